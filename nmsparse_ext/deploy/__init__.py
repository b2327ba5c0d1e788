"""Taking a sparse model into use: pack it where that pays, save it, load it.

``convert`` packs weights, ``report`` says what it did; ``save_file``, ``load_file`` and ``load_into`` keep
packed models in safetensors files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .convert import convert, ignore_in_ddp
from .detect import USUAL_PATTERNS, detect_pattern
from .explain import Explanation, Verdict, explain
from .files import load_file, load_into, save_file
from .fold import fold_batch_norm
from .fuse import fuse_activations
from .interchange import FORMATS, OnnxWeight, PeerFormat, detect_format, export_onnx, from_peer, to_peer
from .refit import refit
from .repeated import Compared, Comparison, compare
from .report import LayerReport, Report, report
from .summary import Summary, WeightSummary, summary

if TYPE_CHECKING:
    from .inductor import inductor_options

__all__ = [
    "FORMATS",
    "USUAL_PATTERNS",
    "Compared",
    "Comparison",
    "Explanation",
    "LayerReport",
    "OnnxWeight",
    "PeerFormat",
    "Report",
    "Summary",
    "Verdict",
    "WeightSummary",
    "compare",
    "convert",
    "detect_format",
    "detect_pattern",
    "explain",
    "export_onnx",
    "fold_batch_norm",
    "from_peer",
    "fuse_activations",
    "ignore_in_ddp",
    "inductor_options",
    "load_file",
    "load_into",
    "refit",
    "report",
    "save_file",
    "summary",
    "to_peer",
]


def __getattr__(name: str) -> Any:
    if name == "inductor_options":  # brings torch's compiler, which takes seconds
        from .inductor import inductor_options

        return inductor_options
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
