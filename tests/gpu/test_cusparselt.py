"""cuSPARSELt on a GPU against the reference on the CPU, and what the host side promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext import _lt_layout as lt
from nmsparse_ext import cusparselt, reference

pytestmark = [
    pytest.mark.needs_cuda,
    pytest.mark.skipif(
        torch.cuda.is_available() and cusparselt.why_not("cuda") is not None,
        reason=str(cusparselt.why_not("cuda")) if torch.cuda.is_available() else "",
    ),
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def dtypes() -> list[torch.dtype]:
    has_float8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    return [dtype for dtype in lt.MULTIPLES if dtype != torch.float8_e4m3fn or has_float8]


def integers(*shape: int, dtype: torch.dtype) -> Tensor:
    """Small ones: their sums are exact in every order."""
    return torch.randint(-2, 3, shape).to(dtype)


def weight(*shape: int, dtype: torch.dtype) -> nms.NMTensor:
    return nms.compress(integers(*shape, dtype=dtype), lt.hardware_pattern(dtype), dim=-1, prune=True)


def both(w: nms.NMTensor, x: Tensor, bias: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Results of the GPU and of the CPU."""
    on_gpu = None if bias is None else bias.cuda()
    mine = cusparselt.linear(x.cuda(), cusparselt.pack(w.cuda()), on_gpu, **options)
    return mine.cpu(), cusparselt.linear(x, cusparselt.pack(w), bias, **options)


@pytest.mark.parametrize("dtype", lt.MULTIPLES)
@pytest.mark.parametrize("tokens", [1, 7, 16, 33, 128, 0])
@pytest.mark.parametrize(("rows", "k"), [(32, 64), (160, 224), (1024, 512)])
def test_products(dtype: torch.dtype, tokens: int, rows: int, k: int) -> None:
    if dtype not in dtypes():
        pytest.skip("this GPU has no float8")
    out = {torch.int8: torch.int32, torch.float8_e4m3fn: torch.float16}.get(dtype, dtype)
    actual, expected = both(weight(rows, k, dtype=dtype), integers(tokens, k, dtype=dtype), out_dtype=out)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", lt.ACTIVATIONS)
def test_epilogues(dtype: torch.dtype, activation: str) -> None:
    w, x, bias = weight(64, 96, dtype=dtype), integers(40, 96, dtype=dtype), integers(64, dtype=dtype)
    actual, expected = both(w, x, bias, alpha=0.5, activation=activation)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("out_dtype", lt.OUT_DTYPES[torch.int8])
def test_int8(out_dtype: torch.dtype) -> None:
    w, x = weight(64, 96, dtype=torch.int8), integers(32, 96, dtype=torch.int8)
    actual, expected = both(w, x, torch.ones(64), alpha=0.25, out_dtype=out_dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0 if out_dtype.is_floating_point else 1)
    scales = torch.linspace(0.5, 2, 64)
    packed = cusparselt.pack(w.cuda())
    y = cusparselt.linear(x.cuda(), packed, scales=scales.cuda(), out_dtype=torch.float16)
    torch.testing.assert_close(y.cpu(), ((x.double() @ w.to_dense().double().T) * scales).half())


def test_random_values_against_dense() -> None:
    w = nms.compress(torch.randn(512, 1024, device="cuda").half(), "2:4", prune=True)
    x = torch.randn(256, 1024, device="cuda").half()
    y = cusparselt.linear(x, cusparselt.pack(w))
    torch.testing.assert_close(y, F.linear(x, w.to_dense()), rtol=2e-3, atol=5e-2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides(dtype: torch.dtype) -> None:
    w = weight(64, 128, dtype=dtype)
    packed, x = cusparselt.pack(w.cuda()), integers(48, 128, dtype=dtype).cuda()
    expected = (x.double() @ w.to_dense().double().T.cuda()).to(dtype)
    wide = x.repeat(1, 2)
    tail = torch.cat([x[:3], x])[3:]
    odd = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(48, 128)
    for other in (x.T.contiguous().T, wide[:, :128], tail, odd, x.view(4, 12, 128)):
        assert torch.equal(cusparselt.linear(other, packed).view(48, 64), expected)
    assert torch.equal(cusparselt.linear(tail[:45], packed), expected[:45])


def test_a_batch_of_weights() -> None:
    actual, expected = both(weight(3, 32, 64, dtype=torch.float16), integers(3, 11, 64, dtype=torch.float16))
    assert torch.equal(actual, expected)


def test_a_call_that_was_made_before_plans_and_allocates_nothing() -> None:
    device = torch.cuda.current_device()
    packed = cusparselt.pack(weight(64, 128, dtype=torch.float16).cuda())
    x = integers(64, 128, dtype=torch.float16).cuda()
    cusparselt.linear(x, packed)

    def counts() -> dict[str, int]:
        return next(one for one in cusparselt.statistics() if one["device"] == device)

    before = counts()
    for _ in range(10):
        cusparselt.linear(x, packed)
    after = counts()
    assert after["hits"] - before["hits"] == 10
    assert after["misses"] == before["misses"]
    assert after["workspace_bytes"] == before["workspace_bytes"]


def test_biases_that_move_share_a_plan() -> None:
    """A bias that autocast casts anew lies somewhere else in every call."""
    device, w = torch.cuda.current_device(), weight(96, 128, dtype=torch.float16)
    packed, x = cusparselt.pack(w.cuda()), integers(40, 128, dtype=torch.float16).cuda()
    biases = [
        integers(97, dtype=torch.float16).cuda() for _ in range(100)
    ]  # all alive: none lies where one was

    def counts() -> dict[str, int]:
        return next(one for one in cusparselt.statistics() if one["device"] == device)

    cusparselt.clear(device)  # in a cache that other tests have filled, no bias gets a plan of its own
    cusparselt.linear(x, packed)
    before, expected = counts(), x.double() @ w.cuda().to_dense().double().T
    for bias in biases:
        assert torch.equal(cusparselt.linear(x, packed, bias[:96]).double(), expected + bias[:96].double())
    for bias in biases:  # at no multiple of 16 bytes
        assert torch.equal(cusparselt.linear(x, packed, bias[1:]).double(), expected + bias[1:].double())
    after = counts()
    assert after["misses"] - before["misses"] == 1
    assert after["bias_copies"] - before["bias_copies"] == 200
    for _ in range(3):
        assert torch.equal(cusparselt.linear(x, packed, biases[0][:96]).double(), expected + biases[0][:96])
    assert counts()["misses"] - after["misses"] == 1  # one that stays has a plan of its own
    assert counts()["bias_copies"] == after["bias_copies"]


def test_graph_capture() -> None:
    packed = cusparselt.pack(weight(64, 128, dtype=torch.float16).cuda())
    x = integers(64, 128, dtype=torch.float16).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cusparselt.linear(x, packed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = cusparselt.linear(x, packed)
    for _ in range(3):
        x.copy_(integers(64, 128, dtype=torch.float16))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, cusparselt.linear(x, packed))


def test_search(tmp_path: Any) -> None:
    before, path = cusparselt.search_mode(), cusparselt.algorithms_path()
    try:
        cusparselt.set_search_mode("file", path=tmp_path / "algorithms.json")
        packed = cusparselt.pack(weight(512, 512, dtype=torch.float16).cuda())
        found = cusparselt.search(packed, 256)
        assert found.tried > 1
        assert found.microseconds <= found.default_microseconds
        x = integers(256, 512, dtype=torch.float16).cuda()
        chosen = cusparselt.linear(x, packed)
        assert torch.equal(chosen, cusparselt.linear(x, packed, choice=cusparselt.Choice(0)))
    finally:
        cusparselt.set_search_mode(before, path=path)


def test_which_layout_the_library_has(record_property: Any) -> None:
    """Written down, not required: NVIDIA may change it. Each answer is a layout of ours or none."""
    for rows, k in ((128, 128), (256, 384)):
        w = nms.nm_prune(torch.randn(rows, k).half(), "2:4")
        blob = cusparselt.pack(nms.compress(w, "2:4").cuda()).blob.cpu()
        values, indices = reference.compress(w, 2, 4, 1, False)
        same = [name for name in lt.LAYOUTS if torch.equal(blob, reference.lt_pack(values, indices, k, name))]
        record_property(f"layout {rows}x{k}", ", ".join(same) or "none of ours")
