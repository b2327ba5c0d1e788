"""What every study has: a plan with a digest, runs with names, a page. And reading a plan from TOML."""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from nmsparse_ext.recipes.catalog import RECIPES

Record = dict[str, Any]
Records = Mapping[str, Record]

# Where each kind of study is; its module has `experiment_from(name, entry)` and `STUDY`, its `Plan`.
KINDS = {"sr-ste": "sr_ste.plan", "search": "search.plan"}


class Job(Protocol):
    """One run of a study."""

    @property
    def key(self) -> str:
        """What names this run in the file of results."""

    @property
    def experiment(self) -> str:
        """The experiment it belongs to."""


class Named(Protocol):
    """An experiment: one recipe, and what is compared on it."""

    @property
    def name(self) -> str:
        """Its name in the plan."""


J = TypeVar("J", bound=Job)
E = TypeVar("E", bound=Named)


@dataclass(frozen=True)
class Plan(ABC, Generic[J, E]):
    """A study.

    Attributes:
        experiments: Its experiments.
        alpha: Level of the tests and intervals.
        digest: Names the plan's exact text; every result carries it, or one of `extends`.
        extends: Digests of earlier texts that this plan only adds runs to: their results are results of it.
        page: The name of its page, without ``.md``; its plots begin with it too.
    """

    experiments: tuple[E, ...]
    alpha: float
    digest: str
    extends: tuple[str, ...] = ()
    page: ClassVar[str]

    def experiment(self, name: str) -> E:
        """The experiment of that name.

        Raises:
            ValueError: If there is none.
        """
        for experiment in self.experiments:
            if experiment.name == name:
                return experiment
        known = ", ".join(experiment.name for experiment in self.experiments)
        raise ValueError(f"the plan has no experiment {name!r}; there are {known}")

    @abstractmethod
    def jobs(self) -> Iterator[J]:
        """All runs in the order they are made."""

    @abstractmethod
    def run(self, job: J, records: Records) -> Record:
        """Make one run; `records` are those made so far. The result is of plain JSON types."""

    @abstractmethod
    def render(self, records: Records) -> str:
        """The page as Markdown."""

    @abstractmethod
    def draw(self, records: Records, folder: Path) -> None:
        """Write the page's plots to a folder."""


def load_plan(path: Path | None = None) -> Plan[Any, Any]:
    """Read a plan.

    Args:
        path: A TOML file, or the name of a plan that comes with the library: "study" (the SR-STE paper's
            claims, also ``None``), "search_study".

    Raises:
        ValueError: Naming the entry that is wrong.
    """
    packaged = resources.files("nmsparse_ext.recipes").joinpath(f"{path or 'study'}.toml")
    if path is None or (not path.suffix and not path.exists() and packaged.is_file()):
        text = packaged.read_text(encoding="utf-8")
    else:
        text = path.read_text(encoding="utf-8")
    contents = _parse_toml(text)
    alpha, kind = contents.pop("alpha", 0.05), contents.pop("kind", "sr-ste")
    extends = contents.pop("extends", [])
    if not isinstance(alpha, float) or not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha!r}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not isinstance(extends, list) or not all(isinstance(digest, str) for digest in extends):
        raise ValueError(f"extends must be a list of digests of earlier plans, got {extends!r}")
    module = import_module(f"nmsparse_ext.recipes.study.{KINDS[kind]}")
    experiments = tuple(module.experiment_from(name, entry) for name, entry in contents.items())
    if not experiments:
        raise ValueError("the plan has no experiments")
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return module.STUDY(experiments, alpha, digest, tuple(extends))


def table(name: str, entry: Any, keys: set[str]) -> dict[str, Any]:
    """An entry of a plan that must be a table with just these keys.

    Raises:
        ValueError: Naming the entry.
    """
    if not isinstance(entry, dict) or set(entry) != keys:
        got = ", ".join(entry) if isinstance(entry, dict) else repr(entry)
        raise ValueError(f"{name} must be a table with the entries {', '.join(sorted(keys))}, got {got}")
    return entry


def check_recipe(name: str, entry: Mapping[str, Any]) -> None:
    """Checks what every experiment says: its recipe and its metric.

    Raises:
        ValueError: Naming the entry.
    """
    if entry["recipe"] not in RECIPES:
        raise ValueError(f"{name}.recipe must be one of {', '.join(RECIPES)}, got {entry['recipe']!r}")
    if entry["metric"] not in ("accuracy", "loss"):
        raise ValueError(f"{name}.metric must be accuracy or loss, got {entry['metric']!r}")


def check_seeds(name: str, first: Sequence[int], tested: Sequence[int], what: str) -> None:
    """Checks that no seed serves both for a choice and for the tested runs.

    Raises:
        ValueError: Naming the seeds.
    """
    if shared := sorted(set(first) & set(tested)):
        raise ValueError(f"{name}: seeds {shared} are both of {what} and of the tested runs")


# Settings of a run that is part of a study: one thread of the CPU, so that the bits do not depend on the
# machine's size, and no logs.
QUIET: Mapping[str, Any] = {"threads": 1, "device": "cpu", "progress": False, "tensorboard": False}


def _parse_toml(text: str) -> dict[str, Any]:
    tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"the plan is no TOML: {error}") from None
