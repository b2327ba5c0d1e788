"""Argument checks and shape arithmetic of the ops, shared by the reference kernels and the fake kernels.

They are written with ``torch._check`` so that they also hold for symbolic sizes: a fake kernel that accepted
what the real kernel refuses would turn a clear error at trace time into a crash at run time. ``torch._check``
raises ``RuntimeError``, as the compiled kernels do; the public functions in ``ops.py`` check first and raise
``ValueError``/``TypeError`` with the public argument names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .pattern import MAX_M, Pattern

WEIGHT_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.float8_e4m3fn,
)
GRAD_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_DIMS = 5


def ceil_div(a: int, b: int) -> int:
    """``ceil(a / b)`` for non-negative integers; also for symbolic ones."""
    return -(-a // b)


def index_row_bytes(n: int, m: int, k: int) -> int:
    """Bytes of ``indices`` that a row of ``k`` weights takes."""
    return ceil_div(ceil_div(k, m) * Pattern(n, m).bits_per_group, 8)


def moved_shape(shape: Sequence[int], dim: int, last: int) -> list[int]:
    """``shape`` with ``dim`` taken out and a dimension of size ``last`` put at the end."""
    return [*shape[:dim], *shape[dim + 1 :], last]


def restored_shape(shape: Sequence[int], dim: int, size: int) -> list[int]:
    """``shape`` with its last dimension taken out and a dimension of size ``size`` put at ``dim``."""
    others = list(shape[:-1])
    return [*others[:dim], size, *others[dim:]]


def bits_shape(shape: Sequence[int], dim: int) -> list[int]:
    """Shape of the packed mask of a tensor of ``shape``: group dim last, eight weights a byte."""
    return moved_shape(shape, dim, ceil_div(shape[dim], 8))


def check_pattern(n: int, m: int) -> None:
    torch._check(
        1 <= n <= m <= MAX_M, lambda: f"the pattern must satisfy 1 <= n <= m <= {MAX_M}, got {n}:{m}"
    )


def check_dim(dim: int, ndim: int, name: str) -> None:
    torch._check(1 <= ndim <= MAX_DIMS, lambda: f"{name} must have 1 to {MAX_DIMS} dimensions, got {ndim}")
    torch._check(
        0 <= dim < ndim, lambda: f"dim must be in [0, {ndim}) for {name} with {ndim} dimensions, got {dim}"
    )


def check_weight_dtype(w: Tensor, name: str = "w") -> None:
    torch._check(
        w.dtype in WEIGHT_DTYPES,
        lambda: f"{name} must be one of {', '.join(map(str, WEIGHT_DTYPES))}, got {w.dtype}",
    )


def check_weight(w: Tensor, n: int, m: int, dim: int, pad: bool) -> None:
    """Checks of every op that groups a dense weight."""
    check_pattern(n, m)
    check_weight_dtype(w)
    check_dim(dim, w.dim(), "w")
    if not pad:
        torch._check(
            w.shape[dim] % m == 0,
            lambda: f"w has size {w.shape[dim]} along dim {dim}, no multiple of m = {m}, and pad is False",
        )


def check_contiguous(tensor: Tensor, name: str) -> None:
    torch._check(tensor.is_contiguous(), lambda: f"{name} must be contiguous, got strides {tensor.stride()}")


def check_same_device(tensor: Tensor, name: str, w: Tensor, w_name: str) -> None:
    torch._check(
        tensor.device == w.device,
        lambda: f"{name} must be on the device of {w_name}, {w.device}, got {tensor.device}",
    )


def check_bits(bits: Tensor, w: Tensor, dim: int, w_name: str = "w") -> None:
    """``bits`` must be the packed mask of a tensor of the shape of ``w``."""
    torch._check(bits.dtype == torch.uint8, lambda: f"bits must be torch.uint8, got {bits.dtype}")
    expected = bits_shape(w.shape, dim)
    torch._check(
        bits.dim() == len(expected) and all(a == b for a, b in zip(bits.shape, expected, strict=True)),
        lambda: (
            f"bits must have shape {expected} for {w_name} of shape {list(w.shape)} and dim {dim}, "
            f"got {list(bits.shape)}"
        ),
    )
    check_contiguous(bits, "bits")
    check_same_device(bits, "bits", w, w_name)


def check_mask(mask: Tensor, dim: int) -> None:
    torch._check(mask.dtype == torch.bool, lambda: f"mask must be torch.bool, got {mask.dtype}")
    check_dim(dim, mask.dim(), "mask")


def check_unpack_bits(bits: Tensor, k: int, dim: int) -> None:
    torch._check(bits.dtype == torch.uint8, lambda: f"bits must be torch.uint8, got {bits.dtype}")
    check_dim(dim, bits.dim(), "bits")
    torch._check(k >= 0, lambda: f"k must be >= 0, got {k}")
    torch._check(
        bits.shape[-1] == ceil_div(k, 8),
        lambda: f"bits must have {ceil_div(k, 8)} bytes a row for k = {k}, got {bits.shape[-1]}",
    )
    check_contiguous(bits, "bits")


def check_apply_bits(w: Tensor, bits: Tensor, dim: int) -> None:
    check_weight_dtype(w)
    check_dim(dim, w.dim(), "w")
    check_bits(bits, w, dim)


def check_same_shape(a: Tensor, a_name: str, b: Tensor, b_name: str) -> None:
    torch._check(
        a.dim() == b.dim() and all(x == y for x, y in zip(a.shape, b.shape, strict=True)),
        lambda: f"{a_name} must have the shape of {b_name}, {list(b.shape)}, got {list(a.shape)}",
    )


def check_writable(tensor: Tensor, name: str) -> None:
    """Refuses a tensor several of whose elements share memory (an expanded one): it cannot be written to."""
    torch._check(
        tensor.numel() == 0  # an empty channels_last tensor has strides of 0 too
        or not any(
            stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ),
        lambda: (
            f"{name} is written to, but several of its elements share one memory location "
            f"(shape {list(tensor.shape)}, strides {tensor.stride()}); clone it first"
        ),
    )


def check_out(w: Tensor, out: Tensor) -> None:
    torch._check(out.dtype == w.dtype, lambda: f"out must have the dtype of w, {w.dtype}, got {out.dtype}")
    check_same_shape(out, "out", w, "w")
    check_same_device(out, "out", w, "w")
    check_writable(out, "out")


def check_sad(a: Tensor, b: Tensor) -> None:
    torch._check(
        a.dtype in (torch.uint8, torch.bool),
        lambda: f"a must be torch.bool or packed torch.uint8, got {a.dtype}",
    )
    torch._check(a.dtype == b.dtype, lambda: f"b must have the dtype of a, {a.dtype}, got {b.dtype}")
    check_same_shape(b, "b", a, "a")
    check_same_device(b, "b", a, "a")
    check_contiguous(a, "a")
    check_contiguous(b, "b")


def check_sad_out(a: Tensor, out: Tensor) -> None:
    torch._check(
        out.dtype == torch.int64 and out.numel() == 1,
        lambda: f"out must hold one torch.int64, got {list(out.shape)} of {out.dtype}",
    )
    check_same_device(out, "out", a, "a")


def check_add_pruned(grad: Tensor, w: Tensor, bits: Tensor, dim: int, scale: Tensor | None) -> None:
    for name, tensor in (("grad", grad), ("w", w)):
        torch._check(
            tensor.dtype in GRAD_DTYPES,
            lambda name=name, tensor=tensor: (
                f"{name} must be one of {', '.join(map(str, GRAD_DTYPES))}, got {tensor.dtype}"
            ),
        )
    check_dim(dim, w.dim(), "w")
    check_same_shape(grad, "grad", w, "w")
    check_same_device(grad, "grad", w, "w")
    check_writable(grad, "grad")
    check_bits(bits, w, dim)
    if scale is not None:
        torch._check(
            scale.dtype == torch.float32 and scale.numel() == 1,
            lambda: f"scale must hold one torch.float32, got {list(scale.shape)} of {scale.dtype}",
        )
        check_same_device(scale, "scale", w, "w")


def check_indices_shape(indices: Tensor, n: int, m: int, k: int) -> None:
    """``indices`` must have the bytes a row that ``k`` weights in groups of ``m`` take."""
    check_pattern(n, m)
    torch._check(k >= 0, lambda: f"k must be >= 0, got {k}")
    torch._check(indices.dtype == torch.uint8, lambda: f"indices must be torch.uint8, got {indices.dtype}")
    torch._check(
        1 <= indices.dim() <= MAX_DIMS,
        lambda: f"indices must have 1 to {MAX_DIMS} dimensions, got {indices.dim()}",
    )
    row_bytes = index_row_bytes(n, m, k)
    torch._check(
        indices.shape[-1] == row_bytes,
        lambda: f"indices must have {row_bytes} bytes a row for {n}:{m} and k = {k}, got {indices.shape[-1]}",
    )
    check_contiguous(indices, "indices")


def check_packed(values: Tensor, indices: Tensor, n: int, m: int, k: int, dim: int) -> None:
    check_indices_shape(indices, n, m, k)
    check_weight_dtype(values, "values")
    check_dim(dim, values.dim(), "values")
    torch._check(
        values.shape[-1] == ceil_div(k, m) * n,
        lambda: (
            f"values must have {ceil_div(k, m) * n} entries a row for {n}:{m} and k = {k}, "
            f"got {values.shape[-1]}"
        ),
    )
    torch._check(
        values.dim() == indices.dim()
        and all(a == b for a, b in zip(values.shape[:-1], indices.shape[:-1], strict=True)),
        lambda: (
            f"values and indices must agree in all but the last dimension, got {list(values.shape)} "
            f"and {list(indices.shape)}"
        ),
    )
    check_same_device(indices, "indices", values, "values")
    check_contiguous(values, "values")


def check_transposable(w: Tensor) -> None:
    check_weight_dtype(w)
    torch._check(w.dim() == 2, lambda: f"w must have 2 dimensions, got {w.dim()}")
    torch._check(
        w.shape[0] % 4 == 0 and w.shape[1] % 4 == 0,
        lambda: f"both sizes of w must be multiples of 4, got {list(w.shape)}",
    )


def holds_data(tensor: Tensor) -> bool:
    """False for meta and fake tensors, whose contents cannot be looked at."""
    return not tensor.is_meta and type(tensor).__name__ not in ("FakeTensor", "FunctionalTensor")
