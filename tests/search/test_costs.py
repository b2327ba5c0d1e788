"""Costs: params, MACs, bytes and latency of weights and schemes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nmsparse_ext as nms
from nmsparse_ext.search import Budget, Cost, Costs, find_candidates

P = nms.Pattern


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 32, (3, 1), stride=(2, 1))
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        return self.fc(self.conv(self.first(x)).mean((2, 3)))


X = torch.randn(2, 3, 9, 5)  # not square


def seconds(name: str, pattern: P | None) -> float:
    return 1e-3 if pattern is None else 1e-3 * pattern.density


def test_agrees_with_summary():
    model = Net()
    costs = Costs(model, X)
    scheme = {"conv": P(2, 16), "fc.weight": P(1, 4)}
    rows = {row.name: row for row in nms.summary(model, scheme, X)}
    assert costs.names == tuple(rows)
    for name, row in rows.items():
        pattern = None if row.pattern is None else P.parse(row.pattern)
        assert costs.of(name, pattern) == Cost(row.kept, row.kept_macs, row.bytes, None)
    total = costs.total(scheme)
    assert total.params == 432 + 1536 // 8 + 320 // 4
    assert total.macs == 2 * (9 * 5 * 432 + 4 * 5 * 192 + 80)
    assert total.bytes == sum(row.bytes for row in rows.values())


def test_dense_patterns_are_dense():
    costs = Costs(Net())
    assert costs.of("fc", P(4, 4)) == costs.of("fc.weight") == Cost(320, None, 1280, None)
    assert costs.total({"fc": P(16, 16)}) == costs.dense == costs.total({})


def test_limits():
    costs = Costs(Net(), X, latency=seconds)
    found = costs.limits(Budget(params=0.5, macs=1000, bytes="1kB", latency="2ms"))
    assert found == {"params": 0.5 * costs.dense.params, "macs": 1000, "bytes": 1000, "latency": 0.002}
    assert costs.dense.latency == pytest.approx(3e-3)


def test_within_counts_what_is_not_named_as_dense():
    costs = Costs(Net())
    everything = {"conv": P(2, 16), "fc": P(2, 16)}
    share = costs.shares(everything)["params"]
    assert share == (432 + (1536 + 320) / 8) / costs.dense.params
    assert costs.within(everything, Budget(params=share))
    assert not costs.within({"conv": P(2, 16)}, Budget(params=share))
    assert costs.within(everything, costs.limits(Budget(params=share)))
    assert not costs.within(everything, {"params": costs.total(everything).params - 1})


def test_unmeasured_metrics_are_refused():
    costs = Costs(Net())
    with pytest.raises(ValueError, match="macs needs an example_input"):
        costs.limits(Budget(macs=0.5))
    with pytest.raises(ValueError, match="latency needs"):
        costs.limits(Budget(latency=0.5))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="nothing is no weight"):
        Costs(Net()).total({"nothing": P(2, 4)})


def test_check_says_what_is_in_the_way():
    model = Net()
    candidates = find_candidates(model, skip=["fc"])
    costs = Costs(model, X, candidates=candidates)
    least = 432 + 320 + 1536 // 16
    costs.check(candidates, {"params": least})
    with pytest.raises(ValueError, match="budget of params is 847") as error:
        costs.check(candidates, {"params": least - 1})
    assert "leave 848 of 2,288, 752 of it in weights that stay dense" in str(error.value)
    assert "fc.weight: skipped by 'fc'" in str(error.value)


def test_embeddings_count_only_if_they_are_searched():
    from nmsparse_ext.search import Constraints

    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64, bias=False))
    assert Costs(model).names == ("1.weight",)
    candidates = find_candidates(model, constraints=Constraints(include=["0", "1"]))
    assert Costs(model, candidates=candidates).names == ("1.weight", "0.weight")
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="no weight to search"):
        find_candidates(model)
    tied = find_candidates(model, constraints=Constraints(include=["1"]))
    costs = Costs(model, torch.zeros(3, dtype=torch.long), candidates=tied)
    assert costs.names == ("0.weight",)
    assert costs.of("1") == Cost(2048, 3 * 2048, 8192, None)


def test_unknown_macs_are_left_out():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16))

        def forward(self, x):
            return x @ self.w.T

    nms.scheme.register_module(Own, {"w": 1})
    model = nn.Sequential(nn.Linear(16, 16), Own())
    costs = Costs(model, torch.randn(2, 16))
    assert costs.unknown_macs == ("1.w",)
    assert costs.dense.macs == 2 * 256
    assert costs.dense.params == 512
