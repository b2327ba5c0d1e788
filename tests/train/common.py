"""Small models and loops that the training tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import nmsparse_ext as nms

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """16 -> 8 -> 4; both weights can be 2:4."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(16, 16, bias=False).double()
        self.b = nn.Linear(16, 16, bias=False).double()
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def batch(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The inputs of one step, [32, 16]; the same for everybody who asks for that step."""
    return torch.randn(32, 16, generator=torch.Generator().manual_seed(1000 + step), dtype=torch.float64).to(
        dtype
    )


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).pow(2).mean()


def sgd(model: nn.Module) -> torch.optim.SGD:
    """With momentum, whose state depends on every step before."""
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    start: int = 0,
    dtype: torch.dtype = torch.float64,
) -> list[float]:
    """The plainest loop there is; returns the losses."""
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step, dtype))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_satisfies(model: nn.Module, scheme: nms.Scheme | dict[str, str]) -> None:
    parameters = dict(model.named_parameters())
    for name, pattern in scheme.items():
        assert nms.find_violation(parameters[name].detach(), pattern) is None, name


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Equal bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
