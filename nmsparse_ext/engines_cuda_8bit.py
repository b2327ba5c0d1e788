"""The engines that multiply with weights of 8 bits on NVIDIA GPUs: ``cuda-int8`` and ``cuda-float8``.

A weight that is int8 or float8 (e4m3) itself is run by them on its own, as it stands. One of 16 bits is
rounded when it is given the engine, so that is on request only: with one scale a row (``amax / 127``, or
``amax / 448``); its values and indices stay as they are, and what is saved is not rounded.

Inputs have 16 bits (32 go dense). A call goes one of three ways, by the number of tokens and the table of
``crossover.py``, whose keys hold both dtypes ("int8 by bfloat16"):

- the small-batch kernel multiplies up to 32 tokens with int8 weights as it reads them, half the bytes of
  16-bit values (5/16 of the dense weight for 2:4); inputs are not rounded;
- cuSPARSELt multiplies 8 bits with 8 bits: each token is rounded, with a scale of its own, if
  `crossover.allow_rounded_inputs` says that it may be;
- the weight is made dense, in the input's dtype, in every call. It is never kept: that would be four times
  the packed bytes.

Beside the packed form a weight holds its rounded values (nothing more if it has 8 bits itself), and
cuSPARSELt's form where some number of tokens goes that way.

With int8 an output is off by at most ``s / 2 * sum |x|`` over the kept inputs of its row, with ``s`` the
row's scale, and where the token is rounded too, by ``t / 2 * sum |w|`` more, with ``t`` its scale.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import crossover, cusparselt, engines_cuda, ops
from ._checks import holds_data
from ._crossover_timer import CudaTimer, copies_of
from ._op_gradients import _slope as slope
from ._op_library import NAMESPACE, library
from ._panel_layout import ACTIVATIONS
from .crossover import LT, SMALL_BATCH, SMALL_BATCH_DTYPES, Problem
from .cusparselt import LtWeight
from .engines import Engine, portable, register_engine, unpack_rows, unpacked_conv
from .panels import Activation, transforming
from .pattern import Pattern
from .reference import quantize_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .tensor import NMTensor

#: The engine's name -> what it rounds to, and the largest number of that.
ROUNDED = {"cuda-int8": (torch.int8, 127.0), "cuda-float8": (torch.float8_e4m3fn, 448.0)}
_LARGEST = dict(ROUNDED.values())


class Parts(NamedTuple):
    """What products are made from.

    Attributes:
        values: 8 bits, ``[rows, groups * n]``.
        indices: uint8 ``[rows, bytes]``.
        scales: float32 ``[rows]``: what one unit of each row's values stands for.
        blob: cuSPARSELt's form, uint8 ``[bytes]``; empty where it is not held.
    """

    values: Tensor
    indices: Tensor
    scales: Tensor
    blob: Tensor


# -------------------------------------------------------------------------------------------------- the forms


def _why_not(weight: NMTensor, target: torch.dtype) -> str | None:
    with torch._C.DisableTorchFunctionSubclass():
        device, dtype = weight.device, weight.dtype
    if device.type not in engines_cuda.DEVICES:
        return f"it runs on NVIDIA GPUs, the weight is on {device}"
    if len(weight.rows) != 1:
        return f"it multiplies matrices, the weight has {len(weight.rows) + 1} dimensions"
    if dtype == target:
        return None
    if dtype not in SMALL_BATCH_DTYPES:
        return f"it takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}, and rounds them"
    # Rounded for few tokens: what none reads faster for that had better stay as it is.
    return crossover.reasons(_problem(weight, target, dtype))[SMALL_BATCH] if target == torch.int8 else None


def _automatic(weight: NMTensor, target: torch.dtype) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return weight.dtype == target


def _problem(weight: NMTensor, target: torch.dtype, inputs: torch.dtype) -> Problem:
    with torch._C.DisableTorchFunctionSubclass():
        device = weight.device
    return Problem(device, target, weight.pattern, weight.rows[0], weight.k, inputs)


def problem_of(weight: NMTensor) -> Problem:
    """The matrix with the inputs that it is expected to have: of its own dtype, or bfloat16."""
    target, _ = ROUNDED[weight.engine]
    return _problem(weight, target, _inputs_of(weight))


def _inputs_of(weight: NMTensor) -> torch.dtype:
    with torch._C.DisableTorchFunctionSubclass():
        return weight.dtype if weight.dtype.itemsize > 1 else torch.bfloat16


def round_rows(x: Tensor, target: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rounds rows, symmetric, with one scale each.

    Returns:
        Values of ``target``, of ``x``'s shape, and scales, float32 ``[..., 1]``: 0 for rows of zeros, NaN for
        those that hold a NaN or an infinity.
    """
    if target == torch.int8:
        return quantize_rows(x)
    x = x.float()
    amax = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    usable = amax.isfinite() & (amax >= 2.0**-100)
    inverse = torch.where(usable, torch.full_like(amax, _LARGEST[target]) / amax, 0.0)
    values = torch.where(inverse != 0, x * inverse, 0.0).to(target)
    scale = torch.where(usable, amax / _LARGEST[target], 0.0)
    return values, torch.where(amax.isfinite(), scale, torch.nan)


def _build(weight: NMTensor, target: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    values, indices = portable(weight)
    if values.dtype == target:
        rounded = values
        forms = values.new_empty(0), values.new_ones(values.shape[0], dtype=torch.float32)
    else:
        rounded, scales = round_rows(values, target)
        forms = rounded, scales.flatten().float()
    problem = _problem(weight, target, _inputs_of(weight))
    blob = values.new_empty(0, dtype=torch.uint8)
    if holds_data(values):
        if engines_cuda._measures_now(values.device):
            _measure(problem, Parts(rounded, indices, forms[1], blob), crossover.TOKENS)
        if LT in crossover.choices_for(problem).branches:
            blob = _compress(rounded, indices, problem)
    return *forms, blob


def _compress(values: Tensor, indices: Tensor, problem: Problem) -> Tensor:
    return cusparselt.compress(ops.unpack(values, indices, problem.pattern, k=problem.k, dim=-1))


def _refill(weight: NMTensor, forms: tuple[Tensor, ...], target: torch.dtype) -> None:
    """Fills those forms anew that there are."""
    held, scales, blob = forms
    values, indices = portable(weight)
    if held.numel():
        rounded, new_scales = round_rows(values, target)
        held.copy_(rounded)
        scales.copy_(new_scales.flatten())
        values = rounded
    if blob.numel():
        blob.copy_(_compress(values, indices, _problem(weight, target, _inputs_of(weight))))


def parts_of(weight: NMTensor) -> Parts:
    """What a weight of these engines multiplies with."""
    if weight.shared is not None and not torch.compiler.is_compiling():
        weight.shared.refresh()
    rounded, scales, blob = weight.forms()
    return Parts(rounded if rounded.numel() else weight.values, weight.indices, scales, blob)


def refit(weight: NMTensor) -> NMTensor:
    """As `engines_cuda.refit`."""
    wanted = LT in crossover.choices_for(problem_of(weight)).branches
    return weight if wanted == (weight.forms()[2].numel() > 0) else weight.with_engine(weight.engine)


def memory(weight: NMTensor) -> dict[str, int]:
    """Bytes of each form that a weight of these engines holds."""
    rounded, scales, blob = (form.numel() * form.element_size() for form in weight.forms())
    return {"packed": weight.nbytes, "rounded": rounded, "scales": scales, "for cuSPARSELt": blob}


def why(weight: NMTensor) -> str:
    """Which way a weight of these engines goes for how many tokens, and why, in words."""
    held = ", ".join(f"{count:,} {form}" for form, count in memory(weight).items() if count)
    return f"{crossover.why(problem_of(weight))}; holds bytes: {held}"


# -------------------------------------------------------------------------------------------------- measuring


class _Timer(CudaTimer):
    """See `crossover.Timer`."""

    def __init__(self, problem: Problem, parts: Parts) -> None:
        assert problem.inputs is not None
        self._pattern, self._k, self._dtype = problem.pattern, problem.k, problem.inputs
        self._parts, self._problem, self._device = parts, problem, parts.values.device
        self._random = torch.Generator(self._device).manual_seed(0)

    def _call(self, branch: str, x: Tensor, sets: Sequence[Any]) -> Callable[[int], Tensor]:
        return lambda i: multiply(branch, x, sets[i % len(sets)], None, self._pattern, "none")

    def _sets(self, branch: str) -> list[Any]:
        parts = self._parts
        if branch == LT:
            parts = parts._replace(blob=_compress(parts.values, parts.indices, self._problem))
            return [parts._replace(blob=blob) for (blob,) in copies_of(parts.blob)]
        held = copies_of(parts.values, parts.indices)
        return [parts._replace(values=values, indices=indices) for values, indices in held]


def _measure(problem: Problem, parts: Parts, tokens: Sequence[int]) -> None:
    known = crossover.measured(problem)
    missing = [count for count in tokens if known is None or count not in known.points]
    if missing:
        crossover.measure(problem, _Timer(problem, parts), missing)


def tuned(weight: NMTensor, tokens: int) -> NMTensor:
    """As `engines_cuda.tuned`."""
    if tokens == 0 or not engines_cuda._may_measure(weight.values):
        return weight
    most = max(tokens, crossover.SMALL_BATCH_TOKENS)
    counts = (*(count for count in crossover.TOKENS if count <= most), tokens)
    _measure(problem_of(weight), parts_of(weight), counts)
    return refit(weight)


# ------------------------------------------------------------------------------------------------ the product


def dense_of(parts: Parts, pattern: Pattern, k: int, dtype: torch.dtype) -> Tensor:
    """The dense weight in another dtype: scaled while it is packed, when it is smaller."""
    values = (parts.values.float() * parts.scales.unsqueeze(-1)).to(dtype)
    return torch.ops.nmsparse.decompress(values, parts.indices, pattern.n, pattern.m, k, 1)


def multiply(
    branch: str, x: Tensor, parts: Parts, bias: Tensor | None, pattern: Pattern, activation: str
) -> Tensor:
    """One product, one way; what lacks its form goes dense.

    Args:
        branch: One of `crossover.BRANCHES`.
        x: ``[..., k]``, floating point.
        parts: The weight.
        bias: ``[rows]`` of the dtype of ``x``.
        pattern: The weight's pattern.
        activation: Applied to the sums.

    Returns:
        ``[..., rows]`` of the dtype of ``x``.
    """
    k = x.shape[-1]
    if branch == SMALL_BATCH:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.nmsparse.small_batch_linear(
                x, parts.values, parts.indices, parts.scales, bias, pattern.n, pattern.m, k, activation
            )
    if branch == LT and parts.blob.numel() and k == parts.values.shape[1] // pattern.n * pattern.m:
        return _by_library(x, parts, bias, activation)
    y = F.linear(x, dense_of(parts, pattern, k, x.dtype), bias)
    return y if activation == "none" else getattr(F, activation)(y)


def _by_library(x: Tensor, parts: Parts, bias: Tensor | None, activation: str) -> Tensor:
    rows, dtype = parts.values.shape[0], parts.values.dtype
    largest = _LARGEST[dtype]
    rounded, token_scales = round_rows(x.reshape(-1, x.shape[-1]), dtype)
    weight = LtWeight(parts.blob, rows, x.shape[-1], dtype)
    # The library's results have 16 bits, too. Operands count as numbers of at most 1 there (int8: only the
    # inputs), so that float16 holds the sums; what they are really worth comes after.
    if dtype == torch.int8:  # which can be scaled by row inside
        y = cusparselt.multiply(rounded, weight, None, parts.scales / largest, 1.0, "none", x.dtype)
        scales = None
    else:
        y = cusparselt.multiply(rounded, weight, None, None, 1 / largest**2, "none", x.dtype)
        scales = parts.scales * largest
    y.mul_(token_scales * largest)
    if scales is not None or bias is not None or activation != "none":
        torch.ops.nmsparse.epilogue_(y, scales, bias, activation)
    return y.view(*x.shape[:-1], rows)


def _run(x: Tensor, parts: Parts, bias: Tensor | None, pattern: Pattern, activation: str) -> Tensor:
    values, k = parts.values, x.shape[-1]
    problem = Problem(values.device, values.dtype, pattern, values.shape[0], k, x.dtype)
    branch = crossover.choices_for(problem).at(x.numel() // k if k else 0)
    return multiply(branch, x, parts, bias, pattern, activation)


# ----------------------------------------------------------------------------------------------------- the op


def _eight_bit_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scales: Tensor,
    blob: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    activation: str,
) -> Tensor:
    return _run(x, Parts(values, indices, scales, blob), bias, Pattern(n, m), activation).contiguous()


def _fake(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scales: Tensor,
    blob: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    activation: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, scales, blob, bias, ctx.n, ctx.m, ctx.activation = inputs
    ctx.save_for_backward(x, values, indices, scales, blob, bias)


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, as if it were not rounded, and of bias; the weight is frozen."""
    x, values, indices, scales, blob, bias = ctx.saved_tensors
    if ctx.activation != "none":
        before = torch.ops.nmsparse.eight_bit_linear(
            x, values, indices, scales, blob, bias, ctx.n, ctx.m, "none"
        )
        grad = grad * slope(ctx.activation, before)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        parts = Parts(values, indices, scales, blob)
        grad_x = grad @ dense_of(parts, Pattern(ctx.n, ctx.m), x.shape[-1], grad.dtype)
    if ctx.needs_input_grad[5]:
        grad_bias = grad if grad.dim() == 1 else grad.sum(tuple(range(grad.dim() - 1)))
    return grad_x, None, None, None, None, grad_bias, None, None, None


library.define(
    "eight_bit_linear(Tensor x, Tensor values, Tensor indices, Tensor scales, Tensor blob, Tensor? bias, "
    "int n, int m, str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.impl("eight_bit_linear", _eight_bit_linear, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::eight_bit_linear", _fake, lib=library)
torch.library.register_autograd(f"{NAMESPACE}::eight_bit_linear", _grad, setup_context=_save, lib=library)

# ------------------------------------------------------------------------------------------------ the engines


def _linear(
    input: Tensor, weight: NMTensor, bias: Tensor | None = None, activation: Activation = "none"
) -> Tensor:
    device = input.device.type
    if torch.is_autocast_enabled(device):
        input = input.to(torch.get_autocast_dtype(device))
        bias = None if bias is None else bias.to(input.dtype)
    values = weight.values
    if not input.is_floating_point() or input.dtype.itemsize == 1:
        # As ever: PyTorch multiplies what it can, and says what it cannot. `cusparselt.linear` takes these.
        return F.linear(input, unpack_rows(weight), bias)
    if (values.requires_grad and torch.is_grad_enabled()) or transforming():
        # A gradient for the values, forward-mode derivatives, vmap: with the weight before rounding.
        y = F.linear(input, unpack_rows(weight).to(input.dtype), bias)
        return y if activation == "none" else getattr(F, activation)(y)
    return with_parts(input, parts_of(weight), weight, bias, activation)


def with_parts(input: Tensor, parts: Parts, weight: NMTensor, bias: Tensor | None, activation: str) -> Tensor:
    """A product with a weight's parts, or with others of the same shapes; ``bias`` as of ``F.linear``."""
    n, m = weight.pattern.n, weight.pattern.m
    if bias is None or (bias.dim() == 1 and bias.shape[0] == weight.rows[0]):
        wants_gradients = torch.is_grad_enabled() and (
            input.requires_grad or (bias is not None and bias.requires_grad)
        )
        if wants_gradients or torch.compiler.is_compiling() or not holds_data(input):
            return torch.ops.nmsparse.eight_bit_linear(input, *parts, bias, n, m, activation)
        return _run(input, parts, bias, weight.pattern, activation)
    y = with_parts(input, parts, weight, None, "none")
    y = y + bias.expand_as(y)
    return y if activation == "none" else getattr(F, activation)(y)


def _matmul(input: Tensor, weight: NMTensor) -> Tensor:
    if not input.is_floating_point() or input.dtype.itemsize == 1:
        return torch.matmul(input, unpack_rows(weight))
    return torch.matmul(input, dense_of(parts_of(weight), weight.pattern, weight.k, input.dtype))


for _name, (_target, _) in ROUNDED.items():
    register_engine(
        Engine(
            name=_name,
            why_not=functools.partial(_why_not, target=_target),
            linear=_linear,
            conv=unpacked_conv,
            forms=("rounded", "scales", "blob"),
            build=functools.partial(_build, target=_target),
            refill=functools.partial(_refill, target=_target),
            matmul=_matmul,
            activations=ACTIVATIONS,
            automatic=functools.partial(_automatic, target=_target),
        ),
        first=True,
    )
