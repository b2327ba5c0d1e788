"""Weights and inputs for packed convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nmsparse_ext import reference
from nmsparse_ext._build import extension
from nmsparse_ext.conv_panels import conv_pack
from nmsparse_ext.panels import Panels
from nmsparse_ext.pattern import Pattern

needs_extension = pytest.mark.skipif(extension is None, reason="the engine is for the compiled extension")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def integers(*shape: int, dtype: torch.dtype = torch.float32, limit: int = 3) -> Tensor:
    """Small integers: exact in every dtype, as are the sums of their products here."""
    return torch.randint(-limit, limit + 1, shape).to(dtype)


def packed(w: Tensor, pattern: str) -> tuple[Tensor, Panels]:
    """A weight pruned to ``pattern``, dense and in panels."""
    p = Pattern.parse(pattern)
    values, indices = reference.compress(w, p.n, p.m, 1, True)
    return reference.decompress(values, indices, p.n, p.m, w.shape[1], 1), conv_pack(
        values, indices, p, k=w.shape[1]
    )
