"""``F.linear`` with a masked weight on sparse tensor cores, for training: packed once for every change of it.

The op ``nmsparse::masked_linear(x, weight, bias, min_tokens)`` is ``F.linear(x, weight, bias)``, whatever
``weight`` holds. Where somebody has vouched for the weight's pattern (`vouch`), and as long as it was not
written to since, the product runs through cuSPARSELt on a packed copy of the weight, which is made at the
first product after the change and kept until the next. So gradient accumulation and activation checkpointing
pack once a step. With a transposable mask the gradient of the input runs there too, on the packed transposed
weight; where our own packer writes the library's bytes, one pass packs both ways
(`cusparselt.compress_both_ways`), elsewhere the transpose is packed from a copy. The gradient of the weight
is a dense product, as it has to be.

Whoever vouches says that the weight as it stands has the pattern: a `Sparsifier` does after each step. Writes
are told by the version counter, which ``.data`` goes around. So do replays of a CUDA graph: a weight whose
step was captured is packed in every product outside of the graph.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import _lt_layout as lt
from .. import cusparselt
from .._op_library import NAMESPACE, library
from ..cusparselt import LtWeight
from ..panels import transforming
from ..pattern import Pattern

__all__ = ["disown", "masked_linear", "vouch"]


class _Vouched(NamedTuple):
    """A weight that has a pattern as long as its version is this one.

    ``replayed``: a captured step writes to it, which no version tells.
    """

    storage: StorageWeakRef  # holds on to the storage's address, not to its memory
    version: int
    pattern: Pattern
    transposable: bool
    replayed: bool
    packed: dict[Hashable, Tensor]


_vouched: dict[Hashable, _Vouched] = {}
_lock = threading.Lock()  # backward passes run in threads of their own


def _key(storage: StorageWeakRef, weight: Tensor) -> Hashable:
    return storage.cdata, weight.storage_offset(), tuple(weight.shape), weight.stride(), weight.dtype


def vouch(weight: Tensor, pattern: Pattern, *, transposable: bool = False) -> None:
    """Says that a weight ``[out, in]`` has ``pattern`` along its inputs as it stands.

    Args:
        weight: The weight. Its contents are not looked at.
        pattern: Its pattern.
        transposable: Whether it has the pattern along its outputs, too.
    """
    storage = StorageWeakRef(weight.untyped_storage())
    with _lock:
        for key in [key for key, one in _vouched.items() if one.storage.expired()]:
            del _vouched[key]
        key = _key(storage, weight)
        replayed = _is_capturing(weight) or (key in _vouched and _vouched[key].replayed)
        _vouched[key] = _Vouched(storage, weight._version, pattern, transposable, replayed, {})


def disown(weight: Tensor) -> None:
    """Takes `vouch` back."""
    with _lock:
        _vouched.pop(_key(StorageWeakRef(weight.untyped_storage()), weight), None)


def why_not_packed(weight: Tensor, dtype: torch.dtype, pattern: Pattern) -> str | None:
    """Why products in ``dtype`` with a weight ``[out, in]`` go dense; None if they need not."""
    if dtype not in lt.MULTIPLES or dtype.itemsize == 1:
        return f"cuSPARSELt has no training products in {dtype}"
    if not lt.embeds(pattern, dtype):
        return f"{pattern} does not embed in {lt.hardware_pattern(dtype)}, which {dtype} runs in"
    multiple = lt.MULTIPLES[dtype].weight
    rows, k = weight.shape
    if rows == 0 or rows % multiple or k == 0 or k % multiple:
        return f"cuSPARSELt needs sizes in multiples of {multiple}, not {rows}x{k}"
    return _why_not_on(weight.device)


def _why_not_on(device: torch.device) -> str | None:
    """Tests put another in its place, to train on the CPU as on a GPU."""
    return cusparselt.why_not(device)


def _is_capturing(weight: Tensor) -> bool:
    """Tests put another in its place."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def _packed(weight: Tensor, dtype: torch.dtype, transposed: bool) -> LtWeight | None:
    """The weight in the library's form; None if nobody vouches for it, or it goes dense."""
    storage = StorageWeakRef(weight.untyped_storage())
    with _lock:
        vouched = _vouched.get(_key(storage, weight))
    if vouched is None or vouched.version != weight._version or (transposed and not vouched.transposable):
        return None
    if why_not_packed(weight, dtype, vouched.pattern) is not None:
        return None
    rows, k = weight.shape[::-1] if transposed else weight.shape

    dense = weight.detach()
    if vouched.replayed or _is_capturing(weight):  # as part of the graph, so that replays see later weights
        dense = dense.to(dtype)
        return LtWeight(cusparselt.compress((dense.T if transposed else dense).contiguous()), rows, k, dtype)
    stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else None
    blob = vouched.packed.get((dtype, transposed, stream))
    if blob is None:
        dense = dense.to(dtype).contiguous()
        # Who takes the forward product takes the gradient next: in one pass, where that can be.
        both = cusparselt.compress_both_ways(dense) if vouched.transposable else None
        if both is not None:
            vouched.packed[dtype, False, stream], vouched.packed[dtype, True, stream] = both
            blob = both[transposed]
        else:
            blob = cusparselt.compress(dense.T.contiguous() if transposed else dense)
            vouched.packed[dtype, transposed, stream] = blob
    return LtWeight(blob, rows, k, dtype)


# --------------------------------------------------------------------------------------------------- the ops


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, min_tokens: int, transposed: bool) -> Tensor:
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    tokens = flat.shape[0]
    fits = flat.shape[-1] == weight.shape[0 if transposed else 1]  # else F.linear says what is wrong
    packed = _packed(weight, x.dtype, transposed) if fits and tokens >= max(min_tokens, 1) else None
    if packed is not None:
        y = cusparselt.multiply(flat, packed, bias).contiguous()
    elif transposed:
        y = flat @ weight.to(x.dtype)
    else:
        y = F.linear(flat, weight.to(x.dtype), bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, min_tokens: int) -> Tensor:
    return _multiply(x, weight, bias, min_tokens, transposed=False)


def _matmul(x: Tensor, weight: Tensor, min_tokens: int) -> Tensor:
    return _multiply(x, weight, None, min_tokens, transposed=True)


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None, min_tokens: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_matmul(x: Tensor, weight: Tensor, min_tokens: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.min_tokens = inputs
    ctx.save_for_backward(x, weight)


def _grad_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.nmsparse.masked_matmul(grad, weight, ctx.min_tokens)
    if ctx.needs_input_grad[1]:
        grad_weight = _outer(grad, x, weight)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
    return grad_x, grad_weight, grad_bias, None


def _save_matmul(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.min_tokens = inputs
    ctx.save_for_backward(x, weight)


def _grad_matmul(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.nmsparse.masked_linear(grad, weight, None, ctx.min_tokens)
    if ctx.needs_input_grad[1]:
        grad_weight = _outer(x, grad, weight)
    return grad_x, grad_weight, None


def _outer(outputs: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the weight, rounded as autocast has it: in the products' dtype first."""
    rows, k = weight.shape
    return (outputs.reshape(-1, rows).T @ inputs.reshape(-1, k)).to(weight.dtype)


for _name, _arguments, _kernel, _fake, _save, _grad in (
    ("masked_linear", "Tensor? bias, ", _linear, _fake_linear, _save_linear, _grad_linear),
    ("masked_matmul", "", _matmul, _fake_matmul, _save_matmul, _grad_matmul),
):
    library.define(
        f"{_name}(Tensor x, Tensor weight, {_arguments}int min_tokens) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=library)
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _grad, setup_context=_save, lib=library)


def masked_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, min_tokens: int = 0) -> Tensor:
    """``F.linear(x, weight, bias)``, through cuSPARSELt where the weight is vouched for; see the module.

    Differentiable in all three, any number of times; dense under ``torch.func``'s transforms. Autocast rounds
    as it does for ``F.linear``.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]``.
        min_tokens: Products of fewer tokens go dense: packing takes as long for few as for many.

    Returns:
        ``[..., out]``.
    """
    if transforming():  # vmap, forward-mode derivatives: the op has no rules for these
        return F.linear(x, weight, bias)
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        if x.dtype != weight.dtype:
            return F.linear(x, weight, bias)  # which says so
        return torch.ops.nmsparse.masked_linear(x, weight, bias, min_tokens)
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        bias = None if bias is None else bias.to(dtype)
        return torch.ops.nmsparse.masked_linear(x.to(dtype), weight, bias, min_tokens)
