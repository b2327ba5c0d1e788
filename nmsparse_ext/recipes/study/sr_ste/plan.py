"""The plan of the study of SR-STE, and the runs that it asks for."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

import nmsparse_ext as nms
from nmsparse_ext.recipes.catalog import RECIPES
from nmsparse_ext.recipes.loop import train
from nmsparse_ext.recipes.study.plan import QUIET, Plan, Record, Records, check_recipe, check_seeds, table
from nmsparse_ext.recipes.study.runs import figures_of
from nmsparse_ext.recipes.task import Task

PENALTIES = ("gradient", "decoupled")


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        experiment: The experiment it belongs to.
        stage: "selection" (choosing lambda, on validation data) or "main" (tested).
        arm: What is compared: "dense", "ste", "sr-ste" (gradient penalty, chosen lambda), "sr-ste-decoupled",
            or "sweep" (gradient penalty, lambda of the plan).
        pattern: n:m.
        seed: Seed of the run; runs of equal seed are pairs.
        lambda_w: Lambda, where the plan says it; ``None`` where it is chosen in the selection stage.
    """

    experiment: str
    stage: str
    arm: str
    pattern: str
    seed: int
    lambda_w: float | None = None

    @property
    def key(self) -> str:
        """What names this run in the file of results."""
        parts = [self.experiment, self.stage, self.arm, self.pattern, f"seed {self.seed}"]
        if self.lambda_w is not None:
            parts.append(f"lambda {self.lambda_w:g}")
        return " / ".join(parts)

    @property
    def method(self) -> str:
        """The training method."""
        return self.arm if self.arm in ("dense", "ste") else "sr-ste"

    @property
    def penalty(self) -> str:
        """Where SR-STE's term goes."""
        return "decoupled" if self.arm == "sr-ste-decoupled" else "gradient"


@dataclass(frozen=True)
class Selection:
    """How lambda is chosen for each pattern: on validation data, with seeds of its own.

    Attributes:
        seeds: Seeds of these runs; others than those of the tested runs.
        lambdas: ``{penalty: lambdas to choose from}``.
    """

    seeds: tuple[int, ...]
    lambdas: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Experiment:
    """One recipe, several patterns, several ways to train.

    Attributes:
        name: Its name in the plan.
        recipe: The recipe's name.
        metric: The test figure compared, "accuracy" or "loss".
        patterns: The patterns trained with.
        seeds: Seeds of the tested runs.
        selection: How lambda is chosen.
        sweep: Lambdas that are tested whatever was chosen; 0 is STE and needs no run.
        sweep_pattern: The pattern of that sweep.
        config: Settings of the recipe that all runs share.
    """

    name: str
    recipe: str
    metric: str
    patterns: tuple[str, ...]
    seeds: tuple[int, ...]
    selection: Selection
    sweep: tuple[float, ...]
    sweep_pattern: str
    config: Mapping[str, Any]

    @property
    def higher_is_better(self) -> bool:
        """Which way the metric points."""
        return self.metric == "accuracy"

    @property
    def arms(self) -> tuple[str, ...]:
        """The ways of sparse training that are compared with STE."""
        return tuple(map(arm_of, self.selection.lambdas))

    def selection_jobs(self) -> Iterator[Job]:
        """The runs of the selection stage."""
        chosen = self.selection
        for seed in chosen.seeds:
            for pattern in self.patterns:
                for penalty, lambdas in chosen.lambdas.items():
                    for lambda_w in lambdas:
                        yield Job(self.name, "selection", arm_of(penalty), pattern, seed, lambda_w)

    def main_jobs(self, seed: int) -> Iterator[Job]:
        """The tested runs of one seed."""
        yield Job(self.name, "main", "dense", self.patterns[0], seed)
        for pattern in self.patterns:
            for arm in ("ste", *self.arms):
                yield Job(self.name, "main", arm, pattern, seed)
        for lambda_w in self.sweep:
            yield Job(self.name, "main", "sweep", self.sweep_pattern, seed, lambda_w)

    def chosen_lambda(self, arm: str, pattern: str, records: Mapping[str, Record]) -> float:
        """The lambda with the lowest mean validation loss over the selection seeds; the smallest of equals.

        Raises:
            ValueError: If a run of the selection stage is missing.
        """
        losses: dict[float, list[float]] = {}
        for job in self.selection_jobs():
            if (job.arm, job.pattern) != (arm, pattern) or job.lambda_w is None:
                continue
            if job.key not in records:
                raise ValueError(f"the selection stage is not complete: {job.key} is missing")
            loss = records[job.key]["validation"]["loss"]
            losses.setdefault(job.lambda_w, []).append(math.inf if loss is None else loss)
        return min(sorted(losses), key=lambda value: statistics.fmean(losses[value]))

    def task(self, job: Job, lambda_w: float) -> Task:
        """The recipe, ready to train."""
        recipe = RECIPES[self.recipe]
        config = recipe.config(
            **{
                **self.config,
                "method": job.method,
                "pattern": job.pattern,
                "penalty": job.penalty,
                "lambda_w": lambda_w,
                "seed": job.seed,
                "test": job.stage == "main",
                **QUIET,
            }
        )
        return recipe.task(config)


def arm_of(penalty: str) -> str:
    """The arm of SR-STE with this penalty and a chosen lambda."""
    return "sr-ste" if penalty == "gradient" else f"sr-ste-{penalty}"


@dataclass(frozen=True)
class SrStePlan(Plan[Job, Experiment]):
    """The claims of the SR-STE paper."""

    page: ClassVar[str] = "study"

    @override
    def jobs(self) -> Iterator[Job]:
        """Selection first, then seed by seed, the experiments in turn."""
        for experiment in self.experiments:
            yield from experiment.selection_jobs()
        for seeds in zip_longest(*(experiment.seeds for experiment in self.experiments)):
            for experiment, seed in zip(self.experiments, seeds, strict=True):
                if seed is not None:
                    yield from experiment.main_jobs(seed)

    @override
    def run(self, job: Job, records: Records) -> Record:
        experiment = self.experiment(job.experiment)
        if job.lambda_w is not None:
            lambda_w = job.lambda_w
        elif job.method == "sr-ste":
            lambda_w = experiment.chosen_lambda(job.arm, job.pattern, records)
        else:
            lambda_w = 0.0
        task = experiment.task(job, lambda_w)
        outcome = train(task)
        return {
            "experiment": job.experiment,
            "stage": job.stage,
            "arm": job.arm,
            "pattern": job.pattern,
            "seed": job.seed,
            "lambda_w": outcome.lambda_w,
            **figures_of(outcome),
            "data": task.describe(),
            "cpu_seconds": round(outcome.cpu_seconds, 2),
        }

    @override
    def render(self, records: Records) -> str:
        from nmsparse_ext.recipes.study.sr_ste.report import render

        return render(records, self)

    @override
    def draw(self, records: Records, folder: Path) -> None:
        from nmsparse_ext.recipes.study.sr_ste.figures import save_figure

        for experiment in self.experiments:
            if any(r["experiment"] == experiment.name and r["stage"] == "main" for r in records.values()):
                save_figure(experiment, records, folder / f"study_{experiment.name}.png", self.alpha)


STUDY = SrStePlan


def experiment_from(name: str, entry: Any) -> Experiment:
    """Reads an experiment of the plan.

    Raises:
        ValueError: Naming the entry that is wrong.
    """
    entry = table(name, entry, {"recipe", "metric", "patterns", "seeds", "selection", "sweep", "config"})
    check_recipe(name, entry)
    sweep = table(f"{name}.sweep", entry["sweep"], {"pattern", "lambdas"})
    chosen = table(f"{name}.selection", entry["selection"], {"seeds", "lambdas"})
    grid = chosen["lambdas"]
    if not isinstance(grid, dict) or not grid or not set(grid) <= set(PENALTIES):
        raise ValueError(f"{name}.selection.lambdas must be lists by penalty, {PENALTIES}, got {grid!r}")
    check_seeds(name, chosen["seeds"], entry["seeds"], "the selection")
    return Experiment(
        name=name,
        recipe=entry["recipe"],
        metric=entry["metric"],
        patterns=tuple(map(_pattern, entry["patterns"])),
        seeds=tuple(entry["seeds"]),
        selection=Selection(
            seeds=tuple(chosen["seeds"]),
            lambdas={penalty: tuple(map(float, values)) for penalty, values in grid.items()},
        ),
        sweep=tuple(map(float, sweep["lambdas"])),
        sweep_pattern=_pattern(sweep["pattern"]),
        config=dict(entry["config"]),
    )


def _pattern(text: str) -> str:
    return str(nms.Pattern.parse(text))
