"""nm_mask: which weights the rule keeps."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, SELECTIONS, TINY, Selection, mask, tensor
from engines import Engine
from properties import Weight, for_any, kept_by_hand, weights
from samples import assert_same_bits, content

import nmsparse_ext as nms

SELECTION_PARAMS = [
    pytest.param(case, dtype, id=f"{case.name}-{str(dtype).removeprefix('torch.')}")
    for case in SELECTIONS
    for dtype in case.dtypes
]


@pytest.mark.parametrize(("case", "dtype"), SELECTION_PARAMS)
def test_truth_table(engine: Engine, case: Selection, dtype: torch.dtype) -> None:
    w = tensor(case.w, dtype)
    kept = nms.nm_mask(w, case.pattern, remainder="pad")
    assert kept.tolist() == mask(case.kept).tolist()


@pytest.mark.parametrize("dtype", TINY, ids=str)
def test_denormals_are_not_zero(engine: Engine, dtype: torch.dtype) -> None:
    w = TINY[dtype] * tensor([0, 1, 3, -2], torch.float64)
    assert nms.nm_mask(w.to(dtype), "2:4").tolist() == [False, False, True, True]
    assert nms.nm_mask(w.to(dtype), "3:4").tolist() == [False, True, True, True]


@for_any(case=weights())
def test_equals_the_rule_in_plain_python(engine: Engine, case: Weight) -> None:
    kept = nms.nm_mask(case.w, case.pattern, dim=case.dim, remainder="pad")
    assert kept.dtype == torch.bool
    assert kept.shape == case.w.shape
    assert kept.is_contiguous()
    rows = case.last(case.w).to(torch.float64).reshape(-1, case.k) if case.w.numel() else []
    got = case.last(kept).reshape(-1, case.k) if case.w.numel() else []
    for row, expected in zip(got, rows, strict=True):
        assert row.tolist() == kept_by_hand(expected.tolist(), case.n, case.m), case.label


@for_any(case=weights())
def test_keeps_exactly_n_of_every_full_group(engine: Engine, case: Weight) -> None:
    kept = case.last(nms.nm_mask(case.w, case.pattern, dim=case.dim, remainder="pad"))
    full = case.k // case.m * case.m
    counts = kept[..., :full].unflatten(-1, (case.k // case.m, case.m)).sum(-1)
    assert (counts == case.n).all(), case.label
    assert (kept[..., full:].sum(-1) == min(case.n, case.k - full)).all(), case.label


@for_any(case=weights())
def test_bits_are_the_mask(engine: Engine, case: Weight) -> None:
    kept = nms.nm_mask(case.w, case.pattern, dim=case.dim, remainder="pad")
    bits = nms.nm_mask(case.w, case.pattern, dim=case.dim, remainder="pad", bits=True)
    assert bits.dtype == torch.uint8
    assert bits.is_contiguous()
    bytes_a_row = -(-case.k // 8)
    assert bits.shape == (*case.last(case.w).shape[:-1], bytes_a_row)
    unpacked = (bits.unsqueeze(-1) >> torch.arange(8)) & 1
    unpacked = unpacked.reshape(*bits.shape[:-1], 8 * bytes_a_row)
    assert torch.equal(unpacked[..., : case.k].bool(), case.last(kept)), case.label
    assert not unpacked[..., case.k :].any(), "unused bits must be 0"


def test_every_pattern(engine: Engine) -> None:
    for m in range(1, 65):
        w = content((2, 2 * m + m // 2), torch.float32, "ties", seed=m)
        order = w.abs()[:, : 2 * m].reshape(4, m).sort(dim=-1, descending=True, stable=True).indices
        for n in range(1, m + 1):
            expected = torch.zeros(4, m, dtype=torch.bool).scatter_(-1, order[:, :n], True).view(2, 2 * m)
            kept = nms.nm_mask(w, f"{n}:{m}", remainder="pad")
            assert torch.equal(kept[:, : 2 * m], expected), f"{n}:{m}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_negative_dims(engine: Engine, dtype: torch.dtype) -> None:
    w = content((4, 8, 4), dtype, "ties", seed=1)
    for dim in range(3):
        assert torch.equal(nms.nm_mask(w, "2:4", dim=dim - 3), nms.nm_mask(w, "2:4", dim=dim))


def test_default_dim_is_1_and_a_vector_has_one_dim(engine: Engine) -> None:
    w = torch.randn(4, 8, 4)
    assert torch.equal(nms.nm_mask(w, "2:4"), nms.nm_mask(w, "2:4", dim=1))
    v = torch.randn(8)
    assert torch.equal(nms.nm_mask(v, "2:4"), nms.nm_mask(v, "2:4", dim=0))
    assert torch.equal(nms.nm_mask(v, "2:4"), nms.nm_mask(v, "2:4", dim=-1))


def test_pattern_or_text(engine: Engine) -> None:
    w = torch.randn(4, 8)
    assert torch.equal(nms.nm_mask(w, nms.Pattern(1, 4)), nms.nm_mask(w, "1:4"))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_flat_grouping_follows_the_logical_order(engine: Engine, memory_format: torch.memory_format) -> None:
    w = torch.randn(3, 5, 2, 2).contiguous(memory_format=memory_format)
    expected = nms.nm_mask(w.flatten(), "2:4").view(w.shape)
    assert torch.equal(nms.nm_mask(w, "2:4", grouping="flat"), expected)
    bits = nms.nm_mask(w, "2:4", grouping="flat", bits=True)
    assert_same_bits(bits, nms.nm_mask(w.flatten(), "2:4", bits=True))
    padded = nms.nm_mask(w, "3:7", grouping="flat", remainder="pad")
    assert torch.equal(padded, nms.nm_mask(w.flatten(), "3:7", remainder="pad").view(w.shape))


def test_conv_groups_run_along_input_channels(engine: Engine) -> None:
    w = torch.zeros(1, 4, 2, 2)
    w[0, :, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    w[0, :, 1, 1] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    kept = nms.nm_mask(w, "2:4")
    assert kept[0, :, 0, 0].tolist() == [False, False, True, True]
    assert kept[0, :, 1, 1].tolist() == [True, True, False, False]


@pytest.mark.parametrize("shape", [(0,), (0, 8), (4, 0), (4, 0, 3), (2, 8, 0)])
def test_empty(engine: Engine, shape: tuple[int, ...]) -> None:
    w = torch.empty(shape)
    assert nms.nm_mask(w, "2:4").shape == shape
    k = shape[min(1, len(shape) - 1)]
    assert nms.nm_mask(w, "2:4", bits=True).shape[-1] == -(-k // 8)
