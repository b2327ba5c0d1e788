"""This project's own files, and dense checkpoints with the zeros in place."""

from __future__ import annotations

from torch import Tensor

from ..files import save_file
from ..stored import identity, unlayout
from ._containers import write_plain, write_torch
from ._packing import dense, pack_dense
from ._peer import PeerFormat, Reading, Source, Writing


def _read(source: Source, reading: Reading) -> dict[str, Tensor]:
    return unlayout(dict(source.tensors), source.contents)


def _write(writing: Writing) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = dict(writing.tensors)
    if writing.destination is not None:
        save_file(stored, writing.destination, **writing.options)
    return stored


def _read_dense(source: Source, reading: Reading) -> dict[str, Tensor]:
    known = reading.weights()
    made: dict[tuple, Tensor] = {}  # tied ones stay tied
    result: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        key = identity(tensor) or (name,)
        if key not in made or name in reading.patterns:
            group_dim = reading.group_dim(name, tensor, known)
            made[key] = pack_dense(name, tensor, reading, group_dim, prune=bool(reading.prune))
        result[name] = made[key]
    return result


def _write_dense(writing: Writing) -> dict[str, Tensor]:
    made: dict[int, Tensor] = {}
    tensors = {name: made.setdefault(id(t), dense(t)) for name, t in writing.tensors.items()}
    path = writing.destination
    if path is not None and path.endswith(".safetensors"):
        write_plain(tensors, path)  # without the ties: any reader finds each name
    else:
        write_torch(tensors, path)
    return tensors


NATIVE = PeerFormat(
    name="nmsparse",
    title="files of this project (docs/format.md)",
    recognises=lambda source: bool(source.contents.weights or source.contents.aliases),
    read=_read,
    write=_write,
    options=frozenset({"max_shard_size"}),
    verified="an independent reader written from the specification",
)
DENSE = PeerFormat(
    name="dense",
    title="dense checkpoints, safetensors or torch, with zeros in place",
    recognises=lambda source: bool(source.tensors),
    read=_read_dense,
    write=_write_dense,
    verified="safetensors, torch.save",
    lossy="which zeros were kept and which pruned; the pattern, where a tighter one holds too",
)
