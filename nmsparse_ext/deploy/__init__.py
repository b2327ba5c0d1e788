"""Taking a sparse model into use: pack it where that pays, save it, load it.

``convert`` packs weights, ``report`` says what it did; ``save_file``, ``load_file`` and ``load_into`` keep
packed models in safetensors files.
"""

from __future__ import annotations

from .convert import convert, ignore_in_ddp
from .detect import USUAL_PATTERNS, detect_pattern
from .files import load_file, load_into, save_file
from .fold import fold_batch_norm
from .report import LayerReport, Report, report
from .summary import Summary, WeightSummary, summary

__all__ = [
    "USUAL_PATTERNS",
    "LayerReport",
    "Report",
    "Summary",
    "WeightSummary",
    "convert",
    "detect_pattern",
    "fold_batch_norm",
    "ignore_in_ddp",
    "load_file",
    "load_into",
    "report",
    "save_file",
    "summary",
]
