"""Search: a pattern for each layer, within a budget."""

from __future__ import annotations

from .allocate import Allocation, allocate
from .budget import Budget
from .constraints import Candidates, Constraints, find_candidates
from .costs import Cost, Costs
from .domino import DominoResult, domino_search
from .erk import Erk, erk_densities
from .erk_scheme import erk_scheme
from .latency import LatencyTable, measure_latency
from .permute import Permutation, permute_channels

__all__ = [
    "Allocation",
    "Budget",
    "Candidates",
    "Constraints",
    "Cost",
    "Costs",
    "DominoResult",
    "Erk",
    "LatencyTable",
    "Permutation",
    "allocate",
    "domino_search",
    "erk_densities",
    "erk_scheme",
    "find_candidates",
    "measure_latency",
    "permute_channels",
]
