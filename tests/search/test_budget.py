"""Budget: what may be written, and what it means."""

from __future__ import annotations

import numpy as np
import pytest

from nmsparse_ext.search import Budget
from nmsparse_ext.search.budget import Limit


@pytest.mark.parametrize(
    ("metric", "given", "limit"),
    [
        ("params", 0.125, Limit(0.125, True)),
        ("params", 1.0, Limit(1.0, True)),
        ("params", "0.125", Limit(0.125, True)),
        ("params", "12.5%", Limit(0.125, True)),
        ("params", "100 %", Limit(1.0, True)),
        ("params", 2, Limit(2, False)),
        ("params", 5_000_000, Limit(5e6, False)),
        ("params", "5M", Limit(5e6, False)),
        ("params", np.float32(0.5), Limit(0.5, True)),
        ("params", np.int64(7), Limit(7, False)),
        ("macs", 1.5e9, Limit(1.5e9, False)),
        ("macs", "1.5G", Limit(1.5e9, False)),
        ("macs", "1.5e9", Limit(1.5e9, False)),
        ("bytes", "10MB", Limit(1e7, False)),
        ("bytes", "10 kB", Limit(1e4, False)),
        ("bytes", "2000B", Limit(2000, False)),
        ("latency", 0.5, Limit(0.5, True)),
        ("latency", "50%", Limit(0.5, True)),
        ("latency", "3.5ms", Limit(0.0035, False)),
        ("latency", "850us", Limit(0.00085, False)),
        ("latency", "850 µs", Limit(0.00085, False)),
        ("latency", "1s", Limit(1.0, False)),
    ],
)
def test_values(metric, given, limit):
    found = Budget(**{metric: given}).limits()
    assert list(found) == [metric]
    assert found[metric].relative == limit.relative
    assert found[metric].value == pytest.approx(limit.value, rel=1e-12)


@pytest.mark.parametrize(
    ("metric", "given", "message"),
    [
        ("params", 1, "ambiguous"),
        ("params", "1", "ambiguous"),
        ("params", 0.0, "params must be a fraction"),
        ("params", -0.5, "got -0.5"),
        ("params", float("nan"), "got nan"),
        ("params", float("inf"), "got inf"),
        ("params", "half", "got 'half'"),
        ("params", "1.2.3", "got '1.2.3'"),
        ("params", "120%", "at most 100 %"),
        ("params", "5ms", "got '5ms'"),
        ("macs", "5MB", "got '5MB'"),
        ("latency", 5, "a time such as"),
        ("latency", "5", "a time such as"),
        ("latency", "5M", "a time such as"),
    ],
)
def test_refused(metric, given, message):
    with pytest.raises(ValueError, match=message):
        Budget(**{metric: given})


@pytest.mark.parametrize("given", [True, [0.5], object()])
def test_wrong_type(given):
    with pytest.raises(TypeError, match="params must be"):
        Budget(params=given)


def test_no_limit():
    with pytest.raises(ValueError, match="at least one of params, macs, bytes, latency"):
        Budget()


def test_repr_shows_what_was_given():
    assert repr(Budget(params=0.125, latency="20ms")) == "Budget(params=0.125, latency='20ms')"


def test_parse():
    assert Budget.parse(["params=0.125", "latency = 3ms"]) == Budget(params="0.125", latency="3ms")
    assert Budget.parse({"params": 0.125}) == Budget(params=0.125)
    budget = Budget(macs=0.5)
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["params"], 'look like "params=0.125"'),
        (["size=0.5"], "one of params, macs, bytes, latency, got 'size'"),
        (["params=0.5", "params=0.2"], "params twice"),
        ({"flops": 0.5}, "got 'flops'"),
        ([], "at least one"),
    ],
)
def test_parse_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        Budget.parse(given)


@pytest.mark.parametrize("given", ["params=0.5", 0.5, [0.5]])
def test_parse_wrong_type(given):
    with pytest.raises(TypeError, match="budget"):
        Budget.parse(given)
