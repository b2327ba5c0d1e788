"""Opens what other tools have written, and writes such files: safetensors, torch checkpoints, folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from ..._arguments import check_state, state_of
from ..._atomic import atomic_write
from ...errors import FormatError
from ...weights import canonical_name
from ..format import brief
from ..shards import INDEX_SUFFIX, locate, read_config, read_stored
from ._packing import dense
from ._peer import Source, plain_names

#: Where checkpoints of training scripts keep the model's state dict.
STATE_DICTS = ("model_state_dict", "state_dict", "model")
_TORCH_FILES = (".bin", ".pt", ".pth", ".tar", ".ckpt")
_SEMI_STRUCTURED = (SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT)


def open_source(source: str | os.PathLike[str] | Mapping[str, Any] | nn.Module) -> Source:
    """Finds the state dict in a file, a folder, a checkpoint or a model.

    Torch checkpoints are loaded with ``weights_only=True``: nothing in them is run.

    Raises:
        TypeError: If ``source`` is none of these.
        ValueError: If a model has extra state that is no tensor.
        FormatError: If a file is damaged or holds no tensors by name.
        OSError: If it cannot be opened.
    """
    if isinstance(source, nn.Module):
        tensors: dict[str, Any] = {name: t.detach() for name, t in state_of("source", source).items()}
        # torch.ao.pruning keeps the masks of its parametrizations out of state dicts.
        tensors |= {
            name: mask
            for name, mask in source.named_buffers()
            if name.endswith(".mask") and ".parametrizations." in f".{name}"
        }
        return Source(plain_names(tensors))
    if isinstance(source, Mapping):
        tensors, entries = _state_dict(source)
        return Source(plain_names(tensors), entries=entries, masks=_masks(source))
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source must be a path, a state dict or an nn.Module, got {type(source).__name__}")
    path = _file_of(os.fspath(source))
    config = read_config(os.path.dirname(path))
    with open(path, "rb") as file:
        start = file.read(4096)
    if path.endswith(INDEX_SUFFIX) or start[8:9] == b"{":
        tensors, contents = read_stored(path)
        # Aliases and packed weights have names of their own; the reader of our format takes them as they are.
        packed = bool(contents.weights or contents.aliases)
        return Source(tensors if packed else plain_names(tensors), config, contents=contents, path=path)
    if start[:2] in (b"PK", b"\x80\x02"):
        checkpoint = _load_torch(path)
        tensors, entries = _state_dict(checkpoint)
        return Source(plain_names(tensors), config, entries, masks=_masks(checkpoint), path=path)
    return Source({}, config, text=start.decode("utf-8", "replace"), path=path)


def _file_of(path: str) -> str:
    """The file to begin with; in a folder without safetensors files the only torch checkpoint."""
    try:
        return locate(path)
    except FileNotFoundError:
        found = [name for name in sorted(os.listdir(path)) if name.endswith(_TORCH_FILES)]
        if len(found) != 1:
            raise
        return os.path.join(path, found[0])


def _load_torch(path: str) -> Any:
    try:
        with torch.serialization.safe_globals(list(_SEMI_STRUCTURED)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Zip errors, unpickling errors, and whatever a damaged tensor leads to.
        raise FormatError(f"{path}: no torch checkpoint of plain tensors: {error}") from error


def _state_dict(checkpoint: Any) -> tuple[dict[str, Any], frozenset[str]]:
    if not isinstance(checkpoint, Mapping):
        raise FormatError(f"a checkpoint must be a mapping of names, got {type(checkpoint).__name__}")
    for key in STATE_DICTS:
        inner = checkpoint.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            check_state(f"{key} of a checkpoint", inner, FormatError)
            return dict(inner), frozenset(str(name) for name in checkpoint if name != key)
    strange = [name for name, value in checkpoint.items() if not isinstance(value, Tensor)]
    if strange:
        raise FormatError(
            f"neither a state dict nor a checkpoint with one under {', '.join(STATE_DICTS)}: "
            f"{brief(strange)} are no tensors"
        )
    check_state("a state dict", checkpoint, FormatError)
    return dict(checkpoint), frozenset()


def _masks(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Masks of a ``torch.ao.pruning`` sparsifier whose state is saved beside the model's."""
    masks: dict[str, Tensor] = {}
    for entry in checkpoint.values():
        state = entry.get("state") if isinstance(entry, Mapping) and "groups" in entry else None
        for name, kept in state.items() if isinstance(state, Mapping) else ():
            mask = kept.get("mask") if isinstance(kept, Mapping) else None
            if isinstance(name, str) and isinstance(mask, Tensor):
                masks[canonical_name(name)] = mask
    return masks


def write_torch(checkpoint: Mapping[str, Any], path: str | None) -> None:
    """``torch.save``, all or nothing; without a path there is nothing to do."""
    if path is None:
        return
    with atomic_write(path) as file:
        torch.save(dict(checkpoint), file)
        file.flush()


def write_plain(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Writes tensors, dense, for any reader of safetensors: each name has its own, tied ones are repeated."""
    seen: set[int] = set()
    stored = {}
    for name, tensor in tensors.items():
        plain = dense(tensor).cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.nbytes:  # safetensors refuses both
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        stored[name] = plain
    with atomic_write(path) as file:
        save_file(stored, file.name, {"format": "pt"})
