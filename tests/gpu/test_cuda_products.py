"""The product of few tokens, epilogues, and packing for sparse tensor cores: CUDA against the reference."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from samples import assert_same_bits, content
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext import _lt_layout as lt
from nmsparse_ext import cusparselt, reference
from nmsparse_ext._build import extension
from nmsparse_ext._lt_library import library
from nmsparse_ext._lt_probe import probed_layout

pytestmark = [
    pytest.mark.needs_cuda,
    pytest.mark.skipif(
        extension is None or not extension.build_info()["cuda"], reason="this build has no CUDA kernels"
    ),
]

nmsparse = torch.ops.nmsparse
PATTERNS = (
    "2:4",
    "1:4",
    "1:2",
    "4:8",
    "2:8",
    "1:8",
    "8:16",
    "4:16",
    "2:16",
    "1:16",
    "1:32",
    "3:4",
    "5:7",
    "8:32",
)
SHAPES = ((64, 1024), (7, 130), (1, 4096), (300, 96), (33, 9000))  # ragged, long and short rows
HALVES = (torch.bfloat16, torch.float16)


def packed(pattern: str, rows: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int, int]:
    """A weight of small integers, whose sums are exact in every order."""
    p = nms.Pattern.parse(pattern)
    w = torch.randint(-3, 4, (rows, k)).to(dtype)
    return (*reference.compress(w, p.n, p.m, 1, True), p.n, p.m)


def both(
    x: Tensor, values: Tensor, indices: Tensor, scales: Any, bias: Any, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Results of the GPU and of the reference."""
    arguments = (x, values, indices, scales, bias)
    on_gpu = (None if a is None else a.cuda() for a in arguments)
    return nmsparse.small_batch_linear(*on_gpu, *rest).cpu(), reference.small_batch_linear(*arguments, *rest)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_products(pattern: str) -> None:
    for (rows, k), dtype, int8 in itertools.product(SHAPES, HALVES, (False, True)):
        # Packed once for all tokens: the reference takes longer for that than for the products.
        values, indices, n, m = packed(pattern, rows, k, torch.int8 if int8 else dtype)
        scales = torch.full((rows,), 0.5) if int8 else None
        x = torch.randint(-1, 2, (33, k)).to(dtype)
        expected = reference.small_batch_linear(x, values, indices, scales, None, n, m, k, "none")
        on_gpu = [None if a is None else a.cuda() for a in (x, values, indices, scales)]
        for tokens in (1, 2, 3, 4, 5, 8, 9, 16, 32, 33):
            actual = nmsparse.small_batch_linear(on_gpu[0][:tokens], *on_gpu[1:], None, n, m, k, "none")
            assert torch.equal(actual.cpu(), expected[:tokens]), (tokens, rows, k, dtype, int8)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
def test_bias_and_activation(dtype: torch.dtype, activation: str) -> None:
    values, indices, n, m = packed("2:4", 200, 512, dtype)
    for shape in ((5,), (2, 3), ()):
        x, bias = torch.randn(*shape, 512).to(dtype) / 32, torch.randn(200).to(dtype)
        actual, expected = both(x, values, indices, None, bias, n, m, 512, activation)
        torch.testing.assert_close(actual, expected)


def test_random_weights_are_summed_in_float32() -> None:
    w, x = torch.randn(1024, 4096).half(), torch.randn(8, 4096).half()
    values, indices = reference.compress(w, 2, 4, 1, False)
    exact = x.double() @ reference.decompress(values, indices, 2, 4, 4096, 1).double().T
    y = nmsparse.small_batch_linear(x.cuda(), values.cuda(), indices.cuda(), None, None, 2, 4, 4096, "none")
    assert (y.cpu().double() - exact).abs().max() < 1e-3 * exact.abs().max()


def test_strides_and_offsets() -> None:
    values, indices, n, m = (
        a.cuda() if isinstance(a, Tensor) else a for a in packed("1:4", 48, 256, torch.float16)
    )
    x = torch.randint(-1, 2, (6, 256), device="cuda").half()
    expected = nmsparse.small_batch_linear(x, values, indices, None, None, n, m, 256, "none")
    odd = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(6, 256)
    wide = torch.cat([x, x], 1)[:, :256]
    batch = x.view(1, 6, 256)  # of one, whose stride says nothing of where tokens lie
    views = odd, wide, x.T.contiguous().T, x.view(2, 3, 256), wide.view(2, 3, 256)
    for other in (*views, batch, batch.transpose(0, 1), wide.view(1, 6, 256).transpose(0, 1)):
        y = nmsparse.small_batch_linear(other, values, indices, None, None, n, m, 256, "none")
        assert torch.equal(y.view(6, 48), expected)
    shifted = torch.cat([values.flatten()[:1], values.flatten()])[1:].view_as(values)
    assert torch.equal(
        nmsparse.small_batch_linear(x, shifted, indices, None, None, n, m, 256, "none"), expected
    )


def test_few_rows_are_split_and_every_run_gives_the_same_bits() -> None:
    values, indices, n, m = (
        a.cuda() if isinstance(a, Tensor) else a for a in packed("2:4", 8, 65536, torch.float16)
    )
    values = torch.randn_like(values)
    x = torch.randn(3, 65536, device="cuda").half()
    first = nmsparse.small_batch_linear(x, values, indices, None, None, n, m, 65536, "none")
    for _ in range(20):
        assert torch.equal(
            nmsparse.small_batch_linear(x, values, indices, None, None, n, m, 65536, "none"), first
        )


def test_products_in_a_graph() -> None:
    for rows, k in ((512, 1024), (8, 65536)):  # in one kernel, and in splits
        values, indices, n, m = (
            a.cuda() if isinstance(a, Tensor) else a for a in packed("2:4", rows, k, torch.float16)
        )
        x = torch.zeros(2, k, device="cuda").half()
        arguments = (values, indices, None, None, n, m, k, "none")
        nmsparse.small_batch_linear(x, *arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = nmsparse.small_batch_linear(x, *arguments)
        for _ in range(3):
            x.copy_(torch.randint(-1, 2, (2, k)))
            graph.replay()
            assert torch.equal(y, nmsparse.small_batch_linear(x, *arguments))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_damaged_indices_touch_nothing_else(pattern: str) -> None:
    """compute-sanitizer watches this one in `make gpu`."""
    for rows, k in ((16, 512), (5, 133)):
        values, indices, n, m = packed(pattern, rows, k, torch.float16)
        indices = torch.randint(0, 256, indices.shape, dtype=torch.uint8)
        for tokens in (1, 4, 8):
            x = torch.ones(tokens, k, device="cuda").half()
            nmsparse.small_batch_linear(x, values.cuda(), indices.cuda(), None, None, n, m, k, "none")
    torch.cuda.synchronize()


# -------------------------------------------------------------------------------------------------- epilogue


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
def test_epilogue(dtype: torch.dtype, activation: str) -> None:
    for shape in ((4, 64), (3, 5, 33), (1000, 1024), (0, 8)):
        rows = shape[-1]
        y, bias, scales = torch.randn(shape).to(dtype), torch.randn(rows).to(dtype), torch.rand(rows)
        for s, b in itertools.product((None, scales), (None, bias)):
            expected = reference.epilogue(y, s, b, activation)
            on_gpu = [None if t is None else t.cuda() for t in (y, s, b)]
            torch.testing.assert_close(nmsparse.epilogue(*on_gpu, activation).cpu(), expected)
            strided = on_gpu[0].transpose(0, -1).contiguous().transpose(0, -1)
            for own in (on_gpu[0], strided):
                nmsparse.epilogue_(own, *on_gpu[1:], activation)
                torch.testing.assert_close(own.cpu(), expected)


# --------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, *HALVES, torch.int8, torch.float8_e4m3fn], ids=str
)
def test_transposable_weights_are_packed_both_ways(dtype: torch.dtype) -> None:
    for (rows, cols), kind in itertools.product(
        ((4, 4), (36, 100), (256, 192)), ("normal", "ties", "special")
    ):
        w = content((rows, cols), dtype, kind, seed=rows)
        for given in (w.cuda(), w.cuda().T.contiguous().T):
            actual = nmsparse.transposable_pack(given)
            for a, b in zip(actual, reference.transposable_pack(w), strict=True):
                assert_same_bits(a.cpu(), b, f"{rows}x{cols} {kind}")


@pytest.mark.parametrize("layout", lt.LAYOUTS)
@pytest.mark.parametrize("dtype", lt.MULTIPLES, ids=str)
def test_blobs(layout: str, dtype: torch.dtype) -> None:
    if lt.layout_multiples(layout, dtype) == (0, 0):
        pytest.skip("the layout is of 16-bit weights")
    pattern = lt.hardware_pattern(dtype)
    for shape in ((128, 128), (256, 384)):
        w = content(shape, dtype, "ties", seed=shape[1])
        values, indices = reference.compress(w, pattern.n, pattern.m, 1, False)
        expected = reference.lt_pack(values, indices, shape[1], layout)
        assert torch.equal(nmsparse.lt_prune_pack(w.cuda(), layout).cpu(), expected)
        assert torch.equal(nmsparse.lt_pack(values.cuda(), indices.cuda(), shape[1], layout).cpu(), expected)


@pytest.mark.parametrize("dtype", lt.MULTIPLES, ids=str)
def test_the_probe_decides_who_compresses(dtype: torch.dtype, record_property: Any) -> None:
    if cusparselt.why_not("cuda") is not None:
        pytest.skip(str(cusparselt.why_not("cuda")))
    if dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    device = torch.device("cuda", torch.cuda.current_device())
    layout = probed_layout(device, library()[0] or "", dtype)
    record_property(f"layout of {dtype}", layout or "none of ours")
    w = nms.nm_prune(torch.randint(1, 100, (256, 512), device="cuda").to(dtype), lt.hardware_pattern(dtype))
    if layout is not None:  # else both are the library's, which need not write every byte
        assert torch.equal(cusparselt.compress(w), cusparselt.compress_with_library(w))


def test_an_activation_that_the_library_does_not_fuse() -> None:
    if cusparselt.why_not("cuda") is not None:
        pytest.skip(str(cusparselt.why_not("cuda")))
    w = nms.compress(torch.randn(64, 128, device="cuda").half(), "2:4", prune=True)
    x, bias = torch.randn(16, 128, device="cuda").half(), torch.randn(64, device="cuda").half()
    plain = F.linear(x.float(), w.to_dense().float(), bias.float())
    y = cusparselt.linear(x, cusparselt.pack(w), bias, activation="silu")
    torch.testing.assert_close(y, F.silu(plain).half(), rtol=2e-3, atol=2e-2)
