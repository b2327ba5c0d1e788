"""The selection rule in PyTorch: the order in which the weights of a group are kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import ceil_div

_INT_VIEW = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# dtype -> the one key that stands for every NaN: just above the largest key of a number or infinity.
_NAN_KEY = {
    torch.float64: 0x7FF0_0000_0000_0001,
    torch.float32: 0x7F80_0001,
    torch.bfloat16: 0x7F81,
    torch.float16: 0x7C01,
    torch.float8_e4m3fn: 0x7F,
}


def as_int(x: Tensor) -> Tensor:
    """``x``'s memory as integers of the same width; shares storage."""
    return x.view(_INT_VIEW[x.element_size()])


def magnitude_key(w: Tensor) -> Tensor:
    """Integers in the order of ``|w|``: -0.0 equals 0.0, all NaNs are equal and largest, int8 -128 is 128."""
    if w.dtype == torch.int8:
        return w.to(torch.int16).abs()
    bits = as_int(w)
    return (bits & torch.iinfo(bits.dtype).max).clamp(max=_NAN_KEY[w.dtype])


def grouped(x: Tensor, m: int, dim: int) -> Tensor:
    """``x`` with the group dim moved last, zero-padded to whole groups: ``[..., groups, m]``."""
    x = x.movedim(dim, -1)
    groups = ceil_div(x.shape[-1], m)
    x = F.pad(x, (0, groups * m - x.shape[-1]))
    return x.reshape(*x.shape[:-1], groups, m)


def ranking(w: Tensor, m: int, dim: int) -> Tensor:
    """Per group, the positions from the largest ``|w|`` to the smallest: ``[..., groups, m]``.

    Equal ones stand in order of position. Virtual positions past the end of ``w`` hold zeros and come last in
    their group, so every real weight outranks them.
    """
    return grouped(magnitude_key(w), m, dim).sort(dim=-1, descending=True, stable=True).indices
