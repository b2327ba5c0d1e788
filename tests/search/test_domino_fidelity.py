"""The authors' algorithm, re-enacted in plain PyTorch, takes the same decisions, step for step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import nmsparse_ext as nms
from nmsparse_ext.macs import count_macs

M, CANDIDATES = 16, (1, 2, 4, 8, 16)


def cnn() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),  # no multiple of 16 input channels: dense in both
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 16),
    ).double()  # so that what is rounded in another order does not grow to another decision


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    while True:
        labels = torch.randint(0, 16, (8,), generator=generator)
        yield torch.randn(8, 3, 6, 6, generator=generator).double() + labels.view(-1, 1, 1, 1) / 8, labels


class SparseWeight(torch.autograd.Function):
    """Kept weights forward; the gradient and the penalty of kept weights backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        return grad * mask + weight * ctx.decay * mask, None, None


def grouped(weight: Tensor) -> Tensor:
    """Rows of M weights along the input channels: their magnitudes."""
    last = weight.detach().permute(0, 2, 3, 1) if weight.dim() == 4 else weight.detach()
    return last.abs().reshape(-1, M)


def mask_of(weight: Tensor, n: int) -> Tensor:
    rows = grouped(weight)
    pruned = torch.argsort(rows, dim=1)[:, : M - n]
    mask = torch.ones_like(rows).scatter_(1, pruned, 0)
    if weight.dim() == 2:
        return mask.view_as(weight)
    o, i, h, w = weight.shape
    return mask.view(o, h, w, i).permute(0, 3, 1, 2)


def erk_sparsities(shapes: dict[str, tuple[int, ...]], target: float, dense: set[str]) -> dict[str, float]:
    while True:
        zeros = {name: int(np.floor(target * np.prod(shape))) for name, shape in shapes.items()}
        raw = {n: np.sum(shape) / np.prod(shape) for n, shape in shapes.items() if n not in dense}
        kept = sum(np.prod(s) - zeros[n] if n not in dense else -zeros[n] for n, s in shapes.items())
        epsilon = kept / sum(raw[name] * np.prod(shapes[name]) for name in raw)
        if epsilon * max(raw.values()) <= 1:
            return {name: 1 - epsilon * raw[name] if name in raw else 0.0 for name in shapes}
        dense = dense | {name for name in raw if raw[name] == max(raw.values())}


def official_search(
    model: nn.Module, searched: list[str], macs: dict[str, int], target: float, decay: float, every: int
) -> list[tuple[int, str, int]]:
    """Every level that a layer came to, until the target: ``(iteration, layer, n)``."""
    weights = {name: model.get_parameter(name) for name in searched}
    thresholds = {
        n: grouped(w).sort(1).values[:, : M // 2].sum(1, keepdim=True) / (M // 2) for n, w in weights.items()
    }
    inter, final = dict.fromkeys(searched, M), dict.fromkeys(searched, M)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.dim() > 1}
    erk = erk_sparsities(shapes, target, set(shapes) - set(searched))
    total, moves = sum(np.prod(shape) for shape in shapes.values()), []

    def new_factors() -> dict[str, float]:
        residual = np.array([erk[name] - (1 - final[name] / M) for name in searched])
        flops = np.array([macs[name] * final[name] / M for name in searched])
        both = 0.5 * residual / np.abs(residual).max() + 0.5 * flops / flops.max()
        return dict(zip(searched, both.tolist(), strict=True))

    factors, data = new_factors(), batches()
    for iteration in range(10**6):
        penalty = decay if iteration % 5 == 0 else 0.0
        if iteration + 1 == 60:
            decay, penalty = 2 * decay, 2 * penalty
        sparse = {
            n: SparseWeight.apply(w, mask_of(w, inter[n]), penalty * factors[n]) for n, w in weights.items()
        }
        images, labels = next(data)
        model.zero_grad()
        F.cross_entropy(functional_call(model, sparse, images), labels).backward()
        if iteration % every == 0:
            for name, weight in weights.items():
                survivors = (grouped(weight) > thresholds[name]).sum(1)
                if final[name] == 1 or (survivors < inter[name]).double().mean() < 0.75:
                    continue
                inter[name] -= 1
                moves.append((iteration + 1, name, inter[name]))
                if inter[name] in CANDIDATES:
                    final[name] = inter[name]
                    factors = new_factors()
                    pruned = sum(np.prod(shapes[n]) * (1 - final[n] / M) for n in searched)
                    if pruned / total >= target - 0.001:
                        return moves
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
    raise AssertionError("never ends")


@pytest.mark.parametrize("target", [0.6, 0.8])
def test_same_decisions_until_the_target(target: float) -> None:
    model, data = cnn(), batches()

    def step(model: nn.Module) -> Tensor:
        images, labels = next(data)
        return F.cross_entropy(model(images), labels)

    result = nms.domino_search(
        model,
        step,
        budget=nms.Budget(params=1 - target),
        pull=3.0,
        check_every=8,
        doublings=(60,),
        max_steps=5000,
        progress=False,
    )
    searched = list({name for _, name, _ in result.moves})
    searched = [name for name, _ in model.named_parameters() if name in searched]
    assert len(searched) >= 5
    macs = {name: count or 0 for name, count in count_macs(model, torch.zeros(1, 3, 6, 6).double()).items()}
    moves = official_search(cnn(), searched, macs, target, decay=3.0, every=8)
    assert result.moves == moves
    assert result.steps == moves[-1][0]
    assert result.trace == [move for move in moves if move[2] in CANDIDATES]
    # The part of the rule that pushes away from zero has had its turn as well.
    assert any(result.erk.densities[name] > n / M for _, name, n in result.trace[:-1])
