"""2:4 weights (1:2 in float32) on sparse tensor cores, through NVIDIA's cuSPARSELt.

Example::

    W = nms.compress(w.cuda(), "2:4")       # any pattern that embeds in 2:4
    packed = cusparselt.pack(W)             # the library's own form; once
    y = cusparselt.linear(x, packed, bias)  # x: as many tokens as you like

The library is loaded at run time from where torch or its wheel put it; `why_not` says why there is none. On
the CPU the same functions run in plain PyTorch, with a form of their own.

Which of the library's algorithms runs is decided by `set_search_mode`: ``"off"`` takes its own choice,
``"file"`` (the default) what an earlier search has found for this GPU, library version and product, and
``"first-use"`` searches at the first call of a product. `search` does it ahead of time.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import _arguments as arguments
from . import _lt_layout as lt
from . import ops
from ._build import extension
from ._lt_autograd import Backing, Epilogue, LtLinear
from ._lt_choice import SearchMode, algorithms_path, chosen, search, search_mode, set_search_mode
from ._lt_library import library, require, why_not
from ._lt_probe import usable_layout
from ._lt_search import Algorithms, Choice, Found

if TYPE_CHECKING:
    from .tensor import NMTensor

__all__ = [
    "Algorithms",
    "Choice",
    "Found",
    "LtWeight",
    "SearchMode",
    "algorithms_path",
    "clear",
    "linear",
    "pack",
    "search",
    "search_mode",
    "set_plan_limit",
    "set_search_mode",
    "statistics",
    "why_not",
]

_lt_matmul = torch.ops.nmsparse.lt_matmul.default  # found once: a packet looks for the overload in every call
_epilogue = torch.ops.nmsparse.epilogue.default

#: What `linear` can apply to its sums: what the library fuses, and what is a step of its own.
ACTIVATIONS = ("none", "relu", "gelu", "silu")


class LtWeight(NamedTuple):
    """A weight in the form that multiplies it, for one device and library version. Not to be saved.

    Attributes:
        blob: uint8 ``[bytes]``.
        rows: Outputs.
        k: Inputs.
        dtype: The weight's dtype, which inputs must have too.
        batches: How many weights it holds, or 0 for a single one.
        backing: What gradients of inputs are made from; None if it was packed without.
    """

    blob: Tensor
    rows: int
    k: int
    dtype: torch.dtype
    batches: int = 0
    backing: Backing | None = None


# ------------------------------------------------------------------------------------------------ packing


def pack(weight: NMTensor, *, gradients: bool = False) -> LtWeight:
    """Compresses a packed weight for `linear`.

    Args:
        weight: ``[rows, k]``, or ``[batches, rows, k]``, grouped along ``k``, with a pattern that embeds in
            2:4 (float32: in 1:2). Rows and k must be multiples of 16 (float32: 8; int8 and float8: 32).
        gradients: Keep what gradients of inputs take: ``weight`` itself, which is made dense in every
            backward pass; or, where ``weight`` has the hardware's pattern along its rows too (a transposable
            mask), its transposed in the library's form, so that the backward pass runs on sparse tensor
            cores as well. Weights of floating point numbers only, of 16 bits or more.

    Returns:
        The library's form, on the weight's device.

    Raises:
        TypeError: ``weight`` is no NMTensor, or of a dtype that sparse tensor cores do not multiply.
        ValueError: Its pattern, group dim, shape or device will not do.
    """
    from .tensor import NMTensor

    if not isinstance(weight, NMTensor):
        raise TypeError(f"weight must be an NMTensor (nms.compress makes one), got {type(weight).__name__}")
    arguments.check_dtype("weight", weight, tuple(lt.MULTIPLES))
    if gradients and weight.dtype.itemsize == 1:
        raise TypeError(f"weight of {weight.dtype} has no gradients: pack it with gradients=False")
    if weight.dim() not in (2, 3) or weight.group_dim != weight.dim() - 1:
        raise ValueError(
            "weight must be [rows, k] or [batches, rows, k], grouped along k, "
            f"got shape {list(weight.shape)}, grouped along dim {weight.group_dim}"
        )
    wanted, pattern = lt.hardware_pattern(weight.dtype), weight.pattern
    if not lt.embeds(pattern, weight.dtype):
        raise ValueError(
            f"weight of {weight.dtype} must have a pattern that embeds in {wanted} "
            f"(n <= {wanted.n}, m a multiple of {wanted.m}), got {pattern}"
        )
    rows, k = weight.shape[-2:]
    multiple = lt.MULTIPLES[weight.dtype].weight
    if rows == 0 or rows % multiple or k == 0 or k % multiple:
        raise ValueError(
            f"weight of {weight.dtype} must have sizes in multiples of {multiple}, got {list(weight.shape)}"
        )
    dense = weight.detach().to_dense().contiguous()
    if dense.is_cuda:
        require(dense.device)
    backing = None
    if gradients:
        crosswise = ops.find_violation(dense, wanted, dim=dense.dim() - 2) is None
        transposed = compress(dense.mT.contiguous()) if crosswise else None
        backing = Backing(weight.values.detach(), weight.indices, pattern, transposed)
    return LtWeight(compress(dense), rows, k, dense.dtype, dense.shape[0] if dense.dim() == 3 else 0, backing)


def compress(dense: Tensor) -> Tensor:
    """The library's form of a weight that has the hardware's pattern, 2:4 (float32: 1:2).

    Our kernel writes it where a probe has shown that it writes the library's bytes, else the library does.

    Args:
        dense: ``[rows, k]`` or ``[batches, rows, k]``, contiguous, of a dtype and of sizes that the library
            takes, which is not checked here; nor is the pattern.

    Returns:
        uint8 ``[bytes]``.
    """
    layout = _our_layout(dense, *dense.shape) if dense.dim() == 2 else None
    if layout is not None:
        return torch.ops.nmsparse.lt_prune_pack(dense, layout)
    return compress_with_library(dense)


def compress_both_ways(dense: Tensor) -> tuple[Tensor, Tensor] | None:
    """`compress` of a weight that is 2:4 in its rows and in its columns, and of its transpose, in one pass.

    Nothing is transposed. Of every 4x4 tile the best choice by float64 sums is kept: of finite weights that
    are 2:4 both ways nothing gets lost but what is smaller than the rounding of its tile's sum, a part in
    2^50 of the tile's largest weight.

    Args:
        dense: ``[rows, k]``, contiguous, of a dtype and of sizes that the library takes both ways. That is
            not checked here, nor is the pattern.

    Returns:
        Two blobs, uint8 ``[bytes]``; None where our kernels are not known to write the library's bytes for
        both, or the hardware's pattern is not 2:4: each has to be compressed on its own then.
    """
    rows, k = dense.shape
    if lt.hardware_pattern(dense.dtype).m != 4:
        return None
    along, across = _our_layout(dense, rows, k), _our_layout(dense, k, rows)
    if along is None or across is None:
        return None
    values, indices, values_t, indices_t, _ = torch.ops.nmsparse.transposable_pack(dense)
    pack = torch.ops.nmsparse.lt_pack
    return pack(values, indices, k, along), pack(values_t, indices_t, rows, across)


def _our_layout(like: Tensor, rows: int, k: int) -> str | None:
    """In which of our layouts the library would store ``[rows, k]``; tests put another in its place."""
    return usable_layout(like.device, library()[0] or "", like.dtype, rows, k) if like.is_cuda else None


def compress_with_library(dense: Tensor) -> Tensor:
    """`compress`, by the library itself."""
    rows, k = dense.shape[-2:]
    batches = dense.shape[0] if dense.dim() == 3 else 1
    if dense.is_cuda:
        assert extension is not None
        with torch.cuda.device(dense.device):
            size = extension.cusparselt_compressed_bytes(
                dense.device.index, rows, k, batches, _name(dense.dtype)
            )
    else:
        size = lt.portable_bytes(rows, k, dense.dtype, batches)
    return torch.ops.nmsparse.lt_compress(dense, size)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------ products


def linear(
    x: Tensor,
    weight: LtWeight,
    bias: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    alpha: float = 1.0,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    choice: Choice | None = None,
) -> Tensor:
    """Multiplies with a compressed weight.

    Equivalent to ``activation(alpha * F.linear(x, W) + bias)``, but for the order in which sums are taken.
    Differentiable in ``x`` and ``bias`` if the weight was packed with ``gradients=True``. Under autocast the
    weight keeps its dtype, as it was packed: ``x`` and ``bias`` are cast to it, and the result is of
    autocast's. CUDA graphs can capture it once it has run with the same arguments.

    Args:
        x: ``[..., k]`` of the weight's dtype; ``[batches, tokens, k]`` for a batch of weights. Read where it
            lies if its rows begin at multiples of 16 bytes; token counts that the library does not take
            (other than multiples of 8, float32: 4, int8 and float8: 16) cost a copy only where x ends at the
            end of its memory.
        weight: What `pack` gave, on the device of ``x``.
        bias: ``[rows]``, of the result's dtype (float32 for int8 weights, float16 for results of float8).
        scales: float32 ``[rows]``, instead of ``alpha``, for int8 weights only.
        alpha: What sums are multiplied by.
        activation: ``"none"``, ``"relu"``, ``"gelu"`` (the exact one) or ``"silu"``. The library fuses relu,
            and gelu for int8 in and out; the others are a step of its own.
        out_dtype: dtype of the result, by default that of ``x``. int8: also int32, float16, bfloat16. float8:
            also float16, bfloat16, float32.
        choice: Which of the library's kernels runs; by default what `search_mode` says.

    Returns:
        ``[..., rows]``.

    Raises:
        TypeError: An argument has a type or dtype that will not do.
        ValueError: A shape, device, activation or combination of them will not do, or gradients are
            asked for.
    """
    arguments.check_tensor("x", x)
    if not isinstance(weight, LtWeight):
        raise TypeError(f"weight must be what cusparselt.pack gives, got {type(weight).__name__}")
    if _under_autocast(x, weight):
        result = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            x, bias = x.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
            y = linear(x, weight, bias, alpha=alpha, activation=activation, choice=choice)
            return y if out_dtype is not None else y.to(result)
    out = x.dtype if out_dtype is None else out_dtype
    _check_linear(x, weight, bias, scales, activation, out)
    shape = x.shape
    if not weight.batches and x.dim() != 2:
        x = x.reshape(-1, weight.k)
    if _wants_gradients(x, bias):
        backing = weight.backing
        assert backing is not None
        rest = (
            functools.partial(_multiply_again, choice=choice),
            backing.pattern,
            weight.rows,
            Epilogue(alpha, activation),
        )
        y = LtLinear.apply(x, bias, weight.blob, backing.values, backing.indices, backing.transposed, rest)
    else:
        y = multiply(x, weight, bias, scales, alpha, activation, out, choice)
    return y if y.dim() == len(shape) else y.view(*shape[:-1], weight.rows)


def _under_autocast(x: Tensor, weight: LtWeight) -> bool:
    if not x.is_floating_point() or weight.dtype.itemsize == 1:
        return False
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _wants_gradients(x: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def multiply(
    x: Tensor,
    weight: LtWeight,
    bias: Tensor | None = None,
    scales: Tensor | None = None,
    alpha: float = 1.0,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    choice: Choice | None = None,
) -> Tensor:
    """`linear` without checks, autocast and gradients, for ``x`` ``[tokens, k]`` (or batches of them)."""
    out = x.dtype if out_dtype is None else out_dtype
    is_fused = activation in ("none", "relu") or (activation == "gelu" and x.dtype == out == torch.int8)
    fused = activation if is_fused else "none"
    if choice is None:
        choice = chosen(x, weight, out, bias, scales, fused)
    if bias is not None:
        bias = bias.contiguous()
    y = _lt_matmul(x, weight.blob, bias, scales, alpha, weight.rows, fused, out, *choice)
    return y if is_fused else _activated(y, activation)


def _activated(y: Tensor, activation: str) -> Tensor:
    if torch.compiler.is_compiling():
        return _epilogue(y, None, None, activation)
    with torch._C._AutoDispatchBelowAutograd():  # its gradients are Python, which takes as long as the op
        return _epilogue(y, None, None, activation)


def _multiply_again(
    x: Tensor, blob: Tensor, bias: Tensor | None, rows: int, epilogue: Epilogue, choice: Choice | None
) -> Tensor:
    """`multiply`, as the gradients call it: for the transposed weight, too."""
    batches = x.shape[0] if x.dim() == 3 else 0
    weight = LtWeight(blob, rows, x.shape[-1], x.dtype, batches)
    return multiply(x, weight, bias, None, epilogue.alpha, epilogue.activation, None, choice)


def _check_linear(
    x: Tensor,
    weight: LtWeight,
    bias: Tensor | None,
    scales: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> None:
    if x.dtype != weight.dtype:
        raise TypeError(f"x must have the weight's dtype, {weight.dtype}, got {x.dtype}")
    arguments.check_same_device("x", x, "weight", weight.blob)
    if weight.batches and (x.dim() != 3 or x.shape[0] != weight.batches):
        raise ValueError(
            f"x must be [{weight.batches}, tokens, {weight.k}] for {weight.batches} weights, "
            f"got {list(x.shape)}"
        )
    if x.dim() == 0 or x.shape[-1] != weight.k:
        raise ValueError(f"x must be [..., {weight.k}], got {list(x.shape)}")
    if out_dtype not in lt.OUT_DTYPES[x.dtype]:
        allowed = ", ".join(map(str, lt.OUT_DTYPES[x.dtype]))
        raise TypeError(f"out_dtype must be one of {allowed} for x of {x.dtype}, got {out_dtype}")
    arguments.check_choice("activation", activation, ACTIVATIONS)
    if activation in ("gelu", "silu"):
        fused = activation == "gelu" and x.dtype == out_dtype == torch.int8
        if not fused and not out_dtype.is_floating_point:
            raise ValueError(f"activation {activation!r} needs a floating-point out_dtype, got {out_dtype}")
        if out_dtype == torch.float8_e4m3fn:
            raise ValueError(
                f"activation {activation!r} is not available for float8 results; ask for another out_dtype"
            )
    if scales is not None and x.dtype != torch.int8:
        raise ValueError(f"scales are for int8 weights only, got {x.dtype}")
    bias_dtype = lt.bias_dtype(x.dtype, out_dtype)
    for name, vector, dtype in (("bias", bias, bias_dtype), ("scales", scales, torch.float32)):
        if vector is None:
            continue
        arguments.check_tensor(name, vector)
        arguments.check_dtype(name, vector, (dtype,))
        arguments.check_same_device(name, vector, "x", x)
        if vector.dim() != 1 or vector.shape[0] != weight.rows or not vector.is_contiguous():
            raise ValueError(f"{name} must be contiguous [{weight.rows}], got {list(vector.shape)}")
    if _wants_gradients(x, bias):
        if weight.backing is None:
            raise ValueError(
                "weight was packed without gradients: use pack(weight, gradients=True), or call this under "
                "torch.no_grad()"
            )
        if out_dtype != x.dtype:
            raise ValueError(f"out_dtype must be {x.dtype} where gradients are wanted, got {out_dtype}")


# --------------------------------------------------------------------------------------------- bookkeeping


def statistics() -> list[dict[str, Any]]:
    """Plans, hits, misses, evictions, streams and bytes of workspace, for each device that was used."""
    return [] if extension is None else extension.cusparselt_statistics()


def clear(device: torch.device | str | int) -> None:
    """Gives back a GPU's plans and workspaces. No captured CUDA graph may still be going to use them."""
    if extension is None or not torch.cuda.is_available():
        return
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        extension.cusparselt_clear(torch.cuda.current_device())


def set_plan_limit(limit: int) -> None:
    """How many plans (products of one shape, bias and epilogue) each device keeps; 256 unless set.

    Raises:
        ValueError: ``limit`` is below 1, or there is no cuSPARSELt.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(f"limit must be an int of at least 1, got {limit!r}")
    version, reason = library()
    if version is None:
        raise ValueError(f"there is no cuSPARSELt: {reason}")
    assert extension is not None
    extension.cusparselt_set_plan_limit(limit)
