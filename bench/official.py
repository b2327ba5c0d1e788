"""SR-STE as the authors publish it, for comparison: the mask and the term within the weight's autograd node.

Re-written from https://github.com/aojunzz/NM-sparsity (devkit/sparse_ops, MIT), for weights whose groups lie
along their last dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Sparse(torch.autograd.Function):
    """The masked weight; backward adds ``decay * (1 - mask) * weight``, at every call."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, n: int, m: int, decay: float) -> Tensor:  # noqa: D102
        groups = weight.detach().abs().reshape(-1, m)
        smallest = torch.argsort(groups, dim=1)[:, : m - n]
        mask = torch.ones_like(groups).scatter_(dim=1, index=smallest, value=0).reshape(weight.shape)
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: D102
        weight, mask = ctx.saved_tensors
        return grad + ctx.decay * (1 - mask) * weight, None, None, None
