"""The engines that multiply with packed weights on NVIDIA GPUs.

``cuda`` goes, call by call, the way that is the fastest for the number of tokens (``crossover.py``): the
small-batch kernel, which reads the packed form itself; cuSPARSELt, from the library's own form; or the dense
weight. It holds those forms that some number of tokens needs: at most the packed form (n/m of the dense
bytes, and indices), the library's (9/16) and the dense weight (1). Two others hold less, whatever is the
fastest:

- ``cuda-sparse`` holds the packed form and the library's, 9/8 of the dense bytes for 2:4 in 16 bits. Few
  tokens go through the small-batch kernel, all others through cuSPARSELt.
- ``cuda-packed`` holds the packed form alone. For more tokens than the small-batch kernel takes, the weight
  is made dense in every call.

What is held is decided when the engine is given its weight. `refit` frees what a table that has become known
since says never wins, and makes what it says wins.

In eager mode the way is chosen here. Compiled and exported graphs call the op ``nmsparse::tuned_linear``,
which chooses when it runs: numbers of tokens may be symbolic there, and what was measured is not part of a
graph. A captured CUDA graph has the choice of when it was captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import crossover, cusparselt, ops
from ._checks import holds_data
from ._op_gradients import _slope as slope
from ._op_library import NAMESPACE, library
from ._panel_layout import ACTIVATIONS
from .crossover import BRANCHES, DENSE, LT, SMALL_BATCH, Choices, Problem
from .cusparselt import LtWeight
from .engines import Engine, portable, register_engine, unpack_rows, unpacked_conv
from .panels import Activation, transforming
from .pattern import Pattern

if TYPE_CHECKING:
    from .tensor import NMTensor

#: Kinds of devices that the engines are for. Tests add the CPU, where the same ops run in plain PyTorch.
DEVICES = {"cuda"}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Which ways the weights of an engine hold forms for: the small-batch kernel reads the packed form itself.
WAYS = {
    "cuda": BRANCHES,
    "cuda-conv": BRANCHES,
    "cuda-sparse": (SMALL_BATCH, LT),
    "cuda-packed": (SMALL_BATCH,),
}
CUDA_ENGINES = tuple(WAYS)

_small_batch_linear = torch.ops.nmsparse.small_batch_linear.default  # found once, see `cusparselt`

#: values, indices, dense rows, the library's form; see `multiply`.
Operands = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def problem_of(weight: NMTensor) -> Problem:
    """The matrix, or the one that a 1x1 convolution multiplies with, as far as its speed depends on it."""
    values = weight.values
    return Problem(values.device, values.dtype, weight.pattern, weight.rows[0], weight.k)


def is_pointwise(weight: NMTensor) -> bool:
    """Whether a matrix is all there is to a weight: itself, or that of a 1x1 convolution."""
    return all(size == 1 for size in weight.rows[1:])


def matrix_parts(weight: NMTensor) -> tuple[Tensor, Tensor]:
    """Values and indices of the matrix of `is_pointwise`."""
    values, indices = weight.values, weight.indices
    return values.view(values.shape[0], -1), indices.view(indices.shape[0], -1)


def why_not_matrix(weight: NMTensor) -> str | None:
    """Why the engines of GPUs cannot run a weight as a matrix."""
    if len(weight.rows) == 1:
        return _why_not_here(weight)
    elsewhere = _why_not_device(weight)
    return elsewhere or f"it multiplies matrices, the weight has {len(weight.rows) + 1} dimensions"


def why_not_conv(weight: NMTensor) -> str | None:
    """Why they cannot run it as the weight of a convolution."""
    dims = len(weight.rows) + 1
    if not 3 <= dims <= 5 or weight.batch:
        return f"it convolves in 1 to 3 dimensions, the weight has {dims} dimensions"
    if weight.group_dim != 1:
        return f"it sums over dim 1 of a weight, groups run along dim {weight.group_dim}"
    return _why_not_here(weight)


def _why_not_packed(weight: NMTensor) -> str | None:
    return why_not_matrix(weight) if len(weight.rows) == 1 else why_not_conv(weight)


def _why_not_device(weight: NMTensor) -> str | None:
    with torch._C.DisableTorchFunctionSubclass():
        device = weight.device
    return None if device.type in DEVICES else f"it runs on NVIDIA GPUs, the weight is on {device}"


def _why_not_here(weight: NMTensor) -> str | None:
    with torch._C.DisableTorchFunctionSubclass():
        dtype = weight.dtype
    elsewhere = _why_not_device(weight)
    if elsewhere is not None:
        return elsewhere
    if dtype not in _DTYPES:
        return f"it takes weights of {', '.join(map(str, _DTYPES))}, not {dtype}"
    return None


# -------------------------------------------------------------------------------------------------- the forms


def _build(weight: NMTensor) -> tuple[Tensor, Tensor]:
    """The dense rows and the library's form; empty where no number of tokens needs them."""
    values, indices = portable(weight)
    blob = values.new_empty(0, dtype=torch.uint8)
    if not holds_data(values):  # of a device that may not be there
        return ops.unpack(values, indices, weight.pattern, k=weight.k, dim=-1), blob
    branches = branches_of(weight)
    wants_dense, wants_lt = DENSE in branches, LT in branches
    if not wants_dense and not wants_lt:
        return values.new_empty(0), blob
    dense = ops.unpack(values, indices, weight.pattern, k=weight.k, dim=-1)
    if wants_lt:
        blob = cusparselt.compress(dense)
    return dense if wants_dense else values.new_empty(0), blob


def branches_of(weight: NMTensor) -> tuple[str, ...]:
    """The ways that some number of tokens goes, measured first where a weight is to be at its first use."""
    if _measures_now(weight.values.device):
        measure_once(weight)
    return crossover.choices_for(problem_of(weight)).branches


def _refill(weight: NMTensor, forms: tuple[Tensor, ...]) -> None:
    """Fills those forms anew that there are."""
    dense, blob = forms
    if not dense.numel() and not blob.numel():
        return
    rows = ops.unpack(*portable(weight), weight.pattern, k=weight.k, dim=-1)
    if dense.numel():
        dense.copy_(rows)
    if blob.numel():
        blob.copy_(cusparselt.compress(rows))


def _why_not_sparse(weight: NMTensor) -> str | None:
    reason = why_not_matrix(weight)
    return crossover.reasons(problem_of(weight))[LT] if reason is None else reason


def _build_sparse(weight: NMTensor) -> tuple[Tensor]:
    values, indices = portable(weight)
    if not holds_data(values):
        return (values.new_empty(0, dtype=torch.uint8),)
    if _measures_now(values.device):
        measure_once(weight)
    return (cusparselt.compress(ops.unpack(values, indices, weight.pattern, k=weight.k, dim=-1)),)


def _measures_now(device: torch.device) -> bool:
    return (
        cusparselt.search_mode() == "first-use"
        and device.type == "cuda"
        and not torch.cuda.is_current_stream_capturing()
    )


def measure_once(weight: NMTensor, tokens: tuple[int, ...] = crossover.TOKENS) -> crossover.Measured:
    """Measures for those numbers of tokens that nothing is known of; all that is known.

    Raises:
        ValueError: The weight is not on a GPU, or has no matrix that the engines of GPUs run.
    """
    from ._crossover_timer import CudaTimer

    reason = _why_not_packed(weight) if is_pointwise(weight) else why_not_matrix(weight)
    if reason is not None:
        raise ValueError(f"weight cannot be measured: {reason}")
    problem = problem_of(weight)
    known = crossover.measured(problem)
    missing = [count for count in tokens if known is None or count not in known.points]
    if known is not None and not missing:
        return known
    return crossover.measure(problem, CudaTimer(weight), missing)


def tuned(weight: NMTensor, tokens: int) -> NMTensor:
    """The weight with the forms that win for up to so many tokens, which is measured if it is not known.

    A weight that the engines of this module do not run, or that is not on a GPU, comes back as it is; so does
    any in the search mode ``"off"``.
    """
    if weight.engine not in CUDA_ENGINES or tokens == 0 or not is_pointwise(weight):
        return weight
    if not _may_measure(weight.values):
        return weight
    problem = problem_of(weight)
    before = crossover.choices_for(problem)
    most = max(tokens, crossover.SMALL_BATCH_TOKENS)
    measure_once(weight, (*(count for count in crossover.TOKENS if count <= most), tokens))
    return weight if crossover.choices_for(problem) == before else refit(weight)


def _may_measure(values: Tensor) -> bool:
    return cusparselt.search_mode() != "off" and values.is_cuda and holds_data(values)


def why(weight: NMTensor) -> str:
    """Which way a weight of these engines goes for how many tokens, and why, in words."""
    held = ", ".join(f"{count:,} {form}" for form, count in memory(weight).items() if count)
    if is_pointwise(weight):
        ways = crossover.why(problem_of(weight), WAYS[weight.engine])
        ways += "; channels_last inputs only, others dense" if len(weight.rows) > 1 else ""
    elif weight.engine == "cuda-packed":
        ways = "unpacked in every call: no sparse kernel convolves but 1x1"
    else:
        ways = "dense always: no sparse kernel convolves but 1x1"
    return f"{ways}; holds bytes: {held}"


def memory(weight: NMTensor) -> dict[str, int]:
    """Bytes of each form that a weight of these engines holds: packed, dense, cuSPARSELt's."""
    held = weight.__dict__
    forms = {"dense": held.get("form_dense"), "for cuSPARSELt": held.get("form_blob")}
    return {"packed": weight.nbytes} | {
        name: 0 if form is None else form.numel() * form.element_size() for name, form in forms.items()
    }


def refit(weight: NMTensor) -> NMTensor:
    """The weight with the forms that the table wants by now; itself if it holds just these."""
    if weight.engine not in ("cuda", "cuda-conv") or not is_pointwise(weight):
        return weight
    branches = crossover.choices_for(problem_of(weight)).branches
    dense, blob = weight.forms()
    if (DENSE in branches, LT in branches) == (dense.numel() > 0, blob.numel() > 0):
        return weight
    return weight.with_engine(weight.engine)


def _dense_rows(weight: NMTensor) -> Tensor:
    if weight.shared is not None and not torch.compiler.is_compiling():
        weight.shared.refresh()
    dense: Tensor = getattr(weight, "form_dense")  # noqa: B009 - forms are no declared attributes
    if dense.numel():
        return dense
    return ops.unpack(*portable(weight), weight.pattern, k=weight.k, dim=-1)


# ------------------------------------------------------------------------------------------------ the product


def multiply(
    branch: str,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    dense: Tensor | None,
    blob: Tensor | None,
    bias: Tensor | None,
    pattern: Pattern,
    activation: str,
) -> Tensor:
    """One product, one way; what lacks its form goes dense.

    Args:
        branch: One of `crossover.BRANCHES`.
        x: ``[..., k]``.
        values: ``[rows, groups * n]``.
        indices: uint8 ``[rows, bytes]``.
        dense: ``[rows, k]``; None or empty: there is none.
        blob: uint8 ``[bytes]``; None or empty: there is none.
        bias: ``[rows]``.
        pattern: The weight's pattern.
        activation: Applied to the sums.

    Returns:
        ``[..., rows]``.
    """
    k = x.shape[-1]
    if branch == SMALL_BATCH:
        with torch._C._AutoDispatchBelowAutograd():  # its gradients are Python, which takes as long as the op
            return _small_batch_linear(x, values, indices, None, bias, pattern.n, pattern.m, k, activation)
    # An input that does not fit goes dense too, and PyTorch says what is wrong: the library would not.
    fits = x.dtype == values.dtype and k == values.shape[1] // pattern.n * pattern.m
    if branch == LT and fits and blob is not None and blob.numel():
        weight = LtWeight(blob, values.shape[0], k, values.dtype)
        if x.dim() == 2:
            return cusparselt.multiply(x, weight, bias, None, 1.0, activation)
        y = cusparselt.multiply(x.reshape(-1, k), weight, bias, None, 1.0, activation)
        return y.view(*x.shape[:-1], values.shape[0])
    if dense is None or not dense.numel():
        dense = ops.unpack(values, indices, pattern, k=k, dim=-1)
    y = F.linear(x, dense, bias)
    return y if activation == "none" else getattr(F, activation)(y)


def _run(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    dense: Tensor | None,
    blob: Tensor | None,
    bias: Tensor | None,
    pattern: Pattern,
    activation: str,
) -> Tensor:
    k = x.shape[-1]
    problem = Problem(values.device, values.dtype, pattern, values.shape[0], k)
    # What is empty is not needed; what is None is not held, and to be done without.
    held = {SMALL_BATCH: values, LT: blob, DENSE: dense}
    ways = tuple(way for way in BRANCHES if held[way] is not None)
    branch = crossover.choices_for(problem, ways).at(x.numel() // k if k else 0)
    return multiply(branch, x, values, indices, dense, blob, bias, pattern, activation)


# ----------------------------------------------------------------------------------------------------- the op


def _tuned_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    dense: Tensor | None,
    blob: Tensor | None,
    bias: Tensor | None,
    n: int,
    m: int,
    activation: str,
) -> Tensor:
    return _run(x, values, indices, dense, blob, bias, Pattern(n, m), activation).contiguous()


def _fake_tuned_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    dense: Tensor | None,
    blob: Tensor | None,
    bias: Tensor | None,
    n: int,
    m: int,
    activation: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, indices, dense, blob, bias, ctx.n, ctx.m, ctx.activation = inputs
    ctx.k = x.shape[-1]
    # What came before an activation is summed again in the backward pass.
    again = (x, blob, bias) if ctx.activation != "none" else (None, None, None)
    ctx.save_for_backward(values, indices, dense, *again)


def _grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias; the weight is frozen."""
    values, indices, dense, x, blob, bias = ctx.saved_tensors
    if ctx.activation != "none":
        before = torch.ops.nmsparse.tuned_linear(x, values, indices, dense, blob, bias, ctx.n, ctx.m, "none")
        grad = grad * slope(ctx.activation, before)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        if dense is None or not dense.numel():
            dense = torch.ops.nmsparse.decompress(values, indices, ctx.n, ctx.m, ctx.k, 1)
        grad_x = grad @ dense
    if ctx.needs_input_grad[5]:
        grad_bias = grad if grad.dim() == 1 else grad.sum(tuple(range(grad.dim() - 1)))
    return grad_x, None, None, None, None, grad_bias, None, None, None


library.define(
    "tuned_linear(Tensor x, Tensor values, Tensor indices, Tensor? dense, Tensor? blob, Tensor? bias, int n, "
    "int m, str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.impl("tuned_linear", _tuned_linear, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::tuned_linear", _fake_tuned_linear, lib=library)
torch.library.register_autograd(f"{NAMESPACE}::tuned_linear", _grad, setup_context=_save, lib=library)

# ------------------------------------------------------------------------------------------------ the engines


def _linear(
    input: Tensor, weight: NMTensor, bias: Tensor | None = None, activation: Activation = "none"
) -> Tensor:
    device = input.device.type
    # The common call of inference comes first, and is spelled out: around a product of few tokens Python
    # takes as long as the product.
    if (
        not torch.is_grad_enabled()
        and (type(input) is Tensor or type(input) is Parameter)  # graphs may be traced with fake ones
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(device)
        and (bias is None or bias.shape == weight.rows)
        and forward_ad._current_level < 0
        and torch._C._functorch.maybe_current_level() is None
    ):
        if weight.shared is not None:
            weight.shared.refresh()
        held = weight.__dict__  # "cuda-packed" has no forms, "cuda-sparse" one
        dense, blob = held.get("form_dense"), held.get("form_blob")
        branch = _choices(weight).at(input.numel() // weight.k if weight.k else 0)
        values, indices = weight.packed_values, weight.packed_indices
        assert values is not None
        assert indices is not None
        return multiply(branch, input, values, indices, dense, blob, bias, weight.pattern, activation)
    values = weight.packed_values
    if (values is not None and values.requires_grad and torch.is_grad_enabled()) or transforming():
        # A gradient for the values, forward-mode derivatives or vmap: see the engines on the CPU.
        y = F.linear(input, unpack_rows(weight), bias)
        return y if activation == "none" else getattr(F, activation)(y)
    if not torch.is_autocast_enabled(device):
        return _product(input, weight, bias, activation)
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
        if weight.values.dtype == dtype:
            return _product(input, weight, bias, activation)
        if weight.shared is not None and not torch.compiler.is_compiling():
            return _product(input, weight.shared.cast_weight(dtype), bias, activation)
        # There is no place where a cast weight could stay, above all not in a graph.
        lower: Operands = (weight.values.to(dtype), weight.indices, None, None)
        return multiply_any(input, lower, weight, bias, activation)


def _choices(weight: NMTensor) -> Choices:
    """Which way goes for how many tokens; remembered on the weight as long as it cannot change."""
    era = crossover.era()
    kept = weight.__dict__.get("_choices")
    if kept is not None and kept[0] is era[0] and kept[1] is era[1]:
        return kept[2]
    problem = problem_of(weight)
    choices = crossover.choices_for(problem, WAYS[weight.engine])
    if problem.dtype != torch.float32:  # where whether TF32 is allowed counts, too
        weight.__dict__["_choices"] = (*era, choices)
    return choices


def _product(input: Tensor, weight: NMTensor, bias: Tensor | None, activation: Activation) -> Tensor:
    if weight.shared is not None and not torch.compiler.is_compiling():
        weight.shared.refresh()
    dense = getattr(weight, "form_dense", None)
    blob = getattr(weight, "form_blob", None)
    return multiply_any(input, (weight.values, weight.indices, dense, blob), weight, bias, activation)


def multiply_any(
    input: Tensor,
    operands: Operands,
    weight: NMTensor,
    bias: Tensor | None,
    activation: Activation,
) -> Tensor:
    """One product, with a bias of any shape that ``F.linear`` takes; through the op where that has to be.

    Args:
        input: ``[..., k]``.
        operands: What it is multiplied with, see `multiply`.
        weight: Whose they are, for its rows and its pattern.
        bias: Added to the sums.
        activation: Applied to them.
    """
    rows = weight.rows[0]
    if bias is None or (bias.dim() == 1 and bias.shape[0] == rows):
        return _dispatched(input, operands, bias, weight.pattern, activation)
    if bias.numel() == 1 and bias.dim() <= 1:
        return _dispatched(input, operands, bias.expand(rows).contiguous(), weight.pattern, activation)
    y = _dispatched(input, operands, None, weight.pattern, "none")
    y = y + bias.expand_as(y)
    return y if activation == "none" else getattr(F, activation)(y)


def _dispatched(
    input: Tensor, operands: Operands, bias: Tensor | None, pattern: Pattern, activation: Activation
) -> Tensor:
    """Through the op where a graph or autograd wants one."""
    wants_gradients = torch.is_grad_enabled() and (
        input.requires_grad or (bias is not None and bias.requires_grad)
    )
    if wants_gradients or torch.compiler.is_compiling() or not holds_data(input):
        return torch.ops.nmsparse.tuned_linear(input, *operands, bias, pattern.n, pattern.m, activation)
    return _run(input, *operands, bias, pattern, activation)


def _packed_conv(
    op: Callable[..., Tensor], input: Tensor, weight: NMTensor, *args: Any, **kwargs: Any
) -> Tensor:
    from .engines_cuda_conv import convolve  # which is made of what is here

    return convolve(op, input, weight, *args, **kwargs)


def _matmul(input: Tensor, weight: NMTensor) -> Tensor:
    return torch.matmul(input, unpack_rows(weight))


for _lean in (
    Engine(
        name="cuda-packed",
        why_not=_why_not_packed,
        linear=_linear,
        conv=_packed_conv,
        activations=ACTIVATIONS,
        automatic=False,
    ),
    Engine(
        name="cuda-sparse",
        why_not=_why_not_sparse,
        linear=_linear,
        conv=unpacked_conv,
        forms=("blob",),
        build=_build_sparse,
        matmul=_matmul,
        activations=ACTIVATIONS,
        automatic=False,
    ),
):
    register_engine(_lean, first=True)
register_engine(
    Engine(
        name="cuda",
        why_not=why_not_matrix,
        linear=_linear,
        conv=unpacked_conv,
        forms=("dense", "blob"),
        build=_build,
        refill=_refill,
        dense_rows=_dense_rows,
        matmul=_matmul,
        activations=ACTIVATIONS,
    ),
    first=True,
)
