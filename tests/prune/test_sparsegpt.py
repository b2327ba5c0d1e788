"""SparseGPT against its definition, solved anew for every column, and against least squares."""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from engines import Engine
from properties import for_any, integers, kept_by_hand
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext.prune.sparsegpt import blocks, inverse_factor, prune_matrix


class Case(NamedTuple):
    matrix: Tensor
    moment: Tensor
    pattern: str
    segment: int


def cases(random: Random) -> Case:
    """Small layers with correlated inputs; segments with and without a remainder."""
    m = random.randint(1, 6)
    segment, segments = random.randint(1, 9), random.randint(1, 3)
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    inputs = segment * segments
    x = torch.randn(3 * inputs + 5, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    matrix = torch.randn(random.randint(1, 4), inputs, generator=generator, dtype=torch.float64)
    return Case(matrix, x.T @ x / len(x), f"{random.randint(1, m)}:{m}", segment)


def by_definition(case: Case, dampening: float) -> Tensor:
    """Column by column: the cheapest of each group go, all later columns are solved for."""
    pattern = nms.Pattern.parse(case.pattern)
    inputs = case.matrix.shape[1]
    damped = case.moment + dampening * case.moment.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    rows = []
    for row in case.matrix.clone():
        kept = [True] * inputs
        for i in range(inputs):
            base = i // case.segment * case.segment
            if (i - base) % pattern.m == 0:
                end = min(i + pattern.m, base + case.segment)
                # Costs of j with all columns before j fixed.
                costs = [float(row[j] ** 2 / damped[j:, j:].inverse()[0, 0]) for j in range(i, end)]
                kept[i:end] = kept_by_hand(costs, pattern.n, pattern.m)
            if not kept[i]:
                # min over d of [-w, d]^T H [-w, d] with H of what is left
                gone = row[i].clone()
                row[i] = 0
                row[i + 1 :] += torch.linalg.solve(damped[i + 1 :, i + 1 :], damped[i + 1 :, i] * gone)
        rows.append(row)
    return torch.stack(rows)


@for_any(case=cases, columns=integers(1, 12))
def test_equals_its_definition(case: Case, columns: int) -> None:
    for dampening in (0.01, 1.0):
        pruned = prune_matrix(
            case.matrix,
            case.moment,
            nms.Pattern.parse(case.pattern),
            segment=case.segment,
            dampening=dampening,
            columns=columns,
        )
        torch.testing.assert_close(pruned, by_definition(case, dampening), rtol=1e-6, atol=1e-8)


def test_equals_least_squares_where_all_that_goes_comes_first() -> None:
    """Then every weight that stays may still change, and nothing is better than the best fit."""
    torch.manual_seed(0)
    x = torch.randn(40, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    matrix = torch.tensor([[0.01, -0.02, 3.0, 2.0], [0.03, 0.01, -2.0, 5.0]], dtype=torch.float64)
    pruned = prune_matrix(matrix, x.T @ x / 40, nms.Pattern(2, 4), dampening=0.0)
    best = torch.linalg.lstsq(x[:, 2:], x @ matrix.T).solution.T
    assert torch.equal(pruned[:, :2], torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(pruned[:, 2:], best)


def test_matrix_is_not_changed() -> None:
    for matrix in (torch.randn(8, 12), torch.randn(12, 8).T):
        before = matrix.clone()
        prune_matrix(matrix, torch.eye(12), nms.Pattern(2, 4))
        assert torch.equal(matrix, before)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:5", "1:16"])
def test_identity_is_magnitude(pattern: str, engine: Engine) -> None:
    matrix = torch.randn(8, 48).round(decimals=1)  # with ties
    pruned = prune_matrix(matrix, 3.0 * torch.eye(48), nms.Pattern.parse(pattern), dampening=0.0)
    assert torch.equal(pruned, nms.nm_prune(matrix, pattern, remainder="pad"))


def test_engines_agree(compiled_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from nmsparse_ext import ops, reference

    x = torch.randn(100, 64)
    arguments: Any = (torch.randn(16, 64), x.T @ x / 100, nms.Pattern(2, 8))
    pruned = prune_matrix(*arguments)
    monkeypatch.setattr(ops, "_nms", reference)
    assert torch.equal(pruned, prune_matrix(*arguments))


def test_inputs_that_are_never_there() -> None:
    """Their weights go first, and the others do not change for it."""
    x = torch.randn(50, 8)
    x[:, [0, 3, 5, 6]] = 0
    matrix = torch.randn(4, 8).sign() * (1 + torch.rand(4, 8))
    pruned = prune_matrix(matrix, x.T @ x / 50, nms.Pattern(2, 4))
    expected = matrix.clone()
    expected[:, [0, 3, 5, 6]] = 0
    torch.testing.assert_close(pruned, expected)
    nothing = prune_matrix(matrix, torch.zeros(8, 8), nms.Pattern(2, 4))
    assert torch.equal(nothing, nms.nm_prune(matrix, "2:4"))


def test_singular_moments_are_dampened_more_or_refused() -> None:
    x = torch.randn(3, 32)
    moment = x.T @ x / 3
    factor = inverse_factor(moment, 0.0)
    assert torch.isfinite(factor).all()
    with pytest.raises(ValueError, match=r"singular with dampening=0\.01"):
        inverse_factor(torch.tensor([[1.0, 1e4], [1e4, 1.0]]), 0.01)  # no moments of anything
    moment[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        inverse_factor(moment, 0.01)


@for_any(m=integers(1, 20), segment=integers(1, 50), segments=integers(1, 4), columns=integers(1, 60))
def test_blocks_end_where_groups_do(m: int, segment: int, segments: int, columns: int) -> None:
    inputs = segment * segments
    ends = {
        base + min(end, segment) for base in range(0, inputs, segment) for end in range(m, segment + m, m)
    }
    found = blocks(inputs, m, segment, columns)
    assert [first for first, _ in found] == [0, *[last for _, last in found[:-1]]]
    assert found[-1][1] == inputs
    assert {last for _, last in found} <= ends
    assert all(last - first <= max(m, columns) for first, last in found)
