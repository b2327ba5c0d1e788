"""The CUDA kernels against the CPU's, bit for bit, and what only a GPU can show.

Which weights, patterns and contents an op takes is tested for every engine in tests/test_engines.py, "cuda"
among them. Here are the shapes that the CUDA kernels treat differently (tiles in shared memory, their tails,
plain strided access), streams, graphs, devices, and offsets past 32 bits. The truth is what the CPU kernels
say: they are tested against the reference, which would take minutes for all these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES, FLOATS
from samples import KINDS, as_int, assert_same_bits, content, lay_out
from torch import Tensor

from nmsparse_ext import reference
from nmsparse_ext._build import extension

pytestmark = [
    pytest.mark.needs_cuda,
    pytest.mark.skipif(
        extension is None or not extension.build_info()["cuda"], reason="this build has no CUDA kernels"
    ),
]

nmsparse = torch.ops.nmsparse
PATTERNS = ((1, 2), (2, 4), (4, 8), (5, 16), (8, 32), (3, 7), (16, 64))


def on_cpu(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else x


def assert_like_cpu(name: str, *arguments: Any, label: str = "") -> Any:
    """Runs an op on the GPU and on the CPU; compares results and written arguments."""
    copies = [on_cpu(a) for a in arguments]
    expected = getattr(nmsparse, name)(*copies)
    actual = getattr(nmsparse, name)(*arguments)
    results = actual if isinstance(actual, tuple) else (actual,)
    expected_results = expected if isinstance(expected, tuple) else (expected,)
    for a, b in zip([*results, *arguments], [*expected_results, *copies], strict=True):
        if isinstance(b, Tensor):
            assert_same_bits(a.cpu(), b, f"{name} {label}")
    return actual


def on_gpu(shape: str, dtype: torch.dtype, kind: str, seed: int, laid_out: bool = True) -> Tensor:
    """A weight of one of SHAPES."""
    sizes, _, lay = SHAPES[shape]
    w = content(sizes, dtype, kind, seed).cuda()
    return lay(as_int(w)).view(dtype) if laid_out else w


# Every way a kernel walks through memory, with whole and with ragged ends: (shape, group dim, layout).
SHAPES: dict[str, tuple[tuple[int, ...], int, Callable[[Tensor], Tensor]]] = {
    "rows": ((64, 512), 1, lambda w: w),
    "one long row": ((100_000,), 0, lambda w: w),
    "rows end within a byte": ((64, 516), 1, lambda w: w),
    "rows end within a group": ((33, 1003), 1, lambda w: w),
    "padded rows": ((65, 500), 1, lambda w: torch.cat([w, w], 1)[:, :500]),
    "misaligned": ((65, 504), 1, lambda w: torch.cat([w.flatten()[:1], w.flatten()])[1:].view_as(w)),
    "many short rows": ((3000, 12), 1, lambda w: w),
    "columns": ((520, 300), 0, lambda w: w),
    "columns of a transposed copy": ((300, 520), 1, lambda w: w.t().contiguous().t()),
    "few columns": ((999, 40), 0, lambda w: w),
    "OIHW 3x3": ((17, 260, 3, 3), 1, lambda w: w),
    "OIHW 7x7": ((5, 66, 7, 7), 1, lambda w: w),
    "OIHW 1x1": ((64, 256, 1, 1), 1, lambda w: w),
    "channels last": ((16, 260, 3, 3), 1, lambda w: w.contiguous(memory_format=torch.channels_last)),
    "ConvTranspose": ((260, 17, 3, 3), 0, lambda w: w),
    "experts": ((3, 260, 136), 1, lambda w: w),
    "every second": ((40, 130), 1, lambda w: torch.stack([w, w], -1).flatten(-2)[:, ::2]),
    "5-D": ((3, 70, 2, 3, 5), 1, lambda w: w.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0)),
    "empty": ((0, 8), 1, lambda w: w),
    "no groups": ((8, 0), 1, lambda w: w),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_through_memory(shape: str, dtype: torch.dtype) -> None:
    _, dim, lay = SHAPES[shape]
    for seed, (n, m) in enumerate(PATTERNS):
        label = f"{shape} {dtype} {n}:{m}"
        w = on_gpu(shape, dtype, KINDS[seed % len(KINDS)], seed)
        k = w.shape[dim]
        grouping = (n, m, dim, True)
        pruned, bits = assert_like_cpu("prune", w, *grouping, label=label)
        assert pruned.stride() == torch.empty_like(w).stride()
        contiguous = torch.empty(w.shape, dtype=dtype, device=w.device)
        assert_like_cpu("mask_bits", w, *grouping, label=label)
        assert_like_cpu("prune_out", w, *grouping, contiguous, None, label=label)
        assert_like_cpu("prune_", w.clone(), *grouping, torch.empty_like(bits), label=label)
        assert_like_cpu("apply_bits", w, bits, dim, label=label)
        mask = assert_like_cpu("unpack_bits", bits, k, dim, label=label)
        assert_like_cpu("pack_bits", mask, dim, label=label)
        assert_like_cpu("pack_bits", lay(mask), dim, label=label)
        assert_like_cpu("sad", bits, ~bits, label=label)
        assert_like_cpu("sad_out", mask, ~mask, torch.tensor(-5, device=w.device), label=label)
        assert_like_cpu("find_violation", w, *grouping, label=label)
        assert_like_cpu("find_violation", pruned, *grouping, label=label)
        values, indices = assert_like_cpu("compress", w, *grouping, label=label)
        assert_like_cpu("decompress", values, indices, n, m, k, dim, label=label)
        assert_like_cpu("check_indices", indices, n, m, k, label=label)
        assert_like_cpu("check_indices", ~indices, n, m, k, label=label)


@pytest.mark.parametrize("w_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("grad_dtype", FLOATS, ids=str)
def test_add_pruned(grad_dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    for shape, (_, dim, _) in SHAPES.items():
        w = on_gpu(shape, w_dtype, "normal", 1)
        bits = nmsparse.mask_bits(w, 2, 4, dim, True)
        for laid_out in (True, False):
            grad = on_gpu(shape, grad_dtype, "normal", 2, laid_out)
            for scale in (None, torch.tensor(0.3), torch.tensor([1e3])):
                scale = None if scale is None else scale.to(w.device)
                assert_like_cpu("add_pruned_", grad.clone(), w, bits, dim, 2e-4, scale, label=shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposable(dtype: torch.dtype, kind: str) -> None:
    for shape in ((4, 4), (64, 68), (256, 512)):
        w = content(shape, dtype, kind, 4).cuda()
        for layout in ("contiguous", "reversed dims", "every second", "offset"):
            assert_like_cpu("transposable_bits", lay_out(w, layout), label=f"{dtype} {kind} {shape} {layout}")


def test_opcheck() -> None:
    w = torch.randn(6, 16, 3, 3, device="cuda", requires_grad=True)
    bits = nmsparse.mask_bits(w.detach(), 2, 4, 1, False)
    values, indices = nmsparse.compress(w.detach(), 2, 4, 1, False)
    plain = w.detach().clone()
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("prune", (w, 2, 4, 1, False)),
        ("prune_out", (plain, 2, 4, 1, False, torch.empty_like(plain), torch.empty_like(bits))),
        ("prune_", (plain.clone(), 2, 4, 1, False, None)),
        ("mask_bits", (plain, 2, 4, 1, False)),
        ("pack_bits", (plain > 0, 1)),
        ("unpack_bits", (bits, 16, 1)),
        ("apply_bits", (w, bits, 1)),
        ("apply_bits_", (plain.clone(), bits, 1)),
        ("add_pruned_", (torch.randn_like(plain), plain, bits, 1, 0.5, torch.tensor(2.0, device="cuda"))),
        ("sad", (bits, ~bits)),
        ("sad_out", (bits, ~bits, torch.tensor(0, device="cuda"))),
        ("find_violation", (plain, 2, 4, 1, False)),
        ("compress", (w, 2, 4, 1, False)),
        ("decompress", (values.clone().requires_grad_(), indices, 2, 4, 16, 1)),
        ("check_indices", (indices, 2, 4, 16)),
        ("transposable_bits", (torch.randn(8, 12, device="cuda"),)),
    ]
    for name, arguments in calls:
        torch.library.opcheck(getattr(nmsparse, name).default, arguments)


def test_current_stream() -> None:
    """Ops queue behind what the current stream still has to do."""
    w = torch.zeros(1 << 16, device="cuda")
    bits = torch.zeros(1 << 13, dtype=torch.uint8, device="cuda")
    count = torch.zeros((), dtype=torch.int64, device="cuda")
    old_bits = bits.clone()
    expected = content((1 << 16,), torch.float32, "normal", 1).cuda()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles; some 30 ms
        w.copy_(expected)
        nmsparse.prune_(w, 2, 4, 0, False, bits)
        nmsparse.sad_out(bits, old_bits, count)
        values, _ = nmsparse.compress(w, 2, 4, 0, False)
        violation = nmsparse.find_violation(w, 1, 4, 0, False)
    stream.synchronize()
    pruned, expected_bits = reference.prune(expected.cpu(), 2, 4, 0, False)
    assert_same_bits(w.cpu(), pruned)
    assert_same_bits(bits.cpu(), expected_bits)
    assert count.item() == 1 << 15
    assert_same_bits(values.cpu(), reference.compress(pruned, 2, 4, 0, False)[0])
    assert violation.tolist() == [0, 2]


def test_graph_capture() -> None:
    """All ops can be captured: nothing waits for the device. A replay works on what the inputs then hold."""
    w = torch.empty(128, 64, 3, 3, device="cuda")
    out, grad = torch.empty_like(w), torch.zeros_like(w)
    bits, old = (torch.zeros(128, 3, 3, 8, dtype=torch.uint8, device="cuda") for _ in range(2))
    count = torch.zeros((), dtype=torch.int64, device="cuda")
    scale = torch.ones((), device="cuda")

    def step() -> dict[str, Tensor]:
        nmsparse.prune_out(w, 2, 4, 1, False, out, bits)
        nmsparse.add_pruned_(grad, w, bits, 1, 0.5, scale)
        nmsparse.sad_out(bits, old, count)
        values, indices = nmsparse.compress(w, 2, 4, 1, False)
        return {
            "values": values,
            "dense": nmsparse.decompress(values, indices, 2, 4, 64, 1),
            "bad": nmsparse.check_indices(indices, 2, 4, 64),
            "violation": nmsparse.find_violation(w, 2, 4, 1, False),
            "mask": nmsparse.unpack_bits(bits, 64, 1),
            "applied": nmsparse.apply_bits(w, bits, 1),
            "transposable": nmsparse.transposable_bits(w.view(128, -1)),
        }

    w.normal_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for seed in range(3):
        w.copy_(content((128, 64, 3, 3), torch.float32, "normal", seed))
        grad.zero_()
        scale.fill_(seed + 1.0)
        graph.replay()
        pruned, expected_bits = reference.prune(w.cpu(), 2, 4, 1, False)
        assert_same_bits(out.cpu(), pruned)
        assert_same_bits(bits.cpu(), expected_bits)
        assert_same_bits(grad.cpu(), torch.where(results["mask"], 0, 0.5 * (seed + 1.0) * w).cpu())
        assert count.item() == bits.numel() * 4
        assert_same_bits(results["dense"].cpu(), pruned)
        assert_same_bits(results["applied"].cpu(), pruned)
        assert results["bad"].item() == -1
        assert results["violation"].tolist() == [0, 4]
        assert_same_bits(results["transposable"].cpu(), reference.transposable_bits(w.view(128, -1).cpu()))


def test_nothing_is_allocated() -> None:
    w = torch.randn(256, 128, 3, 3, device="cuda")
    out, grad = torch.empty_like(w), torch.zeros_like(w)
    bits = nmsparse.mask_bits(w, 2, 4, 1, False)
    count = torch.zeros((), dtype=torch.int64, device="cuda")
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    nmsparse.prune_out(w, 2, 4, 1, False, out, bits)
    nmsparse.prune_(w, 2, 4, 1, False, bits)
    nmsparse.apply_bits_(w, bits, 1)
    nmsparse.add_pruned_(grad, w, bits, 1, 0.5, None)
    nmsparse.sad_out(bits, bits, count)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.slow
def test_offsets_past_32_bits() -> None:
    rows, k = (1 << 16) + 1, 1 << 15  # 2 GiB and a row
    w = torch.ones(rows, k, dtype=torch.int8, device="cuda")
    w[:, 3::4] = 2
    w[-1, -4:] = torch.tensor([1, 3, 4, 2], device="cuda")
    nmsparse.prune_(w, 2, 4, 1, False, None)
    assert w[-1, -8:].tolist() == [1, 0, 0, 2, 0, 3, 4, 0]
    assert nmsparse.find_violation(w, 1, 4, 1, False).tolist() == [0, 2]
    w[:-1] = 0
    w[-1, :-4] = 0
    last = rows * (k // 4) - 1
    assert nmsparse.find_violation(w, 1, 4, 1, False).tolist() == [last, 2]
    values, indices = nmsparse.compress(w, 2, 4, 1, False)
    assert values[-1, -2:].tolist() == [3, 4]
    dense = nmsparse.decompress(values, indices, 2, 4, k, 1)
    assert dense[-1, -4:].tolist() == [0, 3, 4, 0]
    bits = nmsparse.mask_bits(w.t(), 2, 4, 0, False)
    assert bits[-1, -1].item() == 0b0110_0011


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device() -> None:
    """Ops run on their tensors' device, whichever is current, and refuse tensors of two devices."""
    expected = content((64, 256), torch.float32, "normal", 1)
    w = expected.to("cuda:1")
    with torch.cuda.device(0):
        out, bits = nmsparse.prune(w, 2, 4, 1, False)
        assert torch.cuda.current_device() == 0
    assert out.device == bits.device == w.device
    pruned, expected_bits = reference.prune(expected, 2, 4, 1, False)
    assert_same_bits(out.cpu(), pruned)
    assert_same_bits(bits.cpu(), expected_bits)
    with pytest.raises(RuntimeError, match="same device"):
        nmsparse.prune_out(w, 2, 4, 1, False, torch.empty_like(w, device="cuda:0"), None)
