"""Weights on the CPU, multiplied as on a GPU: a table of crossovers that a test makes up."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from nmsparse_ext import crossover
from nmsparse_ext.crossover import Choices, Problem


def decree(problem: Problem, *ways: tuple[int, str]) -> None:
    """Has ``way`` go up to so many tokens each, as if it had been measured; the last one without end."""
    points = {}
    for tokens, way in ways:
        points[tokens] = {branch: 1.0 if branch == way else 10.0 for branch in crossover.BRANCHES}
    crossover._table.add(crossover.key_of(problem), crossover.Measured(problem.rows, problem.k, points))
    crossover.forget_choices()


def choices(problem: Problem) -> Choices:
    """What goes now."""
    return crossover.choices_for(problem)


def record_ways(monkeypatch: pytest.MonkeyPatch, engine: ModuleType) -> list[str]:
    """A list that fills with the ways that products of an engine's module go."""
    ways: list[str] = []
    multiply = engine.multiply

    def recorded(branch: str, *args: Any) -> torch.Tensor:
        ways.append(branch)
        return multiply(branch, *args)

    monkeypatch.setattr(engine, "multiply", recorded)
    return ways


def problem_like(w: torch.Tensor, pattern: str) -> Problem:
    """The problem of a weight ``[rows, k]``."""
    from nmsparse_ext.pattern import Pattern

    return Problem(w.device, w.dtype, Pattern.parse(pattern), *w.shape)
