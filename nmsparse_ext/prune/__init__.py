"""One-shot pruning of trained models: magnitude, Wanda, SparseGPT, for any N:M and mixed schemes."""

from __future__ import annotations

from .model import prune_model
from .report import PrunedWeight, PruneReport

__all__ = ["PruneReport", "PrunedWeight", "prune_model"]
