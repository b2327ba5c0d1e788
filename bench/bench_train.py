"""What N:M training costs: whole steps, dense and sparse, in turn in one process.

    python bench/bench_train.py

Two models: an MLP 1024-4096-4096-1024 on a batch of 64 with SGD and momentum, and a GPT-2 block (768 wide,
12 heads) on a batch of 4 x 128 with AdamW. Every path trains its own copy from the same weights on the same
data; the losses of the sparse ones are compared with the published code's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from common import Report, alternate, arguments, require_kernels, threads
from official import Sparse
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext import foreach, ops
from nmsparse_ext.train import Sparsifier

PATTERN, LAMBDA = "2:4", 2e-4
DENSE, HOOKS, ONE_PASS, PUBLISHED = "dense, torch (fused)", "hooks + torch", "one pass", "published code"
GOALS = {HOOKS: 1.12, ONE_PASS: 1.05}  # at most so many dense steps
OVER_PUBLISHED = 6.5  # at least so many times as fast


# ------------------------------------------------------------------------------------------------- models


class Block(nn.Module):
    """A GPT-2 block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then the MLP; x is [batch, tokens, width]."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


@dataclass
class Setting:
    """A model, its data and its optimizers.

    Attributes:
        name: For the table.
        what: In words.
        build: Makes the model.
        shapes: Of x and of y.
        torch_optimizer: The class in ``torch.optim``.
        optimizer: That of ours.
        options: Their arguments.
    """

    name: str
    what: str
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    torch_optimizer: Any
    optimizer: Any
    options: dict[str, Any]

    def model(self) -> nn.Module:
        """The same weights at every call."""
        torch.manual_seed(0)
        return self.build()

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Four pairs of x and y."""
        generator = torch.Generator().manual_seed(1)
        return [
            tuple(torch.randn(shape, generator=generator) for shape in self.shapes)  # type: ignore[misc]
            for _ in range(4)
        ]


def settings(dry_run: bool) -> list[Setting]:
    """The two of the table, or small ones of the same kind."""
    wide, hidden, batch = (64, 128, 4) if dry_run else (1024, 4096, 64)
    width, heads, rows, tokens = (64, 4, 2, 8) if dry_run else (768, 12, 4, 128)

    def mlp() -> nn.Module:
        return nn.Sequential(
            nn.Linear(wide, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, wide)
        )

    return [
        Setting(
            "MLP, SGD",
            f"MLP {wide}-{hidden}-{hidden}-{wide}, batch {batch}",
            mlp,
            ((batch, wide), (batch, wide)),
            torch.optim.SGD,
            nms.optim.SGD,
            {"lr": 0.01, "momentum": 0.9},
        ),
        Setting(
            "GPT-2 block, AdamW",
            f"GPT-2 block, {width} wide, {heads} heads, batch {rows} x {tokens}",
            lambda: Block(width, heads),
            ((rows, tokens, width), (rows, tokens, width)),
            torch.optim.AdamW,
            nms.optim.AdamW,
            {"lr": 1e-3, "weight_decay": 0.1},
        ),
    ]


# -------------------------------------------------------------------------------------------------- paths


@dataclass
class Path:
    """One way to train.

    Attributes:
        model: What is called.
        optimizer: What makes the step.
        kept_alive: Anything else.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    kept_alive: list[object] = field(default_factory=list)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One training step; returns the loss."""
        self.optimizer.zero_grad()
        loss = (self.model(x) - y).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


Build = Callable[[Setting], Path]
PATHS: dict[str, Build] = {}


def path(name: str) -> Callable[[Build], Build]:
    """Registers a way to train under the name that its row gets."""

    def register(build: Build) -> Build:
        PATHS[name] = build
        return build

    return register


def torch_optimizer(setting: Setting, model: nn.Module) -> torch.optim.Optimizer:
    return setting.torch_optimizer(model.parameters(), **setting.options, fused=True)


@path(DENSE)
def dense(setting: Setting) -> Path:
    model = setting.model()
    return Path(model, torch_optimizer(setting, model))


@path(ONE_PASS)
def one_pass(setting: Setting) -> Path:
    model = setting.model()
    optimizer = setting.optimizer(
        model.named_parameters(), **setting.options, scheme=PATTERN, lambda_w=LAMBDA
    )
    return Path(model, optimizer)


@path(HOOKS)
def hooks(setting: Setting) -> Path:
    model = setting.model()
    optimizer = torch_optimizer(setting, model)
    return Path(model, optimizer, [Sparsifier(model, optimizer, PATTERN, lambda_w=LAMBDA)])


@path(f"{HOOKS}, plain STE")
def hooks_ste(setting: Setting) -> Path:
    model = setting.model()
    optimizer = torch_optimizer(setting, model)
    return Path(model, optimizer, [Sparsifier(model, optimizer, PATTERN, method="ste")])


class PublishedLinear(nn.Linear):
    """A linear layer as the published code has it."""

    def forward(self, x: Tensor) -> Tensor:
        """Masks the weight anew."""
        return F.linear(x, Sparse.apply(self.weight, 2, 4, LAMBDA), self.bias)


@path(PUBLISHED)
def published(setting: Setting) -> Path:
    model = setting.model()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = PublishedLinear
    return Path(model, torch_optimizer(setting, model))


# ------------------------------------------------------------------------------------------- measurements


def losses(setting: Setting, name: str, steps: int = 5) -> list[float]:
    """The first losses of a path."""
    run, data = PATHS[name](setting), setting.batches()
    return [run.step(*data[i % len(data)]).item() for i in range(steps)]


def sad_share(setting: Setting, step: float, rounds: int) -> float:
    """Of a step, what SAD takes: choosing masks with and without counting."""
    model = setting.model()
    ws = [layer.weight.detach() for layer in model.modules() if isinstance(layer, nn.Linear)]
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


def time_setting(setting: Setting, chosen: dict[str, Build], report: Report, rounds: int) -> None:
    """Times all paths of a setting; adds their rows."""
    data = setting.batches()
    runs = {name: build(setting) for name, build in chosen.items()}
    calls = {name: lambda i, run=run: run.step(*data[i % len(data)]) for name, run in runs.items()}
    timings = alternate(calls, rounds=rounds, rare={PUBLISHED: 5})
    report.watch(timings)
    base, slow = timings[DENSE], timings.get(PUBLISHED)
    for name, timing in timings.items():
        ratio = timing.low / base.low
        row: dict[str, Any] = {"model": setting.name, "path": name, "step": timing.to_json()}
        row["of dense"] = {"ratio": ratio}
        row["over published"] = {"ratio": slow.low / timing.low} if slow else "-"
        report.rows.append(row)
        goal = GOALS.get(name)
        if goal is not None and ratio > goal:
            report.missed.append(f"{setting.name}, {name}: {ratio:.3f} dense steps, goal at most {goal}")
        if name == ONE_PASS and slow and slow.low < OVER_PUBLISHED * timing.low:
            report.missed.append(
                f"{setting.name}, {name}: {slow.low / timing.low:.2f} times as fast as the published code, "
                f"goal {OVER_PUBLISHED}"
            )
        medians = f"{timing.median / base.median:6.3f} of dense by medians"
        print(f"{setting.name:20s} {name:26s} {1e3 * timing.low:8.2f} ms  {ratio:6.3f} of dense, {medians}")
    if slow:
        reference = losses(setting, PUBLISHED)
        for name in (ONE_PASS, HOOKS):
            if name not in chosen:
                continue
            ours = losses(setting, name)
            difference = max(abs(a - b) / b for a, b in zip(ours, reference, strict=True))
            report.others.setdefault("losses", []).append(
                {
                    "model": setting.name,
                    "path": name,
                    "ours": ours,
                    "published": reference,
                    "largest relative difference": difference,
                }
            )
            print(f"losses of {name}: {difference:.1e} from the published code's")
    share = sad_share(setting, base.low, rounds)
    report.others.setdefault("sad", []).append({"model": setting.name, "share of the dense step": share})
    print(f"SAD: {100 * share:.2f} % of the dense step")


def main(argv: list[str] | None = None) -> int:
    """Times all paths; returns the exit code."""
    parser = arguments(__doc__ or "", "train_cpu.json")
    parser.add_argument("--only", nargs="*", help="paths to time, next to the dense one")
    parser.add_argument("--dry-run", action="store_true", help="small models: does everything run?")
    options = parser.parse_args(argv)
    if not options.dry_run:
        require_kernels()
    chosen = {n: b for n, b in PATHS.items() if n == DENSE or not options.only or n in options.only}
    tried = settings(options.dry_run)
    report = Report(
        f"One training step (forward, backward, optimizer) in float32 with pattern 2:4, every path in turn "
        f"in one process: {'; '.join(setting.what for setting in tried)}. Published code: argsort within the "
        f"weight's autograd node. Ratios are of lower quartiles."
    )
    with threads(options.threads):
        for setting in tried:
            time_setting(setting, chosen, report, options.rounds)
    print(nms.build_info().cpu_isa)
    return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
