"""The packed form: to the bit, back again, and safe against damage."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, INDICES, PACKED, Indices, Packed, tensor
from engines import Engine
from properties import Weight, for_any, integers, patterns, seeds, weights
from samples import assert_same_bits, content, lay_out

import nmsparse_ext as nms
from nmsparse_ext import ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_truth_table(engine: Engine, case: Packed, dtype: torch.dtype) -> None:
    w = tensor(case.w, dtype)
    values, indices = ops.pack(w, case.pattern, remainder="pad")
    assert_same_bits(values, tensor(case.values, dtype))
    assert indices.dtype == torch.uint8
    assert [f"{byte:08b}" for byte in indices.tolist()] == [f"{byte:08b}" for byte in case.indices]
    dense = ops.unpack(values, indices, case.pattern, k=len(case.w))
    assert_same_bits(dense, nms.nm_prune(w, case.pattern, remainder="pad"))


@for_any(case=weights())
def test_round_trip(engine: Engine, case: Weight) -> None:
    values, indices = ops.pack(case.w, case.pattern, dim=case.dim, remainder="pad")
    pattern, others = nms.Pattern(case.n, case.m), case.last(case.w).shape[:-1]
    groups = pattern.groups(case.k)
    assert values.dtype == case.w.dtype
    assert values.shape == (*others, groups * case.n)
    assert indices.shape == (*others, -(-groups * pattern.bits_per_group // 8))
    assert values.is_contiguous()
    assert indices.is_contiguous()
    dense = ops.unpack(values, indices, pattern, k=case.k, dim=case.dim)
    assert dense.is_contiguous()
    expected = nms.nm_prune(case.w, pattern, dim=case.dim, remainder="pad")
    assert_same_bits(dense, expected, case.label)
    assert ops.check_indices(indices, pattern, k=case.k) is None, case.label


def test_every_pattern(engine: Engine) -> None:
    for m in range(1, 65):
        w = content((3, 2 * m + m // 3), torch.float16, "special", seed=m)
        for n in range(1, m + 1):
            pattern = nms.Pattern(n, m)
            values, indices = ops.pack(w, pattern, remainder="pad")
            assert ops.check_indices(indices, pattern, k=w.shape[1]) is None, str(pattern)
            dense = ops.unpack(values, indices, pattern, k=w.shape[1])
            assert_same_bits(dense, nms.nm_prune(w, pattern, remainder="pad"), str(pattern))


def test_values_stand_in_order_of_position(engine: Engine) -> None:
    w = torch.arange(1.0, 65.0).neg().view(1, 64)
    values, _ = ops.pack(w, "3:16")
    assert values.tolist() == [[-14, -15, -16, -30, -31, -32, -46, -47, -48, -62, -63, -64]]


def test_conv_layout(engine: Engine) -> None:
    w = torch.randn(3, 8, 2, 2)
    values, indices = ops.pack(w, "2:4")
    assert values.shape == (3, 2, 2, 4)
    assert indices.shape == (3, 2, 2, 1)
    expected, expected_indices = ops.pack(w.permute(0, 2, 3, 1).contiguous(), "2:4", dim=-1)
    assert_same_bits(values, expected)
    assert_same_bits(indices, expected_indices)


def test_non_contiguous_values_and_indices(engine: Engine) -> None:
    w = torch.randn(6, 16)
    values, indices = ops.pack(w, "2:4")
    dense = ops.unpack(lay_out(values, "every second"), lay_out(indices, "reversed dims"), "2:4", k=16)
    assert_same_bits(dense, nms.nm_prune(w, "2:4"))


@pytest.mark.parametrize("shape", [(0,), (0, 8), (4, 0), (2, 8, 0)])
def test_empty(engine: Engine, shape: tuple[int, ...]) -> None:
    w = torch.empty(shape)
    dim = min(1, len(shape) - 1)
    values, indices = ops.pack(w, "2:4")
    assert ops.unpack(values, indices, "2:4", k=shape[dim]).shape == shape
    assert ops.check_indices(indices, "2:4", k=shape[dim]) is None


# ------------------------------------------------------------------------------------------------ bad indices


@pytest.mark.parametrize("case", INDICES, ids=lambda case: case.name)
def test_bad_indices_by_hand(engine: Engine, case: Indices) -> None:
    indices = torch.tensor(case.indices, dtype=torch.uint8)
    bad = ops.check_indices(indices, case.pattern, k=case.k)
    assert bad == (None if case.first_bad < 0 else (case.first_bad,))


def test_bad_indices_are_found_in_the_first_bad_row(engine: Engine) -> None:
    _, indices = ops.pack(torch.randn(5, 7, 32), "2:4", dim=2)
    indices[3, 2, 1] = 0
    indices[4, 0, 0] = 0
    assert ops.check_indices(indices, "2:4", k=32) == (3, 2, 2)


@for_any(pattern=patterns, k=integers(0, 140), rows=integers(1, 3), seed=seeds)
def test_damaged_indices_do_no_harm(
    engine: Engine, pattern: tuple[int, int], k: int, rows: int, seed: int
) -> None:
    p = nms.Pattern(*pattern)
    row_bytes = -(-p.groups(k) * p.bits_per_group // 8)
    indices = content((rows, row_bytes), torch.int8, "any bits", seed).view(torch.uint8)
    values = torch.ones(rows, p.groups(k) * p.n)
    dense = ops.unpack(values, indices, p, k=k)
    assert dense.shape == (rows, k)
    assert ((dense == 0) | (dense == 1)).all()
    padded = torch.nn.functional.pad(dense, (0, p.groups(k) * p.m - k))
    counts = padded.view(rows, p.groups(k), p.m).sum(-1)
    assert (counts <= p.n).all()
    bad = ops.check_indices(indices, p, k=k)
    if bad is not None:
        assert 0 <= bad[0] < rows
        assert 0 <= bad[1] < p.groups(k)
    elif k % p.m == 0:
        assert (counts == p.n).all()


# --------------------------------------------------------------------------------------------------- autograd


def test_gradients() -> None:
    w = torch.randn(3, 8, 4, requires_grad=True)
    values, indices = ops.pack(w, "2:4")
    assert not indices.requires_grad
    values.sum().backward()
    assert torch.equal(w.grad, nms.nm_mask(w.detach(), "2:4").float())

    values = values.detach().requires_grad_()
    weight = torch.randn(3, 8, 4)
    (ops.unpack(values, indices, "2:4", k=8) * weight).sum().backward()
    kept_weight = weight.movedim(1, -1)[nms.nm_mask(w.detach(), "2:4").movedim(1, -1)]
    assert_same_bits(values.grad, kept_weight.view(values.shape))


def test_no_gradient_reaches_virtual_positions() -> None:
    values, indices = ops.pack(torch.tensor([1.0, 0.0, 0.0, 2.0, 3.0]), "2:4", remainder="pad")
    values.requires_grad_()
    ops.unpack(values, indices, "2:4", k=5).backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert values.grad.tolist() == [1.0, 4.0, 5.0, 0.0]


def test_indices_are_positions(engine: Engine) -> None:
    """For 2:4 the nibbles are idx0 | idx1 << 2, as the sparse tensor cores read them."""
    w = content((4, 32), torch.bfloat16, "normal", seed=7)
    _, indices = ops.pack(w, "2:4")
    nibbles = torch.stack([indices & 15, indices >> 4], dim=-1).flatten(-2).long()
    kept = nms.nm_mask(w, "2:4").view(4, 8, 4)
    first = kept.int().argmax(-1)
    last = 3 - kept.flip(-1).int().argmax(-1)
    assert torch.equal(nibbles, first | last << 2)
