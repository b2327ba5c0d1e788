"""measure_latency: what is measured, what is looked up, and what a pattern counts for."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import nmsparse_ext as nms
from nmsparse_ext.deploy.plan import Seconds
from nmsparse_ext.search import Budget, Constraints, Costs, LatencyTable, find_candidates, measure_latency
from nmsparse_ext.search import latency as module_under_test
from nmsparse_ext.search.latency import _between

P = nms.Pattern


class Clock:
    """Stands in for `time_layer`: tokens x weights kept, in nanoseconds; dense takes half of that."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str]]] = []
        self.refuses: type[nn.Module] | tuple = ()

    def __call__(self, caller, module, attr, packed, args, kwargs, *, dtype=None, flush=None):
        self.calls.append((type(caller).__name__, list(packed)))
        if packed and isinstance(caller, self.refuses):
            raise NotImplementedError("it will not")
        size = module._parameters[attr].numel() * args[0].numel() // args[0].shape[-1] * 1e-9
        times = {name: P.parse(name).density * 2 * size for name in packed}
        return {
            name: Seconds(size, 0.0, size, times.get(name, size), times.get(name, size))
            for name in ("dense", *packed)
        }


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module_under_test, "time_layer", clock)
    return clock


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 10))


def test_a_pattern_that_is_no_faster_counts_as_dense():
    table = LatencyTable({"w": {"dense": 1.0, "2:4": 0.99, "1:4": 0.5, "8:16": 1.5}})
    assert table("w", None) == table("w", P(4, 4)) == 1.0
    assert table("w", P(2, 4)) == 1.0  # within the noise
    assert table("w", P(1, 4)) == 0.5
    assert table("w", P(8, 16)) == 1.0
    with pytest.raises(ValueError, match="w with 1:8 was not measured"):
        table("w", P(1, 8))
    with pytest.raises(ValueError, match="v was not measured"):
        table("v", None)


def test_equal_layers_are_timed_once(clock, tmp_path):
    net = model()
    file = tmp_path / "cache" / "latency.json"
    found = find_candidates(net)
    table = measure_latency(net, torch.randn(5, 16), found, cache=file)
    assert clock.calls == [("Linear", ["8:16", "4:16", "2:16", "1:16"])] * 3  # two are alike
    assert table("1.weight", None) == table("2.weight", None) == pytest.approx(5 * 1024e-9)
    assert table("1.weight", P(2, 16)) == pytest.approx(5 * 256e-9)
    assert table("1.weight", P(8, 16)) == pytest.approx(5 * 1024e-9)  # as fast as dense: no gain
    again = measure_latency(net, torch.randn(5, 16), found, cache=file)
    assert again.times == table.times
    assert len(clock.calls) == 3  # from the file


def test_new_patterns_threads_and_dtypes_are_measured_anew(clock, tmp_path):
    net, file = model(), tmp_path / "latency.json"
    measure_latency(net, torch.randn(5, 16), find_candidates(net), cache=file)
    measure_latency(net, torch.randn(5, 16), find_candidates(net, candidates=["2:4", "4:4"]), cache=file)
    assert clock.calls[3:] == [("Linear", ["2:4"])] * 3
    measure_latency(net, torch.randn(5, 16), find_candidates(net), cache=file)
    assert len(clock.calls) == 6  # the old ones are still there
    net.to(torch.bfloat16)
    measure_latency(net, torch.randn(5, 16).bfloat16(), find_candidates(net), cache=file)
    assert len(clock.calls) == 9
    (machine,) = json.loads(file.read_text())
    assert str(torch.get_num_threads()) in machine


def test_token_counts_between_measured_ones_are_interpolated(clock, tmp_path):
    net, file = model(), tmp_path / "latency.json"
    found = find_candidates(net)
    for tokens in (4, 8):
        measure_latency(net, torch.randn(tokens, 16), found, cache=file)
    table = measure_latency(net, torch.randn(2, 3, 16), found, cache=file)
    assert len(clock.calls) == 6
    assert table("0.weight", P(1, 16)) == pytest.approx(6 * 64e-9)
    measure_latency(net, torch.randn(16, 16), found, cache=file)  # outside
    assert len(clock.calls) == 9
    measure_latency(net, torch.randn(100, 16), found, cache=file)
    measure_latency(net, torch.randn(20, 16), found, cache=file)  # too wide a gap
    assert len(clock.calls) == 15


def test_line_between_points():
    assert _between([(2, 1.0), (4, 3.0)], 3) == 2.0
    assert _between([(2, 1.0), (4, 3.0)], 2) == 1.0
    assert _between([(2, 1.0), (4, 3.0)], 5) is None
    assert _between([(2, 1.0), (4, 3.0)], 1) is None
    assert _between([(2, 1.0), (40, 3.0)], 5) is None
    assert _between([], 5) is None


def test_damaged_cache_is_an_empty_one(clock, tmp_path):
    file = tmp_path / "latency.json"
    for text in ("{", "[]"):
        file.write_text(text)
        measure_latency(model(), torch.randn(5, 16), find_candidates(model()), cache=file)
    assert len(clock.calls) == 6


def test_default_cache_folder(clock, tmp_path, monkeypatch):
    monkeypatch.setenv("NMSPARSE_CACHE", str(tmp_path / "here"))
    measure_latency(model(), torch.randn(5, 16), find_candidates(model()))
    assert (tmp_path / "here" / "latency.json").exists()
    monkeypatch.delenv("NMSPARSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert module_under_test.cache_folder() == tmp_path / "nmsparse"
    measure_latency(model(), torch.randn(5, 16), find_candidates(model()), cache=False)
    assert not (tmp_path / "nmsparse").exists()


def test_layers_called_twice_never_or_densely(clock):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.never, self.skipped = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.skipped(self.twice(self.twice(x)))

    net = Net()
    found = find_candidates(net, skip=["skipped"])
    table = measure_latency(net, torch.randn(2, 16), found, cache=False)
    assert table("twice.weight", None) == pytest.approx(2 * 2 * 256e-9)
    assert table("twice.weight", P(1, 16)) == pytest.approx(2 * 2 * 32e-9)
    assert table("never.weight", None) == table("never.weight", P(1, 16)) == 0
    assert table("skipped.weight", None) == pytest.approx(2 * 256e-9)
    with pytest.raises(ValueError, match="not measured"):
        table("skipped.weight", P(1, 16))
    costs = Costs(net, torch.randn(2, 16), candidates=found, latency=table)
    assert costs.dense.latency == pytest.approx(6 * 256e-9)


def test_attention_shares_its_time(clock):
    net = nn.MultiheadAttention(16, 2)
    x = torch.randn(3, 1, 16)
    table = measure_latency(net, (x, x, x), find_candidates(net), cache=False)
    assert [name for name, _ in clock.calls] == ["MultiheadAttention"] * 2
    in_proj, out = 3 * 768e-9, 3 * 256e-9
    assert table("in_proj_weight", None) == pytest.approx(in_proj / 2)
    assert table("in_proj_weight", P(4, 16)) == pytest.approx(max(0, in_proj / 2 - in_proj / 2))
    assert table("out_proj.weight", None) == pytest.approx(out / 2)


def test_what_cannot_run_packed_counts_as_dense(clock):
    net = nn.Sequential(nn.Linear(16, 16), nn.Embedding(32, 16))
    clock.refuses = nn.Linear
    table = measure_latency(net[0], torch.randn(2, 16), find_candidates(net[0]), cache=False)
    assert table("weight", P(1, 16)) == table("weight", None) > 0
    assert clock.calls == [("Linear", ["8:16", "4:16", "2:16", "1:16"]), ("Linear", [])]
    assert table.unpacked == {"weight": "it will not"}
    found = find_candidates(net[1], constraints=Constraints(include=["weight"]))
    table = measure_latency(net[1], torch.zeros(2, dtype=torch.long), found, cache=False)
    assert table("weight", P(1, 16)) == table("weight", None)
    assert "embedding" in table.unpacked["weight"]


def test_real_measurement():
    """The real thing runs: linear, convolution, MHA; whatever it takes."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.fc = nn.Linear(16, 8)

        def forward(self, x):
            x = self.conv(x).flatten(2).mT
            return self.fc(self.attention(x, x, x)[0])

    net = Net()
    x = torch.randn(1, 16, 4, 4)
    before = net(x)
    found = find_candidates(net, candidates=["4:4", "1:4"])
    table = measure_latency(net, x, found, cache=False)
    assert set(table.times) == {
        "conv.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "fc.weight",
    }
    assert all(table(name, None) > 0 for name in found)
    assert all(0 <= table(name, P(1, 4)) <= table(name, None) for name in found)
    torch.testing.assert_close(net(x), before)


def test_allocate_measures_for_a_budget_of_latency(clock, tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    monkeypatch.setenv("NMSPARSE_CACHE", str(tmp_path))
    net = model()
    result = nms.allocate(net, Budget(latency=0.6), example_input=torch.randn(4, 16))
    assert clock.calls
    assert result.costs.latency <= 0.6 * result.dense.latency
    # 8:16 is no faster than dense here, so nothing is pruned to it.
    assert P(8, 16) not in result.scheme.values()
    with pytest.raises(ValueError, match="latency needs an example_input"):
        nms.allocate(net, Budget(latency=0.6))
