"""DominoSearch: a text file with ``[N, M]`` for each layer, N kept; the weights are those of a model."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from ... import domino_text
from ..._atomic import atomic_write
from ...pattern import Pattern
from ...scheme import Scheme
from ...tensor import NMTensor
from ._packing import dense, pack_dense
from ._peer import PeerFormat, Reading, Source, Writing


def _read(source: Source, reading: Reading) -> dict[str, Tensor]:
    if reading.model is None or not source.path:
        raise ValueError("source must be the scheme's file, and model the model that has the weights")
    patterns = Scheme.load(source.path, reading.model)
    wanted = Reading(dict(patterns), reading.model, reading.prune)
    known = wanted.weights()
    result: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}
    for name, tensor in reading.model.state_dict(keep_vars=True).items():
        weight = known.get(name) if known else None
        if id(tensor) not in made:
            plain = dense(tensor)
            group_dim = None if weight is None or weight.name not in patterns else weight.group_dim
            prune = reading.prune is not False
            made[id(tensor)] = (
                plain
                if group_dim is None or weight is None
                else pack_dense(weight.name, plain, wanted, group_dim, prune=prune)
            )
        result[name] = made[id(tensor)]
    return result


def _write(writing: Writing) -> dict[str, Tensor]:
    if writing.model is None:
        raise ValueError("model must be given: the scheme lists all its layers in their order")
    patterns = {name: t.pattern for name, t in writing.tensors.items() if isinstance(t, NMTensor)}
    sizes = Counter(pattern.m for pattern in patterns.values())
    m = sizes.most_common(1)[0][0] if sizes else 16
    text = domino_text.dump(patterns, writing.model, dense=Pattern(m, m))
    if writing.destination is not None:
        with atomic_write(writing.destination) as file:
            file.write(text.encode())
            file.flush()
    return writing.tensors


DOMINOSEARCH = PeerFormat(
    name="dominosearch",
    title="DominoSearch's scheme text, for the weights of a model",
    recognises=lambda source: source.text.startswith(("{'SparseConv", "{'Linear")),
    read=_read,
    write=_write,
    verified="the published scheme of ResNet-50; texts are read as the official code does (a Python literal)",
    lossy="layers other than Conv2d and Linear; names (layers are matched by order and shape)",
)
