"""What the tests of `prune_model` prune, and how they compare it."""

from __future__ import annotations

from typing import Any

import torch
from samples import assert_same_bits
from torch import Tensor, nn

CRITERIA = ("magnitude", "wanda", "sparsegpt")


def mlp(width: int = 32, norm: bool = False, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width, **options)]
    return nn.Sequential(*layers, *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU(), nn.Linear(width, 4))


def batches(count: int = 3, size: int = 40, width: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(width, width, generator=generator)
    return [torch.randn(size, width, generator=generator) @ mix for _ in range(count)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, before[name], name)


def weights_of(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.dim() > 1]
