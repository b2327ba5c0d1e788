"""Fake kernels of the ops: each repeats the checks of the real one and says what it returns."""

from __future__ import annotations

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
from . import _product_checks as product_checks
from ._op_library import NAMESPACE, WITHOUT_GRADIENTS, library
from ._panel_layout import PanelLayout


def _fake(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Registers the fake kernel of the op whose name follows ``_fake_``."""
    name = kernel.__name__.removeprefix("_fake_")
    torch.library.register_fake(f"{NAMESPACE}::{name}", kernel, lib=library)
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
def _fake_transposable_pack(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.check_transposable(w)
    rows, cols = w.shape

    def packed(rows: int, k: int) -> tuple[Tensor, Tensor]:
        return w.new_empty((rows, k // 2)), w.new_empty((rows, checks.ceil_div(k, 8)), dtype=torch.uint8)

    return (*packed(rows, cols), *packed(cols, rows), _fake_transposable_bits(w))


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


torch.library.register_fake(f"{NAMESPACE}::{WITHOUT_GRADIENTS}", _fake_panel_linear, lib=library)


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
    return indices.new_empty(lt.blob_bytes(values.shape[0], k, values.dtype))


@_fake
def _fake_lt_prune_pack(w: Tensor, layout: str) -> Tensor:
    lt.check_lt_prune_pack(w, layout)
    return w.new_empty(lt.blob_bytes(w.shape[0], w.shape[1], w.dtype), dtype=torch.uint8)


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


@_fake
def _fake_small_batch_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    n: int,
    m: int,
    k: int,
    activation: str,
) -> Tensor:
    product_checks.check_small_batch_linear(x, values, indices, scales, bias, n, m, k, activation)
    return x.new_empty((*x.shape[:-1], values.shape[0]))


@_fake
def _fake_epilogue(y: Tensor, scales: Tensor | None, bias: Tensor | None, activation: str) -> Tensor:
    product_checks.check_epilogue(y, scales, bias, activation)
    return torch.empty_like(y)


@_fake
def _fake_epilogue_(y: Tensor, scales: Tensor | None, bias: Tensor | None, activation: str) -> None:
    product_checks.check_epilogue(y, scales, bias, activation)
    checks.check_writable(y, "y")
