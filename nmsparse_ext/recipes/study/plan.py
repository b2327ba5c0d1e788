"""The plan of a study, read from a TOML file, and the runs that it asks for."""

from __future__ import annotations

import hashlib
import math
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module, resources
from itertools import zip_longest
from pathlib import Path
from typing import Any

import nmsparse_ext as nms
from nmsparse_ext.recipes.catalog import RECIPES
from nmsparse_ext.recipes.task import Task

PENALTIES = ("gradient", "decoupled")
Record = dict[str, Any]


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
                "threads": 1,
                "device": "cpu",
                "progress": False,
                "tensorboard": False,
            }
        )
        return recipe.task(config)


def arm_of(penalty: str) -> str:
    """The arm of SR-STE with this penalty and a chosen lambda."""
    return "sr-ste" if penalty == "gradient" else f"sr-ste-{penalty}"


@dataclass(frozen=True)
class Plan:
    """A study.

    Attributes:
        experiments: Its experiments.
        alpha: Level of the tests and intervals.
        digest: Names the plan's exact text; every result carries it.
    """

    experiments: tuple[Experiment, ...]
    alpha: float
    digest: str

    def jobs(self) -> Iterator[Job]:
        """All runs in the order they are made: selection, then seed by seed, the experiments in turn."""
        for experiment in self.experiments:
            yield from experiment.selection_jobs()
        for seeds in zip_longest(*(experiment.seeds for experiment in self.experiments)):
            for experiment, seed in zip(self.experiments, seeds, strict=True):
                if seed is not None:
                    yield from experiment.main_jobs(seed)

    def experiment(self, name: str) -> Experiment:
        """The experiment of that name."""
        return next(experiment for experiment in self.experiments if experiment.name == name)


def load_plan(path: Path | None = None) -> Plan:
    """Read a plan.

    Args:
        path: A TOML file; ``None`` for the one that comes with the library.

    Raises:
        ValueError: Naming the entry that is wrong.
    """
    if path is None:
        text = resources.files("nmsparse_ext.recipes").joinpath("study.toml").read_text(encoding="utf-8")
    else:
        text = path.read_text(encoding="utf-8")
    table = _parse_toml(text)
    alpha = table.pop("alpha", 0.05)
    if not isinstance(alpha, float) or not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha!r}")
    experiments = tuple(_experiment(name, entry) for name, entry in table.items())
    if not experiments:
        raise ValueError("the plan has no experiments")
    return Plan(experiments, alpha, hashlib.sha256(text.encode()).hexdigest()[:12])


def _parse_toml(text: str) -> dict[str, Any]:
    tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"the plan is no TOML: {error}") from None


def _experiment(name: str, entry: Any) -> Experiment:
    entry = _table(name, entry, {"recipe", "metric", "patterns", "seeds", "selection", "sweep", "config"})
    if entry["recipe"] not in RECIPES:
        raise ValueError(f"{name}.recipe must be one of {', '.join(RECIPES)}, got {entry['recipe']!r}")
    if entry["metric"] not in ("accuracy", "loss"):
        raise ValueError(f"{name}.metric must be accuracy or loss, got {entry['metric']!r}")
    sweep = _table(f"{name}.sweep", entry["sweep"], {"pattern", "lambdas"})
    chosen = _table(f"{name}.selection", entry["selection"], {"seeds", "lambdas"})
    grid = chosen["lambdas"]
    if not isinstance(grid, dict) or not grid or not set(grid) <= set(PENALTIES):
        raise ValueError(f"{name}.selection.lambdas must be lists by penalty, {PENALTIES}, got {grid!r}")
    shared = sorted(set(chosen["seeds"]) & set(entry["seeds"]))
    if shared:
        raise ValueError(f"{name}: seeds {shared} are both of the selection and of the tested runs")
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


def _table(name: str, entry: Any, keys: set[str]) -> dict[str, Any]:
    if not isinstance(entry, dict) or set(entry) != keys:
        got = ", ".join(entry) if isinstance(entry, dict) else repr(entry)
        raise ValueError(f"{name} must be a table with the entries {', '.join(sorted(keys))}, got {got}")
    return entry


def _pattern(text: str) -> str:
    return str(nms.Pattern.parse(text))
