"""Search: a pattern for each layer, within a budget."""

from __future__ import annotations

from .allocate import Allocation, allocate
from .budget import Budget
from .constraints import Candidates, Constraints, find_candidates
from .costs import Cost, Costs
from .erk import Erk, erk_densities

__all__ = [
    "Allocation",
    "Budget",
    "Candidates",
    "Constraints",
    "Cost",
    "Costs",
    "Erk",
    "allocate",
    "erk_densities",
    "find_candidates",
]
