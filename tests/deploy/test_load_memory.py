"""Loading a packed model takes no dense copy of a packed weight, at any time."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import nn

import nmsparse_ext as nms
from nmsparse_ext.tensor import NMTensor, inner_tensors

SIZE = 2048
DENSE = SIZE * SIZE * 4  # bytes of one weight


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    net = model()
    for layer in net:
        nms.nm_prune_(layer.weight.data, "1:4")
    nms.save_file(net, tmp_path / "model.safetensors", max_shard_size="5MB")
    return tmp_path


class Allocations:
    """Every allocation of PyTorch's CPU allocator, also of what ops take inside, and the highest sum.

    It counts files that it maps as well, at their full size.
    """

    def __init__(self) -> None:
        self.largest = self.peak = 0

    def __enter__(self) -> Allocations:
        gc.collect()
        self.profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self.profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.profile.__exit__(None, None, None)
        held = 0
        events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        assert events
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            self.largest, self.peak = max(self.largest, event.nbytes()), max(self.peak, held)


def test_the_measure_sees_dense_copies(path: Path) -> None:
    weight = nms.load_file(path)["0.weight"]
    with Allocations() as seen:
        weight.to_dense()
    assert seen.largest >= DENSE


def mapped(folder: Path) -> int:
    return sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))


@pytest.mark.parametrize("keep", ["both", "engine"])
def test_load_into_makes_none(path: Path, keep: str) -> None:
    with torch.device("meta"):
        net = model()
    tracemalloc.start()
    try:
        with Allocations() as seen:
            nms.load_into(net, path, keep=keep)
        _, python_peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    engines = [sum(form.nbytes for form in layer.weight.forms()) for layer in net]
    assert all(isinstance(layer.weight, NMTensor) for layer in net)
    # What is made is the form of the engine, if it has one, one weight after the other; the rest is mapped.
    assert seen.largest < DENSE // 2
    assert seen.peak < mapped(path) + sum(engines) + DENSE // 4
    assert python_peak < DENSE // 2
    x = torch.randn(2, SIZE)
    torch.testing.assert_close(net[0](x), nn.functional.linear(x, net[0].weight.to_dense(), net[0].bias))


def test_tensors_of_a_file_are_mapped(path: Path) -> None:
    with Allocations() as seen:
        loaded = nms.load_file(path)
    packed = [t for t in loaded.values() if isinstance(t, NMTensor)]
    forms = sum(t.engine_nbytes for t in packed)
    assert len(packed) == 2
    assert seen.peak < mapped(path) + forms + DENSE // 4
    names = {str(shard) for shard in path.glob("*-of-*.safetensors")}
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    assert {line[-1] for line in maps} == names
    ranges = [tuple(int(part, 16) for part in line[0].split("-")) for line in maps]
    for weight in packed:
        for part in inner_tensors(weight)[:2]:
            assert any(begin <= part.data_ptr() < end for begin, end in ranges)
