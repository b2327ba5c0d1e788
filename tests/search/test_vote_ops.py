"""The ops of DominoSearch: by hand, equal on all engines, and against plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import assert_same_bits, content, lay_out
from torch import Tensor

from nmsparse_ext import foreach, ops, reference

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# shape, group dim, m
WEIGHTS = [
    ((64, 128), 1, 16),
    ((16, 32, 3, 3), 1, 16),
    ((48, 24), 0, 8),
    ((5, 4, 12), 2, 3),
    ((3, 40), 1, 40),
    ((6, 128), 1, 64),
    ((0, 8), 1, 4),
    ((1024, 1040), 1, 16),
]


def by_definition(w: Tensor, m: int, dim: int) -> tuple[Tensor, Tensor]:
    """The groups of a weight as ``[..., groups, m]``, and the means of their smaller halves."""
    groups = w.movedim(dim, -1).unflatten(-1, (-1, m)).abs()
    return groups, groups.double().sort(-1).values[..., : m // 2].mean(-1).to(w.dtype)


def test_by_hand() -> None:
    w = torch.tensor([[1.0, -2, 3, -4, 8, 6, -7, 5]])
    assert foreach.group_thresholds(w, 4, dim=1).tolist() == [[1.5, 5.5]]
    thresholds = torch.tensor([[2.0, 5.5]])  # above it: 3 and 4; 8, 6 and 7
    counts = torch.full((3,), -1)
    for n, votes in ((2, 0), (3, 1), (4, 2)):
        foreach.vote([w] * 3, [thresholds] * 3, ns=[n] * 3, ms=[4] * 3, dims=[1] * 3, counts=counts)
        assert counts.tolist() == [votes] * 3
    out, bits = torch.empty(1, 8), torch.tensor([[0b11000011]], dtype=torch.uint8)
    foreach.add_kept([torch.ones(1, 8)], [w], [bits], dims=[1], alphas=[0.5], outs=[out])
    assert out.tolist() == [[1.5, 0, 0, 0, 0, 0, -2.5, 3.5]]


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties", "special"])
@pytest.mark.parametrize(("shape", "dim", "m"), WEIGHTS)
def test_engines_agree(compiled_engine, shape, dim: int, m: int, kind: str, dtype: torch.dtype) -> None:
    w = content(shape, dtype, kind, 1)
    ours, theirs = (module.group_thresholds(w, m, dim) for module in (compiled_engine.ops, reference))
    assert_same_bits(ours, theirs)
    later = content(shape, dtype, kind, 2)
    for n in sorted({1, m // 2, m - 1, m}):
        results = []
        for module in (compiled_engine.ops, reference):
            counts = torch.full((1,), -1)
            module.foreach_vote([later], [theirs], [n], [m], [dim], counts)
            results.append(counts.item())
        assert results[0] == results[1]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("shape", "dim", "m"), WEIGHTS)
def test_engines_add_alike(compiled_engine, shape, dim: int, m: int, dtype: torch.dtype) -> None:
    w, grad = content(shape, dtype, "normal", 1), content(shape, dtype, "normal", 2)
    bits = ops.mask_bits(content(shape, dtype, "normal", 3), f"{m // 2}:{m}", dim=dim)
    for scale in (None, torch.tensor(3.0)):
        ours, theirs = torch.empty_like(w), torch.empty_like(w)
        for module, out in ((compiled_engine.ops, ours), (reference, theirs)):
            module.foreach_add_kept([grad], [w], [bits], [dim], [0.3], scale, [out])
        assert_same_bits(ours, theirs)
        in_place = grad.clone()
        compiled_engine.ops.foreach_add_kept([in_place], [w], [bits], [dim], [0.3], scale, [in_place])
        assert_same_bits(in_place, theirs)


@pytest.mark.parametrize("layout", ["channels_last", "every second"])
def test_layouts(engine, layout: str) -> None:
    w = lay_out(content((4, 32, 3, 3), torch.float32, "normal", 1), layout)
    grad, out = content((4, 32, 3, 3), torch.float32, "normal", 2), torch.empty(4, 32, 3, 3)
    bits = ops.mask_bits(w, "4:16")
    engine.ops.foreach_add_kept([grad], [w], [bits], [1], [2.0], None, [out])
    assert_same_bits(out, torch.where(ops.unpack_bits(bits, 32), grad + 2 * w, 0))
    groups, thresholds = by_definition(w, 16, 1)
    torch.testing.assert_close(engine.ops.group_thresholds(w, 16, 1), thresholds)
    counts = torch.zeros(1, dtype=torch.int64)
    engine.ops.foreach_vote([w], [thresholds.contiguous()], [11], [16], [1], counts)
    assert counts.item() == ((groups > thresholds.unsqueeze(-1)).sum(-1) < 11).sum()


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16])
def test_sums_are_taken_in_the_wider_dtype(engine, grad_dtype: torch.dtype) -> None:
    w, grad = content((8, 16), torch.float32, "normal", 1), content((8, 16), grad_dtype, "normal", 2)
    bits, out = ops.mask_bits(w, "2:4"), torch.empty(8, 16)
    engine.ops.foreach_add_kept([grad], [w], [bits], [1], [1e-3], None, [out])
    assert_same_bits(out, torch.where(ops.unpack_bits(bits, 16), grad.float() + 1e-3 * w, 0))


def test_pruned_entries_are_zeros_whatever_stood_there(engine) -> None:
    grad, w = torch.full((1, 16), math.nan), torch.full((1, 16), math.inf)
    bits, out = torch.zeros(1, 2, dtype=torch.uint8), torch.empty(1, 16)
    engine.ops.foreach_add_kept([grad], [w], [bits], [1], [1.0], None, [out])
    assert_same_bits(out, torch.zeros(1, 16))


@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 5),
    m=st.integers(2, 20),
    n=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_as_defined(rows: int, groups: int, m: int, n: int, seed: int) -> None:
    w = content((rows, groups * m), torch.float32, "normal", seed)
    wanted = by_definition(w, m, 1)[1]
    thresholds = foreach.group_thresholds(w, m, dim=1)
    torch.testing.assert_close(thresholds, wanted)
    later = content((rows, groups * m), torch.float32, "normal", seed + 1)
    counts = torch.zeros(1, dtype=torch.int64)
    foreach.vote([later], [thresholds], ns=[min(n, m)], ms=[m], dims=[1], counts=counts)
    above = (by_definition(later, m, 1)[0] > thresholds.unsqueeze(-1)).sum(-1)
    assert counts.item() == (above < min(n, m)).sum()


def test_several_weights_at_once(engine) -> None:
    ws = [content(shape, torch.float32, "normal", 1) for shape in ((4, 16), (8, 8, 2, 2), (32, 4))]
    ms, dims, ns = [16, 4, 8], [1, 1, 0], [12, 3, 6]
    thresholds = [engine.ops.group_thresholds(w, m, dim) for w, m, dim in zip(ws, ms, dims, strict=True)]
    together, alone = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    engine.ops.foreach_vote(ws, thresholds, ns, ms, dims, together)
    for i in range(3):
        engine.ops.foreach_vote([ws[i]], [thresholds[i]], [ns[i]], [ms[i]], [dims[i]], alone[i : i + 1])
    assert together.tolist() == alone.tolist()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dims": [1, 1]}, "one entry a weight"),
        ({"dims": [2]}, "dim must be in"),
        ({"ms": [3]}, "multiple of m = 3"),
        ({"ws": [torch.randn(4, 8).bfloat16()]}, "float64 or (torch\\.)?float32"),
        ({"thresholds": [torch.zeros(4, 2).double()]}, "dtype of ws"),
        ({"thresholds": [torch.zeros(4, 4)]}, "thresholds must have shape"),
        ({"thresholds": [torch.zeros(2, 4).t()]}, "contiguous"),
        ({"counts": torch.zeros(1)}, "counts must be"),
        ({"counts": torch.zeros(2, dtype=torch.int64)}, "counts must be"),
    ],
)
def test_refusals(engine, change: dict[str, object], match: str) -> None:
    arguments = {
        "ws": [torch.randn(4, 8)],
        "thresholds": [torch.zeros(4, 2)],
        "ns": [2],
        "ms": [4],
        "dims": [1],
        "counts": torch.zeros(1, dtype=torch.int64),
    }
    with pytest.raises(RuntimeError, match=match):
        engine.ops.foreach_vote(*{**arguments, **change}.values())


@pytest.mark.parametrize(
    ("w", "m", "dim", "match"),
    [
        (torch.randn(4, 8), 1, 1, "m must be 2 or more"),
        (torch.randn(4, 8), 3, 1, "multiple of m = 3"),
        (torch.randn(4, 8), 4, 2, "dim must be in"),
        (torch.ones(4, 8, dtype=torch.int8), 4, 1, "float64 or (torch\\.)?float32"),
    ],
)
def test_thresholds_refuse(engine, w: Tensor, m: int, dim: int, match: str) -> None:
    with pytest.raises(RuntimeError, match=match):
        engine.ops.group_thresholds(w, m, dim)
