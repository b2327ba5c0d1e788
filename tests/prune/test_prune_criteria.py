"""prune_model: what each criterion makes of a layer."""

from __future__ import annotations

import copy
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from engines import Engine
from properties import for_any
from properties import patterns as any_pattern
from prune_samples import CRITERIA, assert_same_state, batches, mlp, state, weights_of
from samples import assert_same_bits
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext import ops, reference


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "3:5"])
def test_magnitude_is_nm_prune(pattern: str, engine: Engine) -> None:
    model = mlp().to(engine.name if engine.name == "cuda" else "cpu")
    expected = {n: nms.nm_prune(p.detach(), pattern, remainder="pad") for n, p in weights_of(model)}
    report = nms.prune_model(model, pattern, remainder="pad")
    for name, parameter in weights_of(model):
        assert_same_bits(parameter.detach(), expected[name], name)
    assert [row.error for row in report] == [None] * 3
    assert all(row.pattern == pattern and 0 < row.kept < 1 for row in report)


def test_wanda_by_hand() -> None:
    model = mlp()
    data = batches()
    first = model[0].weight.detach().clone()
    norms = torch.cat(data).norm(dim=0)
    mask = nms.nm_mask(first.abs() * norms, "2:4")
    nms.prune_model(model, "2:4", criterion="wanda", calibration=data)
    assert_same_bits(model[0].weight.detach(), torch.where(mask, first, 0.0))
    hidden = torch.relu(model[0](torch.cat(data))).detach()  # of what is pruned already
    second = mlp()[2].weight.detach()
    mask = nms.nm_mask(second.abs() * hidden.norm(dim=0), "2:4")
    assert_same_bits(model[2].weight.detach(), torch.where(mask, second, 0.0))


def test_wanda_with_equal_norms_is_magnitude(engine: Engine) -> None:
    device = "cuda" if engine.name == "cuda" else "cpu"
    layer = nn.Linear(16, 8).to(device)
    layer.weight.data = layer.weight.data.mul(8).round()  # ties, too
    expected = nms.nm_prune(layer.weight.detach(), "2:4")
    nms.prune_model(layer, "2:4", criterion="wanda", calibration=[2.0 * torch.eye(16, device=device)])
    assert_same_bits(layer.weight.detach(), expected)


def test_inputs_that_are_never_there_go_by_magnitude() -> None:
    layer = nn.Linear(8, 4)
    x = torch.randn(20, 8)
    x[:, :4] = 0
    expected = nms.nm_prune(layer.weight.detach(), "1:4")[:, :4].clone()
    nms.prune_model(layer, "1:4", criterion="wanda", calibration=[x])
    assert torch.equal(layer.weight.detach()[:, :4], expected)
    layer = nn.Linear(8, 4)
    expected = nms.nm_prune(layer.weight.detach(), "1:4")
    for criterion in ("wanda", "sparsegpt"):
        other = copy.deepcopy(layer)
        nms.prune_model(other, "1:4", criterion=criterion, calibration=[torch.zeros(3, 8)])
        assert torch.equal(other.weight.detach(), expected)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_engines_give_the_same_bits(
    criterion: Any, compiled_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = "cuda" if compiled_engine.name == "cuda" else "cpu"
    model, data = mlp().to(device), [batch.to(device) for batch in batches()]
    other = copy.deepcopy(model)
    scheme = {"0": "2:4", "2": "3:8", "4": "1:16"}
    nms.prune_model(model, scheme, criterion=criterion, calibration=data)
    monkeypatch.setattr(ops, "_nms", reference)
    nms.prune_model(other, scheme, criterion=criterion, calibration=data)
    assert_same_state(model, state(other))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8"])
def test_sparsegpt_changes_outputs_least(pattern: str) -> None:
    data = batches()
    x = torch.cat(data)
    errors = []
    for criterion in ("sparsegpt", "wanda", "magnitude"):
        model = mlp()
        with torch.no_grad():
            before = x @ model[0].weight.T
        report = nms.prune_model(model, pattern, criterion=criterion, calibration=data)
        with torch.no_grad():
            error = (x @ model[0].weight.T - before).norm() / before.norm()
        assert report[0].error == pytest.approx(float(error), rel=1e-3)
        assert nms.find_violation(model[2].weight.detach(), pattern) is None
        errors.append(report[0].error)
    assert errors[0] < min(errors[1:])


class Layer(NamedTuple):
    """Any layer, with a pattern for it and something to call it with."""

    layer: nn.Module
    pattern: nms.Pattern
    x: Tensor


def layers(random: Random) -> Layer:
    n, m = any_pattern(random)
    seed, inputs, outputs = random.randrange(2**31), random.randint(1, 40), random.randint(1, 5)
    torch.manual_seed(seed)
    layer: nn.Module = nn.Linear(inputs, outputs)
    shape: tuple[int, ...] = (inputs,)
    if random.random() < 0.5:
        layer, shape = nn.Conv1d(inputs, outputs, random.randint(1, 2)), (inputs, 3)
    return Layer(layer, nms.Pattern(n, m), torch.randn(random.randint(2, 60), *shape))


@for_any(case=layers)
def test_any_layer(case: Layer) -> None:
    """The pattern holds, as much is kept as it allows, and Wanda's weights keep their bits."""
    for criterion in CRITERIA:
        model = copy.deepcopy(case.layer)
        before = model.weight.detach().clone()
        report = nms.prune_model(
            model,
            {"weight": case.pattern},
            criterion=criterion,  # type: ignore[arg-type]
            calibration=[case.x],
            remainder="pad",
        )
        after = model.weight.detach()
        assert nms.find_violation(after, case.pattern, remainder="pad") is None
        if case.pattern.is_dense:
            assert report.pruned == ()
            continue
        kept = case.pattern.kept(after.shape[1])
        assert bool((after.count_nonzero(dim=1) == kept).all())
        if criterion != "sparsegpt":
            assert torch.equal(after, torch.where(after != 0, before, 0.0))


def test_wrapped_models() -> None:
    expected = mlp()
    nms.prune_model(expected, "2:4", criterion="sparsegpt", calibration=batches())
    for wrap in (torch.compile, lambda model: torch.optim.swa_utils.AveragedModel(model)):
        model = wrap(mlp())
        report = nms.prune_model(
            model, {"0": "2:4", "2": "2:4", "4": "2:4"}, criterion="sparsegpt", calibration=batches()
        )
        assert report.pruned == ("0.weight", "2.weight", "4.weight")
        for mine, other in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(mine, other)
