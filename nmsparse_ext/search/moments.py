"""Second moments of what reaches each layer, and the output error that pruning causes there.

With x one column of inputs to a linear map W, pruning D of W changes the output by ``D x``, on average by
``E |D x|^2 = tr(D H D^T)`` where ``H = E[x x^T]``. So one pass over calibration data serves every candidate.
A convolution is the linear map of its patches.

H of a layer with K inputs has K^2 entries. It is held in diagonal blocks of at most `BLOCK` inputs: exact for
layers up to that width, and for wider ones without the correlations between inputs of different blocks. As
long as less than half as many x came as a block has inputs, they are held themselves: ``mean |D x|^2`` is
then the cheaper way to the same error, and exact for wide layers, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..deploy.example import ExampleInput, run_example
from ..weights import Weight
from .inputs import Columns, NoFeatures, Source, find_sources
from .matrices import matrices_of

#: Inputs in a block: 16 MB of float32 each, and 16 GFLOP for 2048 outputs.
BLOCK = 2048


class Moments:
    """``E[x x^T]`` of the inputs of one weight's matrices.

    Args:
        matrices: How many matrices there are at most; see `as_matrices`. As long as all get the same inputs,
            one moment stands for them all.
        block: Inputs in a block, at most; ``None`` for one block of all.
        dtype: What is added up in.

    Attributes:
        counts: How many columns they are the mean of, for each matrix.
    """

    def __init__(
        self, matrices: int = 1, *, block: int | None = -1, dtype: torch.dtype = torch.float32
    ) -> None:
        self._blocks: list[Tensor] = []
        self._held: list[Tensor] = []  # columns that are in no block yet: [count, matrices or 1, inputs]
        self.counts: list[int] = [0]
        self._matrices = matrices
        self._block = BLOCK if block == -1 else block
        self._dtype = dtype

    @property
    def count(self) -> int:
        """How many columns came, to the matrix that most of them came to."""
        return max(self.counts)

    @property
    def blocks(self) -> list[Tensor]:
        """``[matrices or 1, size, size]`` for consecutive inputs."""
        held, self._held = self._held, []
        if held:
            self.counts = [0] * len(self.counts)
            self._add(torch.cat(held), None)
        return self._blocks

    def add(self, columns: Columns) -> None:
        """Takes more columns into the mean."""
        values, at = columns
        if not len(values):
            return
        values = values.to(self._dtype)
        if self._can_hold(values, at):
            self._held.append(values.clone())
            self.counts = [self.count + len(values)] * values.shape[1]
            return
        _ = self.blocks
        self._add(values, at)

    def _can_hold(self, values: Tensor, at: int | None) -> bool:
        """Whether more columns are fewer than half a block's inputs still, and go to all matrices alike."""
        if at is not None or self._blocks or (self._held and self._held[0].shape[1] != values.shape[1]):
            return False
        width = values.shape[2]
        return 2 * (self.count + len(values)) <= min(width, self._block or width)

    def _add(self, values: Tensor, at: int | None) -> None:
        parts = values.split(self._block or max(1, values.shape[2]), dim=2)
        if not self._blocks:
            self.counts = [0] * values.shape[1]
            self._blocks = [
                p.new_zeros(values.shape[1], p.shape[2], p.shape[2], dtype=self._dtype) for p in parts
            ]
        if at is not None and len(self.counts) == 1 < self._matrices:
            # From now on they differ.
            self.counts = self.counts * self._matrices
            self._blocks = [block.repeat(self._matrices, 1, 1) for block in self._blocks]
        if at is None and values.shape[1] < len(self.counts):
            for matrix in range(len(self.counts)):
                self._add(values, matrix)
            return
        chosen = slice(None) if at is None else slice(at, at + 1)
        before = self.counts[chosen][0]
        count = before + len(values)
        self.counts[chosen] = [count] * len(self.counts[chosen])
        for block, part in zip(self._blocks, parts, strict=True):
            # mean += (x x^T - mean) / count, for as many columns as came.
            by_matrix, mean = part.transpose(0, 1), block[chosen]
            torch.baddbmm(mean, by_matrix.mT, by_matrix, beta=before / count, alpha=1 / count, out=mean)

    def squares(self) -> Tensor:
        """``E[x^2]`` of each input: ``[matrices or 1, inputs]``."""
        if self._held:
            return torch.cat(self._held).square().mean(0)
        return torch.cat([block.diagonal(dim1=1, dim2=2) for block in self.blocks], dim=1)

    def error(self, change: Tensor) -> float:
        """``tr(D H D^T)`` of a change D, ``[matrices or 1, outputs, inputs]``; see `as_matrices`.

        Of matrices that not all columns came to it is the mean over those that came to any.
        """
        if self.count == 0:
            return 0.0
        change = change.to(self._dtype)
        if self._held:
            columns = torch.cat(self._held).permute(1, 2, 0)  # [matrices or 1, inputs, count]
            outputs = change.flatten(0, 1) @ columns[0] if len(columns) == 1 else change @ columns
            return float(outputs.square_().sum(dtype=torch.float64)) / self.count
        parts = change.split(self.blocks[0].shape[1], dim=2)
        products = sum(
            ((part @ block) * part).sum((1, 2), dtype=torch.float64)
            for part, block in zip(parts, self.blocks, strict=True)
        )
        assert isinstance(products, Tensor)
        share = torch.tensor(self.counts, dtype=torch.float64, device=products.device) / max(1, self.count)
        return max(0.0, float((products * share).sum()))


def collect(
    model: nn.Module,
    sources: Mapping[str, list[Source]],
    moments: Mapping[str, Moments],
    batch: ExampleInput,
) -> None:
    """Runs the model on a batch and adds what reaches each weight to its moments.

    Args:
        model: The model; it runs in eval mode without gradients.
        sources: Where each weight's inputs are seen.
        moments: Of each weight.
        batch: A tensor, a tuple of arguments or a mapping of keyword arguments.

    Raises:
        TypeError: If the batch is none of these.
        NoFeatures: If what reaches a weight is no features.
    """
    run_example(model, batch, hooks_for(sources, moments))


def hooks_for(sources: Mapping[str, list[Source]], moments: Mapping[str, Moments]) -> dict[nn.Module, Any]:
    """``{module: what to call before its forward}``, to collect with."""
    called: dict[nn.Module, list[tuple[str, Source]]] = {}
    for name, found in sources.items():
        for source in found:
            called.setdefault(source.caller, []).append((name, source))

    def before_forward(caller: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, source in called[caller]:
            for columns in source.columns(args, kwargs):
                moments[name].add(columns)

    return dict.fromkeys(called, before_forward)


def input_moments(
    model: nn.Module, weights: Mapping[str, Weight], batches: Iterable[ExampleInput]
) -> dict[str, Moments]:
    """Runs the model on every batch and returns the moments of each weight's inputs.

    Args:
        model: The model; it runs in eval mode without gradients.
        weights: Whose inputs.
        batches: What the model is called with: tensors, tuples of arguments or mappings of keyword arguments.

    Raises:
        TypeError: If a batch is none of these.
        ValueError: If a module's inputs are not known here, nothing reaches one, or there is no batch.
    """
    moments = {name: Moments(matrices_of(weight)) for name, weight in weights.items()}
    try:
        sources = {name: find_sources(model, weight) for name, weight in weights.items()}
        number = 0
        for number, batch in enumerate(batches, start=1):  # noqa: B007 - counted for the error
            collect(model, sources, moments, batch)
    except NoFeatures as error:
        raise ValueError(f"{error}: skip it, or choose another criterion") from None
    if number == 0:
        raise ValueError("calibration must hold at least one batch")
    for name, found in moments.items():
        if found.count == 0:
            raise ValueError(f"no calibration batch reaches {name}: skip it, or give other batches")
    return moments
