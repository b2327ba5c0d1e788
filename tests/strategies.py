"""Weights for property tests: every dtype, pattern, size, layout and content; exact comparison."""

from __future__ import annotations

from typing import NamedTuple

import torch
from cases import DTYPES, TINY
from hypothesis import strategies as st
from torch import Tensor

INT_VIEW = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
KINDS = ("normal", "ties", "special", "any bits")
LAYOUTS = (
    "contiguous",
    "reversed dims",
    "channels_last",
    "every second",
    "offset",
    "expanded",
    "rotated dims",
)


def as_int(x: Tensor) -> Tensor:
    """The bits of ``x``, which also compare where numbers do not: NaN, -0."""
    return x if x.dtype in (torch.bool, torch.uint8, torch.int64) else x.view(INT_VIEW[x.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, message: str = "") -> None:
    """Same dtype, shape, device and bits."""
    assert actual.dtype == expected.dtype, f"{message}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{message}: shape {actual.shape}, expected {expected.shape}"
    assert actual.device == expected.device, message
    if not torch.equal(as_int(actual), as_int(expected)):
        at = tuple((as_int(actual) != as_int(expected)).nonzero()[0].tolist())
        raise AssertionError(f"{message}: bits differ first at {at}: {actual[at]}, expected {expected[at]}")


def content(shape: tuple[int, ...], dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    """A contiguous tensor.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        kind: "normal" numbers; "ties": few distinct magnitudes; "special": mostly NaN (some with a payload),
            infinities, zeros, denormals and the largest numbers; "any bits": uniform bits.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    itemsize = torch.empty((), dtype=dtype).element_size()
    any_bits = torch.randint(0, 256, (*shape, itemsize), generator=generator, dtype=torch.uint8)
    any_bits = any_bits.view(dtype).reshape(shape)
    if kind == "any bits":
        return any_bits
    if kind == "normal":
        return (30 * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(-127, 127).to(dtype)
    if kind == "ties":
        choices = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -2.0], dtype=torch.float64).to(dtype)
    elif dtype == torch.int8:
        choices = torch.tensor([-128, 127, -127, 0, 1, -1], dtype=dtype)
    else:
        largest = torch.finfo(dtype).max
        limits = (float("inf"), -float("inf")) if dtype != torch.float8_e4m3fn else ()
        numbers = [
            float("nan"),
            -float("nan"),
            *limits,
            0.0,
            -0.0,
            TINY[dtype],
            -TINY[dtype],
            largest,
            -largest,
        ]
        choices = torch.tensor(numbers, dtype=torch.float64).to(dtype)
    chosen = as_int(choices)[torch.randint(0, len(choices), shape, generator=generator)].view(dtype)
    if kind == "special":  # one in four any bits: NaNs with payloads among them
        use_any = torch.rand(shape, generator=generator) < 0.25
        chosen = torch.where(use_any, as_int(any_bits), as_int(chosen)).view(dtype)
    return chosen


def lay_out(x: Tensor, layout: str) -> Tensor:
    """A tensor equal to contiguous ``x`` with other strides; for "expanded", all rows are the first."""
    if layout == "contiguous" or x.dim() == 0:
        return x
    if layout == "reversed dims":
        dims = tuple(reversed(range(x.dim())))
        return x.permute(dims).contiguous().permute(dims)
    if layout == "rotated dims":
        dims = (*range(1, x.dim()), 0)
        back = (x.dim() - 1, *range(x.dim() - 1))
        return x.permute(dims).contiguous().permute(back)
    if layout == "channels_last":
        if x.dim() not in (4, 5):
            return x
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "every second":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "offset":  # starts at an address that no vector load likes
        flat = x.new_zeros(x.numel() + 1)
        flat[1:] = x.reshape(-1)
        return flat[1:].view(x.shape)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    raise ValueError(layout)


class Weight(NamedTuple):
    """A weight, and how to group it. ``dim`` is normalised."""

    w: Tensor
    n: int
    m: int
    dim: int
    label: str

    @property
    def pattern(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def k(self) -> int:
        return self.w.shape[self.dim]

    def last(self, x: Tensor) -> Tensor:
        """``x`` of the weight's shape with the group dim moved last."""
        return x.movedim(self.dim, -1)


@st.composite
def patterns(draw: st.DrawFn) -> tuple[int, int]:
    """The usual patterns often, all others sometimes."""
    usual = [(2, 4), (1, 4), (1, 2), (4, 8), (2, 8), (1, 16), (4, 16), (8, 16), (8, 32), (16, 64)]
    if draw(st.booleans()):
        return draw(st.sampled_from(usual))
    m = draw(st.integers(1, 64))
    return draw(st.integers(1, m)), m


@st.composite
def weights(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    layouts: tuple[str, ...] = LAYOUTS,
    min_k: int = 0,
) -> Weight:
    """Any weight that the ops take; group dims around every vector width, few of the rest."""
    n, m = draw(patterns())
    ndim = draw(st.integers(1, 5))
    dim = draw(st.integers(0, ndim - 1))
    shape = [draw(st.integers(1, 4)) for _ in range(ndim)]
    if draw(st.integers(0, 9)) == 0:
        shape[draw(st.integers(0, ndim - 1))] = 0
    shape[dim] = draw(st.integers(min_k, 130))
    dtype = draw(st.sampled_from(dtypes))
    kind = draw(st.sampled_from(KINDS))
    layout = draw(st.sampled_from(layouts))
    w = lay_out(content(tuple(shape), dtype, kind, draw(st.integers(0, 2**31))), layout)
    return Weight(w, n, m, dim, f"{n}:{m} {dtype} {list(shape)} {layout} {kind} dim {dim}")


def kept_by_hand(row: list[float], n: int, m: int) -> list[bool]:
    """The selection rule in plain Python."""
    kept = [False] * len(row)
    for start in range(0, len(row), m):
        group = range(start, min(start + m, len(row)))
        # NaN first, then by |w|, then by position
        order = sorted(group, key=lambda i: (row[i] == row[i], -abs(row[i]) if row[i] == row[i] else 0.0, i))
        for i in order[:n]:
            kept[i] = True
    return kept
