"""What a format of another tool is to `from_peer` and `to_peer`: an entry of the table in ``__init__.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..._checks import MAX_DIMS, WEIGHT_DTYPES
from ...pattern import Pattern
from ...weights import Weight, canonical_name, weights
from ..format import Contents


@dataclass(frozen=True)
class Source:
    """A checkpoint as it was found, before anybody knows whose it is.

    Attributes:
        tensors: Its state dict, without the parts of names that wrappers add.
        config: The ``config.json`` beside it.
        entries: What a torch checkpoint holds besides the state dict (names only).
        contents: What the file says of our packed weights.
        masks: Masks by parameter name that stand beside the state dict (a sparsifier's state).
        text: The beginning of a file that holds no tensors.
        path: Where it came from; ``""`` for a mapping.
    """

    tensors: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    entries: frozenset[str] = frozenset()
    contents: Contents = field(default_factory=Contents)
    masks: dict[str, Tensor] = field(default_factory=dict)
    text: str = ""
    path: str = ""


@dataclass(frozen=True)
class Reading:
    """How a checkpoint is to be read.

    Attributes:
        patterns: Patterns by parameter name, n kept; ``""`` holds for all weights that have none.
        model: What the checkpoint is of, if that is known.
        prune: Whether weights that violate their pattern are pruned; ``None``: as the format has it.
        options: Further arguments that only some formats take.
    """

    patterns: Mapping[str, Pattern] = field(default_factory=dict)
    model: nn.Module | None = None
    prune: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def weights(self) -> dict[str, Weight] | None:
        """The model's weights under all their names; ``None`` without a model."""
        if self.model is None:
            return None
        return {name: weight for weight in weights(self.model) for name in weight.names}

    def group_dim(self, name: str, tensor: Tensor, known: Mapping[str, Weight] | None) -> int | None:
        """The dim that the groups of a weight run along; ``None`` if it is none that can be packed.

        Without a model: dim 1 of whatever has two dims or more.
        """
        if tensor.dtype not in WEIGHT_DTYPES or not 2 <= tensor.dim() <= MAX_DIMS:
            return None
        if known is None:
            return 1
        weight = known.get(name)
        if weight is None or tuple(weight.parameter.shape) != tuple(tensor.shape):
            return None
        return weight.group_dim if weight.dense_because is None or name in self.patterns else None

    def pattern(self, name: str) -> Pattern | None:
        """The pattern that was asked for."""
        return self.patterns.get(name, self.patterns.get(""))


@dataclass(frozen=True)
class Writing:
    """How a checkpoint is to be written.

    Attributes:
        tensors: ``{name: Tensor or NMTensor}``.
        model: The model, if it was given.
        destination: The file or folder; ``None`` to write nothing.
        options: Further arguments that only some formats take.
    """

    tensors: dict[str, Tensor]
    model: nn.Module | None = None
    destination: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PeerFormat:
    """A format of another tool.

    Attributes:
        name: What it is called in `from_peer`, `to_peer` and on the command line.
        title: Whose it is.
        recognises: Whether a checkpoint looks like it.
        read: ``(source, reading) -> {name: Tensor or NMTensor}``; ``None`` if it cannot be read.
        write: ``writing -> {name: tensor}`` as the peer holds it; writes to the destination if there is one.
            ``None`` if it cannot be written.
        options: Arguments that only some formats take, and this one does.
        verified: Against what the tests check it.
        lossy: What does not come through; ``""`` if everything does.
    """

    name: str
    title: str
    recognises: Callable[[Source], bool]
    read: Callable[[Source, Reading], dict[str, Tensor]] | None = None
    write: Callable[[Writing], dict[str, Any]] | None = None
    options: frozenset[str] = frozenset()
    verified: str = ""
    lossy: str = ""


def plain_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict without the parts of names that wrappers add.

    Raises:
        ValueError: If two names become the same.
    """
    renamed: dict[str, Any] = {}
    for name, tensor in tensors.items():
        plain = canonical_name(name)
        if plain in renamed:
            raise ValueError(f"two tensors are called {plain!r} once wrapper prefixes are dropped")
        renamed[plain] = tensor
    return renamed
