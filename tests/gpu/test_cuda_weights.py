"""Convolutions, weights of 8 bits, weights of less memory, and packing both ways, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from made_crossovers import decree
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext import _lt_layout as lt
from nmsparse_ext import crossover, cusparselt, engines_cuda, engines_cuda_8bit
from nmsparse_ext._build import extension
from nmsparse_ext.crossover import DENSE, LT, SMALL_BATCH, Problem

pytestmark = [
    pytest.mark.needs_cuda,
    pytest.mark.skipif(
        extension is None or not extension.build_info()["cuda"], reason="this build has no CUDA kernels"
    ),
]

HALF, INT8, FLOAT8 = torch.float16, torch.int8, torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _own_tables(tmp_path: Path) -> Iterator[None]:
    before, path = cusparselt.search_mode(), cusparselt.algorithms_path()
    cusparselt.set_search_mode("file", path=tmp_path / "algorithms.json")
    crossover.set_table(tmp_path / "crossovers.json")
    yield
    crossover.allow_rounded_inputs(False)
    cusparselt.set_search_mode(before, path=path)
    crossover.set_table(None)


def integers(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    """Small ones: their sums are exact in every order."""
    return torch.randint(-2, 3, shape, device="cuda").to(dtype)


def can_lt() -> None:
    if cusparselt.why_not("cuda") is not None:
        pytest.skip(str(cusparselt.why_not("cuda")))


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


# ----------------------------------------------------------------------------------------------- convolutions


@pytest.mark.parametrize("way", [SMALL_BATCH, DENSE, LT])
@pytest.mark.parametrize("stride", [1, 2])
def test_1x1(way: str, stride: int) -> None:
    if way == LT:
        can_lt()
    decree(Problem(device(), HALF, nms.Pattern(2, 4), 64, 128), (32 if way == SMALL_BATCH else 1 << 20, way))
    w = nms.compress(integers(64, 128, 1, 1), "2:4", prune=True)
    assert w.engine == "cuda-conv"
    bias = integers(64)
    for size in (4, 5) if way == SMALL_BATCH else (4, 9, 30):
        x = integers(1, size, size, 128).movedim(-1, 1)
        expected = F.conv2d(x.double(), w.to_dense().double(), bias.double(), stride=stride)
        y = F.conv2d(x, w, bias, stride=stride)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)
        y = F.conv2d(x.contiguous(), w, bias, stride=stride)
        torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("engine", ["cuda-conv", "cuda-packed"])
def test_3x3(channels_last: bool, engine: str) -> None:
    w = nms.compress(integers(64, 32, 3, 3), "2:4", prune=True).with_engine(engine)
    x = integers(2, 32, 14, 14)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    y = F.conv2d(x, w, None, padding=1, stride=2)
    expected = F.conv2d(x.double(), w.to_dense().double(), None, padding=1, stride=2)
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)
    with torch.autocast("cuda", torch.bfloat16):
        y = F.conv2d(x, w, None, padding=1, stride=2)
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-1)


# ------------------------------------------------------------------------------------------ weights of 8 bits


@pytest.mark.parametrize("dtype", [INT8, FLOAT8])
@pytest.mark.parametrize("inputs", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", [SMALL_BATCH, DENSE, LT])
def test_weights_of_8_bits(dtype: torch.dtype, inputs: torch.dtype, way: str) -> None:
    if dtype == FLOAT8 and way == SMALL_BATCH:
        pytest.skip("the small-batch kernel reads int8")
    if way == LT:
        can_lt()
        if dtype == FLOAT8 and torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("this GPU has no float8")
        crossover.allow_rounded_inputs()
    for of in {inputs, torch.bfloat16}:  # by bfloat16 forms are chosen
        problem = Problem(device(), dtype, nms.Pattern(2, 4), 128, 256, of)
        decree(problem, (32 if way == SMALL_BATCH else 1 << 20, way))
    w = nms.compress(nms.nm_prune(integers(128, 256).float(), "2:4").to(dtype), "2:4")
    assert w.engine == {INT8: "cuda-int8", FLOAT8: "cuda-float8"}[dtype]
    assert (w.form_blob.numel() > 0) == (way == LT)
    for tokens in (1, 7, 32) if way == SMALL_BATCH else (1, 40, 1000):
        x, bias = torch.randn(tokens, 256, device="cuda").to(inputs), integers(128, dtype=inputs)
        expected = F.linear(x.double(), w.to_dense().double(), bias.double())
        y = nms.linear(x, w, bias)
        assert y.dtype == inputs
        # Where x is rounded: half a unit of each input, or of the last place of each.
        off = x.double().abs().amax(-1, keepdim=True) / 254 if dtype == INT8 else x.double().abs() / 16 + 1e-3
        bound = F.linear(off.expand_as(x).contiguous(), w.to_dense().double().abs())
        allowed = (bound if way == LT else 0) + 0.02 * expected.abs() + 0.05
        assert ((y.double() - expected).abs() <= allowed).all()
        torch.testing.assert_close(nms.linear(x, w, bias, "silu"), F.silu(y), rtol=2e-2, atol=5e-2)


def test_weights_of_8_bits_are_measured() -> None:
    can_lt()
    crossover.allow_rounded_inputs()
    w = nms.compress(torch.randn(512, 512, device="cuda").half(), "2:4", prune=True).with_engine("cuda-int8")
    w = engines_cuda_8bit.tuned(w, 64)
    found = crossover.measured(engines_cuda_8bit.problem_of(w))
    assert found is not None
    assert set(found.points[64]) == {DENSE, LT}
    x = torch.randn(64, 512, device="cuda").half()
    torch.testing.assert_close(F.linear(x, w), F.linear(x, w.to_dense()), rtol=0.1, atol=1.0)


# -------------------------------------------------------------------------------------------- less memory


def test_without_a_dense_weight() -> None:
    can_lt()
    w = nms.compress(integers(256, 512), "2:4", prune=True).with_engine("cuda-sparse")
    assert engines_cuda.memory(w)["dense"] == 0
    torch.cuda.synchronize()
    for tokens in (1, 32, 33, 500):
        x, bias = integers(tokens, 512), integers(256)
        expected = F.linear(x.double(), w.to_dense().double(), bias.double())
        torch.testing.assert_close(F.linear(x, w, bias).double(), expected, rtol=1e-2, atol=1e-2)


# -------------------------------------------------------------------------------------------- both ways


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_ways_are_what_the_library_makes_of_each(dtype: torch.dtype) -> None:
    can_lt()
    w = torch.randn(256, 512, device="cuda").to(dtype)
    w = torch.where(nms.transposable_mask(w), w, 0)
    both = cusparselt.compress_both_ways(w)
    if both is None:
        pytest.skip("our packer's layouts are not those of this library on this GPU")
    for blob, dense in zip(both, (w, w.T.contiguous()), strict=True):
        assert torch.equal(blob, cusparselt.compress_with_library(dense))
        packed = cusparselt.LtWeight(blob, *dense.shape, dtype)
        x = torch.randn(lt.MULTIPLES[dtype].tokens * 4, dense.shape[1], device="cuda").to(dtype)
        y = cusparselt.multiply(x, packed)
        torch.testing.assert_close(y.double(), x.double() @ dense.double().T, rtol=2e-2, atol=0.5)
