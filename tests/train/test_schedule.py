"""Schedules: a pattern for each step."""

from __future__ import annotations

import copy

import pytest
import torch
from train.common import assert_satisfies, mlp, train

import nmsparse_ext as nms
from nmsparse_ext import Pattern
from nmsparse_ext.train import Sparsifier


class Gradual:
    """4:4 until step 2, 3:4 until step 4, then what the scheme says."""

    def pattern(self, step: int, name: str, final: Pattern) -> Pattern | str:
        return "4:4" if step < 2 else "3:4" if step < 4 else final


def adam(model: torch.nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=0.05)


@pytest.mark.parametrize("as_function", [False, True])
@pytest.mark.parametrize("method", ["sr-ste", "ste", "static"])
def test_masks_follow(method: str, as_function: bool) -> None:
    schedule = Gradual()
    model = mlp()
    optimizer = adam(model)
    sparsifier = Sparsifier(
        model,
        optimizer,
        {"0": "1:4", "2": "2:4"},
        method=method,
        schedule=schedule.pattern if as_function else schedule,
    )
    for step in range(6):
        if step:
            train(model, optimizer, 1, start=step)
        now = {0: "4:4", 1: "4:4", 2: "3:4", 3: "3:4"}.get(step)
        expected = {"0.weight": now or "1:4", "2.weight": now or "2:4"}
        assert {name: str(pattern) for name, pattern in sparsifier.patterns.items()} == expected
        assert_satisfies(model, expected)
        for name, pattern in expected.items():
            assert sparsifier.masks[name].float().mean() == Pattern.parse(pattern).density
    if method == "static":
        assert sparsifier.history["2.weight"] == [0, 8, 0, 8, 0]


def test_dense_training_until_then_is_dense_training() -> None:
    model, twin = mlp(), mlp()
    optimizer, plain = adam(model), adam(twin)
    Sparsifier(model, optimizer, "2:4", schedule=lambda step, name, final: final if step >= 5 else "4:4")
    assert train(model, optimizer, 5) == train(twin, plain, 5)
    assert_satisfies(model, {"0.weight": "2:4"})


def test_finalize_applies_the_scheme() -> None:
    model = mlp()
    optimizer = adam(model)
    sparsifier = Sparsifier(model, optimizer, "2:4", schedule=lambda step, name, final: "4:4")
    train(model, optimizer, 2)
    dense = model[0].weight.detach().clone()
    assert nms.find_violation(dense, "2:4") is not None
    sparsifier.finalize()
    assert torch.equal(model[0].weight, nms.nm_prune(dense, "2:4"))


def test_a_pattern_that_does_not_fit_is_refused_when_it_comes() -> None:
    model = mlp()
    optimizer = adam(model)
    sparsifier = Sparsifier(
        model, optimizer, "2:4", schedule=lambda step, name, final: "3:5" if step == 2 else final
    )
    train(model, optimizer, 1)
    with pytest.raises(
        ValueError, match=r"the schedule gives 0.weight the pattern 3:5 at step 2.*no multiple of 5"
    ):
        train(model, optimizer, 1)
    assert sparsifier.step == 1
    assert_satisfies(model, sparsifier.scheme)


def test_resumes_where_it_was() -> None:
    model = mlp()
    optimizer = adam(model)
    Sparsifier(model, optimizer, "2:4", schedule=Gradual())
    train(model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    losses = train(model, optimizer, 4, start=2)
    other = mlp(seed=7)
    resumed = adam(other)
    again = Sparsifier(other, resumed, "2:4", schedule=Gradual())
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert str(again.patterns["0.weight"]) == "3:4"
    assert train(other, resumed, 4, start=2) == losses
