"""Calibration data, and passes of the model over it that gather statistics of a few weights at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..deploy.example import ExampleInput, run_example
from ..search.inputs import NoFeatures, Source, find_sources
from ..search.matrices import matrices_of
from ..search.moments import Moments, hooks_for
from ..weights import Weight, canonical_name
from .criteria import working_dtype


class Calibration:
    """Batches that can be gone through several times.

    Args:
        batches: What the model is called with: tensors, tuples of arguments or mappings of keyword arguments.
            An iterator is read once and kept; others, such as a ``DataLoader``, are asked anew each time.

    Raises:
        TypeError: If it cannot be iterated, or is one batch.
    """

    def __init__(self, batches: Iterable[ExampleInput]) -> None:
        if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
            raise TypeError(
                "calibration must be an iterable of batches, such as a list or a DataLoader, "
                f"got {type(batches).__name__}"
            )
        self._batches = list(batches) if isinstance(batches, Iterator) else batches

    def __iter__(self) -> Iterator[ExampleInput]:
        empty = True
        for batch in self._batches:
            if not isinstance(batch, (Tensor, tuple, list, Mapping)):
                raise TypeError(
                    "calibration must hold tensors, tuples of arguments or mappings of keyword arguments, "
                    f"got {type(batch).__name__}"
                )
            empty = False
            yield tuple(batch) if isinstance(batch, list) else batch
        if empty:
            raise ValueError("calibration must hold at least one batch")


@dataclass
class Calibrated:
    """A weight whose inputs are to be seen.

    Attributes:
        weight: The weight.
        sources: Where they are seen.
        block: Inputs in a block of its moments; see `Moments`.
        first: The number of the call that first used it, in the order of execution.
        why_not: Why nothing is known of its inputs, if so.
    """

    weight: Weight
    sources: list[Source]
    block: int | None
    first: int | None = None
    why_not: str | None = None
    moments: Moments | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its moments, at most."""
        size = self._inputs
        per_block = size if self.block is None else min(size, self.block)
        return matrices_of(self.weight) * size * per_block * self._itemsize

    @property
    def _inputs(self) -> int:
        shape = self.weight.parameter.shape
        if isinstance(self.weight.module, nn.modules.conv._ConvNd) and not self.weight.module.transposed:
            return shape[1:].numel()
        return self.weight.span

    @property
    def _itemsize(self) -> int:
        return max(4, self.weight.parameter.itemsize)


@dataclass
class Passes:
    """Runs a model over calibration data for some of its weights at a time.

    Args:
        model: The model.
        calibration: The data.

    Attributes:
        once: Callers that no batch called more than once.
    """

    model: nn.Module
    calibration: Calibration
    once: set[nn.Module] = field(default_factory=set)

    def find(self, weights: Mapping[str, tuple[Weight, int | None]]) -> dict[str, Calibrated]:
        """Finds where the inputs of weights are seen, and in which order, in one pass.

        Args:
            weights: ``{name: (weight, inputs in a block of its moments)}``.
        """
        found: dict[str, Calibrated] = {}
        for name, (weight, block) in weights.items():
            try:
                found[name] = Calibrated(weight, find_sources(self.model, weight), block)
            except NoFeatures as error:
                found[name] = Calibrated(weight, [], block, why_not=str(error))
        called: dict[nn.Module, list[Calibrated]] = {}
        for item in found.values():
            for source in item.sources:
                called.setdefault(source.caller, []).append(item)
        calls = 0
        often: set[nn.Module] = set()
        of_batch: set[nn.Module] = set()

        def before_forward(caller: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal calls
            if caller in of_batch:
                often.add(caller)
            of_batch.add(caller)
            calls += 1
            for item in called[caller]:
                if item.first is None:
                    item.first = calls

        for batch in self.calibration:
            of_batch.clear()
            try:
                run_example(self.model, batch, dict.fromkeys(called, before_forward))
            except TypeError as error:
                if not isinstance(batch, tuple):
                    raise
                raise TypeError(
                    f"the model cannot be called with a batch of calibration: {error}. The {len(batch)} "
                    "items of a tuple are taken for arguments: leave labels out"
                ) from error
        for item in found.values():
            if item.first is None and item.why_not is None:
                item.why_not = "no calibration batch calls it"
        # Hooks of accelerate that bring weights in take them out again after the forward.
        hooked = any(hasattr(module, "_hf_hook") for module in self.model.modules())
        self.once = set() if hooked else set(called) - often
        return found

    def gather(self, items: Iterable[Calibrated]) -> None:
        """Makes the moments of some weights, in one pass; features that are none are noted as `why_not`."""
        chosen = {item.weight.name: item for item in items}
        sources = {name: item.sources for name, item in chosen.items()}
        moments = {
            name: Moments(matrices_of(item.weight), block=item.block, dtype=working_dtype(item.weight))
            for name, item in chosen.items()
        }
        collect = hooks_for(sources, moments)
        left: set[nn.Module] = set()

        def before_forward(caller: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            try:
                collect[caller](caller, args, kwargs)
            except NoFeatures as error:
                for name, found in sources.items():
                    if any(source.caller is caller for source in found):
                        chosen[name].why_not = str(error)
            left.discard(caller)
            if not left and self.once.issuperset(collect):
                raise _Enough

        for batch in self.calibration:
            left.update(collect)
            with contextlib.suppress(_Enough):
                run_example(self.model, batch, dict.fromkeys(collect, before_forward))
        for name, item in chosen.items():
            item.moments = moments[name]
            if not moments[name].count and item.why_not is None:
                item.why_not = "what its weights are multiplied with is not seen"


def plan(
    model: nn.Module, items: Iterable[Calibrated], sequential: str | None, memory: int
) -> list[list[Calibrated]]:
    """Shares weights out over passes, in the order of execution.

    Args:
        model: The model.
        items: The weights; those without inputs are left out.
        sequential: ``"block"`` or ``"layer"``: what a pass must not go beyond; ``None`` for no such bound.
        memory: Bytes of moments that a pass may hold; a pass of one weight may hold more.
    """
    modules = {canonical_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    passes: list[list[Calibrated]] = []
    before: object = None
    left = 0
    called = [item for item in items if item.why_not is None]
    for item in sorted(called, key=lambda item: item.first or 0):
        part: object = None
        if sequential == "block":
            part = _block_of(item.weight.name, modules)
        elif sequential == "layer":
            part = id(item.sources[0].caller)
        if not passes or part != before or item.nbytes > left:
            passes.append([])
            left = memory
        passes[-1].append(item)
        left -= item.nbytes
        before = part
    return passes


def _block_of(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The element of a module list that a weight is in; else of a sequence of modules; else its module."""
    parts = name.split(".")[:-1]
    for kind in (nn.ModuleList, nn.Sequential):
        for length in range(len(parts) - 1, -1, -1):
            if isinstance(modules.get(".".join(parts[:length])), kind):
                return ".".join(parts[: length + 1])
    return ".".join(parts)


class _Enough(BaseException):
    """The rest of a forward is of no interest. No Exception, so that no model catches it."""
