"""What N:M training costs: whole steps, dense and sparse, in turn in one process.

    python bench/bench_train.py

An MLP 1024-4096-4096-1024 takes a batch of 64 through forward, backward and SGD with momentum. Every path
trains its own copy from the same weights on the same data; the losses of the sparse ones are compared with
the published code's.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from common import Report, alternate, arguments, require_kernels, threads
from official import Sparse
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext import foreach, ops
from nmsparse_ext.train import Sparsifier

PATTERN, LR, MOMENTUM, LAMBDA, BATCH = "2:4", 0.01, 0.9, 2e-4, 64
SIZES = (1024, 4096, 4096, 1024)

Build = Callable[[nn.Sequential], "Path"]
PATHS: dict[str, Build] = {}
GOALS = {"hooks + torch SGD": 1.12}  # at most so many dense steps


@dataclass
class Path:
    """One way to train.

    Attributes:
        model: What is called.
        optimizer: What makes the step.
        kept_alive: Anything else.
    """

    model: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    kept_alive: list[object] = field(default_factory=list)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One training step; returns the loss."""
        self.optimizer.zero_grad()
        loss = (self.model(x) - y).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def path(name: str) -> Callable[[Build], Build]:
    """Registers a way to train under the name that its row gets."""

    def register(build: Build) -> Build:
        PATHS[name] = build
        return build

    return register


def mlp() -> nn.Sequential:
    """The same weights at every call."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(SIZES)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, fused=True)


@path("dense, torch SGD (fused)")
def dense(model: nn.Sequential) -> Path:
    return Path(model, sgd(model))


@path("hooks + torch SGD")
def hooks(model: nn.Sequential) -> Path:
    optimizer = sgd(model)
    return Path(model, optimizer, [Sparsifier(model, optimizer, PATTERN, lambda_w=LAMBDA)])


@path("hooks + torch SGD, plain STE")
def hooks_ste(model: nn.Sequential) -> Path:
    optimizer = sgd(model)
    return Path(model, optimizer, [Sparsifier(model, optimizer, PATTERN, method="ste")])


@path("published code")
def official(model: nn.Sequential) -> Path:
    def forward(x: Tensor) -> Tensor:
        for layer in model:
            if isinstance(layer, nn.Linear):
                x = nn.functional.linear(x, Sparse.apply(layer.weight, 2, 4, LAMBDA), layer.bias)
            else:
                x = layer(x)
        return x

    return Path(forward, sgd(model), [model])


def losses(name: str, steps: int = 4) -> list[float]:
    """The first losses of a path."""
    run, data = PATHS[name](mlp()), batches()
    return [run.step(*data[i % len(data)]).item() for i in range(steps)]


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(BATCH, SIZES[0], generator=generator),
            torch.randn(BATCH, SIZES[-1], generator=generator),
        )
        for _ in range(4)
    ]


def sad_share(step: float, rounds: int) -> float:
    """Of a step, what SAD takes: choosing masks with and without counting."""
    model = mlp()
    ws = [layer.weight.detach() for layer in model if isinstance(layer, nn.Linear)]
    outs, bits = [torch.empty_like(w) for w in ws], [ops.mask_bits(w, PATTERN) for w in ws]
    count = len(ws)
    changes = torch.zeros(count, dtype=torch.int64)

    def counted(_: int) -> None:
        foreach.reselect(
            ws,
            ns=[2] * count,
            ms=[4] * count,
            dims=[1] * count,
            outs=outs,
            bits=bits,
            changes=changes,
            places=list(range(count)),
        )

    def uncounted(_: int) -> None:
        for w, out, mask in zip(ws, outs, bits, strict=True):
            ops.prune_into(w, PATTERN, out=out, bits=mask)

    timings = alternate({"with": counted, "without": uncounted}, rounds=rounds)
    return (timings["with"].low - timings["without"].low) / step


def main() -> int:
    """Times all paths; returns the exit code."""
    parser = arguments(__doc__ or "", "train_cpu.json")
    parser.add_argument("--only", nargs="*", help="paths to time, next to the dense one")
    options = parser.parse_args()
    require_kernels()
    first = next(iter(PATHS))
    chosen = {n: b for n, b in PATHS.items() if n == first or not options.only or n in options.only}
    report = Report(
        "One training step of an MLP 1024-4096-4096-1024, batch 64, float32, SGD with momentum 0.9, pattern "
        "2:4; every path in turn in one process."
    )
    with threads(options.threads):
        data = batches()
        runs = {name: build(mlp()) for name, build in chosen.items()}
        calls = {name: lambda i, run=run: run.step(*data[i % len(data)]) for name, run in runs.items()}
        timings = alternate(calls, rounds=options.rounds, rare={"published code": 5})
        report.watch(timings)
        base = timings[first].low
        slow = timings.get("published code")
        for name, timing in timings.items():
            ratio = timing.low / base
            row = {"path": name, "step": timing.to_json(), "of dense": {"ratio": ratio}}
            row["over published"] = {"ratio": slow.low / timing.low} if slow else "-"
            report.rows.append(row)
            goal = GOALS.get(name)
            if goal is not None and ratio > goal:
                report.missed.append(f"{name}: {ratio:.3f} dense steps, goal at most {goal}")
            print(f"{name:34s} {1e3 * timing.low:8.2f} ms  {ratio:6.3f}")
        del runs, calls
        share = sad_share(base, options.rounds)
        report.others["sad"] = [{"share of the dense step": share}]
        print(f"SAD: {100 * share:.2f} % of the dense step")
        if slow:
            reference = losses("published code")
            for name in ("hooks + torch SGD",):
                ours = losses(name)
                difference = max(abs(a - b) / b for a, b in zip(ours, reference, strict=True))
                report.others.setdefault("losses", []).append(
                    {
                        "path": name,
                        "ours": ours,
                        "published": reference,
                        "largest relative difference": difference,
                    }
                )
                print(f"losses of {name}: {difference:.1e} from the published code's")
    print(nms.build_info().cpu_isa)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
