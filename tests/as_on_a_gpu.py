"""Weights on the CPU, multiplied as on a GPU: every way runs in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from nmsparse_ext import crossover, cusparselt, engines_cuda
from nmsparse_ext.crossover import Choices, Problem

GPU = "NVIDIA Test 9000"


@contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Path]:
    """Has the engines of GPUs take weights on the CPU; gives the file of a table of its own."""
    with monkeypatch.context() as patch:
        patch.setattr(engines_cuda, "DEVICES", {"cuda", "cpu"})
        patch.setattr(crossover, "_why_no_small_batch_on", lambda device: None)
        patch.setattr(crossover, "_why_no_lt_on", lambda device: None)
        patch.setattr(crossover, "_tf32", lambda: True)
        patch.setattr(crossover, "_machine", lambda device: (GPU, "0.8.1"))
        before = cusparselt.search_mode()
        cusparselt.set_search_mode("file")
        path = folder / "crossovers.json"
        crossover.set_table(path)
        try:
            yield path
        finally:
            cusparselt.set_search_mode(before)
            crossover.set_table(None)


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


def problem_like(w: torch.Tensor, pattern: str) -> Problem:
    """The problem of a weight ``[rows, k]``."""
    from nmsparse_ext.pattern import Pattern

    return Problem(w.device, w.dtype, Pattern.parse(pattern), *w.shape)
