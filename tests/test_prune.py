"""nm_prune, nm_prune_ and prune_into: the masked copy, its layout, memory and gradients."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, SELECTIONS, mask, tensor
from engines import Engine
from properties import Weight, for_any, weights
from samples import LAYOUTS, as_int, assert_same_bits, content, lay_out
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext import ops

WRITABLE_LAYOUTS = tuple(layout for layout in LAYOUTS if layout != "expanded")


def selected(w: Tensor, kept: Tensor) -> Tensor:
    """``where(kept, w, +0)``, on bits."""
    return torch.where(kept, as_int(w), 0).view(w.dtype)


@pytest.mark.parametrize("case", SELECTIONS, ids=lambda case: case.name)
def test_truth_table(engine: Engine, case: object) -> None:
    for dtype in case.dtypes:
        w = tensor(case.w, dtype)
        pruned = nms.nm_prune(w, case.pattern, remainder="pad")
        assert_same_bits(pruned, selected(w, mask(case.kept)), str(dtype))


@for_any(case=weights())
def test_is_the_masked_weight_in_its_layout(engine: Engine, case: Weight) -> None:
    before = case.w.clone()
    pruned, bits = nms.nm_prune(case.w, case.pattern, dim=case.dim, remainder="pad", return_bits=True)
    kept = nms.nm_mask(case.w, case.pattern, dim=case.dim, remainder="pad")
    assert_same_bits(pruned, selected(case.w, kept), case.label)
    assert pruned.stride() == torch.empty_like(case.w).stride(), case.label
    assert_same_bits(bits, nms.nm_mask(case.w, case.pattern, dim=case.dim, remainder="pad", bits=True))
    assert_same_bits(case.w, before, "w must not change")


@for_any(case=weights())
def test_pruning_twice_changes_nothing(engine: Engine, case: Weight) -> None:
    once = nms.nm_prune(case.w, case.pattern, dim=case.dim, remainder="pad")
    twice = nms.nm_prune(once, case.pattern, dim=case.dim, remainder="pad")
    # A kept -0.0 may give way to a +0.0 before it; all else keeps its bits.
    same = (as_int(twice) == as_int(once)) | (once.to(torch.float64) == 0) & (twice.to(torch.float64) == 0)
    assert same.all(), case.label


@for_any(case=weights(min_k=1))
def test_kept_weights_are_at_least_the_pruned_ones(engine: Engine, case: Weight) -> None:
    w = case.last(case.w).to(torch.float64)
    w = torch.where(w.isnan(), float("inf"), w.abs())
    kept = case.last(nms.nm_mask(case.w, case.pattern, dim=case.dim, remainder="pad"))
    for start in range(0, case.k, case.m):
        group, group_kept = w[..., start : start + case.m], kept[..., start : start + case.m]
        smallest_kept = torch.where(group_kept, group, float("inf")).amin(-1)
        largest_pruned = torch.where(group_kept, 0.0, group).amax(-1)
        assert (smallest_kept >= largest_pruned).all(), case.label


@for_any(case=weights(layouts=WRITABLE_LAYOUTS))
def test_in_place(engine: Engine, case: Weight) -> None:
    expected, expected_bits = nms.nm_prune(
        case.w, case.pattern, dim=case.dim, remainder="pad", return_bits=True
    )
    expected = expected.clone()
    returned, bits = nms.nm_prune_(case.w, case.pattern, dim=case.dim, remainder="pad", return_bits=True)
    assert returned is case.w
    assert_same_bits(case.w, expected, case.label)
    assert_same_bits(bits, expected_bits, case.label)


@pytest.mark.parametrize("out_layout", WRITABLE_LAYOUTS)
@pytest.mark.parametrize("w_layout", LAYOUTS)
def test_out_of_another_layout(engine: Engine, w_layout: str, out_layout: str) -> None:
    for dtype in DTYPES:
        for dim in range(4):
            w = lay_out(content((3, 9, 5, 12), dtype, "ties", seed=dim), w_layout)
            out = lay_out(content((3, 9, 5, 12), dtype, "any bits", seed=9), out_layout)
            expected, expected_bits = nms.nm_prune(w, "2:4", dim=dim, remainder="pad", return_bits=True)
            returned, bits = nms.nm_prune(w, "2:4", dim=dim, remainder="pad", out=out, return_bits=True)
            assert returned is out
            assert_same_bits(out, expected, f"{dtype} dim {dim}")
            assert_same_bits(bits, expected_bits, f"{dtype} dim {dim}")
            assert nms.nm_prune(w, "2:4", dim=dim, remainder="pad", out=out) is out


def test_writing_to_a_view_leaves_its_surroundings(engine: Engine) -> None:
    for dtype in DTYPES:
        base = content((6, 40), dtype, "any bits", seed=3)
        before = base.clone()
        view = base[1:5, 3:37:2]
        expected = nms.nm_prune(view, "2:4", remainder="pad")
        nms.nm_prune_(view, "2:4", remainder="pad")
        assert_same_bits(view, expected)
        outside = torch.ones(6, 40, dtype=torch.bool)
        outside[1:5, 3:37:2] = False
        assert torch.equal(as_int(base)[outside], as_int(before)[outside])


def test_out_may_be_the_weight(engine: Engine) -> None:
    w = torch.randn(4, 16)
    expected = nms.nm_prune(w, "2:4")
    assert nms.nm_prune(w, "2:4", out=w) is w
    assert_same_bits(w, expected)
    alias = w.view(4, 16)
    nms.nm_prune(w, "1:4", out=alias)
    assert_same_bits(w, nms.nm_prune(expected, "1:4"))


def test_pruned_entries_are_positive_zero(engine: Engine) -> None:
    w = torch.tensor([-float("inf"), float("nan"), -1.0, -0.0])
    pruned = nms.nm_prune(w, "1:4")
    assert as_int(pruned)[[0, 2, 3]].tolist() == [0, 0, 0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_flat_grouping(engine: Engine, memory_format: torch.memory_format) -> None:
    w = torch.randn(3, 5, 2, 2).contiguous(memory_format=memory_format)
    kept = nms.nm_mask(w, "2:4", grouping="flat")
    expected_bits = nms.nm_mask(w, "2:4", grouping="flat", bits=True)
    pruned, bits = nms.nm_prune(w, "2:4", grouping="flat", return_bits=True)
    assert_same_bits(pruned, selected(w, kept))
    assert pruned.stride() == w.stride()
    assert_same_bits(bits, expected_bits)
    out = torch.empty(3, 5, 2, 2)
    assert nms.nm_prune(w, "2:4", grouping="flat", out=out) is out
    assert_same_bits(out, pruned)
    inplace, bits = nms.nm_prune_(w, "2:4", grouping="flat", return_bits=True)
    assert inplace is w
    assert_same_bits(w, pruned)
    assert_same_bits(bits, expected_bits)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (4, 0), (2, 8, 0)])
def test_empty(engine: Engine, shape: tuple[int, ...]) -> None:
    w = torch.empty(shape)
    assert nms.nm_prune(w, "2:4").shape == shape
    assert nms.nm_prune_(w, "2:4") is w
    out = torch.empty(shape)
    assert nms.nm_prune(w, "2:4", out=out, return_bits=True)[0] is out


def test_prune_into(engine: Engine) -> None:
    w = torch.randn(4, 20)
    expected, expected_bits = nms.nm_prune(w, "2:4", return_bits=True)
    out, bits = torch.full_like(w, 7), torch.full_like(expected_bits, 255)
    ops.prune_into(w, "2:4", out=out, bits=bits)
    assert_same_bits(out, expected)
    assert_same_bits(bits, expected_bits)
    ops.prune_into(w, "2:4", out=w)
    assert_same_bits(w, expected)


# --------------------------------------------------------------------------------------------------- autograd


def test_gradient_passes_where_kept() -> None:
    w = torch.randn(4, 3, 8, requires_grad=True)
    pruned, bits = nms.nm_prune(w, "2:4", dim=2, return_bits=True)
    assert pruned.requires_grad
    assert not bits.requires_grad
    weight = torch.randn_like(w)
    (pruned * weight).sum().backward()
    assert_same_bits(w.grad, selected(weight, nms.nm_mask(w.detach(), "2:4", dim=2)))


def test_gradient_of_flat_grouping() -> None:
    w = torch.randn(3, 4, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn_like(w)
    (nms.nm_prune(w, "1:4", grouping="flat") * weight).sum().backward()
    assert_same_bits(w.grad, selected(weight, nms.nm_mask(w.detach(), "1:4", grouping="flat")))


def test_infinite_gradients_of_pruned_weights_are_dropped() -> None:
    w = torch.tensor([4.0, 3.0, 2.0, 1.0], requires_grad=True)
    nms.nm_prune(w, "2:4").backward(torch.tensor([1.0, float("nan"), float("inf"), float("nan")]))
    assert w.grad[1].isnan()
    assert w.grad[[0, 2, 3]].tolist() == [1.0, 0.0, 0.0]


def test_overwriting_what_autograd_saved_is_noticed() -> None:
    w = torch.randn(4, 8)
    scale = torch.ones(4, 8, requires_grad=True)
    for overwrite in (lambda: nms.nm_prune_(w, "2:4"), lambda: nms.nm_prune(torch.randn(4, 8), "2:4", out=w)):
        loss = (scale * w).sum()
        overwrite()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_version_counter_moves() -> None:
    w = torch.randn(4, 8)
    before = w._version
    nms.nm_prune_(w, "2:4")
    assert w._version > before
    before = w._version
    with torch.no_grad():
        ops.prune_into(w, "2:4", out=w)
    assert w._version > before


def test_parameters_are_pruned_in_place_without_grad() -> None:
    w = torch.nn.Parameter(torch.randn(4, 8))
    with torch.no_grad():
        nms.nm_prune_(w, "2:4")
    assert nms.find_violation(w, "2:4") is None
