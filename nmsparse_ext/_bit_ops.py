"""The thin layer on which training and deployment stand: packed bits, and packing; part of `ops`.

What arguments mean is said there.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _ops  # noqa: F401  (registers torch.ops.nmsparse)
from ._checks import GRAD_DTYPES, WEIGHT_DTYPES, ceil_div
from .pattern import Pattern

Remainder = Literal["error", "pad"]

_nms = torch.ops.nmsparse


def mask_bits(w: Tensor, pattern: Pattern | str, *, dim: int = 1, remainder: Remainder = "error") -> Tensor:
    """The packed mask of ``w``: uint8 ``[other dims..., ceil(K / 8)]``."""
    n, m, dim, pad = arguments.check_grouping(w, pattern, dim, remainder)
    return _nms.mask_bits(w, n, m, dim, pad)


def prune_into(
    w: Tensor,
    pattern: Pattern | str,
    *,
    dim: int = 1,
    out: Tensor,
    bits: Tensor | None = None,
    remainder: Remainder = "error",
) -> None:
    """Writes the pruned ``w`` to ``out`` (``w`` itself or separate memory) and its mask to ``bits``."""
    n, m, dim, pad = arguments.check_grouping(w, pattern, dim, remainder)
    if bits is not None:
        arguments.check_bits("bits", bits, w.shape, dim)
        arguments.check_same_device("bits", bits, "w", w)
    if out is w:
        arguments.check_in_place("out", out)
        _nms.prune_(w, n, m, dim, pad, bits)
    else:
        arguments.check_out(w, out)
        _nms.prune_out(w, n, m, dim, pad, out, bits)


def pack_bits(mask: Tensor, *, dim: int = 1) -> Tensor:
    """A bool mask as packed bits: uint8 ``[other dims..., ceil(K / 8)]``."""
    arguments.check_tensor("mask", mask)
    arguments.check_dtype("mask", mask, (torch.bool,))
    arguments.check_dims("mask", mask)
    return _nms.pack_bits(mask, arguments.normalize_dim("mask", mask.dim(), dim))


def unpack_bits(bits: Tensor, k: int, *, dim: int = 1) -> Tensor:
    """Packed bits as a contiguous bool mask whose group dim, of size ``k``, stands at ``dim``."""
    arguments.check_tensor("bits", bits)
    arguments.check_dtype("bits", bits, (torch.uint8,))
    arguments.check_dims("bits", bits)
    dim = arguments.normalize_dim("bits", bits.dim(), dim)
    arguments.check_k(k)
    if bits.shape[-1] != ceil_div(k, 8):
        raise ValueError(f"k must fit the {bits.shape[-1]} bytes a row of bits, got {k}")
    return _nms.unpack_bits(bits.contiguous(), k, dim)


def apply_bits(w: Tensor, bits: Tensor, *, dim: int = 1) -> Tensor:
    """``torch.where(mask, w, 0)`` for a packed mask, in ``w``'s layout; differentiable in ``w``."""
    dim = arguments.check_weight(w, dim)
    arguments.check_bits("bits", bits, w.shape, dim)
    arguments.check_same_device("bits", bits, "w", w)
    return _nms.apply_bits(w, bits, dim)


def apply_bits_(w: Tensor, bits: Tensor, *, dim: int = 1) -> Tensor:
    """:func:`apply_bits` in place; returns ``w``."""
    dim = arguments.check_weight(w, dim)
    arguments.check_bits("bits", bits, w.shape, dim)
    arguments.check_same_device("bits", bits, "w", w)
    arguments.check_in_place("w", w)
    _nms.apply_bits_(w, bits, dim)
    return w


def add_pruned_(
    grad: Tensor, w: Tensor, bits: Tensor, *, dim: int = 1, alpha: float, scale: Tensor | None = None
) -> Tensor:
    """``grad += alpha * scale * w`` where ``bits`` says pruned; returns ``grad``.

    The update of SR-STE. The kept entries of ``grad`` keep their bits.

    Args:
        grad: Float64, float32, bfloat16 or float16, ``w``'s shape.
        w: The dense weight; dtype and layout may differ from ``grad``'s.
        bits: ``w``'s packed mask.
        dim: The group dim.
        alpha: A number.
        scale: One float32 on ``w``'s device (such as a gradient scaler's), read there without a sync.
    """
    dim = arguments.check_weight(w, dim)
    arguments.check_tensor("grad", grad)
    arguments.check_dtype("w", w, GRAD_DTYPES)
    arguments.check_dtype("grad", grad, GRAD_DTYPES)
    arguments.check_same_shape("grad", grad, "w", w)
    arguments.check_same_device("grad", grad, "w", w)
    arguments.check_bits("bits", bits, w.shape, dim)
    arguments.check_same_device("bits", bits, "w", w)
    arguments.check_in_place("grad", grad)
    if scale is not None:
        arguments.check_tensor("scale", scale)
        arguments.check_dtype("scale", scale, (torch.float32,))
        if scale.numel() != 1:
            raise ValueError(f"scale must hold one number, got shape {list(scale.shape)}")
        arguments.check_same_device("scale", scale, "w", w)
    _nms.add_pruned_(grad, w, bits, dim, float(alpha), scale)
    return grad


def sad_into(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Writes the number of differing weights of two masks to ``out``, one int64; never syncs a GPU."""
    arguments.check_masks("a", a, "b", b)
    arguments.check_tensor("out", out)
    arguments.check_dtype("out", out, (torch.int64,))
    if out.numel() != 1:
        raise ValueError(f"out must hold one number, got shape {list(out.shape)}")
    arguments.check_same_device("out", out, "a", a)
    _nms.sad_out(a.contiguous(), b.contiguous(), out)
    return out


def pack(
    w: Tensor, pattern: Pattern | str, *, dim: int = 1, remainder: Remainder = "error"
) -> tuple[Tensor, Tensor]:
    """Prunes and packs ``w``; differentiable in ``w``.

    Returns:
        ``values [other dims..., groups * n]`` of ``w``'s dtype: the kept weights of each group in order, and
        ``indices`` uint8 ``[other dims..., bytes]``: where they stood, ``Pattern.bits_per_group`` bits a
        group.
    """
    n, m, dim, pad = arguments.check_grouping(w, pattern, dim, remainder)
    return _nms.compress(w, n, m, dim, pad)


def unpack(values: Tensor, indices: Tensor, pattern: Pattern | str, *, k: int, dim: int = 1) -> Tensor:
    """The dense weight of a packed one; differentiable in ``values``.

    Args:
        values: ``[other dims..., groups * n]``.
        indices: uint8 ``[other dims..., bytes]``; fields that point outside their group are ignored, see
            :func:`check_indices`.
        pattern: The pattern it was packed with.
        k: Size of the group dim.
        dim: Where the group dim goes.

    Returns:
        A contiguous tensor with the group dim, of size ``k``, at ``dim``.
    """
    p = Pattern.parse(pattern)
    arguments.check_tensor("values", values)
    arguments.check_dtype("values", values, WEIGHT_DTYPES)
    arguments.check_dims("values", values)
    dim = arguments.normalize_dim("values", values.dim(), dim)
    arguments.check_indices(indices, p, k)
    if values.shape[-1] != p.groups(k) * p.n:
        raise ValueError(
            f"values must have {p.groups(k) * p.n} entries a row for {p} and k = {k}, got {values.shape[-1]}"
        )
    if values.shape[:-1] != indices.shape[:-1]:
        raise ValueError(
            f"indices must agree with values, of shape {list(values.shape)}, in all but the last "
            f"dimension, got shape {list(indices.shape)}"
        )
    arguments.check_same_device("indices", indices, "values", values)
    return _nms.decompress(values.contiguous(), indices.contiguous(), p.n, p.m, k, dim)


def check_indices(indices: Tensor, pattern: Pattern | str, *, k: int) -> tuple[int, ...] | None:
    """Finds the first group whose packed indices no encoder would write.

    Legal are ``n`` ascending, distinct indices below ``m`` (or a bitmask with ``n`` bits set) and zeros in
    the unused bits of a row's last byte. Waits for the result on a GPU.

    Returns:
        None if all are legal, else ``(other dims..., group)`` of the first bad one.
    """
    p = Pattern.parse(pattern)
    arguments.check_indices(indices, p, k)
    bad = int(_nms.check_indices(indices.contiguous(), p.n, p.m, k).item())
    return None if bad < 0 else coordinates(bad, (*indices.shape[:-1], p.groups(k)))


def coordinates(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Where the element of row-major number ``flat`` stands in a tensor of ``shape``."""
    index: list[int] = []
    for size in reversed(shape):
        flat, position = divmod(flat, size)
        index.append(position)
    return tuple(reversed(index))
