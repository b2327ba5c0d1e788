"""The engine that multiplies from panels on the CPU: faster than dense up to about two kept of three."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import panels as ops
from ._build import extension
from ._checks import holds_data
from ._panel_layout import PANEL_ROWS
from .engines import Engine, register_engine, unpack
from .panels import Panels, panel_linear, panel_pack

if TYPE_CHECKING:
    from .tensor import NMTensor


def _why_not(weight: NMTensor) -> str | None:
    if extension is None:
        return "it needs the compiled extension"
    values = weight.packed_values
    if values.device.type != "cpu":
        return f"it runs on the CPU, the weight is on {values.device}"
    if values.dim() != 2:
        return f"it multiplies matrices, the weight has {values.dim()} dimensions"
    return ops.why_no_panels(weight.pattern, values.dtype)


def _build(weight: NMTensor) -> tuple[Tensor, Tensor]:
    return panel_pack(weight.packed_values, weight.packed_indices, weight.pattern, k=weight.k)


def panels_of(weight: NMTensor) -> Panels:
    """The forms of a weight whose engine multiplies from panels."""
    # Forms are no declared attributes.
    return Panels(getattr(weight, "form_values"), getattr(weight, "form_indices"))  # noqa: B009


def _linear(input: Tensor, weight: NMTensor, bias: Tensor | None = None) -> Tensor:
    if (
        weight.group_dim != 1
        or (weight.packed_values.requires_grad and torch.is_grad_enabled())
        or forward_ad._current_level >= 0
    ):
        # Groups along the outputs, a gradient for the values, forward-mode derivatives (which PyTorch drops
        # in silence at ops such as ours): none is what panels are for.
        return F.linear(input, unpack(weight), bias)
    if torch.is_autocast_enabled("cpu"):
        return _autocast_linear(input, weight, bias)
    return _multiply(input, weight, panels_of(weight), bias)


def _multiply(input: Tensor, weight: NMTensor, panels: Panels, bias: Tensor | None) -> Tensor:
    return panel_linear(input, panels, bias, weight.pattern, rows=weight.packed_values.shape[0], k=weight.k)


def _conv(
    op: Callable[..., Tensor],
    input: Tensor,
    weight: NMTensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    return op(input, unpack(weight), bias, *args, **kwargs)


# --------------------------------------------------------------------------------------------------- autocast


def _autocast_linear(input: Tensor, weight: NMTensor, bias: Tensor | None) -> Tensor:
    """As ``F.linear`` under autocast: input, weight and bias rounded to its dtype, and so is the result."""
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        input = input.to(dtype)
        # Torch 2.11 makes the fake call of a graph's node outside of what is_compiling() tells.
        if torch.compiler.is_compiling() or not holds_data(weight.packed_values):
            # A graph has no place where a cast weight could stay, and to cast it in every call would cost
            # more than to multiply with it as it is.
            own = weight.packed_values.dtype
            return _multiply(input.to(own), weight, panels_of(weight), _cast(bias, own)).to(dtype)
        return _multiply(input, weight, cast_panels(weight, dtype, panel_pack), _cast(bias, dtype))


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def cast_panels(weight: NMTensor, dtype: torch.dtype, pack: Callable[..., Panels]) -> Panels:
    """The panels in another dtype: made once, kept on the weight for as long as its values stay the same."""
    values = weight.packed_values
    if values.dtype == dtype:
        return panels_of(weight)
    # A write to the weight counts on the weight, one to its values on them.
    version = (dtype, values.data_ptr(), *(0 if t.is_inference() else t._version for t in (weight, values)))
    cached = getattr(weight, "_autocast_panels", None)
    if cached is None or cached[0] != version:
        with torch.no_grad():
            panels = pack(values.to(dtype), weight.packed_indices, weight.pattern, k=weight.k)
        cached = (version, panels)
        weight._autocast_panels = cached  # type: ignore[attr-defined]
    return cached[1]


register_engine(
    Engine(
        name="cpu-panels",
        why_not=_why_not,
        linear=_linear,
        conv=_conv,
        forms=("values", "indices"),
        build=_build,
        split_rows=PANEL_ROWS,
    ),
    first=True,
)
