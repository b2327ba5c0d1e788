"""Weights in panels, for the tests of what multiplies from them."""

from __future__ import annotations

import torch
from torch import Tensor

from nmsparse_ext import panels, reference
from nmsparse_ext.panels import Panels
from nmsparse_ext.pattern import Pattern

# All kinds of loops: 2-bit and 4-bit fields, one to eight slots, groups of a half and of a whole window,
# run-time numbers of slots, windows that are not full.
PATTERNS = (
    "1:2",
    "2:4",
    "1:4",
    "1:8",
    "2:8",
    "4:8",
    "1:16",
    "2:16",
    "4:16",
    "8:16",
    "3:4",
    "1:3",
    "1:1",
    "2:3",
    "5:7",
    "3:10",
    "16:16",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}


def packed(pattern: str, rows: int, k: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Panels]:
    """A pruned weight ``[rows, k]``, dense and in panels."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, k, generator=generator).to(dtype)
    p = Pattern.parse(pattern)
    values, indices = reference.compress(w, p.n, p.m, 1, True)
    return reference.decompress(values, indices, p.n, p.m, k, 1), panels.panel_pack(values, indices, p, k=k)
