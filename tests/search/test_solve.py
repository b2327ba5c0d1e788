"""choose: against trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nmsparse_ext.search.solve import Option, choose

pytest.importorskip("scipy")


def brute_force(items, limits):
    best = None
    for choice in itertools.product(*(range(len(options)) for options in items)):
        picked = [options[j] for options, j in zip(items, choice, strict=True)]
        if all(sum(o.costs[k] for o in picked) <= limits[k] for k in limits):
            loss = sum(o.loss for o in picked)
            best = loss if best is None else min(best, loss)
    return best


@st.composite
def instances(draw):
    metrics = draw(st.sampled_from([("params",), ("params", "macs"), ("params", "bytes", "latency")]))
    scale = draw(st.sampled_from([1.0, 1e-9, 1e9]))
    cost = st.integers(0, 30)
    items = [
        [
            Option(scale * draw(st.integers(0, 40)) / 4, {k: draw(cost) for k in metrics})
            for _ in range(draw(st.integers(1, 4)))
        ]
        for _ in range(draw(st.integers(1, 5)))
    ]
    return items, {k: draw(st.integers(1, 30 * len(items))) for k in metrics}


@settings(deadline=None, max_examples=150)
@given(instances())
def test_equals_brute_force(instance):
    items, limits = instance
    best = brute_force(items, limits)
    if best is None:
        with pytest.raises(ValueError, match="budget of"):
            choose(items, limits)
        return
    found = choose(items, limits)
    assert found.loss == pytest.approx(best, rel=1e-6, abs=1e-300)
    assert found.bound <= best * (1 + 1e-6)
    assert found.gap <= 1e-6
    for k in limits:
        assert sum(o[j].costs[k] for o, j in zip(items, found.chosen, strict=True)) <= limits[k]


@settings(deadline=None, max_examples=20)
@given(instances())
def test_early_stop_has_an_honest_gap(instance):
    items, limits = instance
    best = brute_force(items, limits)
    assume(best is not None)
    found = choose(items, limits, max_gap=0.5)
    assert found.bound <= best * (1 + 1e-6)
    assert best <= found.loss * (1 + 1e-9)
    assert found.loss * (1 - found.gap) == pytest.approx(found.bound, rel=1e-6, abs=1e-300)


def test_without_pressure_the_least_loss_at_the_least_cost():
    items = [[Option(0, {"params": 10}), Option(0, {"params": 4}), Option(1, {"params": 1})]]
    found = choose(items, {"params": 20})
    assert (found.chosen, found.loss, found.gap) == ([1], 0, 0)


def test_a_metric_that_nothing_costs_binds_nothing():
    options = [Option(0, {"params": 4, "latency": 0.0}), Option(1, {"params": 1, "latency": 0.0})]
    found = choose([options, options], {"params": 5, "latency": 0.0})
    assert found.loss == 1


def test_many_equal_items():
    """Branching over what is all the same must not take forever."""
    option = [Option(loss, {"params": cost}) for loss, cost in ((0, 16), (1, 8), (3, 4), (7, 2), (12, 1))]
    found = choose([option] * 200, {"params": 200 * 16 * 0.3}, max_gap=1e-6)
    assert found.gap < 1e-4
