"""Argument checks of `small_batch_linear` and `epilogue`: products and what follows them, on GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks as checks
from ._panel_layout import check_activation

SMALL_BATCH_DTYPES = (torch.bfloat16, torch.float16)
EPILOGUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check_vector(vector: Tensor, name: str, rows: int, dtype: torch.dtype, x: Tensor, x_name: str) -> None:
    torch._check(
        vector.dim() == 1 and vector.shape[0] == rows and vector.dtype == dtype,
        lambda: f"{name} must be [{rows}] of {dtype}, got {list(vector.shape)} of {vector.dtype}",
    )
    checks.check_same_device(vector, name, x, x_name)


def _check_one_of(tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    torch._check(
        tensor.dtype in dtypes,
        lambda: f"{name} must be one of {', '.join(map(str, dtypes))}, got {tensor.dtype}",
    )


def check_small_batch_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    n: int,
    m: int,
    k: int,
    activation: str,
) -> None:
    """Raises what `small_batch_linear` raises."""
    _check_one_of(x, "x", SMALL_BATCH_DTYPES)
    torch._check(
        x.dim() >= 1 and x.shape[-1] == k,
        lambda: f"the last size of x must be k = {k}, got shape {list(x.shape)}",
    )
    torch._check(values.dim() == 2, lambda: f"values must have 2 dimensions, got {values.dim()}")
    checks.check_packed(values, indices, n, m, k, 1)
    torch._check(
        values.dtype in (x.dtype, torch.int8),
        lambda: f"values must have the dtype of x, {x.dtype}, or int8, got {values.dtype}",
    )
    torch._check(
        (scales is not None) == (values.dtype == torch.int8),
        lambda: (
            f"scales go with int8 values, and with no others; got values of {values.dtype} and "
            f"{'no scales' if scales is None else 'scales'}"
        ),
    )
    checks.check_same_device(values, "values", x, "x")
    if scales is not None:
        _check_vector(scales, "scales", values.shape[0], torch.float32, x, "x")
    if bias is not None:
        _check_vector(bias, "bias", values.shape[0], x.dtype, x, "x")
    check_activation(activation)


def check_epilogue(y: Tensor, scales: Tensor | None, bias: Tensor | None, activation: str) -> None:
    """Raises what `epilogue` raises."""
    _check_one_of(y, "y", EPILOGUE_DTYPES)
    torch._check(y.dim() >= 1, lambda: "y must have at least one dimension")
    if scales is not None:
        _check_vector(scales, "scales", y.shape[-1], torch.float32, y, "y")
    if bias is not None:
        _check_vector(bias, "bias", y.shape[-1], y.dtype, y, "y")
    check_activation(activation)
