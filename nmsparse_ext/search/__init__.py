"""Search: a pattern for each layer, within a budget."""

from __future__ import annotations

from .erk import Erk, erk_densities

__all__ = ["Erk", "erk_densities"]
