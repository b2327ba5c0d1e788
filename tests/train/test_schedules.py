"""The schedules that come with the library, alone and added up, with every method and a mixed scheme."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from train.common import assert_satisfies, mlp, train

import nmsparse_ext as nms
from nmsparse_ext import Pattern
from nmsparse_ext.train import (
    DecayingMask,
    DenseTail,
    DenseWarmup,
    Freeze,
    Gradual,
    RefreshEvery,
    Schedule,
    Sparsifier,
)

SCHEME = {"0": "2:8", "2": "2:4"}
FULL = {"0.weight": "2:8", "2.weight": "2:4"}
METHODS = ["sr-ste", "ste", "static"]


def adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=0.05)


def build(schedule: Schedule, method: str = "sr-ste", seed: int = 0):
    model = mlp(seed=seed)
    optimizer = adam(model)
    return (
        model,
        optimizer,
        Sparsifier(model, optimizer, SCHEME, method=method, schedule=schedule, lambda_w=0.05),
    )


def path(schedule: Schedule, final: str, steps: int) -> list[str]:
    return [str(Pattern.parse(schedule.pattern(s, "w", Pattern.parse(final)))) for s in range(steps)]


class TestPatterns:
    def test_dense_warm_up(self) -> None:
        assert path(DenseWarmup(2), "2:4", 4) == ["4:4", "4:4", "2:4", "2:4"]

    def test_linear(self) -> None:
        assert path(Gradual(4), "2:4", 6) == ["4:4", "4:4", "3:4", "3:4", "2:4", "2:4"]
        assert path(Gradual(14), "2:16", 15) == [f"{n}:16" for n in range(16, 1, -1)]

    def test_halving(self) -> None:
        schedule = Gradual(3, path="halving")
        assert path(schedule, "2:16", 5) == ["16:16", "8:16", "4:16", "2:16", "2:16"]
        assert path(schedule, "3:16", 4) == ["16:16", "8:16", "4:16", "3:16"]
        assert path(schedule, "4:4", 4) == ["4:4"] * 4

    def test_cubic(self) -> None:
        assert path(Gradual(4, path="cubic"), "2:16", 5) == ["16:16", "8:16", "4:16", "3:16", "2:16"]

    def test_phases_take_turns(self) -> None:
        schedule = DenseWarmup(2) + Gradual(2)
        assert path(schedule, "2:4", 6) == ["4:4", "4:4", "4:4", "3:4", "2:4", "2:4"]
        assert (DenseWarmup(1) + DenseWarmup(1)).pattern(1, "w", Pattern(2, 4)) == Pattern(4, 4)

    def test_dense_tail(self) -> None:
        schedule = DenseWarmup(1) + DenseTail(after=3)
        assert path(schedule, "2:4", 5) == ["4:4", "2:4", "2:4", "4:4", "4:4"]
        assert [schedule.ends_dense(step) for step in (2, 3)] == [False, True]

    def test_renewal(self) -> None:
        schedule = DenseWarmup(1) + RefreshEvery(2) + Freeze(after=5)
        assert [schedule.renews(step) for step in range(8)] == [True, False] * 3 + [False] * 2

    def test_shares(self) -> None:
        schedule = DenseWarmup(2) + DecayingMask(4)
        assert [schedule.share(step) for step in range(8)] == [0, 0, 1, 0.75, 0.5, 0.25, 0, 0]
        assert DecayingMask(2, power=2).share(1) == 0.25

    def test_reprs_and_sums_of_sums(self) -> None:
        schedule = DenseWarmup(1) + (Gradual(2) + Freeze(after=3))
        assert repr(schedule) == "DenseWarmup(steps=1) + Gradual(steps=2, path='linear') + Freeze(after=3)"
        with pytest.raises(TypeError):
            schedule + (lambda step, name, final: final)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: DenseWarmup(-1), ValueError, "steps must be 0 or more, got -1"),
        (lambda: DenseWarmup(1.5), TypeError, "steps must be an int, got 1.5"),
        (lambda: Gradual(10, path="square"), ValueError, "path must be one of 'linear', 'cubic', 'halving'"),
        (lambda: RefreshEvery(0), ValueError, "k must be 1 or more, got 0"),
        (lambda: Freeze(after=True), TypeError, "after must be an int"),
        (lambda: DenseTail(after=-3), ValueError, "after must be 0 or more"),
        (lambda: DecayingMask(3, power=0), ValueError, "power must be above 0"),
        (lambda: DecayingMask(3, power="2"), TypeError, "power must be a number"),
    ],
)
def test_wrong_arguments(make, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


SCHEDULES = {
    "warm-up": DenseWarmup(3),
    "gradual": Gradual(6),
    "warm-up, halving": DenseWarmup(2) + Gradual(4, path="halving"),
    "refresh": RefreshEvery(3),
    "freeze": Freeze(after=3),
    "decaying": DenseWarmup(1) + DecayingMask(5),
    "tail": DenseTail(after=4),
    "all": DenseWarmup(1)
    + Gradual(3)
    + DecayingMask(3)
    + RefreshEvery(2)
    + Freeze(after=6)
    + DenseTail(after=7),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stop", [2, 5])
def test_resumes_in_the_middle(name: str, method: str, stop: int) -> None:
    schedule = SCHEDULES[name]
    model, optimizer, sparsifier = build(schedule, method)
    train(model, optimizer, stop)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    losses = train(model, optimizer, 5, start=stop)
    other, resumed, again = build(schedule, method, seed=7)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert train(other, resumed, 5, start=stop) == losses
    for weight in sparsifier.masks:
        assert torch.equal(again.dense_weight(weight), sparsifier.dense_weight(weight))
        assert torch.equal(again.masks[weight], sparsifier.masks[weight])
        assert torch.equal(other.get_parameter(weight), model.get_parameter(weight))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_follows_its_patterns(name: str, method: str) -> None:
    schedule = SCHEDULES[name]
    model, optimizer, sparsifier = build(schedule, method)
    for step in range(9):
        if step:
            train(model, optimizer, 1, start=step)
        for weight in sparsifier.masks:
            pattern = Pattern.parse(schedule.pattern(step, weight, sparsifier.scheme[weight]))
            assert sparsifier.patterns[weight] == pattern
            assert sparsifier.masks[weight].double().mean() == pattern.density
            parameter, dense = model.get_parameter(weight).detach(), sparsifier.dense_weight(weight)
            share = schedule.share(step)
            expected = torch.where(sparsifier.masks[weight], dense, share * dense)
            torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=0)
    sparsifier.finalize()
    if not schedule.ends_dense(8):
        assert_satisfies(model, FULL)


def test_the_phases_of_a_mixed_scheme_end_together() -> None:
    model, optimizer, sparsifier = build(DenseWarmup(2) + Gradual(6))
    train(model, optimizer, 7)
    assert {str(p) for p in sparsifier.patterns.values()} == {"3:8", "3:4"}
    train(model, optimizer, 1, start=7)
    assert_satisfies(model, FULL)


def test_a_warm_up_trains_densely() -> None:
    twin = mlp()
    expected = train(twin, adam(twin), 3)
    model, optimizer, _ = build(DenseWarmup(3))
    assert train(model, optimizer, 3) == expected
    assert_satisfies(model, FULL)


@pytest.mark.parametrize("method", ["sr-ste", "ste"])
def test_masks_stay_between_refreshes_and_when_frozen(method: str) -> None:
    model, optimizer, sparsifier = build(RefreshEvery(3) + Freeze(after=7), method)
    train(model, optimizer, 10)
    assert [bool(total) for total in sparsifier.history.total] == [s in (3, 6) for s in range(1, 11)]
    # The weights themselves go on.
    before = model[0].weight.detach().clone()
    train(model, optimizer, 1, start=10)
    assert not torch.equal(before, model[0].weight)


def test_a_dense_tail_ends_dense() -> None:
    model, optimizer, sparsifier = build(DenseTail(after=2))
    train(model, optimizer, 1)
    assert_satisfies(model, FULL)
    train(model, optimizer, 3, start=1)
    weight = model[0].weight.detach().clone()
    assert torch.equal(weight, sparsifier.dense_weight("0"))
    sparsifier.finalize()
    assert torch.equal(model[0].weight, weight)
    assert nms.find_violation(weight, "2:8") is not None


def test_a_run_that_stops_early_is_finalized_to_the_scheme() -> None:
    model, optimizer, sparsifier = build(Gradual(100) + DenseTail(after=200))
    train(model, optimizer, 2)
    sparsifier.finalize()
    assert_satisfies(model, FULL)


def test_own_schedules_add_up_too() -> None:
    class EvenSteps(Schedule):
        def renews(self, step: int) -> bool:
            return step % 2 == 0

    model, optimizer, sparsifier = build(DenseWarmup(1) + EvenSteps())
    train(model, optimizer, 4)
    assert [bool(total) for total in sparsifier.history.total] == [True, True, False, True]


def test_with_transposable_masks() -> None:
    model = mlp()
    optimizer = adam(model)
    schedule = DenseWarmup(1) + Gradual(2) + RefreshEvery(2)
    Sparsifier(model, optimizer, "2:4", schedule=schedule, transposable=True)
    train(model, optimizer, 5)
    for layer in (model[0], model[2]):
        assert all(nms.find_violation(layer.weight.detach(), "2:4", dim=d) is None for d in (0, 1))
