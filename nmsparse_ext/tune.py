"""Measuring ahead of time what runs products with packed weights on this GPU the fastest.

For each shape: the checked search for cuSPARSELt's algorithm at each number of tokens (``_lt_search.py``),
then which way to multiply wins there (``crossover.py``). Both end up in the files that weights are
multiplied by from then on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import crossover, cusparselt
from .crossover import LT, SMALL_BATCH_TOKENS, TOKENS, Choices, Measured, Problem
from .pattern import Pattern
from .scheme import Scheme
from .tensor import NMTensor, compress
from .weights import Weight, weights

__all__ = ["DTYPES", "Job", "Tuned", "jobs_of_model", "jobs_of_shapes", "tune", "why_not"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Job:
    """A shape to be measured.

    Attributes:
        rows: Outputs.
        k: Inputs.
        pattern: Its pattern.
        dtype: Of weight and inputs.
        biases: Whether products have a bias, without and with: what cuSPARSELt has algorithms for.
        names: Weights of this shape.
    """

    rows: int
    k: int
    pattern: Pattern
    dtype: torch.dtype
    biases: tuple[bool, ...] = (False,)
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.pattern} {self.rows}x{self.k}"

    def problem(self, device: torch.device) -> Problem:
        """The same as `crossover` sees it."""
        return Problem(device, self.dtype, self.pattern, self.rows, self.k)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What was found.

    Attributes:
        job: Of what.
        measured: Times of all ways, for each number of tokens.
        choices: Which way goes.
        reasons: For each way: None, or why it cannot run the shape.
        searched: ``(tokens, bias, what the search found)`` for cuSPARSELt's algorithms.
    """

    job: Job
    measured: Measured
    choices: Choices
    reasons: dict[str, str | None]
    searched: tuple[tuple[int, bool, cusparselt.Found], ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "shape": [self.job.rows, self.job.k],
            "pattern": str(self.job.pattern),
            "dtype": str(self.job.dtype).removeprefix("torch."),
            "weights": list(self.job.names),
            "choices": str(self.choices),
            "microseconds": {str(tokens): dict(times) for tokens, times in self.measured.points.items()},
            "why_not": {way: reason for way, reason in self.reasons.items() if reason is not None},
            "algorithms": [
                {"tokens": tokens, "bias": bias, **dataclasses.asdict(found)}
                for tokens, bias, found in self.searched
            ],
        }


def why_not() -> str | None:
    """Why nothing can be measured here; None if it can."""
    if not torch.cuda.is_available():
        return f"tune measures on an NVIDIA GPU, and torch {torch.__version__} sees none"
    return None


# ------------------------------------------------------------------------------------------------------- jobs


def jobs_of_shapes(
    shapes: Iterable[tuple[int, int]], patterns: Iterable[Pattern], dtype: torch.dtype
) -> list[Job]:
    """Every shape with every pattern, with and without a bias.

    Args:
        shapes: ``(rows, k)``.
        patterns: The patterns.
        dtype: Of weights and inputs.
    """
    return [Job(rows, k, pattern, dtype, (False, True)) for rows, k in shapes for pattern in patterns]


def jobs_of_model(
    model: nn.Module,
    scheme: Scheme,
    dtype: torch.dtype | None = None,
    choose: Callable[[Weight], bool] = lambda weight: True,
) -> list[Job]:
    """The matrices of a model; those that are equally fast count as one.

    Args:
        model: The model; its weights may be packed, or not even pruned.
        scheme: Patterns of those that are not packed.
        dtype: What weights will be converted to; None: as they are.
        choose: Which weights count.
    """
    patterns = {name: resolved.pattern for name, resolved in scheme.resolve(model, strict=False).items()}
    found: dict[Job, list[tuple[str, bool]]] = {}
    for weight in weights(model):
        parameter = weight.parameter
        if not choose(weight):
            continue
        if isinstance(parameter, NMTensor):
            pattern, group_dim = parameter.pattern, parameter.group_dim
        elif weight.name in patterns and weight.group_dim is not None:
            pattern, group_dim = patterns[weight.name], weight.group_dim
        else:
            continue
        if parameter.dim() != 2 or pattern.is_dense:
            continue
        k, rows = parameter.shape[group_dim], parameter.shape[1 - group_dim]
        job = Job(rows, k, pattern, parameter.dtype if dtype is None else dtype)
        bias = getattr(weight.module, "bias", None) is not None
        found.setdefault(job, []).append((weight.name, bias))
    return [
        dataclasses.replace(
            job,
            names=tuple(name for name, _ in places),
            biases=tuple(sorted({bias for _, bias in places})),
        )
        for job, places in found.items()
        if job.dtype in DTYPES.values()
    ]


# -------------------------------------------------------------------------------------------------- measuring


def tune(
    jobs: Sequence[Job],
    tokens: Sequence[int] = TOKENS,
    *,
    device: torch.device | str = "cuda",
    algorithms: bool = True,
    report: Callable[[Tuned], object] = lambda tuned: None,
) -> list[Tuned]:
    """Measures shapes on random weights and inputs, and remembers what is the fastest.

    Args:
        jobs: The shapes.
        tokens: Numbers of tokens; those between go the way of the next larger one.
        device: The GPU.
        algorithms: Search for cuSPARSELt's algorithms first; without, what is known of them is used.
        report: Is told of each job that is done.

    Returns:
        What was found, for each job.

    Raises:
        ValueError: If there is no GPU, or a number of tokens is below 1.
        RuntimeError: The GPU's memory does not suffice for a shape.
    """
    reason = why_not()
    if reason is not None:
        raise ValueError(reason)
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens must be numbers of at least 1, got {list(tokens)}")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    done = []
    for job in jobs:
        tuned = _tune_one(job, sorted(set(tokens)), device, algorithms)
        report(tuned)
        done.append(tuned)
    return done


def _tune_one(job: Job, tokens: Sequence[int], device: torch.device, algorithms: bool) -> Tuned:
    from ._crossover_timer import CudaTimer

    problem = job.problem(device)
    reasons = crossover.reasons(problem)
    weight = _random_weight(job, device).with_engine("cuda-packed")
    searched = []
    if algorithms and reasons[LT] is None:
        packed = cusparselt.pack(weight)
        # Fewer tokens are what the small-batch kernel is for: there cuSPARSELt is timed as it chooses itself.
        for count in (count for count in tokens if count > SMALL_BATCH_TOKENS):
            for bias in job.biases:
                searched.append((count, bias, cusparselt.search(packed, count, bias=bias)))
    measured = crossover.measure(problem, CudaTimer(weight), tokens)
    return Tuned(job, measured, measured.choices(problem), reasons, tuple(searched))


def _random_weight(job: Job, device: torch.device) -> NMTensor:
    generator = torch.Generator(device).manual_seed(0)
    dense: Tensor = torch.randn(job.rows, job.k, generator=generator, device=device).to(job.dtype)
    return compress(dense, job.pattern, prune=True, remainder="pad")
