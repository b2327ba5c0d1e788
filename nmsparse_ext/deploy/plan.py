"""What `convert` knows of one weight on its way to a decision."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from .. import engines_cuda, engines_cuda_8bit
from ..engines import find_engine
from ..pattern import Pattern
from ..tensor import Keep, NMTensor
from ..weights import Weight
from .report import LayerReport
from .support import why_unpacked


@dataclasses.dataclass(frozen=True)
class Target:
    """What packed weights are to be; see `convert`."""

    engine: str | None
    keep: Keep
    dtype: torch.dtype | None


@dataclasses.dataclass
class Seconds:
    """How long the module of a weight takes, summed over what reaches it in one run of the model.

    Attributes:
        dense: With the dense weight, in eager mode.
        prepacked: The same product with a weight that a library packed beforehand, as compiled and frozen
            models call it; 0 where there is none.
        best_dense: The faster of the two, input by input.
        packed: With the packed weight, in eager mode.
        best_packed: The faster of that and of the bare op, as compiled models call it, input by input.
    """

    dense: float = 0.0
    prepacked: float = 0.0
    best_dense: float = 0.0
    packed: float = 0.0
    best_packed: float = 0.0

    @property
    def over_eager(self) -> float:
        """How many times as fast the layer is packed, in eager mode."""
        return self.dense / self.packed

    @property
    def over_best(self) -> float:
        """The same of the fastest dense product and the fastest packed one: like with like."""
        return self.best_dense / self.best_packed

    @property
    def hardest(self) -> tuple[float, float]:
        """Dense and packed seconds of that of these two comparisons in which packed gains less."""
        fastest, eager = (self.best_dense, self.best_packed), (self.dense, self.packed)
        return fastest if self.over_best <= self.over_eager else eager

    @property
    def gain(self) -> float:
        """How many times as fast packed is, compiled or not."""
        return min(self.over_best, self.over_eager)

    def __add__(self, other: Seconds) -> Seconds:
        sums = (a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        return Seconds(*sums)


@dataclasses.dataclass(eq=False)
class Plan:
    """What is known about one weight, and in the end what happens to it."""

    weight: Weight
    asked_for: str | None = None  # name of an engine
    pattern: Pattern | None = None
    packed: nn.Parameter | None = None  # an NMTensor as a parameter
    choice: str | None = None  # "packed" or "dense"; None: not decided yet
    reason: str = ""
    seconds: Seconds = dataclasses.field(default_factory=Seconds)
    tokens: int = 0

    def choose(self, choice: str, reason: str) -> None:
        """Decides."""
        self.choice, self.reason = choice, reason

    def place(self, packed: bool) -> None:
        """Puts the packed or the dense weight where the model has it.

        Straight into the tables of parameters: ``__setattr__`` would cost as much as a small layer.
        """
        for module, attr in self.weight.places:
            module._parameters[attr] = self.packed if packed else self.weight.parameter

    def row(self) -> LayerReport:
        """The line of the report."""
        shape, itemsize = self.weight.parameter.shape, self.weight.parameter.itemsize
        tensor = self.packed
        assert self.choice is not None
        measured = self.seconds.dense > 0
        return LayerReport(
            name=self.weight.name,
            pattern=None if self.pattern is None else str(self.pattern),
            tokens=self.tokens if measured else None,
            dense_ms=_milliseconds(self.seconds.dense),
            prepacked_ms=_milliseconds(self.seconds.prepacked),
            packed_ms=_milliseconds(self.seconds.packed),
            bare_ms=_milliseconds(self.seconds.best_packed),
            dense_bytes=shape.numel() * itemsize,
            packed_bytes=tensor.held_nbytes if isinstance(tensor, NMTensor) else None,
            engine=tensor.engine if isinstance(tensor, NMTensor) else None,
            choice=self.choice,
            reason=self.reason + self._unpacked() + self._ways() + self._other_engine(),
        )

    def _other_engine(self) -> str:
        """What there is to add where the engine that was asked for cannot run the weight."""
        if self.asked_for is None or not isinstance(self.packed, NMTensor):
            return ""
        reason = find_engine(self.asked_for).why_not(self.packed)
        return "" if reason is None else f"; not by engine {self.asked_for!r}: {reason}"

    def _ways(self) -> str:
        """What there is to add for a weight on a GPU, which goes one way or another for its tokens."""
        if self.choice != "packed" or not isinstance(self.packed, NMTensor):
            return ""
        return f"; {why(self.packed)}" if is_on_gpu(self.packed) else ""

    def _unpacked(self) -> str:
        """What there is to add to the reason for a packed weight that is unpacked when it runs."""
        if self.choice != "packed" or not isinstance(self.packed, NMTensor):
            return ""
        reasons = [why_unpacked(module, self.packed) for module, _ in self.weight.places]
        return next((f"; unpacked in every call: {reason}" for reason in reasons if reason), "")


def is_on_gpu(weight: NMTensor) -> bool:
    """Whether an engine of GPUs runs a weight, so that there is something to say about its ways."""
    return weight.engine in engines_cuda.CUDA_ENGINES or weight.engine in engines_cuda_8bit.ROUNDED


def why(weight: NMTensor) -> str:
    """Which way such a weight goes for how many tokens, why, and what it holds for that."""
    eight_bits = weight.engine in engines_cuda_8bit.ROUNDED
    return engines_cuda_8bit.why(weight) if eight_bits else engines_cuda.why(weight)


def _milliseconds(seconds: float) -> float | None:
    return seconds * 1e3 if seconds > 0 else None
