"""find_violation: the first group with too many nonzeros."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, FLOATS, TINY, VIOLATING, Violating, tensor
from engines import Engine
from properties import Weight, for_any, weights
from samples import lay_out

import nmsparse_ext as nms
from nmsparse_ext.ops import Violation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VIOLATING, ids=lambda case: case.name)
def test_truth_table(engine: Engine, case: Violating, dtype: torch.dtype) -> None:
    found = nms.find_violation(tensor(case.w, dtype), case.pattern, dim=case.dim, remainder="pad")
    assert found == case.expected


def test_result_has_names(engine: Engine) -> None:
    found = nms.find_violation(torch.ones(2, 4), "2:4")
    assert isinstance(found, Violation)
    assert found.index == (0, 0)
    assert found.kept == 4


@for_any(case=weights())
def test_equals_counting(engine: Engine, case: Weight) -> None:
    found = nms.find_violation(case.w, case.pattern, dim=case.dim, remainder="pad")
    nonzero = case.last(case.w).to(torch.float64) != 0
    expected = None
    rows = nonzero.reshape(-1, case.k) if nonzero.numel() else nonzero.new_empty(0, 0)
    for r, row in enumerate(rows):
        for start in range(0, case.k, case.m):
            count = int(row[start : start + case.m].sum())
            if count > case.n and expected is None:
                index = (
                    list(torch.unravel_index(torch.tensor(r), nonzero.shape[:-1])) if case.w.dim() > 1 else []
                )
                index = [int(i) for i in index]
                index.insert(case.dim, start)
                expected = (tuple(index), count)
    assert found == expected, case.label


@for_any(case=weights())
def test_pruned_weights_satisfy_their_pattern(engine: Engine, case: Weight) -> None:
    pruned = nms.nm_prune(case.w, case.pattern, dim=case.dim, remainder="pad")
    assert nms.find_violation(pruned, case.pattern, dim=case.dim, remainder="pad") is None, case.label


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_denormals_and_nan_are_nonzero(engine: Engine, dtype: torch.dtype) -> None:
    for value in (TINY[dtype], -TINY[dtype], float("nan"), float("inf")):
        w = tensor([value, -0.0, value, 0.0], dtype)
        assert nms.find_violation(w, "1:4") == ((0,), 2)
        assert nms.find_violation(w, "2:4") is None


def test_large_weight_with_one_violation(engine: Engine) -> None:
    w = nms.nm_prune(torch.randn(300, 1024), "2:4")
    w[217, 512:516] = 1.0
    w[299] = 1.0
    assert nms.find_violation(w, "2:4") == ((217, 512), 4)
    assert nms.find_violation(w.T, "2:4", dim=0) == ((512, 217), 4)
    assert nms.find_violation(lay_out(w, "every second"), "2:4") == ((217, 512), 4)


def test_flat_grouping_gives_coordinates_of_the_weight(engine: Engine) -> None:
    w = torch.zeros(2, 3, 2, 2)
    w[1, 0, 1, 0] = w[1, 0, 1, 1] = w[1, 0, 0, 1] = 1.0
    assert nms.find_violation(w, "2:4", grouping="flat") == ((1, 0, 0, 0), 3)
    channels_last = w.contiguous(memory_format=torch.channels_last)
    assert nms.find_violation(channels_last, "2:4", grouping="flat") == ((1, 0, 0, 0), 3)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (4, 0), (2, 8, 0)])
def test_empty(engine: Engine, shape: tuple[int, ...]) -> None:
    assert nms.find_violation(torch.empty(shape), "2:4") is None
