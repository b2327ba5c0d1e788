"""Room for packed weights in a model that somebody else's loader fills.

Loaders know named tensors. So a weight ``fc.weight`` that a file holds packed is replaced, before loading, by
a module ``fc.weight`` with the tensors ``fc.weight.values`` and ``fc.weight.indices``: exactly the names of
the file. After loading the two are checked and become the packed weight. No dense tensor is made on the way.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .._checks import index_row_bytes, moved_shape
from ..deploy.stored import aligned
from ..deploy.support import why_not_packed, with_engine_for
from ..errors import FormatError
from ..pattern import Pattern
from ..tensor import Keep, NMTensor
from ..weights import Weight


class Placeholder(nn.Module):
    """Two empty tensors, to be loaded, in the place of one weight.

    Attributes:
        values: ``[other dims..., groups * n]``, of the weight's dtype.
        indices: uint8 ``[other dims..., bytes of a row]``.
    """

    def __init__(self, weight: Weight, pattern: Pattern, group_dim: int) -> None:
        super().__init__()
        mark_initialized(self)
        like = weight.parameter
        self.pattern, self.group_dim, self.shape = pattern, group_dim, tuple(like.shape)
        k = self.shape[group_dim]
        values = moved_shape(self.shape, group_dim, pattern.groups(k) * pattern.n)
        indices = moved_shape(self.shape, group_dim, index_row_bytes(pattern.n, pattern.m, k))
        for name, shape, dtype in (("values", values, like.dtype), ("indices", indices, torch.uint8)):
            empty = torch.empty(shape, dtype=dtype, device=like.device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def packed(self, name: str) -> NMTensor:
        """The packed weight, after loading.

        Raises:
            FormatError: If what was loaded is no such weight.
        """
        for part in ("values", "indices"):
            if not getattr(getattr(self, part), "_is_hf_initialized", False):
                raise FormatError(f"{name}.{part} is not in the file")
        values, indices = self.get_parameter("values").detach(), self.get_parameter("indices").detach()
        if values.is_meta or indices.is_meta:
            raise FormatError(
                f"{name} was not loaded: it is on the meta device. Packed weights cannot be offloaded; they "
                "lie where they run"
            )
        try:
            return NMTensor.from_packed(
                aligned(values),
                indices,
                self.pattern,
                group_dim=self.group_dim,
                shape=self.shape,
                remainder="pad" if self.shape[self.group_dim] % self.pattern.m else "error",
            )
        except (TypeError, ValueError) as error:
            raise FormatError(f"{name}: {error}") from None


def mark_initialized(module: nn.Module) -> None:
    """Tells transformers that nothing of ``module`` is to be filled with random numbers.

    It puts the same mark on each parameter that it has loaded.
    """
    vars(module)["_is_hf_initialized"] = True


def make_room(
    weights: Mapping[str, Weight], patterns: Mapping[str, Pattern], group_dims: Mapping[str, int]
) -> None:
    """Puts placeholders into the places of the weights that have a pattern.

    Args:
        weights: Weights of one model, by their names; changed in place.
        patterns: By the same names.
        group_dims: Of weights that are not grouped along the dim that the registry says.

    Raises:
        ValueError: If a weight cannot be packed in that way in this model.
    """
    for name, pattern in patterns.items():
        weight = weights[name]
        group_dim = group_dims.get(name, weight.group_dim)
        if group_dim is None or not 0 <= group_dim < weight.parameter.dim():
            because = weight.dense_because or f"it has no dim {group_dim}"
            raise ValueError(f"{name} cannot be packed as {pattern}: {because}")
        for module, _ in weight.places:
            reason = why_not_packed(module, weight.parameter)
            if reason is not None:
                raise ValueError(f"{name} cannot be packed as {pattern}: {reason}")
    for name, pattern in patterns.items():
        weight = weights[name]
        dim = group_dims.get(name, weight.group_dim)
        assert dim is not None  # checked above
        for module, attr in weight.places:  # a tied weight's each of its own: so are they in the file
            if module._parameters.pop(attr, None) is None:
                continue  # done under another name
            module.add_module(attr, Placeholder(weight, pattern, dim))
            mark_initialized(module)


def fill_room(model: nn.Module, *, engine: str | None, keep: Keep) -> list[str]:
    """Replaces all placeholders of a model by the packed weights that were loaded into them.

    Args:
        model: Changed in place.
        engine: Name of the engine to run them with; ``None``, and where it cannot, the best for each.
        keep: As of `NMTensor.with_engine`; where the engine cannot be kept alone, ``"both"``.

    Returns:
        The names of the weights.

    Raises:
        FormatError: If what was loaded is no such weight; the name says which.
    """
    found = [
        (name, parent, attr, module)
        for name, parent in model.named_modules()
        for attr, module in parent.named_children()
        if isinstance(module, Placeholder)
    ]
    names = []
    for path, parent, attr, placeholder in found:
        name = f"{path}.{attr}" if path else attr
        packed = placeholder.packed(name)
        packed = with_engine_for(parent, packed, engine, keep)
        del parent._modules[attr]
        parent.register_parameter(attr, nn.Parameter(packed, requires_grad=False))
        names.append(name)
    return names
