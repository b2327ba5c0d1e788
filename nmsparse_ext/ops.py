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

The functions after ``find_violation`` are the thin layer on which training and deployment stand.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import _ops  # noqa: F401  (registers torch.ops.nmsparse)
from ._checks import GRAD_DTYPES, MAX_DIMS, WEIGHT_DTYPES, bits_shape, ceil_div
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

Remainder = Literal["error", "pad"]
Grouping = Literal["channel", "flat"]

_nms = torch.ops.nmsparse


# -------------------------------------------------------------------------------------------- argument checks


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} must be one of {', '.join(map(str, allowed))}, got {tensor.dtype}")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")


def _check_same_device(name: str, tensor: Tensor, w_name: str, w: Tensor) -> None:
    if tensor.device != w.device:
        raise ValueError(f"{name} must be on the device of {w_name}, {w.device}, got {tensor.device}")


def _check_same_shape(name: str, tensor: Tensor, w_name: str, w: Tensor) -> None:
    if tensor.shape != w.shape:
        raise ValueError(f"{name} must have the shape of {w_name}, {list(w.shape)}, got {list(tensor.shape)}")


def _check_writable(name: str, tensor: Tensor) -> None:
    # An empty channels_last tensor has strides of 0 too.
    if tensor.numel() > 0 and any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        raise ValueError(
            f"{name} is written to, but several of its elements share one memory location "
            f"(shape {list(tensor.shape)}, strides {list(tensor.stride())}); pass a clone"
        )


def _check_bits(name: str, bits: Tensor, shape: torch.Size, dim: int) -> None:
    _check_tensor(name, bits)
    _check_dtype(name, bits, (torch.uint8,))
    expected = bits_shape(shape, dim)
    if list(bits.shape) != expected:
        raise ValueError(
            f"{name} must have shape {expected} for a weight of shape {list(shape)} and dim {dim}, "
            f"got {list(bits.shape)}"
        )
    if not bits.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(bits.stride())}")


def _check_dims(name: str, tensor: Tensor) -> None:
    if not 1 <= tensor.dim() <= MAX_DIMS:
        raise ValueError(f"{name} must have 1 to {MAX_DIMS} dimensions, got {tensor.dim()}")


def _normalize_dim(name: str, ndim: int, dim: int) -> int:
    """``dim`` as an index from the front; for one dimension the default 1 means 0."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int, got {dim!r} of type {type(dim).__name__}")
    if ndim == 1 and dim == 1:
        return 0
    if not -ndim <= dim < ndim:
        raise ValueError(f"dim must be in [{-ndim}, {ndim - 1}] for {name} with {ndim} dimensions, got {dim}")
    return dim % ndim


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k must be an int >= 0, got {k!r}")
    if k < 0:
        raise ValueError(f"k must be an int >= 0, got {k}")


def _check_weight(w: Tensor, dim: int) -> int:
    """Checks a dense weight; returns the normalised dim."""
    _check_tensor("w", w)
    if w.layout != torch.strided:
        raise TypeError(f"w must be a dense (torch.strided) tensor, got {w.layout}")
    _check_dtype("w", w, WEIGHT_DTYPES)
    _check_dims("w", w)
    return _normalize_dim("w", w.dim(), dim)


def _check_remainder(k: int, m: int, remainder: str, what: str) -> bool:
    """Whether to pad. Refuses a remainder that was not asked for."""
    _check_choice("remainder", remainder, ("error", "pad"))
    pad = remainder == "pad"
    if not pad and k % m != 0:
        raise ValueError(
            f"w has {k} weights {what}, no multiple of m = {m}; pass remainder='pad' to allow it"
        )
    return pad


def _arguments(
    w: Tensor, pattern: Pattern | str, dim: int, remainder: str, grouping: str = "channel"
) -> tuple[int, int, int, bool]:
    """Checks what every grouping function takes; returns the op's ``n, m, dim, pad``."""
    dim = _check_weight(w, dim)
    p = Pattern.parse(pattern)
    _check_choice("grouping", grouping, ("channel", "flat"))
    if grouping == "flat":
        return p.n, p.m, 0, _check_remainder(w.numel(), p.m, remainder, "when flattened")
    return p.n, p.m, dim, _check_remainder(w.shape[dim], p.m, remainder, f"along dim {dim}")


def _check_out(w: Tensor, out: Tensor) -> None:
    _check_tensor("out", out)
    _check_dtype("out", out, (w.dtype,))
    _check_same_shape("out", out, "w", w)
    _check_same_device("out", out, "w", w)
    _check_writable("out", out)
    if torch.is_grad_enabled() and (w.requires_grad or out.requires_grad):
        raise ValueError(
            "out cannot be given where gradients are recorded; leave it away or use torch.no_grad()"
        )
    # A traced graph has no addresses to compare; there, memory planning keeps different tensors apart.
    if not torch.compiler.is_compiling() and out is not w and _overlaps_partly(w, out):
        raise ValueError(
            "out overlaps w (or interleaves with it) in memory; pass w itself or separate memory"
        )


def _overlaps_partly(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype and shape share memory other than element for element.

    Compares address ranges, so tensors that interleave without a common element count as well.
    """
    if a.numel() == 0 or a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    if a.storage_offset() == b.storage_offset() and a.stride() == b.stride():
        return False

    def span(t: Tensor) -> tuple[int, int]:
        first = int(t.storage_offset())
        return first, first + sum(
            (size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)
        )

    (a_first, a_last), (b_first, b_last) = span(a), span(b)
    return a_first <= b_last and b_first <= a_last


def _check_in_place(name: str, tensor: Tensor) -> None:
    _check_writable(name, tensor)
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(f"{name} requires grad and cannot be pruned in place; use torch.no_grad()")


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
    n, m, dim, pad = _arguments(w, pattern, dim, remainder, grouping)
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
    n, m, dim, pad = _arguments(w, pattern, dim, remainder, grouping)
    if out is not None:
        _check_out(w, out)
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
    n, m, dim, pad = _arguments(w, pattern, dim, remainder, grouping)
    _check_in_place("w", w)
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
    _check_weight(w, -1)
    if w.dim() != 2 or w.shape[0] % 4 != 0 or w.shape[1] % 4 != 0:
        raise ValueError(
            f"w must be 2-dimensional with sizes that are multiples of 4, got shape {list(w.shape)}"
        )
    packed = _nms.transposable_bits(w)
    return packed if bits else _nms.unpack_bits(packed, w.shape[1], 1)


def _check_masks(a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    for name, mask in ((a_name, a), (b_name, b)):
        _check_tensor(name, mask)
        _check_dtype(name, mask, (torch.bool, torch.uint8))
    if a.dtype != b.dtype:
        raise TypeError(
            f"{a_name} and {b_name} must both be bool masks or both be packed bits, "
            f"got {a.dtype} and {b.dtype}"
        )
    _check_same_shape(b_name, b, a_name, a)
    _check_same_device(b_name, b, a_name, a)


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
    _check_masks("mask_a", mask_a, "mask_b", mask_b)
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
    n, m, dim, pad = _arguments(w, pattern, dim, remainder, grouping)
    if grouping == "flat":
        group, kept = _nms.find_violation(w.reshape(-1), n, m, 0, pad).tolist()
        return None if group < 0 else Violation(_coordinates(group * m, w.shape), kept)
    group, kept = _nms.find_violation(w, n, m, dim, pad).tolist()
    if group < 0:
        return None
    others = w.shape[:dim] + w.shape[dim + 1 :]
    row, group = divmod(group, ceil_div(w.shape[dim], m))
    index = _coordinates(row, others)
    return Violation((*index[:dim], group * m, *index[dim:]), kept)


def _coordinates(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Where the element of row-major number ``flat`` stands in a tensor of ``shape``."""
    index: list[int] = []
    for size in reversed(shape):
        flat, position = divmod(flat, size)
        index.append(position)
    return tuple(reversed(index))


# ----------------------------------------------------------------- the thin layer for training and deployment


def mask_bits(w: Tensor, pattern: Pattern | str, *, dim: int = 1, remainder: Remainder = "error") -> Tensor:
    """The packed mask of ``w``: uint8 ``[other dims..., ceil(K / 8)]``."""
    n, m, dim, pad = _arguments(w, pattern, dim, remainder)
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
    n, m, dim, pad = _arguments(w, pattern, dim, remainder)
    if bits is not None:
        _check_bits("bits", bits, w.shape, dim)
        _check_same_device("bits", bits, "w", w)
    if out is w:
        _check_in_place("out", out)
        _nms.prune_(w, n, m, dim, pad, bits)
    else:
        _check_out(w, out)
        _nms.prune_out(w, n, m, dim, pad, out, bits)


def pack_bits(mask: Tensor, *, dim: int = 1) -> Tensor:
    """A bool mask as packed bits: uint8 ``[other dims..., ceil(K / 8)]``."""
    _check_tensor("mask", mask)
    _check_dtype("mask", mask, (torch.bool,))
    _check_dims("mask", mask)
    return _nms.pack_bits(mask, _normalize_dim("mask", mask.dim(), dim))


def unpack_bits(bits: Tensor, k: int, *, dim: int = 1) -> Tensor:
    """Packed bits as a contiguous bool mask whose group dim, of size ``k``, stands at ``dim``."""
    _check_tensor("bits", bits)
    _check_dtype("bits", bits, (torch.uint8,))
    _check_dims("bits", bits)
    dim = _normalize_dim("bits", bits.dim(), dim)
    _check_k(k)
    if bits.shape[-1] != ceil_div(k, 8):
        raise ValueError(f"k must fit the {bits.shape[-1]} bytes a row of bits, got {k}")
    return _nms.unpack_bits(bits.contiguous(), k, dim)


def apply_bits(w: Tensor, bits: Tensor, *, dim: int = 1) -> Tensor:
    """``torch.where(mask, w, 0)`` for a packed mask, in ``w``'s layout; differentiable in ``w``."""
    dim = _check_weight(w, dim)
    _check_bits("bits", bits, w.shape, dim)
    _check_same_device("bits", bits, "w", w)
    return _nms.apply_bits(w, bits, dim)


def apply_bits_(w: Tensor, bits: Tensor, *, dim: int = 1) -> Tensor:
    """:func:`apply_bits` in place; returns ``w``."""
    dim = _check_weight(w, dim)
    _check_bits("bits", bits, w.shape, dim)
    _check_same_device("bits", bits, "w", w)
    _check_in_place("w", w)
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
    dim = _check_weight(w, dim)
    _check_tensor("grad", grad)
    _check_dtype("w", w, GRAD_DTYPES)
    _check_dtype("grad", grad, GRAD_DTYPES)
    _check_same_shape("grad", grad, "w", w)
    _check_same_device("grad", grad, "w", w)
    _check_bits("bits", bits, w.shape, dim)
    _check_same_device("bits", bits, "w", w)
    _check_in_place("grad", grad)
    if scale is not None:
        _check_tensor("scale", scale)
        _check_dtype("scale", scale, (torch.float32,))
        if scale.numel() != 1:
            raise ValueError(f"scale must hold one number, got shape {list(scale.shape)}")
        _check_same_device("scale", scale, "w", w)
    _nms.add_pruned_(grad, w, bits, dim, float(alpha), scale)
    return grad


def sad_into(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Writes the number of differing weights of two masks to ``out``, one int64; never syncs a GPU."""
    _check_masks("a", a, "b", b)
    _check_tensor("out", out)
    _check_dtype("out", out, (torch.int64,))
    if out.numel() != 1:
        raise ValueError(f"out must hold one number, got shape {list(out.shape)}")
    _check_same_device("out", out, "a", a)
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
    n, m, dim, pad = _arguments(w, pattern, dim, remainder)
    return _nms.compress(w, n, m, dim, pad)


def _check_indices_tensor(indices: Tensor, p: Pattern, k: int) -> None:
    _check_tensor("indices", indices)
    _check_dtype("indices", indices, (torch.uint8,))
    _check_dims("indices", indices)
    _check_k(k)
    row_bytes = ceil_div(p.groups(k) * p.bits_per_group, 8)
    if indices.shape[-1] != row_bytes:
        raise ValueError(
            f"indices must have {row_bytes} bytes a row for {p} and k = {k}, got {indices.shape[-1]}"
        )


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
    _check_tensor("values", values)
    _check_dtype("values", values, WEIGHT_DTYPES)
    _check_dims("values", values)
    dim = _normalize_dim("values", values.dim(), dim)
    _check_indices_tensor(indices, p, k)
    if values.shape[-1] != p.groups(k) * p.n:
        raise ValueError(
            f"values must have {p.groups(k) * p.n} entries a row for {p} and k = {k}, got {values.shape[-1]}"
        )
    if values.shape[:-1] != indices.shape[:-1]:
        raise ValueError(
            f"indices must agree with values, of shape {list(values.shape)}, in all but the last "
            f"dimension, got shape {list(indices.shape)}"
        )
    _check_same_device("indices", indices, "values", values)
    return _nms.decompress(values.contiguous(), indices.contiguous(), p.n, p.m, k, dim)


def check_indices(indices: Tensor, pattern: Pattern | str, *, k: int) -> tuple[int, ...] | None:
    """Finds the first group whose packed indices no encoder would write.

    Legal are ``n`` ascending, distinct indices below ``m`` (or a bitmask with ``n`` bits set) and zeros in
    the unused bits of a row's last byte. Waits for the result on a GPU.

    Returns:
        None if all are legal, else ``(other dims..., group)`` of the first bad one.
    """
    p = Pattern.parse(pattern)
    _check_indices_tensor(indices, p, k)
    bad = int(_nms.check_indices(indices.contiguous(), p.n, p.m, k).item())
    return None if bad < 0 else _coordinates(bad, (*indices.shape[:-1], p.groups(k)))
