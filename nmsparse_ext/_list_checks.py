"""Argument checks of the ops on lists of weights; see `_checks`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks as checks


def check_lengths(**lists: Sequence[object]) -> None:
    """All lists must be of one length."""
    lengths = {name: len(values) for name, values in lists.items()}
    torch._check(
        len(set(lengths.values())) <= 1,
        lambda: f"all lists must have one entry a weight, got {lengths}",
    )


def check_result(w: Tensor, out: Tensor, w_name: str) -> None:
    """``out`` must be able to hold something of the shape of ``w``."""
    torch._check(
        out.dtype in checks.GRAD_DTYPES or out.dtype == w.dtype,
        lambda: f"outs must be one of {', '.join(map(str, checks.GRAD_DTYPES))}, got {out.dtype}",
    )
    checks.check_same_shape(out, "outs", w, w_name)
    checks.check_same_device(out, "outs", w, w_name)
    checks.check_writable(out, "outs")


def check_foreach_add_pruned(
    grads: Sequence[Tensor],
    ws: Sequence[Tensor],
    bits: Sequence[Tensor],
    dims: Sequence[int],
    alphas: Sequence[float],
    scale: Tensor | None,
    outs: Sequence[Tensor],
) -> None:
    check_lengths(grads=grads, ws=ws, bits=bits, dims=dims, alphas=alphas, outs=outs)
    for grad, w, mask, dim, out in zip(grads, ws, bits, dims, outs, strict=True):
        checks.check_add_pruned(out, w, mask, dim, scale)
        checks.check_same_shape(grad, "grads", w, "ws")
        checks.check_same_device(grad, "grads", w, "ws")


def check_foreach_apply_bits(
    ws: Sequence[Tensor], bits: Sequence[Tensor], dims: Sequence[int], outs: Sequence[Tensor]
) -> None:
    check_lengths(ws=ws, bits=bits, dims=dims, outs=outs)
    for w, mask, dim, out in zip(ws, bits, dims, outs, strict=True):
        checks.check_apply_bits(w, mask, dim)
        check_result(w, out, "ws")


def check_foreach_reselect(
    ws: Sequence[Tensor],
    ns: Sequence[int],
    ms: Sequence[int],
    dims: Sequence[int],
    outs: Sequence[Tensor],
    bits: Sequence[Tensor],
    changes: Tensor,
    places: Sequence[int],
    work: Tensor | None,
) -> None:
    check_lengths(ws=ws, ns=ns, ms=ms, dims=dims, outs=outs, bits=bits, places=places)
    torch._check(
        changes.dtype == torch.int64 and changes.dim() == 1,
        lambda: f"changes must be torch.int64 of one dimension, got {changes.dtype} {list(changes.shape)}",
    )
    for w, n, m, dim, out, mask, place in zip(ws, ns, ms, dims, outs, bits, places, strict=True):
        checks.check_weight(w, n, m, dim, False)
        check_result(w, out, "ws")
        checks.check_bits(mask, w, dim)
        checks.check_same_device(changes, "changes", w, "ws")
        torch._check(
            0 <= place < changes.shape[0],
            lambda place=place: f"places must be in [0, {changes.shape[0]}), got {place}",
        )
        if work is not None:
            torch._check(
                work.dtype == torch.uint8 and work.dim() == 1 and work.numel() >= mask.numel(),
                lambda mask=mask: (
                    f"work must be {mask.numel()} torch.uint8 or more, got {work.dtype} {list(work.shape)}"
                ),
            )


def check_above(w: Tensor, m: int, dim: int, name: str) -> None:
    """Weights that are compared with thresholds, in whole groups."""
    checks.check_pattern(1, m)
    torch._check(
        w.dtype in (torch.float64, torch.float32),
        lambda: f"{name} must be torch.float64 or torch.float32, got {w.dtype}",
    )
    checks.check_dim(dim, w.dim(), name)
    torch._check(
        w.shape[dim] % m == 0,
        lambda: f"{name} has size {w.shape[dim]} along dim {dim}, no multiple of m = {m}",
    )


def check_group_thresholds(w: Tensor, m: int, dim: int) -> None:
    torch._check(m >= 2, lambda: f"m must be 2 or more, got {m}")
    check_above(w, m, dim, "w")


def check_foreach_vote(
    ws: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    ns: Sequence[int],
    ms: Sequence[int],
    dims: Sequence[int],
    counts: Tensor,
) -> None:
    check_lengths(ws=ws, thresholds=thresholds, ns=ns, ms=ms, dims=dims)
    torch._check(
        counts.dtype == torch.int64 and counts.dim() == 1 and counts.shape[0] == len(ws),
        lambda: f"counts must be torch.int64 [{len(ws)}], got {counts.dtype} {list(counts.shape)}",
    )
    checks.check_contiguous(counts, "counts")
    for w, threshold, m, dim in zip(ws, thresholds, ms, dims, strict=True):
        check_above(w, m, dim, "ws")
        torch._check(
            threshold.dtype == w.dtype,
            lambda w=w, threshold=threshold: (
                f"thresholds must have the dtype of ws, {w.dtype}, got {threshold.dtype}"
            ),
        )
        expected = checks.moved_shape(w.shape, dim, w.shape[dim] // m)
        torch._check(
            list(threshold.shape) == expected,
            lambda expected=expected, threshold=threshold: (
                f"thresholds must have shape {expected}, got {list(threshold.shape)}"
            ),
        )
        checks.check_contiguous(threshold, "thresholds")
        checks.check_same_device(threshold, "thresholds", w, "ws")
        checks.check_same_device(counts, "counts", w, "ws")
