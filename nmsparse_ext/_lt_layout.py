"""What the ops on cuSPARSELt's compressed weights (``lt_*``) take and give: checks, shapes, layouts.

The twin of ``csrc/core/sparse24.h`` and of the checks in ``csrc/cusparselt/library/problem.cpp``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks as checks
from ._checks import ceil_div
from .pattern import Pattern

LAYOUTS = ("cutlass", "sm80", "sm90")
ACTIVATIONS = ("none", "relu", "gelu")  # that the library fuses; gelu for int8 in and out only


class Multiples(NamedTuple):
    """What sizes must be multiples of: of the weight (rows and inputs), and tokens."""

    weight: int
    tokens: int


MULTIPLES = {
    torch.float32: Multiples(8, 4),
    torch.bfloat16: Multiples(16, 8),
    torch.float16: Multiples(16, 8),
    torch.int8: Multiples(32, 16),
    torch.float8_e4m3fn: Multiples(32, 16),
}

#: dtype of weight and input -> dtypes that results can have; the first is the default.
OUT_DTYPES = {
    torch.float32: (torch.float32,),
    torch.bfloat16: (torch.bfloat16,),
    torch.float16: (torch.float16,),
    torch.int8: (torch.int8, torch.int32, torch.float16, torch.bfloat16),
    torch.float8_e4m3fn: (torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32),
}


def hardware_pattern(dtype: torch.dtype) -> Pattern:
    """What sparse tensor cores run: 1:2 in float32, else 2:4."""
    return Pattern(1, 2) if dtype == torch.float32 else Pattern(2, 4)


def embeds(pattern: Pattern, dtype: torch.dtype) -> bool:
    """Whether weights of ``pattern`` always have the pattern that sparse tensor cores run."""
    wanted = hardware_pattern(dtype)
    return pattern.n <= wanted.n and pattern.m % wanted.m == 0


def bias_dtype(dtype: torch.dtype, out_dtype: torch.dtype) -> torch.dtype:
    """The dtype that a bias must have."""
    if dtype == torch.int8:
        return torch.float32
    return torch.float16 if out_dtype == torch.float8_e4m3fn else out_dtype


def portable_bytes(rows: int, k: int, dtype: torch.dtype, batches: int = 1) -> int:
    """Bytes of a weight that the reference has compressed: values and indices, one after the other."""
    n, m = hardware_pattern(dtype).n, hardware_pattern(dtype).m
    return batches * rows * (k // m * n * dtype.itemsize + checks.index_row_bytes(n, m, k))


# ---------------------------------------------------------------------------------------------------- layouts


def blob_bytes(rows: int, k: int, dtype: torch.dtype) -> int:
    """Bytes of what `lt_pack` gives: values, and four bits a group."""
    return rows * k // 2 * dtype.itemsize + rows * (k // hardware_pattern(dtype).m) // 2


def layout_multiples(layout: str, dtype: torch.dtype) -> tuple[int, int]:
    """What rows and inputs must be multiples of; (0, 0) if the layout has no such weights."""
    inputs = hardware_pattern(dtype).m
    if layout == "cutlass":
        return (16, 16 * inputs) if dtype.itemsize == 1 else (32, 8 * inputs)
    if dtype.itemsize != 2:
        return 0, 0
    return (128, 32 * inputs) if layout == "sm80" else (64, 16 * inputs)


def nibble_places(layout: str, dtype: torch.dtype, rows: int, groups: int, device: torch.device) -> Tensor:
    """Which nibble of the metadata belongs to each group: int64 ``[rows, groups]``, see `lt_pack`."""
    r = torch.arange(rows, device=device).unsqueeze(1)
    q = torch.arange(groups, device=device)

    def tile_word(c: Tensor) -> Tensor:
        return r % 8 * 8 + r % 32 // 16 * 4 + r % 16 // 8 + c % 2 * 2

    if layout == "cutlass" and dtype.itemsize == 1:
        c = q // 8
        return (r // 16 * 32 + c // 2 * 2 * rows + r % 8 * 4 + r % 16 // 8 + c % 2 * 2) * 8 + q % 8
    if layout == "cutlass":
        return (r // 32 * 64 + q // 8 * 2 * rows + tile_word(q // 4)) * 4 + q % 4
    if layout == "sm80":
        block = r // 128 * 512 + q // 16 * 512 * (rows // 128)
        return (block + q % 16 // 8 * 256 + r % 128 // 32 * 64 + tile_word(q // 4)) * 4 + q % 4
    byte = r // 64 * 32 * groups + q // 8 * 256 + r % 64 // 16 * 64 + r % 8 * 8 + q % 4 * 2 + q % 8 // 4
    return byte * 2 + r % 16 // 8


# ----------------------------------------------------------------------------------------------------- checks


def _check_dtype(tensor: Tensor, name: str) -> None:
    torch._check(
        tensor.dtype in MULTIPLES,
        lambda: f"{name} must be one of {', '.join(map(str, MULTIPLES))}, got {tensor.dtype}",
    )


def _check_layout(layout: str) -> None:
    torch._check(layout in LAYOUTS, lambda: f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def _check_layout_sizes(layout: str, rows: int, k: int, dtype: torch.dtype) -> None:
    row_multiple, k_multiple = layout_multiples(layout, dtype)
    torch._check(row_multiple != 0, lambda: f"layout {layout} is of 16-bit weights")
    torch._check(
        rows % row_multiple == 0 and k % k_multiple == 0,
        lambda: (
            f"layout {layout} needs rows in multiples of {row_multiple} and k in multiples of {k_multiple}, "
            f"got [{rows}, {k}]"
        ),
    )


def check_lt_prune_pack(w: Tensor, layout: str) -> None:
    """Raises what `lt_prune_pack` raises."""
    _check_layout(layout)
    _check_dtype(w, "w")
    torch._check(w.dim() == 2, lambda: f"w must have 2 dimensions, got {w.dim()}")
    _check_layout_sizes(layout, w.shape[0], w.shape[1], w.dtype)


def check_lt_pack(values: Tensor, indices: Tensor, k: int, layout: str) -> None:
    """Raises what `lt_pack` raises."""
    _check_layout(layout)
    _check_dtype(values, "values")
    torch._check(
        values.dim() == 2 and values.is_contiguous() and values.shape[1] * 2 == k,
        lambda: f"values must be contiguous [rows, k / 2] with k = {k}, got {list(values.shape)}",
    )
    _check_layout_sizes(layout, values.shape[0], k, values.dtype)
    pattern = hardware_pattern(values.dtype)
    checks.check_packed(values, indices, pattern.n, pattern.m, k, 1)


def _check_weight_sizes(rows: int, k: int, dtype: torch.dtype) -> None:
    multiple = MULTIPLES[dtype].weight
    torch._check(
        rows > 0 and rows % multiple == 0 and k > 0 and k % multiple == 0,
        lambda: f"a weight of {dtype} must have sizes in multiples of {multiple}, got [{rows}, {k}]",
    )


def check_lt_compress(w: Tensor, size: int) -> None:
    """Raises what `lt_compress` raises."""
    _check_dtype(w, "w")
    torch._check(
        w.dim() in (2, 3) and w.is_contiguous(),
        lambda: f"w must be contiguous, [rows, k] or [batches, rows, k], got {list(w.shape)}",
    )
    _check_weight_sizes(w.shape[-2], w.shape[-1], w.dtype)
    torch._check(size > 0, lambda: f"size must be positive, got {size}")


def check_lt_matmul(
    x: Tensor,
    blob: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    rows: int,
    activation: str,
    out_dtype: torch.dtype | None,
) -> None:
    """Raises what `lt_matmul` raises."""
    _check_dtype(x, "x")
    torch._check(
        x.dim() in (2, 3),
        lambda: f"x must be [tokens, k], or [batches, tokens, k] for a batch of weights, got {list(x.shape)}",
    )
    torch._check(
        blob.dtype == torch.uint8 and blob.dim() == 1 and blob.is_contiguous(),
        lambda: "blob must be what lt_compress gives",
    )
    checks.check_same_device(blob, "blob", x, "x")
    _check_weight_sizes(rows, x.shape[-1], x.dtype)
    out = x.dtype if out_dtype is None else out_dtype
    torch._check(
        out in OUT_DTYPES[x.dtype],
        lambda: (
            f"out_dtype of {x.dtype} must be one of {', '.join(map(str, OUT_DTYPES[x.dtype]))}, got {out}"
        ),
    )
    torch._check(
        activation in ACTIVATIONS,
        lambda: f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}",
    )
    torch._check(
        activation != "gelu" or (x.dtype == torch.int8 and out == torch.int8),
        lambda: f"gelu is fused with int8 in and out only, got {x.dtype} in and {out} out",
    )
    for name, vector, dtype in (
        ("bias", bias, bias_dtype(x.dtype, out)),
        ("scales", scales, torch.float32),
    ):
        if vector is None:
            continue
        checks.check_same_device(vector, name, x, "x")
        torch._check(
            vector.dim() == 1
            and vector.shape[0] == rows
            and vector.is_contiguous()
            and vector.dtype == dtype,
            lambda name=name, dtype=dtype: f"{name} must be contiguous {dtype} [{rows}]",
        )
    torch._check(
        scales is None or x.dtype == torch.int8,
        lambda: f"scales are for int8 weights only, got {x.dtype}",
    )


def new_result(x: Tensor, rows: int, out_dtype: torch.dtype | None) -> Tensor:
    """What `lt_matmul` returns, uninitialised: the front of as many tokens as the library needs."""
    multiple = MULTIPLES[x.dtype].tokens
    tokens = x.shape[-2]
    padded = ceil_div(tokens, multiple) * multiple
    y = x.new_empty((*x.shape[:-2], padded, rows), dtype=x.dtype if out_dtype is None else out_dtype)
    return y if isinstance(tokens, int) and tokens == padded else y.narrow(-2, 0, tokens)
