"""The engines that multiply from panels on the CPU: faster than dense up to about two kept of three.

``cpu-panels`` is for matrices, ``cpu-expert-panels`` for stacks of matrices of one shape (``[experts,
...]``), whose single matrices are weights of ``cpu-panels``: ``weight[e]`` shares the panels.
``cpu-split-panels`` is for matrices whose groups are longer than a window of panels: each part of a group
that fits into one may hold all that is kept, so 4:32 is multiplied as 4:16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from . import panels as panel_ops
from ._build import extension
from ._panel_layout import ACTIVATIONS, MAX_PANEL_M, PANEL_ROWS
from .engines import Engine, portable, register_engine, unpack_rows, unpacked_conv
from .panels import (
    Activation,
    Panels,
    panel_linear,
    panel_matmul,
    panel_pack,
    panel_restore,
    panel_unpack,
    parts_pattern,
    transforming,
)

if TYPE_CHECKING:
    from .pattern import Pattern
    from .tensor import NMTensor


def _why_not(weight: NMTensor, rows: int, pattern: Pattern | None = None) -> str | None:
    if extension is None:
        return "it needs the compiled extension"
    with torch._C.DisableTorchFunctionSubclass():
        device, dtype = weight.device, weight.dtype
    if device.type != "cpu":
        return f"it runs on the CPU, the weight is on {device}"
    if len(weight.rows) != rows:
        kind = "matrices" if rows == 1 else "stacks of matrices"
        return f"it multiplies {kind}, the weight has {len(weight.rows) + 1} dimensions"
    return panel_ops.why_no_panels(pattern or weight.pattern, dtype)


def panels_of(weight: NMTensor) -> Panels:
    """The forms of a weight whose engine multiplies from panels; built anew if it was written to."""
    if weight.shared is not None and not torch.compiler.is_compiling():
        weight.shared.refresh()
    # Forms are no declared attributes.
    return Panels(getattr(weight, "form_values"), getattr(weight, "form_indices"))  # noqa: B009


# --------------------------------------------------------------------------------------------------- matrices


# Past a wrapper in Python that adds nothing.
_panel_linear = torch.ops.nmsparse.panel_linear.without_gradients._op


def _build(weight: NMTensor) -> tuple[Tensor, Tensor]:
    return panel_pack(*portable(weight), weight.pattern, k=weight.k)


def _restore(weight: NMTensor) -> tuple[Tensor, Tensor]:
    return panel_restore(panels_of(weight), weight.pattern, rows=weight.rows[0], k=weight.k)


def _dense_rows(weight: NMTensor) -> Tensor:
    return panel_unpack(panels_of(weight), weight.pattern, rows=weight.rows[0], k=weight.k)


def _panel_pattern(weight: NMTensor) -> Pattern:
    """What the panels hold: the weight's pattern, or that of the parts of its groups."""
    return weight.pattern if weight.pattern.m <= MAX_PANEL_M else parts_pattern(weight.pattern)


def _linear(
    input: Tensor, weight: NMTensor, bias: Tensor | None = None, activation: Activation = "none"
) -> Tensor:
    # The common call of inference comes first, and is spelled out: around the product of a small layer Python
    # takes as long as the product.
    if (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and (bias is None or bias.shape == weight.rows)
        and forward_ad._current_level < 0
        and torch._C._functorch.maybe_current_level() is None
    ):
        if weight.shared is not None:
            weight.shared.refresh()
        pattern, rows, k = _panel_pattern(weight), weight.rows[0], weight.k
        values, indices = weight.form_values, weight.form_indices  # type: ignore[attr-defined]
        return _panel_linear(input, values, indices, bias, pattern.n, pattern.m, rows, k, activation)
    values = weight.packed_values
    if (values is not None and values.requires_grad and torch.is_grad_enabled()) or transforming():
        # A gradient for the values, or forward-mode derivatives (which PyTorch drops in silence at ops such
        # as ours), or vmap: none is what panels are for.
        y = F.linear(input, unpack_rows(weight), bias)
        return y if activation == "none" else getattr(F, activation)(y)
    if torch.is_autocast_enabled("cpu"):
        return _autocast_linear(input, weight, bias, activation)
    return _multiply(input, weight, panels_of(weight), bias, activation)


def _matmul(input: Tensor, weight: NMTensor) -> Tensor:
    values = weight.packed_values
    if (values is not None and values.requires_grad and torch.is_grad_enabled()) or transforming():
        return torch.matmul(input, unpack_rows(weight))  # as in _linear
    pattern = _panel_pattern(weight)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            panels = cast_panels(weight, dtype)
            input = input.to(dtype).to(panels.values.dtype)
            return panel_matmul(input, panels, pattern, rows=weight.rows[0], k=weight.k).to(dtype)
    return panel_matmul(input, panels_of(weight), pattern, rows=weight.rows[0], k=weight.k)


def _multiply(
    input: Tensor, weight: NMTensor, panels: Panels, bias: Tensor | None, activation: Activation
) -> Tensor:
    rows, pattern = weight.rows[0], _panel_pattern(weight)
    if bias is None or (bias.dim() == 1 and bias.shape[0] == rows):
        return panel_linear(input, panels, bias, pattern, rows=rows, k=weight.k, activation=activation)
    if bias.numel() == 1 and bias.dim() <= 1:
        return _multiply(input, weight, panels, bias.expand(rows), activation)
    y = panel_linear(input, panels, None, pattern, rows=rows, k=weight.k)
    y = y + bias.expand_as(y)
    return y if activation == "none" else getattr(F, activation)(y)


# --------------------------------------------------------------------------------------------------- autocast


def _autocast_linear(input: Tensor, weight: NMTensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """As ``F.linear`` under autocast: input, weight and bias rounded to its dtype, and so is the result."""
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        input = input.to(dtype)
        panels = cast_panels(weight, dtype)
        own = panels.values.dtype
        return _multiply(input.to(own), weight, panels, _cast(bias, own), activation).to(dtype)


def cast_panels(weight: NMTensor, dtype: torch.dtype) -> Panels:
    """The panels in another dtype, made once for a weight and its views; in a graph the panels as they are.

    A graph has no place where a cast weight could stay, and to cast it in every call would cost more than to
    multiply in the weight's own dtype.
    """
    panels = panels_of(weight)
    if panels.values.dtype == dtype or weight.shared is None or torch.compiler.is_compiling():
        return panels
    return Panels(*weight.shared.cast(weight, dtype))


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


# --------------------------------------------------------------------------- matrices with groups above 16


def _why_no_parts(weight: NMTensor) -> str | None:
    pattern = weight.pattern
    if pattern.m <= MAX_PANEL_M:
        return f"it is for groups longer than {MAX_PANEL_M}, not {pattern}"
    parts = parts_pattern(pattern)
    if 3 * parts.n > 2 * parts.m:
        return f"each {parts.m} of a group of {pattern} may hold {parts.n}: no faster than dense"
    return _why_not(weight, 1, parts)


def _build_parts(weight: NMTensor) -> tuple[Tensor, Tensor]:
    dense = ops.unpack(*portable(weight), weight.pattern, k=weight.k, dim=-1)
    parts = parts_pattern(weight.pattern)
    return panel_pack(*ops.pack(dense, parts, dim=-1, remainder="pad"), parts, k=weight.k)


# ---------------------------------------------------------------------------------------- stacks of matrices


def _why_no_stack(weight: NMTensor) -> str | None:
    if weight.group_dim == len(weight.batch):
        return "it multiplies stacks of matrices, but the groups run from one to the next"
    if len(weight.rows) == 2 and weight.rows[0] == 0:
        return "the stack is empty"
    return _why_not(weight, 2)


def _build_stack(weight: NMTensor) -> tuple[Tensor, Tensor]:
    """Panels of each matrix, one after the other: ``[experts, panels, ...]``."""
    values, indices = portable(weight)
    experts, rows = weight.rows
    if rows % PANEL_ROWS == 0:
        flat = panel_pack(values.flatten(0, 1), indices.flatten(0, 1), weight.pattern, k=weight.k)
        return _stacked(flat.values, experts), _stacked(flat.indices, experts)
    each = [panel_pack(v, i, weight.pattern, k=weight.k) for v, i in zip(values, indices, strict=True)]
    return torch.stack([form.values for form in each]), torch.stack([form.indices for form in each])


def _stacked(form: Tensor, experts: int) -> Tensor:
    return form.unflatten(0, (experts, form.shape[0] // experts))


def _each_matrix(weight: NMTensor) -> list[Panels]:
    panels = panels_of(weight)
    return [Panels(v, i) for v, i in zip(panels.values, panels.indices, strict=True)]


def _restore_stack(weight: NMTensor) -> tuple[Tensor, Tensor]:
    each = [panel_restore(p, weight.pattern, rows=weight.rows[1], k=weight.k) for p in _each_matrix(weight)]
    return torch.stack([values for values, _ in each]), torch.stack([indices for _, indices in each])


def _dense_stack(weight: NMTensor) -> Tensor:
    each = _each_matrix(weight)
    return torch.stack([panel_unpack(p, weight.pattern, rows=weight.rows[1], k=weight.k) for p in each])


def _no_linear(input: Tensor, weight: NMTensor, bias: Tensor | None = None) -> Tensor:
    raise NotImplementedError(
        "a stack of packed matrices is multiplied by bmm, baddbmm, matmul or grouped_mm, or matrix by matrix "
        "as weight[e]; F.linear takes one matrix"
    )


register_engine(
    Engine(
        name="cpu-expert-panels",
        why_not=_why_no_stack,
        linear=_no_linear,
        conv=unpacked_conv,
        forms=("values", "indices"),
        build=_build_stack,
        restore=_restore_stack,
        dense_rows=_dense_stack,
        split_rows=(1, PANEL_ROWS),
        matrix_engine="cpu-panels",
        # Grouped along the middle it may as well be the weight of a 1-D convolution: that is for the caller
        # to know.
        automatic=lambda weight: weight.group_dim - len(weight.batch) == 2,
    ),
    first=True,
)
register_engine(
    Engine(
        name="cpu-split-panels",
        why_not=_why_no_parts,
        linear=_linear,
        conv=unpacked_conv,
        forms=("values", "indices"),
        build=_build_parts,
        matmul=_matmul,
        activations=tuple(name for name in ACTIVATIONS if name != "none"),
        split_rows=PANEL_ROWS,
    ),
    first=True,
)
register_engine(
    Engine(
        name="cpu-panels",
        why_not=lambda weight: _why_not(weight, 1),
        linear=_linear,
        conv=unpacked_conv,
        forms=("values", "indices"),
        build=_build,
        restore=_restore,
        dense_rows=_dense_rows,
        matmul=_matmul,
        activations=tuple(name for name in ACTIVATIONS if name != "none"),
        split_rows=PANEL_ROWS,
    ),
    first=True,
)
