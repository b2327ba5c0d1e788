"""The ops on lists of weights: by hand, and equal on all engines and to the ops on one weight."""

from __future__ import annotations

import pytest
import torch
from samples import assert_same_bits, content, lay_out
from torch import Tensor

from nmsparse_ext import foreach, ops
from nmsparse_ext import reference_lists as reference

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# shape, group dim, pattern; the last ones are large enough for several tiles and for writing past the cache
WEIGHTS = [
    ((64, 128), 1, "2:4"),
    ((300, 64), 1, "1:16"),
    ((16, 8, 3, 3), 1, "2:8"),
    ((40, 24), 0, "2:4"),
    ((5, 4, 12), 2, "2:3"),
    ((3, 9), 1, "1:9"),
    ((0, 8), 1, "2:4"),
    ((2048, 2056), 1, "2:4"),
]


def sample(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return content(shape, dtype, "normal", seed)


def test_by_hand() -> None:
    w = torch.tensor([[4.0, -3, 2, 1, 1, 2, 3, -4]])
    bits = torch.tensor([[0b11000011]], dtype=torch.uint8)  # keeps 4 -3 . . . . 3 -4
    out = torch.empty(1, 8)
    foreach.add_pruned([torch.ones(1, 8)], [w], [bits], dims=[1], alphas=[0.5], outs=[out])
    assert out.tolist() == [[1, 1, 2, 1.5, 1.5, 2, 1, 1]]
    foreach.apply_bits([w], [bits], dims=[1], outs=[out])
    assert out.tolist() == [[4, -3, 0, 0, 0, 0, 3, -4]]
    changes = torch.zeros(2, dtype=torch.int64)
    foreach.reselect(
        [-w.flip(1)], ns=[1], ms=[4], dims=[1], outs=[out], bits=[bits], changes=changes, places=[1]
    )
    assert out.tolist() == [[4, 0, 0, 0, 0, 0, 0, -4]]
    assert (bits.item(), changes.tolist()) == (0b10000001, [0, 2])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("shape", "dim", "pattern"), WEIGHTS)
def test_engines_agree(compiled_engine, shape, dim: int, pattern: str, dtype: torch.dtype) -> None:
    w, grad = sample(shape, dtype, 1), sample(shape, dtype, 2)
    bits = ops.mask_bits(sample(shape, dtype, 3), pattern, dim=dim)
    n, m = map(int, pattern.split(":"))
    for scale in (None, torch.tensor(3.0)):
        ours, theirs = torch.empty_like(w), torch.empty_like(w)
        for module, out in ((compiled_engine.ops, ours), (reference, theirs)):
            module.foreach_add_pruned([grad], [w], [bits], [dim], [0.3], scale, [out])
        assert_same_bits(ours, theirs)
    for out_dtype in {dtype, torch.bfloat16} if dtype == torch.float32 else {dtype}:
        results = []
        for module in (compiled_engine.ops, reference):
            out, mask, changes = torch.empty(shape, dtype=out_dtype), bits.clone(), torch.full((2,), -1)
            module.foreach_reselect([w], [n], [m], [dim], [out], [mask], changes, [0], None)
            again = torch.empty(shape, dtype=out_dtype)
            module.foreach_apply_bits([w], [mask], [dim], [again])
            assert_same_bits(again, out)
            results.append((out, mask, changes))
        for a, b in zip(*results, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("layout", ["channels_last", "every second"])
def test_layouts_may_differ(engine, layout: str) -> None:
    w = lay_out(sample((4, 8, 3, 3), torch.float32, 1), layout)
    grad, out = sample((4, 8, 3, 3), torch.float32, 2), torch.empty(4, 8, 3, 3)
    bits = ops.mask_bits(w, "2:4")
    engine.ops.foreach_add_pruned([grad], [w], [bits], [1], [2.0], None, [out])
    torch.testing.assert_close(out, grad + 2 * w * ~ops.unpack_bits(bits, 8))
    engine.ops.foreach_apply_bits([w], [bits], [1], [out])
    assert torch.equal(out, ops.nm_prune(w, "2:4"))
    changes = torch.zeros(1, dtype=torch.int64)
    engine.ops.foreach_reselect([w], [1], [4], [1], [out], [bits], changes, [0], None)
    assert torch.equal(out, ops.nm_prune(w, "1:4"))
    assert changes.item() == w.numel() // 4


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16])
def test_sums_are_taken_in_the_wider_dtype(engine, grad_dtype: torch.dtype) -> None:
    w, grad = sample((8, 16), torch.float32, 1), sample((8, 16), grad_dtype, 2)
    bits, out = ops.mask_bits(w, "2:4"), torch.empty(8, 16)
    engine.ops.foreach_add_pruned([grad], [w], [bits], [1], [1e-3], None, [out])
    expected = torch.where(ops.unpack_bits(bits, 16), grad.float(), grad.float() + 1e-3 * w)
    assert_same_bits(out, expected)


def test_kept_entries_are_copied_bit_for_bit(engine) -> None:
    """-0.0 and NaN payloads too, which a sum with zero would change."""
    grad = torch.tensor([[-0.0, float("nan"), 1.0, 2.0] * 8])
    w, out = torch.full((1, 32), float("inf")), torch.empty(1, 32)
    bits = torch.full((1, 4), 0b00110011, dtype=torch.uint8)
    engine.ops.foreach_add_pruned([grad], [w], [bits], [1], [1.0], None, [out])
    assert_same_bits(out.view(8, 4)[:, :2].contiguous(), grad.view(8, 4)[:, :2].contiguous())
    assert out.view(8, 4)[:, 2:].isposinf().all()


def test_a_gradient_may_be_its_own_sum(engine) -> None:
    w, grad = sample((8, 16), torch.float32, 1), sample((8, 16), torch.float32, 2)
    bits = ops.mask_bits(w, "2:4")
    expected = ops.add_pruned_(grad.clone(), w, bits, alpha=0.5)
    engine.ops.foreach_add_pruned([grad], [w], [bits], [1], [0.5], None, [grad])
    assert_same_bits(grad, expected)


def test_several_weights_at_once_equal_one_by_one(engine) -> None:
    ws = [sample((8, 16), torch.float32, 1), sample((4, 24), torch.float32, 2)]
    bits = [torch.zeros(8, 2, dtype=torch.uint8), torch.zeros(4, 3, dtype=torch.uint8)]
    outs, changes = [torch.empty_like(w) for w in ws], torch.zeros(3, dtype=torch.int64)
    engine.ops.foreach_reselect(ws, [2, 1], [4, 8], [1, 1], outs, bits, changes, [2, 0], None)
    assert torch.equal(outs[0], ops.nm_prune(ws[0], "2:4"))
    assert torch.equal(outs[1], ops.nm_prune(ws[1], "1:8"))
    assert changes.tolist() == [12, 0, 64]


def test_working_memory_saves_the_fallback_an_allocation() -> None:
    w, out = sample((8, 16), torch.float32, 1), torch.empty(8, 16)
    bits, changes = torch.zeros(8, 2, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    work = torch.empty(20, dtype=torch.uint8)
    reference.foreach_reselect([w], [2], [4], [1], [out], [bits], changes, [0], work)
    assert torch.equal(out, ops.nm_prune(w, "2:4"))
    assert torch.equal(work[:16].view(8, 2), bits)


def test_writes_count_as_writes() -> None:
    w, out = torch.randn(4, 8), torch.empty(4, 8)
    bits = ops.mask_bits(w, "2:4")
    versions = out._version, bits._version
    foreach.reselect(
        [w],
        ns=[2],
        ms=[4],
        dims=[1],
        outs=[out],
        bits=[bits],
        changes=torch.zeros(1, dtype=torch.int64),
        places=[0],
    )
    assert (out._version, bits._version) > versions


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dims": [1, 1]}, "one entry a weight"),
        ({"dims": [2]}, "dim must be in"),
        ({"ms": [3]}, "multiple of m = 3"),
        ({"ns": [5]}, "1 <= n <= m"),
        ({"outs": [torch.empty(4, 4)]}, "the? ?same shape|must have the shape"),
        ({"outs": [torch.empty(4, 8, dtype=torch.int32)]}, "float64, "),
        ({"outs": [torch.empty(4, 1).expand(4, 8)]}, "written to"),
        ({"bits": [torch.zeros(4, 2, dtype=torch.uint8)]}, "bits must have"),
        ({"places": [1]}, "places must be in"),
        ({"changes": torch.zeros(1)}, "changes must be"),
    ],
)
def test_refusals(engine, change: dict[str, object], match: str) -> None:
    arguments = {
        "ws": [torch.randn(4, 8)],
        "ns": [2],
        "ms": [4],
        "dims": [1],
        "outs": [torch.empty(4, 8)],
        "bits": [torch.zeros(4, 1, dtype=torch.uint8)],
        "changes": torch.zeros(1, dtype=torch.int64),
        "places": [0],
        "work": None,
    }
    with pytest.raises(RuntimeError, match=match):
        engine.ops.foreach_reselect(*{**arguments, **change}.values())
