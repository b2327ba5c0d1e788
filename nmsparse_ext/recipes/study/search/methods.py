"""The ways to find a scheme, all with the same candidates (n:m, n a power of two) and the same budget."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count, islice
from typing import Any, TypeAlias

from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext.recipes.runtime import seed_everything
from nmsparse_ext.recipes.task import Place, Shard, Task
from nmsparse_ext.recipes.timing import threads
from nmsparse_ext.search import Candidates, Costs, erk_scheme, find_candidates


@dataclass(frozen=True)
class Problem:
    """What a scheme is searched for.

    Attributes:
        task: The recipe, which brings data and loss.
        model: The dense model, trained; it is left as it was.
        pattern: The uniform pattern whose cost is the budget.
        metric: What the budget limits, "params" or "macs".
        settings: "calibration", the number of training batches that a criterion may see; "domino", arguments
            of `nms.domino_search`; "refine", with the "criterion" and the budget ("times" the real one) of
            the allocation that DominoSearch starts from, and what of its arguments is then other ("domino").
    """

    task: Task
    model: nn.Module
    pattern: nms.Pattern
    metric: str
    settings: Mapping[str, Any]

    @property
    def m(self) -> int:
        """The group size of all candidates: that of the uniform pattern."""
        return self.pattern.m

    @property
    def skip(self) -> list[str]:
        """What stays dense in every scheme."""
        asked = self.task.config.skip
        return list(self.task.dense_layers(self.model)) if asked is None else asked

    @property
    def example_input(self) -> Any:
        """What MACs are counted for."""
        return self.task.model_input(next(self.task.eval_batches("validation", Shard())))

    def batches(self) -> Iterator[Any]:
        """Training batches without end, in the order of the fine-tuning."""
        return (batch for epoch in count() for batch in self.task.train_batches(epoch, Shard()))

    @cached_property
    def candidates(self) -> Candidates:
        """The searched weights."""
        return find_candidates(self.model, m=self.m, skip=self.skip)

    @cached_property
    def costs(self) -> Costs:
        """What every weight costs."""
        return Costs(self.model, self.example_input, candidates=self.candidates)

    def budget(self, times: float = 1.0) -> nms.Budget:
        """What the uniform pattern leaves, or `times` as much of the searched weights."""
        whole = 0.0
        for name in self.costs.names:
            searched = name in self.candidates
            cost = self.costs.of(name, self.pattern if searched else None)
            whole += getattr(cost, self.metric) * (times if searched else 1.0)
        return nms.Budget(**{self.metric: int(whole)})

    def shares(self, scheme: nms.Scheme) -> dict[str, float]:
        """What a scheme keeps of the searched weights, "params", and of their MACs, "macs"."""
        kept = [self.costs.of(name, scheme.get(name)) for name in self.candidates]
        dense = [self.costs.of(name) for name in self.candidates]
        return {
            metric: sum(getattr(cost, metric) for cost in kept) / sum(getattr(cost, metric) for cost in dense)
            for metric in ("params", "macs")
        }

    def uniform(self, pattern: nms.Pattern) -> nms.Scheme:
        """A pattern for all searched weights."""
        return nms.Scheme.uniform(self.model, pattern, skip=self.skip)


@dataclass(frozen=True)
class Found:
    """A scheme, and what it cost to find it.

    Attributes:
        scheme: ``{searched weight: pattern}``, ``m:m`` for those that stay dense.
        sizes: ``{searched weight: entries}``.
        shares: What is kept of the searched weights, "params", and of their MACs, "macs".
        seconds: Wall-clock time of the search.
        cpu_seconds: Processor time of it.
        steps: Training steps that it made.
    """

    scheme: Mapping[str, nms.Pattern]
    sizes: Mapping[str, int]
    shares: Mapping[str, float]
    seconds: float
    cpu_seconds: float
    steps: int

    def as_json(self) -> dict[str, Any]:
        """What the file of results keeps."""
        return {
            "scheme": {name: str(pattern) for name, pattern in self.scheme.items()},
            "sizes": dict(self.sizes),
            "shares": {name: round(value, 6) for name, value in self.shares.items()},
            "search": {
                "seconds": round(self.seconds, 6),
                "cpu_seconds": round(self.cpu_seconds, 6),
                "steps": self.steps,
            },
        }


def find_scheme(arm: str, problem: Problem) -> Found:
    """Find a scheme in one of the ways, on one thread.

    Args:
        arm: The way, one of `METHODS`.
        problem: What for.

    Raises:
        ValueError: If the scheme found keeps more than the budget allows.
    """
    import scipy.optimize  # noqa: F401 - the solver of `allocate`; loading it is no part of a search

    budget = problem.budget()
    seed_everything(problem.task.config.seed, Place.EPOCH)
    with threads(1):
        wall, cpu = time.perf_counter(), time.process_time()
        scheme, steps = METHODS[arm](problem, budget)
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    if not problem.costs.within(scheme, budget):
        raise ValueError(f"{arm} keeps {problem.costs.total(scheme)}, more than {budget} allows")
    dense = nms.Pattern(problem.m, problem.m)
    return Found(
        scheme={name: scheme.get(name, dense) for name in problem.candidates},
        sizes={name: weight.parameter.numel() for name, weight in problem.candidates.weights.items()},
        shares=problem.shares(scheme),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        steps=steps,
    )


# ---------------------------------------------------------------------------------------------------- ways


Way: TypeAlias = "Callable[[Problem, nms.Budget], tuple[nms.Scheme, int]]"  # -> scheme, training steps


def _uniform(problem: Problem, budget: nms.Budget) -> tuple[nms.Scheme, int]:
    return problem.uniform(problem.pattern), 0


def _erk(problem: Problem, budget: nms.Budget) -> tuple[nms.Scheme, int]:
    scheme = erk_scheme(
        problem.model, budget, m=problem.m, skip=problem.skip, example_input=problem.example_input
    )
    return scheme, 0


def _domino(
    problem: Problem, budget: nms.Budget, start: nms.Scheme | None = None, **changes: Any
) -> tuple[nms.Scheme, int]:
    """DominoSearch, which trains a copy."""
    batches = problem.batches()

    def step(model: nn.Module) -> Tensor:
        return problem.task.loss(model, next(batches))

    result = nms.domino_search(
        copy.deepcopy(problem.model).train(),
        step,
        budget=budget,
        m=problem.m,
        skip=problem.skip,
        example_input=problem.example_input,
        tolerance=0.0,
        progress=False,
        start=start,
        **{**problem.settings["domino"], **changes},
    )
    return result.scheme, result.steps


def _allocate(problem: Problem, budget: nms.Budget, criterion: str) -> tuple[nms.Scheme, int]:
    """One-shot allocation; "taylor" and "output" see some training batches, in evaluation mode."""
    batches = islice(problem.batches(), problem.settings["calibration"])
    given: dict[str, Any] = {}
    if criterion == "taylor":
        given = {
            "step": lambda model: problem.task.loss(model, next(batches)),
            "steps": problem.settings["calibration"],
        }
    elif criterion == "output":
        given = {"calibration": [problem.task.model_input(batch) for batch in batches]}
    result = nms.allocate(
        problem.model,
        budget,
        m=problem.m,
        skip=problem.skip,
        criterion=criterion,
        example_input=problem.example_input,
        **given,
    )
    return result.scheme, 0


def _refined(problem: Problem, budget: nms.Budget) -> tuple[nms.Scheme, int]:
    """DominoSearch that starts from an allocation to a multiple of the budget."""
    refine = problem.settings["refine"]
    looser, _ = _allocate(problem, problem.budget(refine["times"]), refine["criterion"])
    return _domino(problem, budget, start=looser, **refine["domino"])


METHODS: Mapping[str, Way] = {
    "uniform": _uniform,
    "erk": _erk,
    "domino": _domino,
    "magnitude": partial(_allocate, criterion="magnitude"),
    "taylor": partial(_allocate, criterion="taylor"),
    "output": partial(_allocate, criterion="output"),
    "refined": _refined,
}
