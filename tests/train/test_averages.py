"""Averages of sparse weights: denser than the pattern, and one call that restores it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from train.common import assert_satisfies, mlp, train

import nmsparse_ext as nms
from nmsparse_ext.train import Freeze, Sparsifier

FULL = {"0.weight": "2:4", "2.weight": "2:4"}


def build(**kwargs: object):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    return model, optimizer, Sparsifier(model, optimizer, "2:4", **kwargs)


def averaged(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0, **kwargs: object
):
    average = AveragedModel(model, **kwargs)
    for step in range(start, start + steps):
        train(model, optimizer, 1, start=step)
        average.update_parameters(model)
    return average


@pytest.mark.parametrize("kwargs", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}], ids=["swa", "ema"])
def test_prune_restores_the_pattern(kwargs: dict[str, object]) -> None:
    model, optimizer, sparsifier = build()
    average = averaged(model, optimizer, 6, **kwargs)
    weight = average.module[0].weight.detach().clone()
    assert nms.find_violation(weight, "2:4") is not None
    before = model[0].weight.detach().clone()
    assert sparsifier.prune_(average) is average
    assert torch.equal(average.module[0].weight, nms.nm_prune(weight, "2:4"))
    assert_satisfies(average.module, FULL)
    assert torch.equal(model[0].weight, before)


def test_averages_of_frozen_masks_have_the_pattern_already() -> None:
    model, optimizer, sparsifier = build(schedule=Freeze(after=3))
    train(model, optimizer, 3)
    average = averaged(model, optimizer, 4, start=3)
    before = average.module[0].weight.detach().clone()
    assert_satisfies(average.module, FULL)
    sparsifier.prune_(average)
    assert torch.equal(average.module[0].weight, before)


def test_transposable_patterns_are_restored_as_such() -> None:
    model, optimizer, sparsifier = build(transposable=True)
    average = averaged(model, optimizer, 6)
    sparsifier.prune_(average)
    for dim in (0, 1):
        assert nms.find_violation(average.module[0].weight.detach(), "2:4", dim=dim) is None


def test_an_average_may_be_put_back() -> None:
    """And is then the start of further training, zeros and all."""
    model, optimizer, sparsifier = build()
    average = sparsifier.prune_(averaged(model, optimizer, 6))
    model.load_state_dict(copy.deepcopy(average.module.state_dict()))
    with pytest.warns(UserWarning, match="changed outside"):
        train(model, optimizer, 1)
    assert_satisfies(model, FULL)


def test_works_after_the_end() -> None:
    model, optimizer, sparsifier = build()
    average = averaged(model, optimizer, 6)
    sparsifier.finalize()
    sparsifier.prune_(average)
    assert_satisfies(average.module, FULL)


def test_another_architecture_is_refused() -> None:
    _, _, sparsifier = build()
    with pytest.raises(ValueError, match="0"):
        sparsifier.prune_(nn.Linear(16, 8))
