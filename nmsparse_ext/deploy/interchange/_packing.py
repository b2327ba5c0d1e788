"""Between dense weights, masks and packed weights: what the formats have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ... import ops
from ..._checks import WEIGHT_DTYPES
from ..._lt_layout import hardware_pattern
from ..._tensor_checks import refuse_violation
from ...errors import FormatError
from ...pattern import Pattern
from ...tensor import NMTensor, compress
from ..detect import detect_pattern
from ._peer import Reading


def dense(tensor: Tensor) -> Tensor:
    """The tensor with its zeros in place."""
    return tensor.to_dense() if isinstance(tensor, NMTensor) else tensor.detach()


def mask_of(weight: NMTensor) -> Tensor:
    """Bool mask of a packed weight's shape, True where a value is kept (also one that is zero)."""
    ones = torch.ones(weight.values.shape, dtype=torch.int8, device=weight.values.device)
    kept = ops.unpack(ones, weight.indices, weight.pattern, k=weight.k, dim=weight.group_dim)
    return kept.bool()


def pack_dense(name: str, weight: Tensor, reading: Reading, group_dim: int | None, *, prune: bool) -> Tensor:
    """Packs a dense weight as asked for; without a pattern as the tightest usual one that it holds.

    Raises:
        ValueError: If it violates the pattern that was asked for and is not to be pruned.
    """
    if group_dim is None or isinstance(weight, NMTensor):
        return weight
    named = name in reading.patterns
    pattern = reading.pattern(name)
    k = weight.shape[group_dim]
    if pattern is None:
        pattern = detect_pattern(weight, dim=group_dim)
        return weight if pattern is None else compress(weight, pattern, dim=group_dim)
    if pattern.is_dense or (k % pattern.m and not named):
        return weight
    try:
        return compress(weight, pattern, dim=group_dim, prune=prune)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def pack_masked(name: str, weight: Tensor, mask: Tensor, reading: Reading, group_dim: int | None) -> Tensor:
    """Packs a weight whose mask says what is kept; dense with zeros in place if the mask has no N:M pattern.

    Raises:
        FormatError: If mask and weight do not fit.
        ValueError: If the mask violates the pattern that was asked for.
    """
    if mask.shape != weight.shape:
        raise FormatError(f"{name}: the mask has shape {list(mask.shape)}, the weight {list(weight.shape)}")
    kept = mask.to(weight.device, torch.bool)
    masked = torch.where(kept, weight, torch.zeros((), dtype=weight.dtype))
    if group_dim is None or weight.dtype not in WEIGHT_DTYPES or bool(kept.all()):
        return masked
    # The mask tells more than the weight, whose kept entries may be zero.
    ones = kept.to(torch.int8)
    pattern = reading.pattern(name) or detect_pattern(ones, dim=group_dim)
    if pattern is None:
        return masked
    try:
        refuse_violation(ones, pattern, group_dim, "error")
        _, indices = ops.pack(ones, pattern, dim=group_dim)
    except ValueError as error:
        raise ValueError(f"mask of {name}: {error}") from None
    return pack_at(masked, indices, pattern, group_dim)


def pack_all_masked(
    tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], reading: Reading
) -> dict[str, Tensor]:
    """The tensors, packed where there is a mask of that name.

    Raises:
        FormatError: If a mask has no weight, or does not fit it.
        ValueError: If a mask violates the pattern that was asked for.
    """
    known = reading.weights()
    result = dict(tensors)
    for name, mask in masks.items():
        if name not in tensors:
            raise FormatError(f"there is a mask of {name!r}, but no such weight")
        group_dim = reading.group_dim(name, tensors[name], known)
        result[name] = pack_masked(name, tensors[name], mask, reading, group_dim)
    return result


def in_form(
    tensors: Mapping[str, Tensor], form: Callable[[str, NMTensor], Mapping[str, Tensor] | None]
) -> dict[str, Tensor]:
    """Packed weights as ``form`` has them, under the names that it gives; dense where that is ``None``."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        made = form(name, tensor) if isinstance(tensor, NMTensor) else None
        result |= {name: dense(tensor)} if made is None else made
    return result


def split_name(name: str) -> tuple[str, str]:
    """``"layer.0.weight" -> ("layer.0.", "weight")``."""
    start = name.rfind(".") + 1
    return name[:start], name[start:]


def pack_at(weight: Tensor, indices: Tensor, pattern: Pattern, group_dim: int) -> NMTensor:
    """Packs what stands at the given indices, bit for bit; the size of the group dim is a multiple of m."""
    kept = weight.shape[group_dim] // pattern.m * pattern.n
    ones = torch.ones((*indices.shape[:-1], kept), dtype=torch.int8, device=indices.device)
    taken = ops.unpack(ones, indices, pattern, k=weight.shape[group_dim], dim=ones.dim() - 1).bool()
    values = weight.movedim(group_dim, -1)[taken].view(ones.shape)
    shape = tuple(weight.shape)
    return NMTensor.from_packed(values, indices, pattern, group_dim=group_dim, shape=shape)


def as_hardware(weight: NMTensor) -> NMTensor | None:
    """A ``[rows, k]`` weight as 2:4 (float32: 1:2) along k; ``None`` if it is no such weight."""
    if weight.dim() != 2 or weight.group_dim != 1:
        return None
    return as_pattern(weight, hardware_pattern(weight.dtype))


def as_pattern(weight: NMTensor, wanted: Pattern) -> NMTensor | None:
    """The same weight packed as ``wanted``; ``None`` unless its pattern always satisfies that."""
    if weight.pattern == wanted:
        return weight
    fits = weight.pattern.n <= wanted.n and weight.pattern.m % wanted.m == 0
    if not fits or weight.k % wanted.m:
        return None
    return compress(weight.to_dense(), wanted, dim=weight.group_dim)
