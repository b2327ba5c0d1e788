"""Which of cuSPARSELt's algorithms multiplies: what a search has found, or the library's own choice.

The state of the process: the mode, the file, and what was chosen for the products so far.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _lt_layout as lt
from ._checks import ceil_div
from ._lt_library import library, require
from ._lt_search import DEFAULT, Algorithms, Choice, Found, Key, problem_text
from ._lt_search import search as checked_search

if TYPE_CHECKING:
    from .cusparselt import LtWeight

SearchMode = Literal["off", "file", "first-use"]
_MODES = get_args(SearchMode)

_algorithms = Algorithms()
_mode: SearchMode  # set at the end, from the environment
_recent: dict[tuple[Any, ...], Choice] = {}  # what was chosen, product by product
_MOST_RECENT = 4096


def search_mode() -> SearchMode:
    """How `linear` chooses among the library's algorithms."""
    return _mode


def set_search_mode(mode: SearchMode, *, path: str | os.PathLike[str] | None = None) -> None:
    """Says how `linear` chooses among the library's algorithms.

    ``NMSPARSE_CUSPARSELT_SEARCH`` sets it at the start.

    Args:
        mode: ``"off"``: the library's own choice. ``"file"``: what a search has found. ``"first-use"``: the
            same, and a search at the first call of a product that the file does not know, which takes a
            while. While a CUDA graph is being captured no search is made; compiled code leaves the choice to
            the library.
        path: The file; by default ``nmsparse_ext/cusparselt.json`` in the user's cache folder.
    """
    global _mode, _algorithms
    arguments.check_choice("mode", mode, _MODES)
    _mode = mode
    if path is not None:
        _algorithms = Algorithms(path)
    _recent.clear()


def algorithms_path() -> str:
    """The file that found algorithms are kept in."""
    return str(_algorithms.path)


def search(
    weight: LtWeight,
    tokens: int,
    *,
    bias: bool = False,
    scales: bool = False,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> Found:
    """Finds the fastest of the library's algorithms for one product, on random inputs, and remembers it.

    Every candidate's results are compared with those of algorithm 0 before its time counts.

    Args:
        weight: What `pack` gave, on a GPU.
        tokens: How many rows of ``x`` (of each matrix, for a batch of weights).
        bias: Whether the product will have one.
        scales: Whether the product will have scales.
        activation: The activation that the library fuses.
        out_dtype: dtype of the results.

    Returns:
        What was found; `linear` uses it from now on, unless the mode is ``"off"``.

    Raises:
        ValueError: The weight is not on a GPU that runs cuSPARSELt, or the product will not do.
    """
    if weight.blob.device.type != "cuda":
        raise ValueError(f"a search measures on a GPU; the weight is on {weight.blob.device}")
    require(weight.blob.device)
    from ._lt_runner import CudaRunner

    runner = CudaRunner(weight, tokens, bias, scales, activation, out_dtype or weight.dtype)
    with torch.cuda.device(weight.blob.device):
        capability = torch.cuda.get_device_capability()
        found = checked_search(runner, capability, weight.k)
    _algorithms.add(_key(weight, tokens, bias, scales, activation, out_dtype or weight.dtype), found)
    return found


def _key(
    weight: LtWeight, tokens: int, bias: bool, scales: bool, activation: str, out_dtype: torch.dtype
) -> Key:
    multiple = lt.MULTIPLES[weight.dtype].tokens
    text = problem_text(
        weight.dtype,
        out_dtype,
        weight.rows,
        weight.k,
        ceil_div(tokens, multiple) * multiple,
        batches=max(weight.batches, 1),
        bias=bias,
        scales=scales,
        activation=activation,
    )
    return Key(*gpu_and_library(weight.blob.device), text)


@functools.cache
def gpu_and_library(device: torch.device) -> tuple[str, str]:
    """Name of the GPU and version of the library."""
    return torch.cuda.get_device_name(device), library()[0] or "none"


def chosen(
    x: Tensor,
    weight: LtWeight,
    out_dtype: torch.dtype,
    bias: Tensor | None,
    scales: Tensor | None,
    activation: str,
) -> Choice:
    """What runs when the caller has not chosen; ``x`` is what the op gets."""
    if _mode == "off" or x.device.type != "cuda" or torch.compiler.is_compiling():
        return DEFAULT
    tokens = x.shape[-2]
    product = (tokens, bias is not None, scales is not None, activation, out_dtype)
    which = (
        _algorithms,
        _algorithms.added,
        x.device,
        weight.dtype,
        weight.rows,
        weight.k,
        weight.batches,
        *product,
    )
    choice = _recent.get(which)
    if choice is None:
        choice = _looked_up(weight, *product)
        if _mode != "first-use" or not torch.cuda.is_current_stream_capturing():
            if len(_recent) >= _MOST_RECENT:
                _recent.clear()
            _recent[which] = choice
    return choice


def _looked_up(
    weight: LtWeight, tokens: int, bias: bool, scales: bool, activation: str, out_dtype: torch.dtype
) -> Choice:
    if tokens == 0 or (_mode == "file" and len(_algorithms) == 0):
        return DEFAULT
    found = _algorithms.get(_key(weight, tokens, bias, scales, activation, out_dtype))
    if found is None and _mode == "first-use" and not torch.cuda.is_current_stream_capturing():
        found = search(weight, tokens, bias=bias, scales=scales, activation=activation, out_dtype=out_dtype)
    return DEFAULT if found is None else found.choice


def _mode_of_environment() -> SearchMode:
    mode = os.environ.get("NMSPARSE_CUSPARSELT_SEARCH", "").strip() or "file"
    arguments.check_choice("NMSPARSE_CUSPARSELT_SEARCH", mode, _MODES)
    return mode  # type: ignore[return-value]


_mode = _mode_of_environment()
