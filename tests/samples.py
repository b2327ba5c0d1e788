"""Weights of every dtype, content and layout, and exact comparison."""

from __future__ import annotations

import torch
from cases import TINY, WITH_INFINITY, inf, nan, tensor
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


def random_mask(shape: tuple[int, ...], seed: int) -> Tensor:
    """A contiguous bool tensor on the default device."""
    return content(shape, torch.int8, "any bits", seed) > 0


def content(shape: tuple[int, ...], dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    """A contiguous tensor on the default device; its bits do not depend on the device.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        kind: "normal" numbers; "ties": few distinct magnitudes; "special": mostly NaN (some with a payload),
            infinities, zeros, denormals and the largest numbers; "any bits": uniform bits.
        seed: Of the generator.
    """
    with torch.device("cpu"):
        made = _content_on_cpu(shape, dtype, kind, torch.Generator().manual_seed(seed))
    return made.to(torch.get_default_device())


def _content_on_cpu(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str, generator: torch.Generator
) -> Tensor:
    itemsize = torch.empty((), dtype=dtype).element_size()
    any_bits = torch.randint(0, 256, (*shape, itemsize), generator=generator, dtype=torch.uint8)
    any_bits = any_bits.view(dtype).reshape(shape)
    if kind == "any bits":
        return any_bits
    if kind == "normal":
        return (30 * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(-127, 127).to(dtype)
    if kind == "ties":
        choices = tensor([0.0, -0.0, 1.0, -1.0, 2.0, -2.0], dtype)
    elif dtype == torch.int8:
        choices = tensor([-128, 127, -127, 0, 1, -1], dtype)
    else:
        infinities = [inf, -inf] if dtype in WITH_INFINITY else []
        numbers = [TINY[dtype], torch.finfo(dtype).max, nan, 0.0]
        choices = tensor([*infinities, *numbers, *(-x for x in numbers)], dtype)
    chosen = as_int(choices)[torch.randint(0, len(choices), shape, generator=generator)]
    if kind == "special":  # one in four any bits: NaNs with payloads among them
        use_any = torch.rand(shape, generator=generator) < 0.25
        chosen = torch.where(use_any, as_int(any_bits), chosen)
    return chosen.view(dtype)


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
