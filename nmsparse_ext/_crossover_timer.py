"""One packed matrix on a GPU, multiplied each way there is, for `crossover.measure`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import cusparselt, ops
from ._cuda_timing import GRAPH_TOKENS, alternate, graphed, medians
from .crossover import DENSE, LT, SMALL_BATCH
from .engines_cuda import Operands, matrix_parts, multiply

if TYPE_CHECKING:
    from .tensor import NMTensor

#: Weights rotate through so many bytes, several times the second-level cache of any GPU: the layers of a
#: model that is larger than it come from memory.
COLD_BYTES = 256 << 20
MAX_COPIES = 64


class CudaTimer:
    """See `crossover.Timer`. Inputs are random, and their seed is fixed."""

    def __init__(self, weight: NMTensor) -> None:
        values, indices = matrix_parts(weight)
        self._pattern, self._k = weight.pattern, weight.k
        self._device, self._dtype = values.device, values.dtype
        self._values, self._indices = values.detach(), indices
        self._random = torch.Generator(values.device).manual_seed(0)

    def microseconds(self, tokens: int, branches: Sequence[str]) -> dict[str, float]:
        """The median of several rounds, all ways in turns, with cold weights.

        Few tokens are timed as replays of CUDA graphs: in calls one by one the host would take the longest,
        and the way with the shortest call would win, whatever the GPU does.
        """
        device = self._device
        with torch.no_grad(), torch.cuda.device(device):
            x = torch.randn(tokens, self._k, generator=self._random, device=device).to(self._dtype)
            sets: dict[str, Sequence[Any]] = {}
            calls: dict[str, Callable[[int], Tensor]] = {}
            for branch in branches:
                try:
                    sets[branch] = self._sets(branch)
                    calls[branch] = self._call(branch, x, sets[branch])
                    calls[branch](0)
                except RuntimeError as error:
                    if branch != LT or isinstance(error, torch.OutOfMemoryError):
                        raise
                    # The library may refuse what it is said to take; that is no reason to measure nothing.
                    calls.pop(branch, None)
                    warnings.warn(f"cuSPARSELt is left out at {tokens} tokens: {error}", stacklevel=2)
            if tokens <= GRAPH_TOKENS:
                try:
                    graphs = {branch: graphed(call, len(sets[branch])) for branch, call in calls.items()}
                except RuntimeError:  # one cannot be captured: compared as calls, then
                    torch.cuda.synchronize()
                else:
                    found = medians(alternate(graphs))
                    return {branch: time / len(sets[branch]) for branch, time in found.items()}
            return medians(alternate(calls))

    def _call(self, branch: str, x: Tensor, sets: Sequence[Any]) -> Callable[[int], Tensor]:
        def call(i: int) -> Tensor:
            values, indices, dense, blob = sets[i % len(sets)]
            return multiply(branch, x, values, indices, dense, blob, None, self._pattern, "none")

        return call

    def _sets(self, branch: str) -> Sequence[Any]:
        """What `engines_cuda.multiply` takes, with copies of what is read of it that exceed the cache."""
        values, indices = self._values, self._indices
        sets: list[Operands]
        if branch == SMALL_BATCH:
            sets = [(v, i, None, None) for v, i in copies_of(values, indices)]
            return sets
        dense = ops.unpack(values, indices, self._pattern, k=self._k, dim=-1)
        if branch == DENSE:
            sets = [(values, indices, copy, None) for (copy,) in copies_of(dense)]
            return sets
        assert branch == LT
        sets = [(values, indices, None, copy) for (copy,) in copies_of(cusparselt.compress(dense))]
        return sets


def copies_of(*read: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors that are read together, and as many copies of them as exceed the cache."""
    copies = min(MAX_COPIES, COLD_BYTES // max(sum(part.nbytes for part in read), 1) + 1)
    return [read] + [tuple(part.clone() for part in read) for _ in range(copies - 1)]
