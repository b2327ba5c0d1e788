"""The plan of the study of searches, and the runs that it asks for."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

import nmsparse_ext as nms
from nmsparse_ext.recipes.catalog import RECIPES
from nmsparse_ext.recipes.loop import Outcome, train
from nmsparse_ext.recipes.study.plan import QUIET, Plan, Record, Records, check_recipe, check_seeds, table
from nmsparse_ext.recipes.study.runs import figures_of
from nmsparse_ext.recipes.study.search.methods import METHODS, Problem, find_scheme
from nmsparse_ext.recipes.task import Task

METRICS = ("params", "macs")


@dataclass(frozen=True)
class Job:
    """One run: a scheme found from a seed's dense model, and the fine-tuning from that model with it.

    Attributes:
        experiment: The experiment it belongs to.
        arm: "dense" (the pretraining itself), or a way to find a scheme, one of `METHODS`.
        seed: Seed of pretraining, search and fine-tuning; runs of equal seed are pairs.
        pattern: n:m; the budget is what this pattern, given to all searched weights, would cost.
        metric: What the budget limits, "params" or "macs"; "" for dense and uniform, where it is the same.
    """

    experiment: str
    arm: str
    seed: int
    pattern: str = ""
    metric: str = ""

    @property
    def key(self) -> str:
        """What names this run in the file of results."""
        parts = [self.experiment, self.pattern, self.metric, self.arm, f"seed {self.seed}"]
        return " / ".join(filter(None, parts))


@dataclass(frozen=True)
class Experiment:
    """One recipe, several budgets, several ways to find a scheme.

    Attributes:
        name: Its name in the plan.
        recipe: The recipe's name.
        metric: The test figure compared, "accuracy" or "loss".
        seeds: Seeds of the tested runs.
        pilot_seeds: Seeds of the runs that the plan was settled with; only to say so, and to keep them apart.
        arms: The ways to find a scheme.
        budgets: ``{"params" or "macs": patterns whose cost is the budget}``.
        config: Settings of the recipe that all runs share.
        dense: Further settings of the pretraining.
        tune: Further settings of the fine-tuning.
        search: Settings of the searches, see `Problem`.
    """

    name: str
    recipe: str
    metric: str
    seeds: tuple[int, ...]
    pilot_seeds: tuple[int, ...]
    arms: tuple[str, ...]
    budgets: Mapping[str, tuple[str, ...]]
    config: Mapping[str, Any]
    dense: Mapping[str, Any]
    tune: Mapping[str, Any]
    search: Mapping[str, Any]

    @property
    def higher_is_better(self) -> bool:
        """Which way the metric points."""
        return self.metric == "accuracy"

    @property
    def m(self) -> int:
        """The group size, of all candidates."""
        return nms.Pattern.parse(self.patterns[0]).m

    @property
    def patterns(self) -> tuple[str, ...]:
        """The uniform patterns that are budgets, of any metric."""
        return tuple(dict.fromkeys(pattern for patterns in self.budgets.values() for pattern in patterns))

    def jobs(self, seed: int) -> Iterator[Job]:
        """The runs of one seed."""
        yield Job(self.name, "dense", seed)
        for pattern in self.patterns:
            for arm in self.arms:
                if arm == "uniform":
                    yield Job(self.name, arm, seed, pattern)
                    continue
                for metric, patterns in self.budgets.items():
                    if pattern in patterns:
                        yield Job(self.name, arm, seed, pattern, metric)

    def task(self, seed: int, settings: Mapping[str, Any], *, test: bool = True) -> Task:
        """The recipe with some of the settings, ready to train."""
        recipe = RECIPES[self.recipe]
        return recipe.task(recipe.config(**{**self.config, **settings, "seed": seed, "test": test, **QUIET}))


@dataclass(frozen=True)
class DenseModels:
    """The dense models that searches and fine-tunings start from, kept in files while the process lives.

    They are made again where they are missing, with the same bits.
    """

    folder: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="nmsparse-study-")
    )
    outcomes: dict[tuple[str, int], Outcome] = field(default_factory=dict)

    def train(self, experiment: Experiment, seed: int, *, test: bool = True) -> tuple[Outcome, Path]:
        """The pretraining of a seed, and the file with its weights."""
        key = experiment.name, seed
        path = Path(self.folder.name) / f"{experiment.name}-{seed}.safetensors"
        if key not in self.outcomes:
            task = experiment.task(seed, {**experiment.dense, "method": "dense"}, test=test)
            self.outcomes[key] = train(task)
            nms.save_file(self.outcomes[key].model.state_dict(), path)
        return self.outcomes[key], path

    def scheme_file(self, scheme: Mapping[str, nms.Pattern]) -> Path:
        """A scheme as a file."""
        path = Path(self.folder.name) / "scheme.json"
        nms.Scheme(scheme).save(path)
        return path


@dataclass(frozen=True)
class SearchPlan(Plan[Job, Experiment]):
    """Uniform patterns against patterns per layer."""

    page: ClassVar[str] = "search_study"
    dense_models: DenseModels = field(default_factory=DenseModels, compare=False, repr=False)

    @override
    def jobs(self) -> Iterator[Job]:
        """Seed by seed, the experiments in turn."""
        for seeds in zip_longest(*(experiment.seeds for experiment in self.experiments)):
            for experiment, seed in zip(self.experiments, seeds, strict=True):
                if seed is not None:
                    yield from experiment.jobs(seed)

    @override
    def run(self, job: Job, records: Records) -> Record:
        return make_run(self.experiment(job.experiment), job, self.dense_models)

    @override
    def render(self, records: Records) -> str:
        from nmsparse_ext.recipes.study.search.report import render

        return render(records, self)

    @override
    def draw(self, records: Records, folder: Path) -> None:
        from nmsparse_ext.recipes.study.search.figures import save_figure

        for experiment in self.experiments:
            if any(record["experiment"] == experiment.name for record in records.values()):
                save_figure(experiment, records, folder / f"{self.page}_{experiment.name}.png", self.alpha)


STUDY = SearchPlan


def make_run(experiment: Experiment, job: Job, dense_models: DenseModels, *, test: bool = True) -> Record:
    """Make one run.

    Args:
        experiment: What it is of.
        job: The run.
        dense_models: Where the seed's dense model is or will be.
        test: Whether to look at the test data: not while a plan is being settled.
    """
    dense, start = dense_models.train(experiment, job.seed, test=test)
    record: Record = {
        "experiment": job.experiment,
        "arm": job.arm,
        "seed": job.seed,
        "pattern": job.pattern,
        "metric": job.metric,
    }
    if job.arm == "dense":
        task, outcome = experiment.task(job.seed, experiment.dense), dense
    else:
        task = experiment.task(job.seed, {**experiment.tune, "start": start})
        found = find_scheme(
            job.arm,
            Problem(
                task=task,
                model=dense.model,
                pattern=nms.Pattern.parse(job.pattern),
                metric=job.metric or "params",
                settings=experiment.search,
            ),
        )
        scheme = dense_models.scheme_file(found.scheme)
        settings = {**experiment.tune, "start": start, "scheme": scheme}
        outcome = train(experiment.task(job.seed, settings, test=test))
        record |= found.as_json()
    return {
        **record,
        "lambda_w": outcome.lambda_w,
        **figures_of(outcome),
        "data": task.describe(),
        "cpu_seconds": round(outcome.cpu_seconds, 2),
    }


def experiment_from(name: str, entry: Any) -> Experiment:
    """Reads an experiment of the plan.

    Raises:
        ValueError: Naming the entry that is wrong.
    """
    keys = {
        "recipe",
        "metric",
        "seeds",
        "pilot_seeds",
        "arms",
        "budgets",
        "config",
        "dense",
        "tune",
        "search",
    }
    entry = table(name, entry, keys)
    check_recipe(name, entry)
    check_seeds(name, entry["pilot_seeds"], entry["seeds"], "the pilot runs")
    if unknown := [arm for arm in entry["arms"] if arm not in METHODS]:
        raise ValueError(f"{name}.arms must be of {', '.join(METHODS)}, got {', '.join(map(str, unknown))}")
    budgets = entry["budgets"]
    if not isinstance(budgets, dict) or not budgets or not set(budgets) <= set(METRICS):
        raise ValueError(f"{name}.budgets must be lists of patterns by metric, {METRICS}, got {budgets!r}")
    sizes = {nms.Pattern.parse(pattern).m for patterns in budgets.values() for pattern in patterns}
    if len(sizes) != 1:
        raise ValueError(f"{name}.budgets must be patterns of one m, got m of {sorted(sizes)}")
    return Experiment(
        name=name,
        recipe=entry["recipe"],
        metric=entry["metric"],
        seeds=tuple(entry["seeds"]),
        pilot_seeds=tuple(entry["pilot_seeds"]),
        arms=tuple(entry["arms"]),
        budgets={
            metric: tuple(str(nms.Pattern.parse(pattern)) for pattern in patterns)
            for metric, patterns in budgets.items()
        },
        config=dict(entry["config"]),
        dense=dict(entry["dense"]),
        tune=dict(entry["tune"]),
        search=dict(entry["search"]),
    )
