"""Registers ``torch.ops.nmsparse``: schemas, fallback kernels, fake kernels and gradients.

The compiled module ``nmsparse_ext._C`` brings the schemas and the CPU (and CUDA) kernels. Without it the same
schemas are inferred from the annotations in ``reference.py``. Either way the reference functions serve every
device that has no compiled kernel, and all that follows (fakes, version counters, autograd) is registered
here, once.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks as checks
from . import _conv_layout as conv_checks
from . import _list_checks as list_checks
from . import _lt_layout as lt
from . import _optim_checks as optim_checks
from . import _panel_layout as panel_checks
from . import reference
from ._build import extension
from ._panel_layout import PanelLayout

NAMESPACE = "nmsparse"

# op -> the arguments that it writes to, in the order of csrc/library.cpp
MUTATED_ARGS: dict[str, tuple[str, ...]] = {
    "prune": (),
    "prune_out": ("out", "bits"),
    "prune_": ("w", "bits"),
    "mask_bits": (),
    "pack_bits": (),
    "unpack_bits": (),
    "apply_bits": (),
    "apply_bits_": ("w",),
    "add_pruned_": ("grad",),
    "sad": (),
    "sad_out": ("out",),
    "find_violation": (),
    "compress": (),
    "decompress": (),
    "check_indices": (),
    "transposable_bits": (),
    "sgd_": ("weights", "momenta", "sparse", "bits", "changes"),
    "adamw_": (
        "weights",
        "exp_avgs",
        "exp_avg_sqs",
        "max_exp_avg_sqs",
        "sparse",
        "bits",
        "changes",
    ),
    "foreach_add_pruned": ("outs",),
    "foreach_apply_bits": ("outs",),
    "foreach_reselect": ("outs", "bits", "changes", "work"),
    "foreach_add_kept": ("outs",),
    "foreach_vote": ("counts",),
    "group_thresholds": (),
    "panel_pack": (),
    "panel_restore": (),
    "panel_unpack": (),
    "panel_linear": (),
    "panel_matmul": (),
    "panel_conv": (),
    "panel_linear_int8": (),
    "lt_pack": (),
    "lt_compress": (),
    "lt_matmul": (),
}


def schema_of(name: str) -> str:
    """The schema of an op, from the annotations of its reference function.

    ``infer_schema`` makes every int symbolic. Only sizes can be: a pattern or a dim that changes changes the
    shapes, and a kernel is part of the program.
    """
    mutated = MUTATED_ARGS[name]
    schema = torch.library.infer_schema(getattr(reference, name), mutates_args=mutated, op_name=name)
    return re.sub(r"SymInt(\[\])? (?!(k|rows|size)\b)", r"int\1 ", schema)


@functools.cache
def schemas() -> str:
    """The schemas of all ops, in a few letters."""
    ops = getattr(torch.ops, NAMESPACE)
    text = "".join(str(getattr(ops, name).default._schema) for name in MUTATED_ARGS)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# The registrations live as long as this object.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _bump_versions(name: str, mutated: tuple[str, ...]) -> Callable[..., None]:
    """A kernel that makes autograd and everybody else who watches ``_version`` see what the op overwrites."""
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    positions = [i for i, argument in enumerate(op._schema.arguments) if argument.name in mutated]
    below = torch._C._after_ADInplaceOrView_keyset

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> None:
        for position in positions:
            if args[position] is not None:  # a tensor or a list of them
                torch.autograd.graph.increment_version(args[position])
        op.redispatch(keyset & below, *args)

    return kernel


#: An overload of panel_linear that autograd passes over, for calls that have made sure that no gradients are
#: wanted: the kernel that records them is Python, and takes as long as the product of a small layer.
WITHOUT_GRADIENTS = "panel_linear.without_gradients"
_library.define(
    schema_of("panel_linear").replace("panel_linear(", f"{WITHOUT_GRADIENTS}("),
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl(WITHOUT_GRADIENTS, reference.panel_linear, "CompositeExplicitAutograd")
_library.impl(WITHOUT_GRADIENTS, torch.library.fallthrough_kernel, "Autograd")

for _name, _mutated in MUTATED_ARGS.items():
    if extension is None:
        _library.define(schema_of(_name), tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    if _mutated:
        _library.impl(_name, _bump_versions(_name, _mutated), "ADInplaceOrView", with_keyset=True)


# ------------------------------------------------------------------------------------------------------ fakes
# Each repeats the checks of the real kernel and says what it returns.


def _fake(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Registers the fake kernel of the op whose name follows ``_fake_``."""
    name = kernel.__name__.removeprefix("_fake_")
    torch.library.register_fake(f"{NAMESPACE}::{name}", kernel, lib=_library)
    return kernel


@_fake
def _fake_prune(w: Tensor, n: int, m: int, dim: int, pad: bool) -> tuple[Tensor, Tensor]:
    checks.check_weight(w, n, m, dim, pad)
    return torch.empty_like(w), w.new_empty(checks.bits_shape(w.shape, dim), dtype=torch.uint8)


@_fake
def _fake_prune_out(w: Tensor, n: int, m: int, dim: int, pad: bool, out: Tensor, bits: Tensor | None) -> None:
    checks.check_weight(w, n, m, dim, pad)
    checks.check_out(w, out)
    if bits is not None:
        checks.check_bits(bits, w, dim)


@_fake
def _fake_prune_(w: Tensor, n: int, m: int, dim: int, pad: bool, bits: Tensor | None) -> None:
    _fake_prune_out(w, n, m, dim, pad, w, bits)


@_fake
def _fake_mask_bits(w: Tensor, n: int, m: int, dim: int, pad: bool) -> Tensor:
    checks.check_weight(w, n, m, dim, pad)
    return w.new_empty(checks.bits_shape(w.shape, dim), dtype=torch.uint8)


@_fake
def _fake_pack_bits(mask: Tensor, dim: int) -> Tensor:
    checks.check_mask(mask, dim)
    return mask.new_empty(checks.bits_shape(mask.shape, dim), dtype=torch.uint8)


@_fake
def _fake_unpack_bits(bits: Tensor, k: int, dim: int) -> Tensor:
    checks.check_unpack_bits(bits, k, dim)
    return bits.new_empty(checks.restored_shape(bits.shape, dim, k), dtype=torch.bool)


@_fake
def _fake_apply_bits(w: Tensor, bits: Tensor, dim: int) -> Tensor:
    checks.check_apply_bits(w, bits, dim)
    return torch.empty_like(w)


@_fake
def _fake_apply_bits_(w: Tensor, bits: Tensor, dim: int) -> None:
    checks.check_apply_bits(w, bits, dim)
    checks.check_writable(w, "w")


@_fake
def _fake_add_pruned_(
    grad: Tensor, w: Tensor, bits: Tensor, dim: int, alpha: float, scale: Tensor | None
) -> None:
    checks.check_add_pruned(grad, w, bits, dim, scale)


@_fake
def _fake_sad(a: Tensor, b: Tensor) -> Tensor:
    checks.check_sad(a, b)
    return a.new_empty((), dtype=torch.int64)


@_fake
def _fake_sad_out(a: Tensor, b: Tensor, out: Tensor) -> None:
    checks.check_sad(a, b)
    checks.check_sad_out(a, out)


@_fake
def _fake_find_violation(w: Tensor, n: int, m: int, dim: int, pad: bool) -> Tensor:
    checks.check_weight(w, n, m, dim, pad)
    return w.new_empty((2,), dtype=torch.int64)


@_fake
def _fake_compress(w: Tensor, n: int, m: int, dim: int, pad: bool) -> tuple[Tensor, Tensor]:
    checks.check_weight(w, n, m, dim, pad)
    k = w.shape[dim]
    return (
        w.new_empty(checks.moved_shape(w.shape, dim, checks.ceil_div(k, m) * n)),
        w.new_empty(checks.moved_shape(w.shape, dim, checks.index_row_bytes(n, m, k)), dtype=torch.uint8),
    )


@_fake
def _fake_decompress(values: Tensor, indices: Tensor, n: int, m: int, k: int, dim: int) -> Tensor:
    checks.check_packed(values, indices, n, m, k, dim)
    return values.new_empty(checks.restored_shape(values.shape, dim, k))


@_fake
def _fake_check_indices(indices: Tensor, n: int, m: int, k: int) -> Tensor:
    checks.check_indices_shape(indices, n, m, k)
    return indices.new_empty((), dtype=torch.int64)


@_fake
def _fake_transposable_bits(w: Tensor) -> Tensor:
    checks.check_transposable(w)
    return w.new_empty(checks.bits_shape(w.shape, 1), dtype=torch.uint8)


@_fake
def _fake_sgd_(weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor], *arguments: Any) -> None:
    sparse, bits, changes, patterns, term, _lambda_w, _lr, lr_tensor, momentum = arguments[:9]
    states = [momenta] if momentum else []
    optim_checks.check_step(weights, grads, states, sparse, bits, changes, patterns, term)
    optim_checks.check_scalars(weights, lr_tensor, *arguments[-2:])


@_fake
def _fake_adamw_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *arguments: Any,
) -> None:
    sparse, bits, changes, patterns, term, _lambda_w, _lr, lr_tensor = arguments[:8]
    amsgrad = arguments[-4]
    states = [exp_avgs, exp_avg_sqs, *([max_exp_avg_sqs] if amsgrad else [])]
    optim_checks.check_step(weights, grads, states, sparse, bits, changes, patterns, term)
    optim_checks.check_scalars(weights, lr_tensor, *arguments[-2:])
    optim_checks.check_steps(weights, steps)


@_fake
def _fake_foreach_add_pruned(
    grads: list[Tensor],
    ws: list[Tensor],
    bits: list[Tensor],
    dims: list[int],
    alphas: list[float],
    scale: Tensor | None,
    outs: list[Tensor],
) -> None:
    list_checks.check_foreach_add_pruned(grads, ws, bits, dims, alphas, scale, outs)


@_fake
def _fake_foreach_apply_bits(
    ws: list[Tensor], bits: list[Tensor], dims: list[int], outs: list[Tensor]
) -> None:
    list_checks.check_foreach_apply_bits(ws, bits, dims, outs)


@_fake
def _fake_foreach_reselect(
    ws: list[Tensor],
    ns: list[int],
    ms: list[int],
    dims: list[int],
    outs: list[Tensor],
    bits: list[Tensor],
    changes: Tensor,
    places: list[int],
    work: Tensor | None,
) -> None:
    list_checks.check_foreach_reselect(ws, ns, ms, dims, outs, bits, changes, places, work)


@_fake
def _fake_foreach_add_kept(
    grads: list[Tensor],
    ws: list[Tensor],
    bits: list[Tensor],
    dims: list[int],
    alphas: list[float],
    scale: Tensor | None,
    outs: list[Tensor],
) -> None:
    list_checks.check_foreach_add_pruned(grads, ws, bits, dims, alphas, scale, outs)


@_fake
def _fake_foreach_vote(
    ws: list[Tensor],
    thresholds: list[Tensor],
    ns: list[int],
    ms: list[int],
    dims: list[int],
    counts: Tensor,
) -> None:
    list_checks.check_foreach_vote(ws, thresholds, ns, ms, dims, counts)


@_fake
def _fake_group_thresholds(w: Tensor, m: int, dim: int) -> Tensor:
    list_checks.check_group_thresholds(w, m, dim)
    return w.new_empty(checks.moved_shape(w.shape, dim, w.shape[dim] // m))


@_fake
def _fake_panel_pack(values: Tensor, indices: Tensor, n: int, m: int, k: int) -> tuple[Tensor, Tensor]:
    panel_checks.check_panel_pack(values, indices, n, m, k)
    layout, rows = PanelLayout.of(n, m, k, values.dtype), values.shape[0]
    return (
        values.new_empty(layout.value_shape(rows)),
        values.new_empty(layout.index_shape(rows), dtype=torch.int32),
    )


@_fake
def _fake_panel_restore(
    value_panels: Tensor, index_panels: Tensor, n: int, m: int, rows: int, k: int
) -> tuple[Tensor, Tensor]:
    panel_checks.check_panels(value_panels, index_panels, n, m, rows, k)
    return (
        value_panels.new_empty((rows, checks.ceil_div(k, m) * n)),
        value_panels.new_empty((rows, checks.index_row_bytes(n, m, k)), dtype=torch.uint8),
    )


@_fake
def _fake_panel_unpack(
    value_panels: Tensor, index_panels: Tensor, n: int, m: int, rows: int, k: int
) -> Tensor:
    panel_checks.check_panels(value_panels, index_panels, n, m, rows, k)
    return value_panels.new_empty((rows, k))


@_fake
def _fake_panel_linear(
    x: Tensor,
    value_panels: Tensor,
    index_panels: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    rows: int,
    k: int,
    activation: str,
) -> Tensor:
    panel_checks.check_panel_linear(x, value_panels, index_panels, bias, n, m, rows, k, activation)
    return x.new_empty((*x.shape[:-1], rows))


torch.library.register_fake(f"{NAMESPACE}::{WITHOUT_GRADIENTS}", _fake_panel_linear, lib=_library)


@_fake
def _fake_panel_matmul(
    x: Tensor, value_panels: Tensor, index_panels: Tensor, n: int, m: int, rows: int, k: int
) -> Tensor:
    panel_checks.check_panel_matmul(x, value_panels, index_panels, n, m, rows, k)
    return x.new_empty((*x.shape[:-1], k))


@_fake
def _fake_panel_conv(
    x: Tensor,
    value_panels: Tensor,
    index_panels: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    m: int,
    rows: int,
    k: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> Tensor:
    geometry = (kernel, stride, padding, dilation)
    conv_checks.check_panel_conv(
        x, value_panels, index_panels, bias, residual, n, m, rows, k, *geometry, groups, activation
    )
    return x.new_empty((x.shape[0], *conv_checks.output_sizes(x.shape[1:-1], *geometry), rows))


@_fake
def _fake_panel_linear_int8(
    x: Tensor,
    value_panels: Tensor,
    index_panels: Tensor,
    scales: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    rows: int,
    k: int,
    activation: str,
) -> Tensor:
    panel_checks.check_panel_linear_int8(
        x, value_panels, index_panels, scales, sums, bias, n, m, rows, k, activation
    )
    return x.new_empty((*x.shape[:-1], rows))


@_fake
def _fake_lt_pack(values: Tensor, indices: Tensor, k: int, layout: str) -> Tensor:
    lt.check_lt_pack(values, indices, k, layout)
    groups = k // lt.hardware_pattern(values.dtype).m
    return indices.new_empty(values.numel() * values.element_size() + values.shape[0] * groups // 2)


@_fake
def _fake_lt_compress(w: Tensor, size: int) -> Tensor:
    lt.check_lt_compress(w, size)
    return w.new_empty(size, dtype=torch.uint8)


@_fake
def _fake_lt_matmul(
    x: Tensor,
    blob: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    alpha: float,
    rows: int,
    activation: str,
    out_dtype: torch.dtype | None,
    algorithm: int,
    split_k: int,
    split_k_mode: int,
) -> Tensor:
    lt.check_lt_matmul(x, blob, bias, scales, rows, activation, out_dtype)
    return lt.new_result(x, rows, out_dtype)


# --------------------------------------------------------------------------------------------------- autograd
# A mask is a constant to autograd: gradients pass where weights are kept.


def _save_prune(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.dim = inputs[3]
    bits = output[1]
    ctx.mark_non_differentiable(bits)
    ctx.save_for_backward(bits)


def _grad_prune(ctx: Any, grad: Tensor, _grad_bits: Tensor) -> tuple[Tensor, None, None, None, None]:
    (bits,) = ctx.saved_tensors
    return torch.ops.nmsparse.apply_bits(grad, bits, ctx.dim), None, None, None, None


def _save_apply_bits(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bits, ctx.dim = inputs
    ctx.save_for_backward(bits)


def _grad_apply_bits(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (bits,) = ctx.saved_tensors
    return torch.ops.nmsparse.apply_bits(grad, bits, ctx.dim), None, None


def _save_compress(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    w, ctx.n, ctx.m, ctx.dim, _ = inputs
    ctx.k = w.shape[ctx.dim]
    indices = output[1]
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(indices)


def _grad_compress(ctx: Any, grad: Tensor, _grad_indices: Tensor) -> tuple[Tensor, None, None, None, None]:
    (indices,) = ctx.saved_tensors
    grad_w = torch.ops.nmsparse.decompress(grad.contiguous(), indices, ctx.n, ctx.m, ctx.k, ctx.dim)
    return grad_w, None, None, None, None


def _save_decompress(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, indices, ctx.n, ctx.m, _, ctx.dim = inputs
    ctx.save_for_backward(indices)


def _grad_decompress(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
    (indices,) = ctx.saved_tensors
    return reference.gather_packed(grad, indices, ctx.n, ctx.m, ctx.dim), None, None, None, None, None


def _save_panel_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, value_panels, index_panels, bias, *layout, activation = inputs
    ctx.layout, ctx.activation = layout, activation
    # What came before an activation is summed again in the backward pass: the fusion is meant for inference.
    again = (x, bias) if activation != "none" else (None, None)
    ctx.save_for_backward(value_panels, index_panels, *again)


def _grad_panel_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias; the weight is frozen."""
    value_panels, index_panels, x, bias = ctx.saved_tensors
    if ctx.activation != "none":
        before = torch.ops.nmsparse.panel_linear(x, value_panels, index_panels, bias, *ctx.layout, "none")
        grad = grad * _slope(ctx.activation, before)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.nmsparse.panel_matmul(grad, value_panels, index_panels, *ctx.layout)
    if ctx.needs_input_grad[3]:
        grad_bias = grad if grad.dim() == 1 else grad.sum(tuple(range(grad.dim() - 1)))
    return grad_x, None, None, grad_bias, None, None, None, None, None


def _save_panel_matmul(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, value_panels, index_panels, *ctx.layout = inputs
    ctx.save_for_backward(value_panels, index_panels)


def _grad_panel_matmul(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = torch.ops.nmsparse.panel_linear(grad, *ctx.saved_tensors, None, *ctx.layout, "none")
    return grad_x, None, None, None, None, None, None


def _save_panel_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, value_panels, index_panels, bias, residual, *layout, activation = inputs
    ctx.layout, ctx.activation, ctx.sizes = layout, activation, x.shape
    again = (x, bias, residual) if activation != "none" else (None, None, None)
    ctx.save_for_backward(value_panels, index_panels, *again)


def _grad_panel_conv(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, bias, residual; PyTorch's own convolution takes that of x, with a dense weight."""
    value_panels, index_panels, x, bias, residual = ctx.saved_tensors
    if ctx.activation != "none":
        operands = (x, value_panels, index_panels, bias, residual)
        before = torch.ops.nmsparse.panel_conv(*operands, *ctx.layout, "none")
        grad = grad * _slope(ctx.activation, before)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        n, m, rows, k, kernel, *geometry = ctx.layout
        taps = math.prod(kernel)
        row = taps * conv_checks.tap_inputs(n, m, k, taps, value_panels.dtype)
        dense = torch.ops.nmsparse.panel_unpack(value_panels, index_panels, n, m, rows, row)
        weight = conv_checks.weight_of_rows(dense, k, kernel)
        grad_x = _grad_conv_input(grad, ctx.sizes, weight, *geometry)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.sum(tuple(range(grad.dim() - 1)))
    grad_residual = grad if ctx.needs_input_grad[4] else None
    return grad_x, None, None, grad_bias, grad_residual, *[None] * (len(ctx.layout) + 1)


def _grad_conv_input(
    grad: Tensor,
    sizes: Sequence[int],
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The gradient of ``x [N, places..., C]``, with ``weight [O, I, kernel...]``."""
    before, after = padding[::2], padding[1::2]
    both = [min(sides) for sides in zip(before, after, strict=True)]
    # PyTorch pads both sides alike; what is more on one side stands for places of x.
    extra = [b - s for b, s in zip(before, both, strict=True)]
    places = [size + b + a - 2 * s for size, b, a, s in zip(sizes[1:-1], before, after, both, strict=True)]
    x = grad.new_empty(()).expand(sizes[0], sizes[-1], *places)  # only its sizes count
    grad_x = torch.ops.aten.convolution_backward(
        grad.movedim(-1, 1),
        x,
        weight,
        None,
        stride,
        both,
        dilation,
        False,
        [0] * len(stride),
        groups,
        [True, False, False],
    )[0]
    for d, first in enumerate(extra):
        grad_x = grad_x.narrow(2 + d, first, sizes[1 + d])
    return grad_x.movedim(1, -1)


def _save_panel_linear_int8(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, value_panels, index_panels, scales, sums, bias, *layout, activation = inputs
    ctx.layout, ctx.activation = layout, activation
    again = (x, sums, bias) if activation != "none" else (None, None, None)
    ctx.save_for_backward(value_panels, index_panels, scales, *again)


def _grad_panel_linear_int8(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias, as if x were not rounded (the slope of rounding is 0 nearly everywhere)."""
    value_panels, index_panels, scales, x, sums, bias = ctx.saved_tensors
    if ctx.activation != "none":
        before = torch.ops.nmsparse.panel_linear_int8(
            x, value_panels, index_panels, scales, sums, bias, *ctx.layout, "none"
        )
        grad = grad * _slope(ctx.activation, before)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.nmsparse.panel_unpack(value_panels, index_panels, *ctx.layout)
        scaled = weight.float() * scales.flatten()[: weight.shape[0]].unsqueeze(-1)
        grad_x = grad @ scaled.to(grad.dtype)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.sum(tuple(range(grad.dim() - 1)))
    return grad_x, None, None, None, None, grad_bias, None, None, None, None, None


def _slope(activation: str, x: Tensor) -> Tensor:
    """The derivative of an activation at ``x``."""
    if activation == "relu":
        return (x > 0).to(x.dtype)
    if activation == "silu":
        sigmoid = torch.sigmoid(x)
        return sigmoid * (1 + x * (1 - sigmoid))
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


for _name, _backward, _setup in (
    ("panel_linear", _grad_panel_linear, _save_panel_linear),
    ("panel_matmul", _grad_panel_matmul, _save_panel_matmul),
    ("panel_conv", _grad_panel_conv, _save_panel_conv),
    ("panel_linear_int8", _grad_panel_linear_int8, _save_panel_linear_int8),
    ("prune", _grad_prune, _save_prune),
    ("apply_bits", _grad_apply_bits, _save_apply_bits),
    ("compress", _grad_compress, _save_compress),
    ("decompress", _grad_decompress, _save_decompress),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _backward, setup_context=_setup, lib=_library)
