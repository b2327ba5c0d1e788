"""Packed masks: pack, unpack, apply, add to a gradient, compare."""

from __future__ import annotations

import pytest
import torch
from cases import FLOATS
from engines import Engine
from properties import Weight, for_any, integers, seeds, weights
from samples import LAYOUTS, as_int, assert_same_bits, content, lay_out, random_mask

import nmsparse_ext as nms
from nmsparse_ext import ops

# -------------------------------------------------------------------------------------------- pack and unpack


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([True], [1]),
        ([False, True], [2]),
        ([True] * 8, [255]),
        ([False] * 7 + [True], [128]),
        ([True, False, True, True] + [False] * 4 + [True], [13, 1]),
        ([], []),
    ],
)
def test_pack_by_hand(engine: Engine, mask: list[bool], expected: list[int]) -> None:
    bits = ops.pack_bits(torch.tensor(mask, dtype=torch.bool))
    assert bits.tolist() == expected
    assert ops.unpack_bits(bits, len(mask)).tolist() == mask


def test_group_dim_is_moved_last(engine: Engine) -> None:
    mask = torch.tensor([[True, False, True], [True, True, False]])
    assert ops.pack_bits(mask, dim=0).tolist() == [[3], [2], [1]]
    assert ops.pack_bits(mask, dim=1).tolist() == [[5], [3]]


@for_any(case=weights())
def test_round_trip(engine: Engine, case: Weight) -> None:
    mask = as_int(case.w) > 0
    bits = ops.pack_bits(mask, dim=case.dim)
    assert bits.is_contiguous()
    assert bits.shape == (*case.last(mask).shape[:-1], -(-case.k // 8))
    unpacked = ops.unpack_bits(bits, case.k, dim=case.dim)
    assert unpacked.is_contiguous()
    assert torch.equal(unpacked, mask), case.label
    assert_same_bits(ops.pack_bits(unpacked, dim=case.dim), bits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_of_any_layout(engine: Engine, layout: str) -> None:
    mask = lay_out(random_mask((3, 20, 5, 9), seed=3), layout)
    for dim in range(4):
        assert_same_bits(ops.pack_bits(mask, dim=dim), ops.pack_bits(mask.clone().contiguous(), dim=dim))


# ------------------------------------------------------------------------------------------------------ apply


@for_any(case=weights())
def test_apply(engine: Engine, case: Weight) -> None:
    mask = random_mask(tuple(case.w.shape), seed=case.k)
    bits = ops.pack_bits(mask, dim=case.dim)
    applied = ops.apply_bits(case.w, bits, dim=case.dim)
    assert_same_bits(applied, torch.where(mask, as_int(case.w), 0).view(case.w.dtype), case.label)
    assert applied.stride() == torch.empty_like(case.w).stride(), case.label
    copy = case.w.clone()
    assert ops.apply_bits_(copy, bits, dim=case.dim) is copy
    assert_same_bits(copy, applied, case.label)


@for_any(case=weights())
def test_pruning_is_applying_its_bits(engine: Engine, case: Weight) -> None:
    pruned, bits = nms.nm_prune(case.w, case.pattern, dim=case.dim, remainder="pad", return_bits=True)
    assert_same_bits(ops.apply_bits(case.w, bits, dim=case.dim), pruned, case.label)


def test_apply_gradient_passes_where_kept() -> None:
    w = torch.randn(4, 12, requires_grad=True)
    mask = random_mask((4, 12), seed=4)
    ops.apply_bits(w, ops.pack_bits(mask)).sum().backward()
    assert torch.equal(w.grad, mask.float())


# ------------------------------------------------------------------------------------------------ add_pruned_


def test_add_pruned_by_hand(engine: Engine) -> None:
    bits = ops.pack_bits(torch.tensor([[True, False, False, True]]))
    w = torch.tensor([[1.0, 2.0, -3.0, 4.0]])
    grad = torch.tensor([[10.0, 20.0, 30.0, 40.0]])
    assert ops.add_pruned_(grad, w, bits, alpha=0.5) is grad
    assert grad.tolist() == [[10.0, 21.0, 28.5, 40.0]]
    ops.add_pruned_(grad, w, bits, alpha=0.5, scale=torch.tensor(4.0))
    assert grad.tolist() == [[10.0, 25.0, 22.5, 40.0]]


@pytest.mark.parametrize("w_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("grad_dtype", FLOATS, ids=str)
def test_add_pruned_of_any_dtypes_and_layouts(
    engine: Engine, grad_dtype: torch.dtype, w_dtype: torch.dtype
) -> None:
    compute = torch.promote_types(torch.float32, grad_dtype)
    shape = (3, 21, 2, 5)
    for dim, (w_layout, grad_layout) in enumerate(zip(LAYOUTS[:4], LAYOUTS[3::-1], strict=True)):
        w = lay_out(content(shape, w_dtype, "normal", seed=1), w_layout)
        grad = lay_out(content(shape, grad_dtype, "normal", seed=2), grad_layout)
        bits = nms.nm_mask(w, "2:4", dim=dim, bits=True, remainder="pad")
        kept = ops.unpack_bits(bits, shape[dim], dim=dim)
        term = torch.tensor(2e-4 * 3.0, dtype=torch.float64).to(compute) * w.to(compute)
        expected = torch.where(kept, grad, (grad.to(compute) + term).to(grad_dtype))
        ops.add_pruned_(grad, w, bits, dim=dim, alpha=2e-4, scale=torch.tensor([3.0]))
        assert_same_bits(grad, expected, f"dim {dim}")


def test_add_pruned_to_the_weight_itself(engine: Engine) -> None:
    w = torch.randn(4, 16)
    bits = nms.nm_mask(w, "2:4", bits=True)
    expected = torch.where(nms.nm_mask(w, "2:4"), w, w + -0.25 * w)
    ops.add_pruned_(w, w, bits, alpha=-0.25)
    assert_same_bits(w, expected)


def test_add_pruned_leaves_what_is_kept(engine: Engine) -> None:
    w = torch.randn(4, 16)
    grad = content((4, 16), torch.float32, "special", seed=5)
    before = grad.clone()
    ops.add_pruned_(grad, w, torch.full((4, 2), 255, dtype=torch.uint8), alpha=1.0)
    assert_same_bits(grad, before)


def test_add_pruned_with_zero_alpha_keeps_numbers(engine: Engine) -> None:
    w, grad = torch.randn(4, 16), torch.randn(4, 16)
    before = grad.clone()
    ops.add_pruned_(grad, w, nms.nm_mask(w, "2:4", bits=True), alpha=0.0)
    assert torch.equal(grad, before)


# -------------------------------------------------------------------------------------------------------- sad


def test_sad_by_hand(engine: Engine) -> None:
    a = torch.tensor([[True, False, True], [True, True, True]])
    b = torch.tensor([[True, True, False], [True, True, True]])
    assert nms.sad(a, b) == 2
    assert nms.sad(a, a) == 0
    assert nms.sad(a, ~a) == 6
    assert nms.sad(ops.pack_bits(a), ops.pack_bits(b)) == 2
    assert isinstance(nms.sad(a, b), int)


@for_any(size=integers(0, 1100), offset=integers(0, 8), seed=seeds)
def test_sad_of_bits_and_masks(engine: Engine, size: int, offset: int, seed: int) -> None:
    a, b = random_mask((size + offset,), seed)[offset:], random_mask((size + offset,), seed + 1)[offset:]
    expected = int((a ^ b).sum())
    assert nms.sad(a, b) == expected
    assert nms.sad(ops.pack_bits(a), ops.pack_bits(b)) == expected
    out = torch.tensor(-5)
    assert ops.sad_into(a, b, out) is out
    assert out.item() == expected


def test_sad_of_strided_masks(engine: Engine) -> None:
    a, b = random_mask((20, 30), 1), random_mask((20, 30), 2)
    assert nms.sad(a.T, b.T) == nms.sad(a, b)
    assert nms.sad(a[:, ::2], b[:, ::2]) == int((a ^ b)[:, ::2].sum())


def test_sad_of_large_masks(engine: Engine) -> None:
    a = random_mask((1 << 20,), 1)
    b = a.clone()
    b[::1000] = ~b[::1000]
    assert nms.sad(ops.pack_bits(a), ops.pack_bits(b)) == len(range(0, 1 << 20, 1000))
    assert nms.sad(a, ~a) == 1 << 20


def test_sad_of_empty_masks(engine: Engine) -> None:
    assert nms.sad(torch.empty(0, dtype=torch.bool), torch.empty(0, dtype=torch.bool)) == 0
    assert nms.sad(torch.empty(3, 0, dtype=torch.uint8), torch.empty(3, 0, dtype=torch.uint8)) == 0
