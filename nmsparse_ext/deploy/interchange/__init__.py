"""Checkpoints of other tools, to and from packed weights.

`from_peer` reads any of `FORMATS` into ``{name: Tensor or NMTensor}``, which ``nms.save_file`` takes;
`to_peer` writes such a mapping, or a model, as another tool has it; `detect_format` says what a file is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from ..._arguments import check_path, state_of
from ...errors import FormatError
from ...pattern import Pattern
from ...scheme import Scheme
from ...weights import canonical_name
from ._containers import open_source
from ._peer import PeerFormat, Reading, Source, Writing
from .apex_asp import APEX_ASP
from .compressed_tensors import COMPRESSED_TENSORS
from .cusparselt import CUSPARSELT
from .cutlass import CUTLASS
from .dominosearch import DOMINOSEARCH
from .modelopt import MODELOPT
from .native import DENSE, NATIVE
from .nm_sparsity import NM_SPARSITY
from .onnx import ONNX, OnnxWeight, export_onnx
from .torch_pruning import TORCH_PRUNING

__all__ = [
    "FORMATS",
    "OnnxWeight",
    "PeerFormat",
    "detect_format",
    "export_onnx",
    "from_peer",
    "to_peer",
]

StrPath = str | os.PathLike[str]
Counts = Literal["kept", "pruned"]

#: Every format, by name. The first that recognises a checkpoint is what `detect_format` returns.
FORMATS: dict[str, PeerFormat] = {
    peer.name: peer
    for peer in (
        NATIVE,
        COMPRESSED_TENSORS,
        CUTLASS,
        CUSPARSELT,
        TORCH_PRUNING,
        MODELOPT,
        APEX_ASP,
        NM_SPARSITY,
        DOMINOSEARCH,
        ONNX,
        DENSE,
    )
}


def from_peer(
    source: StrPath | Mapping[str, Any] | nn.Module,
    *,
    format: str | None = None,
    pattern: Pattern | str | Scheme | Mapping[str, Pattern | str] | None = None,
    counts: Counts | None = None,
    model: nn.Module | None = None,
    prune: bool | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Reads a checkpoint of another tool, its sparse weights packed.

    Torch checkpoints are read with ``weights_only=True``, and everything in a file is checked.

    Args:
        source: A file, a folder, a state dict, a checkpoint with one, or a model.
        format: One of `FORMATS`; ``None`` detects.
        pattern: The pattern of all weights, or patterns by name. Without one, masks say what is kept, and
            weights have the tightest usual pattern that they hold.
        counts: What the first number of a pattern that is given as text counts: ``"kept"`` as in this
            project, NM-sparsity, DominoSearch, ASP, ModelOpt; ``"pruned"`` as in SparseGPT, Wanda,
            llm-compressor, Neural Compressor, coremltools. Required with such text: 1:4 means either. A
            `Pattern` or `Scheme` always counts what is kept.
        model: What the checkpoint is of. Says which weights may be packed and which dim is grouped; without
            it, dim 1 of whatever has two dims or more.
        prune: Whether weights that violate ``pattern`` are pruned by magnitude. ``None``: only where the
            format has dense weights by nature ("nm-sparsity", "dominosearch"); else that is an error.
        **options: ``layout`` ("cusparselt": "sm80" or "sm90", without a GPU); ``grouping`` ("nm-sparsity":
            "channel", or "flat" for its older layers).

    Returns:
        ``{name: Tensor or NMTensor}``, as `load_file` returns it and `save_file` takes it.

    Raises:
        FormatError: If the checkpoint is damaged, or not of that format.
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range or missing, or a weight violates its pattern.
        OSError: If a file cannot be opened.
    """
    peer = None if format is None else _find(format)
    patterns = _patterns(pattern, counts, model)
    opened = open_source(source)
    if peer is None:
        peer = _detect(opened)
    if peer.read is None:
        raise ValueError(f"format {peer.name!r} can be written only")
    if isinstance(source, nn.Module) and peer is DENSE and model is None:
        model = source
    _check_options(peer, options)
    if peer.name not in ("nmsparse", "dominosearch", "onnx") and not opened.tensors:
        raise FormatError(f"{opened.path or 'source'} holds no tensors by name, so it is not {peer.title}")
    try:
        return peer.read(opened, Reading(patterns, model, prune, options))
    except FormatError as error:
        where = f"{opened.path}: " if opened.path and not str(error).startswith(opened.path) else ""
        raise FormatError(f"{where}{error}") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError) as error:
        # Whatever PyTorch finds wrong with tensors that a checkpoint describes.
        raise FormatError(f"{opened.path or 'source'}: not valid as {peer.title}: {error}") from error


def to_peer(
    tensors: nn.Module | Mapping[str, Tensor],
    destination: StrPath | None = None,
    *,
    format: str,
    model: nn.Module | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Writes packed weights as another tool has them.

    Args:
        tensors: A model, whose weights are packed where they hold a pattern; or ``{name: Tensor or
            NMTensor}`` such as `load_file` and `from_peer` return.
        destination: The file, replaced in one step; or the folder ("compressed-tensors"), in which each file
            is. ``None`` writes nothing.
        format: One of `FORMATS`.
        model: The model, if ``tensors`` is none and the format needs its layers ("modelopt",
            "dominosearch", "onnx").
        **options: ``layout`` ("cusparselt": "sm80" or "sm90", without a GPU); ``max_shard_size``
            ("nmsparse"); ``example_input`` ("onnx").

    Returns:
        The state dict (with "modelopt": the checkpoint) as the other tool has it.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range or missing.
        OSError: If something cannot be written.
    """
    peer = _find(format)
    if peer.write is None:
        raise ValueError(f"format {peer.name!r} can be read only")
    _check_options(peer, options)
    mapping = state_of("tensors", tensors)
    if isinstance(tensors, nn.Module):
        model = tensors
        mapping = from_peer(tensors)
    path = None if destination is None else check_path("destination", destination)
    return peer.write(Writing(mapping, model, path, options))


def detect_format(source: StrPath | Mapping[str, Any] | nn.Module) -> str:
    """Says of which of `FORMATS` a file, a folder, a state dict or a model is.

    Checkpoints of "nm-sparsity" look like any dense one, and are found to be "dense".

    Raises:
        FormatError: If it is of none.
        OSError: If a file cannot be opened.
    """
    return _detect(open_source(source)).name


def _detect(source: Source) -> PeerFormat:
    for peer in FORMATS.values():
        if peer.recognises(source):
            return peer
    raise FormatError(f"{source.path or 'source'} is of none of the formats {', '.join(FORMATS)}")


def _find(name: str) -> PeerFormat:
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def _check_options(peer: PeerFormat, options: Mapping[str, Any]) -> None:
    unknown = sorted(options.keys() - peer.options)
    if unknown:
        taken = f"takes {', '.join(sorted(peer.options))}" if peer.options else "takes none"
        raise TypeError(f"format {peer.name!r} {taken}, got {', '.join(unknown)}")


def _patterns(
    pattern: Pattern | str | Scheme | Mapping[str, Pattern | str] | None,
    counts: str | None,
    model: nn.Module | None,
) -> dict[str, Pattern]:
    """Patterns by name, n kept; ``""`` is for all weights."""
    if counts not in (None, "kept", "pruned"):
        raise ValueError(f'counts must be "kept" or "pruned", got {counts!r}')
    if pattern is None:
        if counts is not None:
            raise ValueError("counts goes with a pattern, and none was given")
        return {}
    given: dict[str, Pattern | str] = dict(pattern) if isinstance(pattern, Mapping) else {"": pattern}
    result: dict[str, Pattern] = {}
    for name, value in given.items():
        parsed = Pattern.parse(value)
        if isinstance(value, str):
            if counts is None:
                raise ValueError(
                    f'counts must be "kept" or "pruned": does {value!r} keep {parsed.n} of every {parsed.m}, '
                    f"or prune them? Tools differ"
                )
            if counts == "pruned":
                if parsed.n == parsed.m:
                    raise ValueError(f"pattern {value!r} with counts='pruned' would keep nothing")
                parsed = Pattern(parsed.m - parsed.n, parsed.m)
        elif counts == "pruned":
            raise ValueError(f"a {type(value).__name__} counts what is kept; give text with counts='pruned'")
        result[_parameter(name, model)] = parsed
    return result


def _parameter(name: str, model: nn.Module | None) -> str:
    """A module's name is shorthand for its weight, as in schemes."""
    plain = canonical_name(name)
    if model is None or not plain:
        return plain
    known = {canonical_name(key) for key, _ in model.named_parameters(remove_duplicate=False)}
    return plain if plain in known or f"{plain}.weight" not in known else f"{plain}.weight"
