"""Weights for products in integers."""

from __future__ import annotations

import torch
from torch import Tensor

from nmsparse_ext import reference
from nmsparse_ext.int8 import Int8Panels, int8_panels
from nmsparse_ext.pattern import Pattern

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_int8(rows: int, k: int, seed: int = 0) -> Tensor:
    """Any bytes, with -128 and 127 more often than by chance."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(-128, 128, (rows, k), generator=generator).to(torch.int8)
    extreme = torch.rand(rows, k, generator=generator)
    return torch.where(extreme < 0.1, -128, torch.where(extreme > 0.9, 127, w)).to(torch.int8)


def packed(pattern: str, rows: int, k: int, seed: int = 0) -> tuple[Tensor, Int8Panels]:
    """A pruned int8 weight ``[rows, k]``, dense and in panels with random scales."""
    p = Pattern.parse(pattern)
    values, indices = reference.compress(random_int8(rows, k, seed), p.n, p.m, 1, True)
    panels = int8_panels(values, indices, p, k=k)
    scales = 0.01 * torch.rand(panels.scales.shape, generator=torch.Generator().manual_seed(seed))
    return reference.decompress(values, indices, p.n, p.m, k, 1), panels._replace(scales=scales)
