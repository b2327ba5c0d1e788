"""A model made of nothing but the tensors of a file, so that all that works on models works on files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from nmsparse_ext.registry import Layout, Rule, register_rules

_CONVS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
#: How models call their embeddings: those look rows up and stay dense, but a file does not say what is one.
_EMBEDDINGS = ("*embed*", "wte", "wpe", "*.wte", "*.wpe", "shared")


def _dim_1(module: nn.Module, tensor: Tensor) -> Layout:
    return 1 if tensor.dim() >= 2 else None


class TensorGroup(nn.Module):
    """What a file has under one path and does not look like a linear layer, convolution or embedding."""


# Attention and recurrent layers call their weights so; of the rest nothing is known but the shape.
_GROUPED = ("in_proj_weight", "[qkv]_proj_weight", "weight_[ih][hr]_l*", "weight_[ih]h")
register_rules(
    TensorGroup,
    {glob: Rule(_dim_1) for glob in _GROUPED} | {"*": Rule(_dim_1, "a file does not say what it is")},
)


class TensorModel(nn.Module):
    """The tensors of a file as modules, told by their names and shapes.

    A ``weight`` of two dims is a linear layer's, of three to five a convolution's, unless its name is that of
    an embedding. Groups therefore run along dim 1, as everywhere in PyTorch; models whose weights lie
    otherwise (``transformers``' GPT-2) have to be given themselves, not as a file.

    Called with a tensor ``[rows, ...]``, whose values do not matter, it runs every linear layer on so many
    rows of random input: enough to time them by.

    Args:
        tensors: ``{name: tensor}``; names that share a tensor share a parameter.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        paths: dict[str, dict[str, Tensor]] = {}
        for name in sorted(tensors, key=_natural):
            path, _, attr = name.rpartition(".")
            paths.setdefault(path, {})[attr] = tensors[name]
        parameters: dict[int, nn.Parameter] = {}
        for path in sorted(paths, key=_natural):  # what is above comes first
            module = self if not path else _like(path, paths[path])
            for attr, tensor in paths[path].items():
                _put(module, attr, tensor, parameters)
            if path:
                _place(self, path, module)

    def forward(self, rows: Tensor) -> None:
        """Runs every linear layer on ``rows.shape[0]`` random rows."""
        for layer in self.linear_layers():
            layer(torch.randn(rows.shape[0], layer.in_features, dtype=layer.weight.dtype))

    def linear_layers(self) -> Iterator[nn.Linear]:
        """The modules that forward runs."""
        return (module for module in self.modules() if isinstance(module, nn.Linear))


register_rules(TensorModel, {"*": Rule(_dim_1)})  # names without a path: somebody's bare weights


def _natural(name: str) -> list[tuple[tuple[int, int, str], ...]]:
    """Sorts ``layers.10`` behind ``layers.9``, and what is below a path behind it."""
    return [
        tuple((0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in _PIECES.findall(part))
        for part in name.split(".")
    ]


_PIECES = re.compile(r"\d+|\D+")


def _like(path: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The empty module that holds such tensors."""
    weight = tensors.get("weight")
    options: dict[str, Any] = {"bias": "bias" in tensors, "device": "meta"}
    if weight is None or weight.numel() == 0:
        return TensorGroup()
    if weight.dim() == 2 and any(fnmatchcase(path.lower(), glob) for glob in _EMBEDDINGS):
        return nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    if weight.dim() == 2:
        return nn.Linear(weight.shape[1], weight.shape[0], **options)
    if weight.dim() in _CONVS:
        kernel: Any = tuple(weight.shape[2:])
        return _CONVS[weight.dim()](weight.shape[1], weight.shape[0], kernel, **options)
    return TensorGroup()


def _put(module: nn.Module, attr: str, tensor: Tensor, parameters: dict[int, nn.Parameter]) -> None:
    # Straight into the tables: names in files need not be ones that `setattr` could take.
    if attr in module._parameters or tensor.is_floating_point() or tensor.dim() >= 2:
        if id(tensor) not in parameters:
            parameters[id(tensor)] = nn.Parameter(tensor, requires_grad=False)
        module._parameters[attr] = parameters[id(tensor)]
    else:
        module._buffers[attr] = tensor


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts ``module`` below ``root``."""
    *parents, last = path.split(".")
    for part in parents:
        child = root._modules.get(part)
        if child is None:
            child = root._modules[part] = TensorGroup()
        root = child
    root._modules[last] = module
