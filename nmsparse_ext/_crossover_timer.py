"""One packed matrix on a GPU, multiplied each way there is, for `crossover.measure`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

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
        self._values, self._indices = values.detach(), indices
        self._random = torch.Generator(values.device).manual_seed(0)

    def microseconds(self, tokens: int, branches: Sequence[str]) -> dict[str, float]:
        """The median of several rounds, all ways in turns, with cold weights.

        Few tokens are timed as replays of CUDA graphs: in calls one by one the host would take the longest,
        and the way with the shortest call would win, whatever the GPU does.
        """
        device, dtype = self._values.device, self._values.dtype
        with torch.no_grad(), torch.cuda.device(device):
            x = torch.randn(tokens, self._k, generator=self._random, device=device).to(dtype)
            sets: dict[str, list[Operands]] = {}
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

    def _call(self, branch: str, x: Tensor, sets: list[Operands]) -> Callable[[int], Tensor]:
        return lambda i: multiply(branch, x, *sets[i % len(sets)], None, self._pattern, "none")

    def _sets(self, branch: str) -> list[Operands]:
        """As many copies of what one way takes as exceed the cache."""
        first = self._operands(branch)
        values, indices, dense, blob = first
        read = [part for part in (dense, blob) if part is not None] or [values, indices]
        held = sum(part.nbytes for part in read)
        copies = min(MAX_COPIES, COLD_BYTES // max(held, 1) + 1)
        return [first] + [self._clone(first) for _ in range(copies - 1)]

    def _operands(self, branch: str) -> Operands:
        """What `engines_cuda.multiply` takes; of it each way reads one form."""
        values, indices = self._values, self._indices
        if branch == SMALL_BATCH:
            return values, indices, None, None
        dense = ops.unpack(values, indices, self._pattern, k=self._k, dim=-1)
        if branch == DENSE:
            return values, indices, dense, None
        assert branch == LT
        return values, indices, None, cusparselt.compress(dense)

    def _clone(self, operands: Operands) -> Operands:
        values, indices, dense, blob = operands
        if dense is not None:
            return values, indices, dense.clone(), None
        if blob is not None:
            return values, indices, None, blob.clone()
        return values.clone(), indices.clone(), None, None
