"""Argument checks of the one-pass optimizer ops, shared by the reference kernels and the fake kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks as checks

TERMS = ("none", "gradient", "decoupled", "masked")


def check_step(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    sparse: Sequence[Tensor],
    bits: Sequence[Tensor],
    changes: Sequence[Tensor],
    patterns: Sequence[int],
    term: str,
) -> None:
    """Checks of everything that both optimizers take."""
    count = len(sparse)
    torch._check(len(grads) == len(weights), lambda: "there must be as many grads as weights")
    for tensors in states:
        torch._check(
            len(tensors) == len(weights), lambda: "there must be as many tensors of state as weights"
        )
    torch._check(
        count <= len(weights) and len(bits) == count and len(changes) == count and len(patterns) == 3 * count,
        lambda: "sparse, bits, changes and patterns must belong to the first weights",
    )
    torch._check(term in TERMS, lambda: f"term must be one of {', '.join(map(repr, TERMS))}, got {term!r}")
    for i, weight in enumerate(weights):
        torch._check(
            weight.dtype in checks.GRAD_DTYPES,
            lambda weight=weight: f"weights must be floating point, got {weight.dtype}",
        )
        checks.check_writable(weight, "weights")
        _check_alike(weight, grads[i], "weights and grads", narrower=True)
        for tensors in states:
            _check_alike(weight, tensors[i], "weights and their state")
        if i < count:
            n, m, dim = patterns[3 * i : 3 * i + 3]
            checks.check_weight(weight, max(n, 1), m, dim, False)
            _check_alike(weight, sparse[i], "weights and sparse", narrower=True)
            checks.check_bits(bits[i], weight, dim)
            torch._check(
                changes[i].dtype == torch.int64
                and changes[i].numel() == 1
                and changes[i].device == weight.device,
                lambda: "changes must be one int64 each, on the weights' device",
            )


def check_scalars(weights: Sequence[Tensor], *scalars: Tensor | None) -> None:
    """Checks of the numbers that may live on a device."""
    for scalar in scalars:
        if scalar is not None and weights:
            torch._check(
                scalar.dtype == torch.float32 and scalar.numel() == 1 and scalar.device == weights[0].device,
                lambda: "lr_tensor, grad_scale and found_inf must be one float32 on the weights' device",
            )


def check_steps(weights: Sequence[Tensor], steps: Sequence[Tensor]) -> None:
    """Checks of AdamW's step numbers."""
    torch._check(len(steps) == len(weights), lambda: "there must be as many steps as weights")
    for step in steps:
        check_scalars(weights, step)


def _check_alike(weight: Tensor, other: Tensor, names: str, narrower: bool = False) -> None:
    torch._check(weight.shape == other.shape, lambda: f"{names} must have the same shape")
    torch._check(weight.device == other.device, lambda: f"{names} must be on the same device")
    torch._check(
        weight.dtype == other.dtype
        or (narrower and weight.dtype == torch.float32 and other.dtype in (torch.bfloat16, torch.float16)),
        lambda: f"{names} must have the same dtype{', or be narrower than float32' * narrower}",
    )
