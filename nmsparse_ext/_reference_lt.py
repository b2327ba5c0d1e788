"""cuSPARSELt's ops in pure PyTorch: what they mean, and what runs without a GPU. See `reference.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks as checks
from . import _lt_layout as lt
from . import reference


def lt_pack(values: Tensor, indices: Tensor, k: int, layout: str) -> Tensor:
    """A packed 2:4 weight (1:2 in float32) as sparse tensor cores' software stores it.

    Returns:
        uint8, ``values`` and then metadata: four bits a group, in the order of ``layout``: ``"cutlass"`` as
        ``torch.sparse._semi_structured_conversions`` has it, ``"sm80"`` and ``"sm90"`` as cuSPARSELt was
        found to have it for 16-bit weights on these GPUs (``csrc/core/sparse24.h``).
    """
    lt.check_lt_pack(values, indices, k, layout)
    pattern = lt.hardware_pattern(values.dtype)
    rows, groups = values.shape[0], k // pattern.m
    bits = pattern.bits_per_group
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=values.device)
    nibbles = (indices.unsqueeze(-1) >> shift & (1 << bits) - 1).flatten(-2)[:, :groups]
    if pattern.m == 2:  # a pair of float32 counts as four halves
        nibbles = torch.where(nibbles == 0, 0x4, 0xE).to(torch.uint8)
    places = lt.nibble_places(layout, values.dtype, rows, groups, values.device)
    metadata = torch.empty(rows * groups, dtype=torch.uint8, device=values.device)
    metadata[places.flatten()] = nibbles.flatten()
    low, high = metadata.view(-1, 2).unbind(-1)
    return torch.cat([values.flatten().view(torch.uint8), low | high << 4])


def lt_prune_pack(w: Tensor, layout: str) -> Tensor:
    """`lt_pack` of a dense weight ``[rows, k]``, of which the two largest of every four (one of two) stay."""
    lt.check_lt_prune_pack(w, layout)
    pattern = lt.hardware_pattern(w.dtype)
    return lt_pack(*reference.compress(w, pattern.n, pattern.m, 1, False), w.shape[1], layout)


def lt_compress(w: Tensor, size: int) -> Tensor:
    """Compresses a weight that is 2:4 (1:2 in float32) for `lt_matmul`.

    Args:
        w: ``[rows, k]`` or ``[batches, rows, k]``.
        size: Bytes of the result. On CUDA cuSPARSELt says how many; here at least `portable_bytes`.

    Returns:
        uint8 ``[size]``. What is in it is the business of whoever multiplies with it: on CUDA the library's
        own form, here values and indices of the packed form.
    """
    lt.check_lt_compress(w, size)
    pattern = lt.hardware_pattern(w.dtype)
    values, indices = reference.compress(w, pattern.n, pattern.m, w.dim() - 1, False)
    blob = torch.cat([values.flatten().view(torch.uint8), indices.flatten()])
    torch._check(size >= blob.numel(), lambda: f"size must be at least {blob.numel()} bytes, got {size}")
    return F.pad(blob, (0, size - blob.numel()))


def lt_matmul(
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
    """``activation(alpha * x @ W.mT + bias)`` with a weight from `lt_compress`; ``scales`` replace ``alpha``.

    ``x`` is ``[tokens, k]``, or ``[batches, tokens, k]`` for a batch of weights. Sums are taken in float32
    (int8: exactly) and rounded once; integer results to the nearest, within the dtype's range. ``algorithm``
    (below 0: the library's own choice), ``split_k`` and ``split_k_mode`` choose the kernel on CUDA and mean
    nothing here.
    """
    lt.check_lt_matmul(x, blob, bias, scales, rows, activation, out_dtype)
    k, batches = x.shape[-1], x.shape[0] if x.dim() == 3 else 1
    pattern = lt.hardware_pattern(x.dtype)
    needed = lt.portable_bytes(rows, k, x.dtype, batches)
    torch._check(blob.numel() >= needed, lambda: f"blob must hold {needed} bytes, got {blob.numel()}")
    index_bytes = checks.index_row_bytes(pattern.n, pattern.m, k)
    first_index = needed - batches * rows * index_bytes
    values, indices = blob[:first_index], blob[first_index:needed]
    shape = (*x.shape[:-2], rows)
    w = reference.decompress(
        values.clone().view(x.dtype).view(*shape, -1),  # a copy, because a slice may begin anywhere
        indices.view(*shape, index_bytes),
        pattern.n,
        pattern.m,
        k,
        len(shape),
    )
    exact = torch.float64 if x.dtype == torch.int8 else torch.float32
    y = (x.to(exact) @ w.to(exact).mT).float() * (alpha if scales is None else scales)
    if bias is not None:
        y = y + bias.float()
    if activation != "none":
        y = getattr(F, activation)(y)
    result = lt.new_result(x, rows, out_dtype)
    if not result.dtype.is_floating_point:
        limits = torch.iinfo(result.dtype)
        y = y.double().round().clamp(limits.min, limits.max)
    return result.copy_(y)
