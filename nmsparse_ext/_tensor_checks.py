"""Checks of what an `NMTensor` is made from."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from ._build import extension
from ._checks import WEIGHT_DTYPES, holds_data
from .pattern import Pattern

_CHECK_BYTES = 1 << 14
REMAINDERS: tuple[ops.Remainder, ...] = ("error", "pad")


def check_parts(
    values: Tensor,
    indices: Tensor,
    pattern: Pattern,
    group_dim: int,
    shape: tuple[int, ...],
    remainder: ops.Remainder,
) -> None:
    """Raises unless the parts make one packed weight; see `NMTensor.from_packed`."""
    for name, part in (("values", values), ("indices", indices)):
        if not isinstance(part, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(part).__name__}")
    if values.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"values must be one of {', '.join(map(str, WEIGHT_DTYPES))}, got {values.dtype}")
    if indices.dtype != torch.uint8:
        raise TypeError(f"indices must be torch.uint8, got {indices.dtype}")
    if indices.device != values.device:
        raise ValueError(f"indices must be on the device of values, {values.device}, got {indices.device}")
    if not 1 <= len(shape) <= 5 or any(size < 0 for size in shape):
        raise ValueError(f"shape must have 1 to 5 non-negative sizes, got {shape}")
    if not 0 <= group_dim < len(shape):
        raise ValueError(f"group_dim must be in [0, {len(shape)}) for shape {shape}, got {group_dim}")
    if remainder not in REMAINDERS:
        raise ValueError(f"remainder must be one of {REMAINDERS}, got {remainder!r}")
    k = shape[group_dim]
    if remainder == "error" and k % pattern.m:
        raise ValueError(
            f"size {k} of group dim {group_dim} is no multiple of m = {pattern.m}, and remainder is 'error'"
        )
    rows = [*shape[:group_dim], *shape[group_dim + 1 :]]
    groups = pattern.groups(k)
    wanted = [*rows, groups * pattern.n]
    if list(values.shape) != wanted:
        raise ValueError(
            f"values must have shape {wanted} for {pattern} and shape {shape}, got {list(values.shape)}"
        )
    wanted = [*rows, -(-groups * pattern.bits_per_group // 8)]
    if list(indices.shape) != wanted:
        raise ValueError(
            f"indices must have shape {wanted} for {pattern} and shape {shape}, got {list(indices.shape)}"
        )
    if holds_data(indices):
        bad = _illegal_group(indices, pattern, k)
        if bad is not None:
            raise ValueError(
                f"indices of group {list(bad)} ([other dims..., group]) are no legal choice of {pattern.n} "
                f"of {pattern.m}: they must be distinct, ascending and inside the group, and unused bits zero"
            )


def _illegal_group(indices: Tensor, pattern: Pattern, k: int) -> tuple[int, ...] | None:
    """The first group whose indices are illegal: its place among the other dims, and its number."""
    if indices.numel() == 0:
        return None
    rows = indices.reshape(-1, indices.shape[-1])
    # In pieces: without the extension the check takes a hundred times the memory of what it looks at.
    step = len(rows) if extension is not None else max(1, _CHECK_BYTES // rows.shape[1])
    for begin in range(0, len(rows), step):
        bad = ops.check_indices(rows[begin : begin + step], pattern, k=k)
        if bad is not None:
            row, group = begin + bad[0], bad[1]
            where: tuple[int, ...] = (group,)
            for size in reversed(indices.shape[:-1]):
                where = (row % size, *where)
                row //= size
            return where
    return None


def refuse_violation(w: Tensor, pattern: Pattern, dim: int, remainder: ops.Remainder) -> None:
    """Raises a ValueError that names the first group of ``w`` with more than n nonzeros."""
    violation = ops.find_violation(w, pattern, dim=dim, remainder=remainder)
    if violation is not None:
        raise ValueError(
            f"w does not satisfy {pattern}: the group along dim {dim} that starts at {list(violation.index)} "
            f"has {violation.kept} nonzeros, at most {pattern.n} are allowed. Train or prune it with that "
            "pattern, or pass prune=True"
        )
