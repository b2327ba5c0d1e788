"""Public functions: arguments checked by name, then one call of ``torch.ops.nmsparse``.

A *group* is ``m`` consecutive weights along the group dim ``dim``; a pattern ``n:m`` keeps ``n`` of every
``m``. Which ones is one rule on every device: the largest ``|w|``, ties to the lower index, NaN above
everything, -0.0 equal to 0.0, int8 -128 as 128. Kept weights are copied bit for bit, pruned ones become +0.0
by selection.

Shared arguments:
    w: float64, float32, bfloat16, float16, int8 or float8_e4m3fn, 1 to 5 dimensions, any strides.
    pattern: a ``Pattern`` or text such as ``"2:4"``.
    dim: the group dim, negative ones count from the end. The default 1 is the input dim of linear and conv
        weights; a 1-dimensional ``w`` is grouped along its only dim, so there 1 means 0.
    remainder: what to do when ``dim`` is no multiple of ``m``. ``"error"`` refuses; ``"pad"`` counts zeros
        after the end, so that a short last group of ``len`` weights keeps ``min(n, len)``.
    grouping: ``"channel"`` groups along ``dim``. ``"flat"`` groups the weight flattened in logical order (for
        a conv weight O, I, kh, kw), as the original N:M code does; ``dim`` is then ignored.

*Packed bits* are masks of one bit a weight: uint8, group dim moved last, low bits first, 1 = kept, zeros in
the unused high bits of a row's last byte. ``"flat"`` packs the flattened mask: shape ``[ceil(numel / 8)]``.

The thin layer on which training and deployment stand is in ``_bit_ops.py``; its functions are here, too.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _ops  # noqa: F401  (registers torch.ops.nmsparse)
from ._bit_ops import (
    Remainder,
    add_pruned_,
    apply_bits,
    apply_bits_,
    check_indices,
    coordinates,
    mask_bits,
    pack,
    pack_bits,
    prune_into,
    sad_into,
    unpack,
    unpack_bits,
)
from ._checks import bits_shape, ceil_div
from .pattern import Pattern

__all__ = [
    "Violation",
    "add_pruned_",
    "apply_bits",
    "apply_bits_",
    "check_indices",
    "find_violation",
    "mask_bits",
    "nm_mask",
    "nm_prune",
    "nm_prune_",
    "pack",
    "pack_bits",
    "prune_into",
    "sad",
    "sad_into",
    "transposable_mask",
    "unpack",
    "unpack_bits",
]

Grouping = Literal["channel", "flat"]

_nms = torch.ops.nmsparse


def _like(flat: Tensor, w: Tensor) -> Tensor:
    """The flattened result in ``w``'s shape and layout."""
    shaped = flat.view(w.shape)
    return shaped if w.is_contiguous() else torch.empty_like(w).copy_(shaped)


# ------------------------------------------------------------------------------------------ masks and pruning


def nm_mask(
    w: Tensor,
    pattern: Pattern | str,
    *,
    dim: int = 1,
    bits: bool = False,
    remainder: Remainder = "error",
    grouping: Grouping = "channel",
) -> Tensor:
    """Which weights an N:M pattern keeps.

    Equivalent to (for a 2-D ``w``, ``dim=1``)::

        order = w.abs().view(R, K // m, m).sort(dim=-1, descending=True, stable=True).indices
        mask = torch.zeros(R, K // m, m, dtype=torch.bool).scatter_(-1, order[..., :n], True).view(R, K)

    Args:
        w: The weight, any shape and dtype of the module's list.
        pattern: ``n`` kept of every ``m``, a ``Pattern`` or text such as ``"2:4"``.
        dim: The group dim.
        bits: Return packed bits instead of a bool mask.
        remainder: ``"error"`` or ``"pad"``.
        grouping: ``"channel"`` or ``"flat"``.

    Returns:
        A contiguous bool tensor of ``w``'s shape, True = kept; or, with ``bits=True``, uint8 of shape
        ``[other dims..., ceil(K / 8)]`` (``[ceil(numel / 8)]`` for ``"flat"``).

    Raises:
        TypeError: For a wrong type or dtype.
        ValueError: For a pattern, dim, remainder or grouping that is not allowed.

    Example:
        >>> nm_mask(torch.tensor([[3.0, -1.0, 2.0, 5.0]]), "2:4")
        tensor([[ True, False, False,  True]])
    """
    n, m, dim, pad = arguments.check_grouping(w, pattern, dim, remainder, grouping)
    if grouping == "flat":
        packed = _nms.mask_bits(w.reshape(-1), n, m, 0, pad)
        return packed if bits else _nms.unpack_bits(packed, w.numel(), 0).view(w.shape)
    packed = _nms.mask_bits(w, n, m, dim, pad)
    return packed if bits else _nms.unpack_bits(packed, w.shape[dim], dim)


@overload
def nm_prune(
    w: Tensor,
    pattern: Pattern | str,
    *,
    dim: int = 1,
    out: Tensor | None = None,
    return_bits: Literal[False] = False,
    remainder: Remainder = "error",
    grouping: Grouping = "channel",
) -> Tensor: ...


@overload
def nm_prune(
    w: Tensor,
    pattern: Pattern | str,
    *,
    dim: int = 1,
    out: Tensor | None = None,
    return_bits: Literal[True],
    remainder: Remainder = "error",
    grouping: Grouping = "channel",
) -> tuple[Tensor, Tensor]: ...


def nm_prune(
    w: Tensor,
    pattern: Pattern | str,
    *,
    dim: int = 1,
    out: Tensor | None = None,
    return_bits: bool = False,
    remainder: Remainder = "error",
    grouping: Grouping = "channel",
) -> Tensor | tuple[Tensor, Tensor]:
    """The weight with all but the kept entries set to +0.0.

    Equivalent to ``torch.where(nm_mask(w, pattern), w, 0)``, in one pass. Differentiable in ``w`` unless
    ``out`` is given: the gradient is that of the kept entries, the mask counts as constant.

    Args:
        w: The weight.
        pattern: ``n`` kept of every ``m``.
        dim: The group dim.
        out: Written to and returned: ``w``'s shape, dtype and device, any layout; ``w`` itself or separate
            memory.
        return_bits: Return the packed mask too.
        remainder: ``"error"`` or ``"pad"``.
        grouping: ``"channel"`` or ``"flat"``.

    Returns:
        The pruned weight in ``w``'s shape, dtype and layout (or ``out``); with ``return_bits=True`` a pair of
        it and the packed bits, see :func:`nm_mask`.

    Raises:
        TypeError: For a wrong type or dtype.
        ValueError: For an argument that is not allowed, an ``out`` that overlaps ``w`` partly, or an ``out``
            where gradients are recorded.
    """
    n, m, dim, pad = arguments.check_grouping(w, pattern, dim, remainder, grouping)
    if out is not None:
        arguments.check_out(w, out)
    if grouping == "flat":
        flat, bits = _nms.prune(w.reshape(-1), n, m, 0, pad)
        pruned = _like(flat, w) if out is None else out.copy_(flat.view(w.shape))
    elif out is None:
        pruned, bits = _nms.prune(w, n, m, dim, pad)
    else:
        bits = w.new_empty(bits_shape(w.shape, dim), dtype=torch.uint8) if return_bits else None
        _nms.prune_out(w, n, m, dim, pad, out, bits)
        pruned = out
    return (pruned, bits) if return_bits else pruned


@overload
def nm_prune_(
    w: Tensor,
    pattern: Pattern | str,
    *,
    dim: int = 1,
    return_bits: Literal[False] = False,
    remainder: Remainder = "error",
    grouping: Grouping = "channel",
) -> Tensor: ...


@overload
def nm_prune_(
    w: Tensor,
    pattern: Pattern | str,
    *,
    dim: int = 1,
    return_bits: Literal[True],
    remainder: Remainder = "error",
    grouping: Grouping = "channel",
) -> tuple[Tensor, Tensor]: ...


def nm_prune_(
    w: Tensor,
    pattern: Pattern | str,
    *,
    dim: int = 1,
    return_bits: bool = False,
    remainder: Remainder = "error",
    grouping: Grouping = "channel",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`nm_prune` in place.

    Equivalent to ``w.masked_fill_(~nm_mask(w, pattern), 0)``.

    Args:
        w: The weight; must not require grad outside ``torch.no_grad()``.
        pattern: ``n`` kept of every ``m``.
        dim: The group dim.
        return_bits: Return the packed mask too.
        remainder: ``"error"`` or ``"pad"``.
        grouping: ``"channel"`` or ``"flat"``.

    Returns:
        ``w``, or with ``return_bits=True`` a pair of it and the packed bits.

    Raises:
        TypeError: For a wrong type or dtype.
        ValueError: For an argument that is not allowed, an expanded ``w``, or one that requires grad.
    """
    n, m, dim, pad = arguments.check_grouping(w, pattern, dim, remainder, grouping)
    arguments.check_in_place("w", w)
    if grouping == "flat" and not w.is_contiguous():
        flat, bits = _nms.prune(w.reshape(-1), n, m, 0, pad)
        w.copy_(flat.view(w.shape))
    else:
        target = w.view(-1) if grouping == "flat" else w
        bits = w.new_empty(bits_shape(target.shape, dim), dtype=torch.uint8) if return_bits else None
        _nms.prune_(target, n, m, dim, pad, bits)
    return (w, bits) if return_bits else w


def transposable_mask(w: Tensor, *, bits: bool = False) -> Tensor:
    """The best mask that is 2:4 along rows and along columns, so that ``w`` and its transpose are both 2:4.

    Exact: every 4x4 tile gets the one of the 90 possible patterns with the largest sum of kept ``|w|`` (in
    float64; magnitudes are capped at 2^1000, infinity and then NaN rank above).

    Args:
        w: 2-D, both sizes multiples of 4.
        bits: Return packed bits instead of a bool mask.

    Returns:
        bool ``[R, C]``, True = kept; or uint8 ``[R, ceil(C / 8)]``.

    Raises:
        TypeError: For a wrong type or dtype.
        ValueError: If ``w`` is not 2-D or a size is no multiple of 4.
    """
    arguments.check_weight(w, -1)
    if w.dim() != 2 or w.shape[0] % 4 != 0 or w.shape[1] % 4 != 0:
        raise ValueError(
            f"w must be 2-dimensional with sizes that are multiples of 4, got shape {list(w.shape)}"
        )
    packed = _nms.transposable_bits(w)
    return packed if bits else _nms.unpack_bits(packed, w.shape[1], 1)


def sad(mask_a: Tensor, mask_b: Tensor) -> int:
    """Sparse Architecture Divergence: how many weights are kept in one mask and pruned in the other.

    Equivalent to ``(mask_a ^ mask_b).sum().item()`` for bool masks.

    Args:
        mask_a: A bool mask of any shape, or packed bits (uint8).
        mask_b: The same kind and shape.

    Returns:
        The number of differing weights.

    Raises:
        TypeError: If a mask is neither bool nor uint8, or one is packed and the other is not.
        ValueError: If shapes or devices differ.
    """
    arguments.check_masks("mask_a", mask_a, "mask_b", mask_b)
    return int(_nms.sad(mask_a.contiguous(), mask_b.contiguous()).item())


class Violation(NamedTuple):
    """A group with more nonzeros than its pattern allows.

    Attributes:
        index: Coordinates of the group's first weight.
        kept: How many of its weights are not zero.
    """

    index: tuple[int, ...]  # type: ignore[assignment]  # tuple.index, which nobody wants here
    kept: int


def find_violation(
    w: Tensor,
    pattern: Pattern | str,
    *,
    dim: int = 1,
    remainder: Remainder = "error",
    grouping: Grouping = "channel",
) -> Violation | None:
    """The first group with more than ``n`` nonzeros, counted row by row with the group dim moved last.

    NaN counts as nonzero, -0.0 as zero. Waits for the result on a GPU.

    Args:
        w: The weight.
        pattern: At most ``n`` nonzeros of every ``m``.
        dim: The group dim.
        remainder: ``"error"`` or ``"pad"``.
        grouping: ``"channel"`` or ``"flat"``.

    Returns:
        None if ``w`` satisfies the pattern, else a :class:`Violation`.

    Raises:
        TypeError: For a wrong type or dtype.
        ValueError: For an argument that is not allowed.
    """
    n, m, dim, pad = arguments.check_grouping(w, pattern, dim, remainder, grouping)
    if grouping == "flat":
        group, kept = _nms.find_violation(w.reshape(-1), n, m, 0, pad).tolist()
        return None if group < 0 else Violation(coordinates(group * m, w.shape), kept)
    group, kept = _nms.find_violation(w, n, m, dim, pad).tolist()
    if group < 0:
        return None
    others = w.shape[:dim] + w.shape[dim + 1 :]
    row, group = divmod(group, ceil_div(w.shape[dim], m))
    index = coordinates(row, others)
    return Violation((*index[:dim], group * m, *index[dim:]), kept)
