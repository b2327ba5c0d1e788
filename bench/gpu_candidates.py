"""The ways to multiply that bench_gpu_linear.py times: cuBLAS, torch's 2:4, and ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_layers import Layer
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext import crossover, cusparselt, engines_cuda
from nmsparse_ext.crossover import LT, SMALL_BATCH

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
#: dtype of results.
OUT = {"int8": torch.int32, "float8_e4m3fn": torch.bfloat16}

DENSE, TORCH, OURS = "cuBLAS", "torch 2:4", "ours"
#: Small products read weights that rotate through so much memory, so that they do not lie in the cache.
COLD_BYTES = 256 << 20
MAX_COPIES = 32

#: What a way says that cannot run a product on this card. Of ours anything else is a bug, and ends the bench;
#: torch's private functions for int8, float8 and 2:4 differ between releases, too.
_REFUSALS = (RuntimeError, ValueError)
_REFUSALS_OF_TORCH = (*_REFUSALS, AttributeError, TypeError)

Call = Callable[[int], Tensor]


class Candidates(NamedTuple):
    """What there is to time, and why the rest is missing."""

    calls: dict[str, Call]
    missing: dict[str, str]


def candidates(layer: Layer, tokens: int, dtype: str, pattern: str, device: str, search: bool) -> Candidates:
    """Every way to multiply one layer's packed weight with so many tokens, each tried once.

    Args:
        layer: The layer.
        tokens: Rows of the input.
        dtype: Of weight and input.
        pattern: The weight's pattern.
        device: Where.
        search: Search for cuSPARSELt's fastest right algorithm first.
    """
    generator = torch.Generator(device).manual_seed(0)
    dense = _random((layer.rows, layer.k), dtype, generator)
    x = _random((tokens, layer.k), dtype, generator)
    w = nms.compress(dense, pattern, prune=True)  # holds the forms that this run's crossovers call for
    makers: dict[str, Callable[[], Callable[[Any], Tensor]]] = {DENSE: lambda: _dense(x, dtype)}
    operands: dict[str, Callable[[], Any]] = {DENSE: lambda: dense.clone()}
    if pattern == "2:4":
        makers[TORCH] = lambda: _torch_24(x, dtype)
        operands[TORCH] = lambda: _torch_operand(w, dtype)
    if dtype in ("bfloat16", "float16"):
        makers |= {SMALL_BATCH: lambda: _way(SMALL_BATCH, x, w), LT: lambda: _way(LT, x, w)}
        operands |= {SMALL_BATCH: lambda: (w.values.clone(), w.indices.clone()), LT: lambda: _blob(w)}
    else:
        makers[LT] = lambda: lambda packed: cusparselt.linear(x, packed, out_dtype=OUT[dtype])
        operands[LT] = lambda: cusparselt.pack(w)
    missing = _missing(w, tokens, dtype)
    if search and LT not in missing:
        packed = cusparselt.pack(w)
        cusparselt.search(packed, tokens, out_dtype=OUT.get(dtype))
    calls: dict[str, Call] = {}
    for name, make in makers.items():
        if name in missing:
            continue
        refusals = _REFUSALS_OF_TORCH if name in (DENSE, TORCH) else _REFUSALS
        try:
            call = _rotating(make(), operands[name])
            call(0)
        except refusals as error:
            missing[name] = str(error).strip().splitlines()[0][:200]
            continue
        calls[name] = call
    if dtype in ("bfloat16", "float16"):
        calls[OURS] = _rotating(lambda weight: F.linear(x, weight), lambda: w.clone())
    return Candidates(calls, missing)


def _missing(w: nms.NMTensor, tokens: int, dtype: str) -> dict[str, str]:
    if dtype not in ("bfloat16", "float16"):
        return {}
    reasons = crossover.reasons(engines_cuda.problem_of(w))
    missing = {name: reason for name, reason in reasons.items() if reason is not None}
    if tokens > crossover.SMALL_BATCH_TOKENS:
        missing[SMALL_BATCH] = f"it takes at most {crossover.SMALL_BATCH_TOKENS} tokens"
    return missing


def _random(shape: tuple[int, int], dtype: str, generator: torch.Generator) -> Tensor:
    if dtype == "int8":
        return torch.randint(-127, 128, shape, generator=generator, device=generator.device).to(torch.int8)
    return torch.randn(shape, generator=generator, device=generator.device).to(DTYPES[dtype])


def _rotating(multiply: Callable[[Any], Tensor], make: Callable[[], Any]) -> Call:
    first = make()
    copies = min(MAX_COPIES, COLD_BYTES // max(_bytes(first), 1) + 1) if torch.cuda.is_available() else 2
    operands = [first] + [make() for _ in range(copies - 1)]

    def call(i: int) -> Tensor:
        with torch.no_grad():
            return multiply(operands[i % len(operands)])

    call.copies = copies  # type: ignore[attr-defined]
    return call


def _bytes(operand: Any) -> int:
    if isinstance(operand, nms.NMTensor):
        return operand.held_nbytes
    if isinstance(operand, cusparselt.LtWeight):
        return operand.blob.nbytes
    if isinstance(operand, tuple):
        return sum(part.nbytes for part in operand)
    if hasattr(operand, "packed") and operand.packed is not None:  # torch's own sparse tensor
        return operand.packed.nbytes
    return operand.nbytes


def _dense(x: Tensor, dtype: str) -> Callable[[Tensor], Tensor]:
    if dtype == "int8":
        return lambda w: torch._int_mm(x, w.t())
    if dtype == "float8_e4m3fn":
        one = torch.ones((), device=x.device)
        return lambda w: torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return lambda w: F.linear(x, w)


def _torch_operand(w: nms.NMTensor, dtype: str) -> Tensor:
    if dtype == "float8_e4m3fn":
        return torch._cslt_compress(w.to_dense())
    return torch.sparse.to_sparse_semi_structured(w.to_dense())


def _torch_24(x: Tensor, dtype: str) -> Callable[[Tensor], Tensor]:
    if dtype == "float8_e4m3fn":
        return lambda w: torch._cslt_sparse_mm(w, x.t(), out_dtype=torch.bfloat16, transpose_result=True)
    return lambda w: F.linear(x, w)


def _way(branch: str, x: Tensor, w: nms.NMTensor) -> Callable[[Any], Tensor]:
    def multiply(operand: Any) -> Tensor:
        values, indices = operand if branch == SMALL_BATCH else (w.values, w.indices)
        blob = operand if branch == LT else None
        return engines_cuda.multiply(branch, x, values, indices, None, blob, None, w.pattern, "none")

    return multiply


def _blob(w: nms.NMTensor) -> Tensor:
    return cusparselt.compress(w.to_dense())
