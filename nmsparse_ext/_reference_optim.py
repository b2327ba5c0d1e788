"""The one-pass optimizer steps in pure PyTorch: twins of csrc/core/optim_step.h, operation by operation.

Every product and sum is an operation of its own, so that each is rounded once, as in the compiled kernels: on
CPUs both give the same bits, except AdamW in float64, as PyTorch's own square root is not exact there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import _optim_checks as checks
from . import reference

Update = Callable[[Tensor, Tensor, list[Tensor]], Tensor]


def sgd_(
    weights: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    sparse: list[Tensor],
    bits: list[Tensor],
    changes: list[Tensor],
    patterns: list[int],
    term: str,
    lambda_w: float,
    lr: float,
    lr_tensor: Tensor | None,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step of SGD: the dense weights, their momenta, and behind them masks and masked weights.

    Args:
        weights: What is updated. Of the first ``len(sparse)``, the dense weights behind them; the others are
            parameters without a pattern. float64, float32, bfloat16 or float16.
        grads: Their gradients; of float32 weights also bfloat16 or float16.
        momenta: Their momenta, of the weights' dtype; not looked at if ``momentum`` is 0.
        sparse: The sparse parameters, to be ``where(mask, weight, 0)``.
        bits: Their packed masks; what they are before the step tells which weights ``term`` is for.
        changes: One int64 each: receives the number of mask bits that changed.
        patterns: ``n, m, dim`` of each sparse parameter; ``n = 0`` leaves its mask as it is.
        term: For pruned weights: ``"none"``; ``"gradient"``, ``grad += lambda_w * weight``; ``"decoupled"``,
            ``weight -= lr * lambda_w * weight``; or ``"masked"``, ``grad = 0``.
        lambda_w: The strength of the term.
        lr: The learning rate.
        lr_tensor: A factor of it (one float32), for learning rates that live on a device.
        momentum: As `torch.optim.SGD`.
        dampening: As `torch.optim.SGD`.
        weight_decay: As `torch.optim.SGD`.
        nesterov: As `torch.optim.SGD`.
        maximize: As `torch.optim.SGD`.
        first: The momenta hold nothing yet.
        grad_scale: What the gradients are multiplied by (one float32).
        found_inf: One float32: the step is skipped if it is not 0.
    """
    states = [momenta] if momentum else []
    checks.check_step(weights, grads, states, sparse, bits, changes, patterns, term)
    checks.check_scalars(weights, lr_tensor, grad_scale, found_inf)
    lr = _times(lr, lr_tensor)

    def update(w: Tensor, g: Tensor, state: list[Tensor]) -> Tensor:
        if weight_decay:
            g = g + w * weight_decay
        if momentum:
            buffer = g if first else state[0] * momentum + g * (1 - dampening)
            g = g + buffer * momentum if nesterov else buffer
            state[0] = buffer
        return w - g * lr

    _step(
        weights,
        grads,
        states,
        sparse,
        bits,
        changes,
        patterns,
        term,
        lambda_w,
        lr,
        maximize,
        grad_scale,
        found_inf,
        [update] * len(weights),
    )


def adamw_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    sparse: list[Tensor],
    bits: list[Tensor],
    changes: list[Tensor],
    patterns: list[int],
    term: str,
    lambda_w: float,
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step of AdamW; arguments as for ``sgd_`` and `torch.optim.AdamW`.

    ``steps`` are the numbers of this step (one float32 each); ``max_exp_avg_sqs`` is looked at only if
    ``amsgrad``.
    """
    states = [exp_avgs, exp_avg_sqs, *([max_exp_avg_sqs] if amsgrad else [])]
    checks.check_step(weights, grads, states, sparse, bits, changes, patterns, term)
    checks.check_scalars(weights, lr_tensor, grad_scale, found_inf)
    checks.check_steps(weights, steps)
    lr = _times(lr, lr_tensor)

    def update_at(step: float) -> Update:
        step_size, root = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)

        def update(w: Tensor, g: Tensor, state: list[Tensor]) -> Tensor:
            w = w * (1 - lr * weight_decay)
            state[0] = state[0] + (g - state[0]) * (1 - beta1)
            state[1] = state[1] * beta2 + (g * (1 - beta2)) * g
            v = state[1]
            if amsgrad:
                v = state[2] = torch.where(v <= state[2], state[2], v)
            return w - (state[0] * step_size) / (_square_root(v) / root + eps)

        return update

    _step(
        weights,
        grads,
        states,
        sparse,
        bits,
        changes,
        patterns,
        term,
        lambda_w,
        lr,
        maximize,
        grad_scale,
        found_inf,
        [update_at(step.item()) for step in steps],
    )


def _square_root(v: Tensor) -> Tensor:
    """The correctly rounded root of float32 numbers, which ``sqrt`` alone is not on every CPU."""
    return v.double().sqrt().to(v.dtype)


def _times(number: float, factor: Tensor | None) -> float:
    return number if factor is None else number * factor.item()


def _step(
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[list[Tensor]],
    sparse: list[Tensor],
    bits: list[Tensor],
    changes: list[Tensor],
    patterns: list[int],
    term: str,
    lambda_w: float,
    lr: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    updates: list[Update],
) -> None:
    """What all optimizers share: the gradient before them, masks and masked weights after them."""
    if found_inf is not None and found_inf.item():
        return
    for i, (weight, grad, update) in enumerate(zip(weights, grads, updates, strict=True)):
        compute = torch.promote_types(torch.float32, weight.dtype)
        w, g = weight.to(compute), grad.to(compute)
        if grad_scale is not None:
            g = g / grad_scale.to(compute)
        kept = None
        if i < len(sparse):
            n, m, dim = patterns[3 * i : 3 * i + 3]
            kept = reference.unpack_bits(bits[i], weight.shape[dim], dim)
        if kept is not None and term == "masked":
            g = torch.where(kept, g, 0)
        if maximize:
            g = -g
        if kept is not None and term == "gradient":
            g = torch.where(kept, g, g + w * lambda_w)
        if kept is not None and term == "decoupled":
            w = torch.where(kept, w, w + w * (-lambda_w * lr))
        state = [tensors[i].to(compute) for tensors in states]
        weight.copy_(update(w, g, state))
        for tensors, new in zip(states, state, strict=True):
            tensors[i].copy_(new)
        if i < len(sparse):
            changed = _mask(weight, sparse[i], bits[i], n, m, dim)
            changes[i].copy_(changed.view(changes[i].shape))


def _mask(weight: Tensor, out: Tensor, bits: Tensor, n: int, m: int, dim: int) -> Tensor:
    """Chooses the mask anew (or, for n = 0, not), writes the masked weight, and counts what has changed."""
    chosen = reference.mask_bits(weight, n, m, dim, False) if n else bits.clone()
    changed = reference.sad(bits, chosen)
    bits.copy_(chosen)
    out.copy_(reference.apply_bits(weight, bits, dim))
    return changed
