"""N:M training: the Sparsifier, its update rules and schedules, and SAD."""

from __future__ import annotations

from .accelerate import Accelerate
from .rules import Rule, SrSte, Static, Ste, Step
from .sad import SadHistory
from .schedule import DecayingMask, DenseTail, DenseWarmup, Freeze, Gradual, RefreshEvery, Schedule
from .sparsifier import Sparsifier
from .weight import SparseWeight

__all__ = [
    "Accelerate",
    "DecayingMask",
    "DenseTail",
    "DenseWarmup",
    "Freeze",
    "Gradual",
    "RefreshEvery",
    "Rule",
    "SadHistory",
    "Schedule",
    "SparseWeight",
    "Sparsifier",
    "SrSte",
    "Static",
    "Ste",
    "Step",
]
