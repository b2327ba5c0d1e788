"""What λ the weights feel: ours and the published code's, over everything that changes gradients on the way.

    python bench/bench_invariance.py

From the same weights and the same batch, one step of SGD is made with the term and one without; what
pruned weights moved more, divided by ``lr * W``, is the λ that they felt. In float64, as a multiple of the λ
asked for. The published code (see official.py) sums the gradients of all ranks after dividing the loss by
their number.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from common import Report, arguments
from official import Sparse
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import nmsparse_ext as nms
from nmsparse_ext.train import Sparsifier

LR, LAMBDA, BATCH = 0.25, 2e-4, 32

Backward = Callable[[nn.Module, torch.optim.Optimizer, Tensor], None]


def mlp() -> nn.Sequential:
    """The same weights at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    loss_of(model, x).backward()
    optimizer.step()


def accumulated(parts: int) -> Backward:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        for part in x.chunk(parts):
            (loss_of(model, part) / parts).backward()
        optimizer.step()

    return step


def scaled(scale: float) -> Backward:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(loss_of(model, x)).backward()
        scaler.step(optimizer)

    return step


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    loss_of(model, x).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    optimizer.step()


class Official(nn.Module):
    """The model with masks and term in its autograd graph."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.net, self.decay = mlp(), decay

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                x = nn.functional.linear(x, Sparse.apply(layer.weight, 2, 4, self.decay), layer.bias)
            else:
                x = layer(x)
        return x


def felt(step: Backward, ours: bool, x: Tensor, ranks: int = 1) -> list[float]:
    """λ as felt, as multiples of λ: the smallest and the largest of a weight's pruned entries."""
    weights = []
    for lambda_w in (LAMBDA, 0.0):
        model = mlp() if ours else Official(lambda_w)
        net = model if ours else model.net
        weight = net[0].weight
        pruned = ~nms.nm_mask(weight.detach(), "2:4")
        before = weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=lambda_w) if ours else None
        if ranks > 1 and ours:
            step(DistributedDataParallel(model), optimizer, x)
        elif ranks > 1:
            (loss_of(model, x) / ranks).backward()
            for p in model.parameters():
                dist.all_reduce(p.grad)
            optimizer.step()
        else:
            step(model, optimizer, x)
        after = sparsifier.dense_weight("0") if sparsifier else weight.detach()
        weights.append(after.clone())
    multiples = (weights[1] - weights[0])[pruned] / (LR * LAMBDA * before[pruned])
    return [multiples.min().item(), multiples.max().item()]


def on_rank(rank: int, ranks: int, port: int, place: str) -> None:
    """One process of several; the first one leaves what was felt."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    x = inputs().chunk(ranks)[rank]
    result = {ours: felt(plain, ours, x, ranks) for ours in (True, False)}
    if rank == 0:
        torch.save(result, place)
    dist.destroy_process_group()


def inputs() -> Tensor:
    return torch.randn(BATCH, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def together(ranks: int) -> dict[bool, list[float]]:
    """What is felt with several ranks."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        place = str(Path(folder) / "felt.pt")
        torch.multiprocessing.spawn(on_rank, (ranks, port, place), nprocs=ranks)
        return torch.load(place, weights_only=True)


def main() -> int:
    """Measures all rows; returns the exit code."""
    options = arguments(__doc__ or "", "invariance.json").parse_args()
    report = Report(
        "λ as pruned weights feel it in one step of SGD, as a multiple of the λ asked for; float64."
    )
    x = inputs()
    rows: list[tuple[str, dict[bool, list[float]]]] = [
        (name, {ours: felt(step, ours, x) for ours in (True, False)})
        for name, step in {
            "one process": plain,
            "2 micro-batches accumulated": accumulated(2),
            "4 micro-batches accumulated": accumulated(4),
            "8 micro-batches accumulated": accumulated(8),
            "loss scale 1024": scaled(2.0**10),
            "loss scale 65536": scaled(2.0**16),
            "gradients clipped to 0.01": clipped,
        }.items()
    ]
    rows += [(f"{ranks} ranks", together(ranks)) for ranks in (2, 4)]
    for name, result in rows:
        texts = {
            ours: f"{low:.7f}" if high - low < 5e-7 else f"{low:.7f} to {high:.7f}"
            for ours, (low, high) in result.items()
        }
        report.rows.append({"one step with": name, "Sparsifier": texts[True], "published code": texts[False]})
        print(f"{name:30s} {texts[True]:>12s} {texts[False]:>12s}")
        if max(abs(value - 1) for value in result[True]) > 1e-6:
            report.missed.append(f"{name}: {texts[True]}")
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
