"""What a step of DominoSearch costs: steps of a search and plain training steps, in turn in one process.

    python bench/bench_domino.py

The search runs as it does for a user. Its ``step`` is where the plain step of a twin model comes in, so the
two alternate; what lies between two calls of ``step`` is a whole step of the search, with its check and its
pull. Three kinds are told apart: ordinary steps, every fifth with a pull, every hundredth with a check. The
figure that counts is their mean, in these proportions.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import Report, arguments, require_kernels, threads, timing_of
from torch import Tensor, nn

import nmsparse_ext as nms

GOAL = 1.1  # at most so many plain steps
CHECK_EVERY = 10  # often enough to be timed; counted as every hundredth
PULL_EVERY = 5


@dataclass(frozen=True)
class Setting:
    """A model and its data."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]


def resnet18() -> nn.Module:
    """ResNet-18 as in transformers, without their output classes."""
    from transformers import ResNetConfig, ResNetForImageClassification

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = ResNetConfig(
                layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], num_labels=1000
            )
            self.resnet = ResNetForImageClassification(config)

        def forward(self, x: Tensor) -> Tensor:
            return self.resnet(pixel_values=x).logits

    return Logits()


def mlp() -> nn.Module:
    """Three linear layers; weights are all there is."""
    sizes = (1024, 4096, 4096, 1024)
    return nn.Sequential(
        nn.Linear(sizes[0], sizes[1]),
        nn.ReLU(),
        nn.Linear(sizes[1], sizes[2]),
        nn.ReLU(),
        nn.Linear(*sizes[2:]),
    )


def settings(dry_run: bool) -> list[Setting]:
    """What is timed."""
    batch, side = (2, 32) if dry_run else (64, 64)
    return [
        Setting(
            f"ResNet-18, {batch} images of {side}x{side}",
            resnet18,
            lambda: (torch.randn(batch, 3, side, side), torch.randint(0, 1000, (batch,))),
        ),
        Setting(
            f"MLP 1024-4096-4096-1024, batch {batch * 4}",
            mlp,
            lambda: (torch.randn(batch * 4, 1024), torch.randint(0, 1000, (batch * 4,))),
        ),
    ]


class Alternating:
    """The ``step`` of a search, which makes and times a plain step of a twin first."""

    def __init__(self, setting: Setting) -> None:
        self.x, self.y = setting.batch()
        self.twin = setting.model()
        self.optimizer = torch.optim.SGD(self.twin.parameters(), lr=0.01, fused=True)
        self.plain: list[float] = []
        self.search: list[float] = []
        self.began = 0.0

    def loss(self, model: nn.Module) -> Tensor:
        """Forward pass and loss."""
        return F.cross_entropy(model(self.x), self.y)

    def __call__(self, model: nn.Module) -> Tensor:
        """One plain step, then the forward pass of the search's."""
        now = time.perf_counter()
        if self.began:
            self.search.append(now - self.began)
        self.optimizer.zero_grad()
        self.loss(self.twin).backward()
        self.optimizer.step()
        self.began = time.perf_counter()
        self.plain.append(self.began - now)
        return self.loss(model)


def time_setting(setting: Setting, report: Report, rounds: int) -> None:
    """Searches for a while; adds a row."""
    torch.manual_seed(0)
    step, model = Alternating(setting), setting.model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that the budget is not reached
        nms.domino_search(
            model,
            step,
            budget=nms.Budget(params=0.1),
            start=nms.Scheme.uniform(model, "8:16"),
            check_every=CHECK_EVERY,
            pull_every=PULL_EVERY,
            max_steps=rounds,
            progress=False,
        )
    # The first steps make memory and count MACs.
    kinds: dict[str, list[float]] = {"plain": step.plain[2:], "ordinary": [], "pull": [], "check": []}
    for number, seconds in enumerate(step.search, start=1):
        if number > 2:
            check, pull = (number - 1) % CHECK_EVERY == 0, (number - 1) % PULL_EVERY == 0
            kinds["check" if check else "pull" if pull else "ordinary"].append(seconds)
    timings = {kind: timing_of(times) for kind, times in kinds.items()}
    report.watch({"plain": timings["plain"], "ordinary": timings["ordinary"]})
    medians = {kind: timing.median for kind, timing in timings.items()}
    # A check always falls on a step with a pull.
    mean = 0.8 * medians["ordinary"] + 0.19 * medians["pull"] + 0.01 * medians["check"]
    ratio = mean / medians["plain"]
    row = {"model": setting.name, **{kind: timing.to_json() for kind, timing in timings.items()}}
    report.rows.append({**row, "of plain": {"ratio": ratio}})
    if ratio > GOAL:
        report.missed.append(f"{setting.name}: {ratio:.3f} plain steps, goal at most {GOAL}")
    shown = ", ".join(f"{kind} {1e3 * seconds:.1f} ms" for kind, seconds in medians.items())
    print(f"{setting.name:40s} {ratio:6.3f} of a plain step: {shown}")


def main(argv: list[str] | None = None) -> int:
    """Times all models; returns the exit code."""
    parser = arguments(__doc__ or "", "domino_cpu.json")
    parser.add_argument("--dry-run", action="store_true", help="small batches: does everything run?")
    options = parser.parse_args(argv)
    if not options.dry_run:
        require_kernels()
    report = Report(
        "A step of DominoSearch (all weights at 8:16, float32) against a plain step with torch's fused SGD, "
        "in turn in one process. By medians; pulls count as every fifth step, checks as every hundredth"
    )
    with threads(options.threads):
        for setting in settings(options.dry_run):
            time_setting(setting, report, max(options.rounds, 32) if not options.dry_run else 24)
        print(nms.build_info().cpu_isa)
        return report.finish(None if options.dry_run else options.json)  # which notes the threads


if __name__ == "__main__":
    sys.exit(main())
