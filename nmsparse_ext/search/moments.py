"""Second moments of what reaches each layer, and the output error that pruning causes there.

With x one column of inputs to a linear map W, pruning D of W changes the output by ``D x``, on average by
``E |D x|^2 = tr(D H D^T)`` where ``H = E[x x^T]``. So one pass over calibration data serves every candidate.
A convolution is the linear map of its patches.

H of a layer with K inputs has K^2 entries. It is held in diagonal blocks of at most `BLOCK` inputs: exact for
layers up to that width, and for wider ones without the correlations between inputs of different blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..deploy.example import ExampleInput, caller_of, run_example
from ..weights import Weight

#: Inputs in a block: 16 MB of float32 each, and 16 GFLOP for 2048 outputs.
BLOCK = 2048
#: Columns of inputs that are held at once while they are added up, times their length.
_ELEMENTS = 1 << 24


@dataclass
class Moments:
    """``E[x x^T]`` of the inputs of one weight.

    Attributes:
        blocks: float32 ``[conv groups, size, size]`` for consecutive inputs.
        count: How many columns they are the mean of.
    """

    blocks: list[Tensor] = field(default_factory=list)
    count: int = 0

    def add(self, columns: Tensor) -> None:
        """Takes more columns into the mean: float ``[count, conv groups, inputs]``."""
        parts = columns.float().split(BLOCK, dim=2)
        if not self.blocks:
            groups = columns.shape[1]
            self.blocks = [
                columns.new_zeros(groups, p.shape[2], p.shape[2], dtype=torch.float32) for p in parts
            ]
        self.count += columns.shape[0]
        for block, part in zip(self.blocks, parts, strict=True):
            # mean += (x x^T - mean) / count, for as many columns as came.
            by_group = part.transpose(0, 1)
            keep = 1 - columns.shape[0] / self.count
            torch.baddbmm(block, by_group.mT, by_group, beta=keep, alpha=1 / self.count, out=block)

    def error(self, change: Tensor) -> float:
        """``tr(D H D^T)`` of a change D of the weight: float32 ``[conv groups, outputs, inputs]``."""
        parts = change.split(BLOCK, dim=2)
        products = (
            ((part @ block) * part).sum(dtype=torch.float64)
            for part, block in zip(parts, self.blocks, strict=True)
        )
        return max(0.0, float(sum(products)))


def input_moments(
    model: nn.Module, weights: Mapping[str, Weight], batches: Iterable[ExampleInput]
) -> dict[str, Moments]:
    """Runs the model on every batch and returns the moments of each weight's inputs.

    Args:
        model: The model; it runs in eval mode without gradients.
        weights: Whose inputs.
        batches: What the model is called with: tensors, tuples of arguments or mappings of keyword arguments.

    Raises:
        TypeError: If a batch is none of these.
        ValueError: If a module's inputs are not known here, nothing reaches one, or there is no batch.
    """
    moments = {name: Moments() for name in weights}
    # What is called -> the weights it multiplies with, each with the module that holds it.
    places: dict[nn.Module, list[tuple[str, nn.Module]]] = {}
    for name, weight in weights.items():
        for module, _ in weight.places:
            caller = caller_of(model, module)
            if not _is_known(caller):
                raise ValueError(
                    f"the inputs of {name} are not known, as it belongs to a {type(module).__name__}: "
                    "skip it, or choose another criterion"
                )
            places.setdefault(caller, []).append((name, module))

    def before_forward(caller: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, module in places[caller]:
            if isinstance(caller, nn.MultiheadAttention):
                input = _attention_input(caller, module, args, kwargs)
            else:
                input = args[0] if args else kwargs["input"]
            for columns in _columns(module, input.detach()):
                moments[name].add(columns)

    number = 0
    for number, batch in enumerate(batches, start=1):  # noqa: B007 - counted for the error
        run_example(model, batch, dict.fromkeys(places, before_forward))
    if number == 0:
        raise ValueError("calibration must hold at least one batch")
    for name, found in moments.items():
        if found.count == 0:
            raise ValueError(f"no calibration batch reaches {name}: skip it, or give other batches")
    return moments


def as_matrix(weight: Weight, values: Tensor) -> Tensor:
    """``values``, of the weight's shape, as float32 ``[conv groups, outputs, inputs]`` as in `Moments`."""
    if weight.group_dim == 0:  # transformers' Conv1D: [in, out]
        values = values.T
    groups = weight.module.groups if isinstance(weight.module, nn.modules.conv._ConvNd) else 1
    return values.float().flatten(1).unflatten(0, (groups, -1))


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight is not None
    is_conv = isinstance(module, nn.modules.conv._ConvNd) and not module.transposed
    return is_conv or isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _attention_input(
    attention: nn.MultiheadAttention, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """What reaches the projections into the heads (``module is attention``), or the one out of them."""
    if module is not attention:
        # Attention multiplies with the weight of out_proj without calling it. With an identity there, its
        # output is what the weight would have been multiplied with.
        out = attention.out_proj
        held = dict(out._parameters)
        try:
            out._parameters.update(weight=nn.Parameter(torch.eye(out.in_features).to(out.weight)), bias=None)
            return attention.forward(*args, **kwargs)[0]
        finally:
            out._parameters.update(held)
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    if not (given["query"] is given["key"] is given["value"]):
        raise ValueError(
            "attention whose query, key and value differ has no single input: skip its in_proj_weight, "
            "or choose another criterion"
        )
    return given["query"]


def _columns(module: nn.Module, input: Tensor) -> Iterable[Tensor]:
    """What the weight is multiplied with: pieces ``[count, conv groups, inputs]``."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        rows = input.reshape(-1, 1, input.shape[-1])
        yield from rows.split(max(1, _ELEMENTS // rows.shape[-1]))
        return
    dims = len(module.kernel_size)
    batch = input if input.dim() == dims + 2 else input.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    sides = module._reversed_padding_repeated_twice
    per_image = module.weight[0].numel() * module.groups * math.prod(batch.shape[2:])
    for images in batch.split(max(1, _ELEMENTS // per_image)):
        patches = F.pad(images, sides, mode=mode) if any(sides) else images
        for i, (size, stride, dilation) in enumerate(
            zip(module.kernel_size, module.stride, module.dilation, strict=True)
        ):
            patches = patches.unfold(2 + i, (size - 1) * dilation + 1, stride)[..., ::dilation]
        # [images, channels, positions..., kernel...] -> [columns, conv groups, channels and kernel]
        by_position = patches.unflatten(1, (module.groups, -1)).movedim((1, 2), (dims + 1, dims + 2))
        yield by_position.flatten(0, dims).flatten(2)
