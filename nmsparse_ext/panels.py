"""The panel form of packed weights, from which the CPU multiplies: a thin layer over the ops.

A panel is 16 rows of the weight, one per vector lane; ``csrc/core/panel_layout.h`` draws it. The form is the
same for every instruction set, takes about the packed form's memory, and is derived from it, never saved.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _ops  # noqa: F401  (registers torch.ops.nmsparse)
from ._panel_layout import MAX_PANEL_M
from .pattern import Pattern

__all__ = [
    "Activation",
    "Panels",
    "panel_linear",
    "panel_matmul",
    "panel_pack",
    "panel_restore",
    "panel_unpack",
    "why_no_panels",
]

Activation = Literal["none", "relu", "gelu", "silu"]

#: Element types with fast kernels. float64 has panels too, but its kernels are for tests.
FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_nms = torch.ops.nmsparse
_panel_linear = _nms.panel_linear.default  # found once: a packet looks for the overload in every call
_panel_matmul = _nms.panel_matmul.default


class Panels(NamedTuple):
    """A weight ``[rows, k]`` in panel form.

    Attributes:
        values: ``[panels, steps, slots, 16]``, bfloat16 ``[panels, steps, slots, 16, 2]``.
        indices: int32 ``[panels, words, 16]``.
    """

    values: Tensor
    indices: Tensor


def why_no_panels(pattern: Pattern, dtype: torch.dtype) -> str | None:
    """Why weights of this pattern and dtype have no fast kernels, or ``None`` if they have."""
    if pattern.m > MAX_PANEL_M:
        return f"panels hold patterns with m <= {MAX_PANEL_M}, not {pattern}"
    if dtype not in FAST_DTYPES:
        return f"panels of {dtype} have no fast kernels"
    return None


def parts_pattern(pattern: Pattern) -> Pattern:
    """The pattern that the parts of a group satisfy, where the group is longer than a window: 4:16 for 4:32.

    A part is the longest whole fraction of the group that fits into a window, and may hold all that is kept.
    """
    part = next(size for size in range(MAX_PANEL_M, 0, -1) if pattern.m % size == 0)
    return Pattern(min(pattern.n, part), part)


def panel_pack(values: Tensor, indices: Tensor, pattern: Pattern, *, k: int) -> Panels:
    """Lays a packed weight out in panels.

    Args:
        values: ``[rows, groups * n]``.
        indices: uint8 ``[rows, bytes]``.
        pattern: Its pattern, ``m <= 16``.
        k: Inputs of a row.

    Returns:
        New tensors.
    """
    return Panels(*_nms.panel_pack(values.contiguous(), indices.contiguous(), pattern.n, pattern.m, k))


def panel_restore(panels: Panels, pattern: Pattern, *, rows: int, k: int) -> tuple[Tensor, Tensor]:
    """The ``values`` and ``indices`` that the panels were packed from, bit for bit; new tensors."""
    return _nms.panel_restore(panels.values, panels.indices, pattern.n, pattern.m, rows, k)


def panel_unpack(panels: Panels, pattern: Pattern, *, rows: int, k: int) -> Tensor:
    """The dense weight ``[rows, k]``."""
    return _nms.panel_unpack(panels.values, panels.indices, pattern.n, pattern.m, rows, k)


def panel_linear(
    x: Tensor,
    panels: Panels,
    bias: Tensor | None,
    pattern: Pattern,
    *,
    rows: int,
    k: int,
    activation: Activation = "none",
) -> Tensor:
    """Multiplies with a weight in panel form; differentiable in ``x`` and ``bias``.

    Equivalent to ``activation(F.linear(x, panel_unpack(panels, ...), bias))``, except that sums are taken in
    float32 and rounded once, and that what meets a pruned weight does not count, not even infinity.

    Args:
        x: ``[..., k]``, any strides, of the panels' dtype.
        panels: The weight ``[rows, k]``.
        bias: ``[rows]``, of the same dtype.
        pattern: The weight's pattern.
        rows: Outputs.
        k: Inputs.
        activation: Applied to the sums. With gradients, the sums are taken once more in the backward pass.

    Returns:
        ``[..., rows]``, contiguous.
    """
    values, indices = panels
    if _wants_autograd(x, bias):
        return _panel_linear(x, values, indices, bias, pattern.n, pattern.m, rows, k, activation)
    # As without_autograd has it, but this is called for every linear layer.
    with torch._C._AutoDispatchBelowAutograd():
        return _panel_linear(x, values, indices, bias, pattern.n, pattern.m, rows, k, activation)


def panel_matmul(x: Tensor, panels: Panels, pattern: Pattern, *, rows: int, k: int) -> Tensor:
    """Multiplies with a weight in panel form along its rows; differentiable in ``x``.

    Equivalent to ``x @ panel_unpack(panels, ...)``, except that sums are taken in float32 and rounded once.
    It is what the gradient of an input takes. The weight is made dense in the first cache, a few thousand
    numbers at a time, and multiplied there: an infinity that meets a pruned weight gives NaN, as with a dense
    weight.

    Args:
        x: ``[..., rows]``, any strides, of the panels' dtype.
        panels: The weight ``[rows, k]``.
        pattern: The weight's pattern.
        rows: Rows of the weight.
        k: Its columns.

    Returns:
        ``[..., k]``, contiguous.
    """
    with without_autograd(x):
        return _panel_matmul(x, panels.values, panels.indices, pattern.n, pattern.m, rows, k)


def without_autograd(*operands: Tensor | None) -> AbstractContextManager:
    """A context to call an op in that has to do with autograd only where somebody wants gradients.

    A small layer takes about as long as the Python kernel in which autograd would find out the same.
    """
    return nullcontext() if _wants_autograd(*operands) else torch._C._AutoDispatchBelowAutograd()


def transforming() -> bool:
    """Whether forward-mode derivatives or a transform of ``torch.func`` (vmap, grad) are going on."""
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None


def _wants_autograd(*operands: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
