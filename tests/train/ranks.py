"""What cases for two processes share: see workers.py."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from train.common import batch, loss_of, mlp, train

import nmsparse_ext as nms
from nmsparse_ext.train import Sparsifier

WORLD = 2
LAMBDA = 0.05
CASES: dict[str, Callable[[pathlib.Path], None]] = {}


def case(function: Callable[[pathlib.Path], None]) -> Callable[[pathlib.Path], None]:
    CASES[function.__name__] = function
    return function


def adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=0.05)


def fused_adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=0.05, fused=True)


def mine(x: Tensor) -> Tensor:
    return x.chunk(WORLD)[dist.get_rank()]


def train_together(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    """As `train`, each rank on its part of the batch."""
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, mine(batch(step))).backward()
        optimizer.step()


def alone(make: Callable[[nn.Module], torch.optim.Optimizer], steps: int, model: nn.Module | None = None):
    """The same training in one process on whole batches: dense weights, parameters, SAD."""
    model = model or mlp()
    optimizer = make(model)
    sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA, process_group=False)
    train(model, optimizer, steps)
    dense = {name: sparsifier.dense_weight(name) for name in sparsifier.masks}
    return dense, {name: p.detach() for name, p in model.named_parameters()}, sparsifier


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def compare(model: nn.Module, sparsifier: Sparsifier, expected: tuple) -> None:
    dense, parameters, other = expected
    for name, weight in dense.items():
        torch.testing.assert_close(whole(sparsifier.dense_weight(name)), weight, rtol=1e-10, atol=1e-13)
        assert torch.equal(whole(sparsifier.masks[name]), other.masks[name])
    for (_, p), q in zip(model.named_parameters(), parameters.values(), strict=True):
        torch.testing.assert_close(whole(p), q, rtol=1e-10, atol=1e-13)
    assert sparsifier.sad() == other.sad()
    assert sparsifier.sad(since=0) == other.sad(since=0)
    assert sparsifier.history == other.history


def one_pass_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return nms.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def one_pass_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return nms.optim.AdamW(model.parameters(), lr=0.05)


def expect(error: type[Exception], text: str, do: Callable[[], object]) -> None:
    with pytest.raises(error, match=re.escape(text)):
        do()
