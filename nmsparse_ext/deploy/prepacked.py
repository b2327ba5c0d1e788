"""The strongest dense rivals of a packed layer: products with weights that oneDNN or MKL packed beforehand.

They are what ``torch.compile`` with freezing calls for linear layers and convolutions on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def prepacked_calls(
    module: nn.Module, args: tuple, kwargs: Mapping[str, Any], dtype: torch.dtype | None
) -> dict[str, Callable[[], Tensor]]:
    """The same products as ``module(*args, **kwargs)``; as many ways as this build of torch has.

    Args:
        module: An ``nn.Linear`` or ``nn.ConvNd`` with a dense weight; others have no such product.
        args: What it is called with.
        kwargs: The same.
        dtype: What autocast would cast to; ``None`` for none.

    Returns:
        ``{name of the library: call}``, each tried once.
    """
    x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    makers: dict[str, Callable[..., Callable[[], Tensor]]] = {}
    if type(module) is nn.Linear and x is not None and x.shape[-1:] == (module.in_features,):
        makers = {"oneDNN": _onednn_linear, "MKL": _mkl_linear}
    elif type(module) in _CONVS and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        makers = {"oneDNN": _onednn_conv}
    if not makers or x is None or x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return {}
    to = x.dtype if dtype is None else dtype
    parameters: tuple[Any, Any] = (module.weight, module.bias)
    weight, bias = (None if t is None else t.detach().to(to) for t in parameters)
    calls = {}
    for name, make in makers.items():
        try:
            call = make(module, x.to(to), weight, bias)
            call()
        except (RuntimeError, AttributeError):  # not for this dtype, shape, processor or build
            continue
        calls[name] = call
    return calls


def _onednn_linear(module: nn.Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
    multiply = torch.ops.mkldnn._linear_pointwise.default
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.numel() // x.shape[-1])
    return lambda: multiply(x, packed, bias, "none", [], "")


def _mkl_linear(module: nn.Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
    if x.dtype != torch.float32:
        raise RuntimeError("MKL packs float32 only")
    rows = x.numel() // x.shape[-1]
    multiply = torch.ops.mkl._mkl_linear.default
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
    return lambda: multiply(x, packed, weight, bias, rows)


def _onednn_conv(
    module: nn.modules.conv._ConvNd, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Callable[[], Tensor]:
    if x.dim() != weight.dim():
        x = x.unsqueeze(0)
    if x.dim() in _CHANNELS_LAST:  # as a frozen graph lays its images out
        x = x.contiguous(memory_format=_CHANNELS_LAST[x.dim()])
    convolve = torch.ops.mkldnn._convolution_pointwise.default
    geometry = (module.padding, module.stride, module.dilation, module.groups)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape))
    return lambda: convolve(x, packed, bias, *geometry, "none", [], "")
