"""What PyTorch does with an `NMTensor`, besides products (``products.py``) and views (``_tensor_views.py``).

``FUNCTIONS`` catches public functions (``F.linear``, convolutions) before autograd sees them. A handler there
composes differentiable functions of ordinary tensors, so gradients and autocast follow from PyTorch's own
rules, and ``torch.compile`` inlines it.

``OPS`` catches ATen ops below autograd: what modules, the optimizer, ``copy.deepcopy`` and
``load_state_dict`` do to any parameter, and products by whoever does not call ``F.linear``. Whatever is in
neither table raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._tensor_tables import FUNCTIONS, implements, unsupported
from .engines import ENGINES, unpack
from .tensor import NMTensor

aten = torch.ops.aten

# --------------------------------------------------------------------------------------------- above autograd


def _conv(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    name = f"F.{op.__name__}"

    def conv(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(weight, NMTensor):
            raise NotImplementedError(
                f"{name} takes an NMTensor as weight only; use .to_dense() for input or bias"
            )
        return ENGINES[weight.engine].conv(op, input, weight, bias, *args, **kwargs)

    return conv


for _op in (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d):
    FUNCTIONS[_op] = _conv(_op)


def _requires_grad_(weight: NMTensor, requires_grad: bool = True) -> NMTensor:
    if requires_grad:
        raise NotImplementedError(
            "the weights of an NMTensor are frozen and take no gradients: use "
            "nn.Parameter(W, requires_grad=False). To train, keep the weight dense and use a Sparsifier; for "
            "gradients of packed values, call nms.linear with the result of compress"
        )
    return weight


def _no_contents(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"NMTensor does not support {name}: call it on .to_dense(), .values or .indices"
        )

    return refuse


for _name in ("numpy", "__array__", "tolist", "__dlpack__"):
    FUNCTIONS[getattr(torch.Tensor, _name)] = _no_contents(_name)


def _no_new_zeros(weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    # What FSDP2 calls to lay out a shard.
    raise NotImplementedError(
        "NMTensor does not support new_zeros: call it on .values or .indices. In fully_shard: packed weights "
        "cannot be sharded; name them in its ignored_params, and every rank holds them whole"
    )


FUNCTIONS[torch.Tensor.new_zeros] = _no_new_zeros


def _no_weight_norm(*args: Any, **kwargs: Any) -> Any:
    # No NotImplementedError: parametrizations take that for "needs no initial value", and go on.
    raise TypeError("NMTensor does not support weight_norm: its weights are frozen; use .to_dense()")


FUNCTIONS[torch.norm_except_dim] = _no_weight_norm
FUNCTIONS[torch.Tensor.requires_grad_] = _requires_grad_
FUNCTIONS[torch.Tensor.requires_grad.__set__] = _requires_grad_  # type: ignore[attr-defined]

# --------------------------------------------------------------------------------------------- below autograd


@implements(aten.convolution.default)
def _convolution(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    if not isinstance(weight, NMTensor):
        raise unsupported(func, "other than as its weight")
    return ENGINES[weight.engine].conv(func, input, weight, bias, *args)


@implements(aten.convolution_backward.default)
def _convolution_backward(func: Any, grad: Tensor, input: Tensor, weight: Tensor, *args: Any) -> tuple:
    *geometry, output_mask = args
    if not isinstance(weight, NMTensor) or output_mask[1]:
        raise unsupported(func, "for the gradient of a packed weight, which is frozen")
    return func(grad, input, unpack(weight), *geometry, output_mask)
