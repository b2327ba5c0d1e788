"""What a weight is multiplied with, seen from outside while the model runs.

Layers of PyTorch and transformers' Conv1D are known: their input says it, by way of patches for a
convolution. Of other modules (stacks of experts, modules that users registered) the forward is run a second
time, and the products with the weight or with parts of it are watched.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from ..deploy.example import caller_of, without_fast_path
from ..weights import Weight
from .matrices import matrices_of

#: Elements of inputs that are held at once while they are added up.
_ELEMENTS = 1 << 24


class Columns(NamedTuple):
    """Inputs of a weight's matrices, in the order of `as_matrices`.

    Attributes:
        values: ``[count, matrices or 1, inputs]``.
        at: The matrix that they reach; ``None`` for all.
    """

    values: Tensor
    at: int | None = None


class Source(NamedTuple):
    """A module whose forward multiplies with a weight.

    Attributes:
        caller: The module.
        columns: ``(args, kwargs) -> columns``, of what it is called with.
    """

    caller: nn.Module
    columns: Callable[[tuple[Any, ...], Mapping[str, Any]], Iterable[Columns]]


class NoFeatures(ValueError):
    """What reaches a weight are no features to weigh it with."""


def find_sources(model: nn.Module, weight: Weight) -> list[Source]:
    """Where a weight's inputs are seen: in each module that holds it, but for embeddings.

    Raises:
        NoFeatures: If it is held by modules only that nothing is known of.
    """
    sources = []
    for module, attr in weight.places:
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue  # it looks rows up, it multiplies with nothing
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            raise NoFeatures(
                f"the inputs of {weight.name} are not known, as it belongs to a {type(module).__name__}"
            )
        caller = caller_of(model, module)
        sources.append(Source(caller, _reader(weight, caller, module, attr)))
    if not sources:
        raise NoFeatures(f"{weight.name} is an embedding's: what reaches it are token ids")
    return sources


def _reader(weight: Weight, caller: nn.Module, module: nn.Module, attr: str) -> Any:
    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Columns]:
        if isinstance(caller, nn.MultiheadAttention):
            yield from _attention(weight, caller, module, attr, args, kwargs)
        elif isinstance(module, _ConvNd):
            yield from map(Columns, _patches(module, _features(weight, _first(args, kwargs))))
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            yield from _rows(_features(weight, _first(args, kwargs)))
        else:
            yield from _watched(weight, caller, attr, args, kwargs)

    return read


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _features(weight: Weight, input: object) -> Tensor:
    if not isinstance(input, Tensor):
        raise NoFeatures(f"{weight.name} is called with a {type(input).__name__}")
    if not input.is_floating_point():
        raise NoFeatures(f"what reaches {weight.name} is {input.dtype}, such as token ids, and no features")
    return input.detach()


def _rows(input: Tensor, at: int | None = None) -> Iterator[Columns]:
    rows = input.reshape(-1, 1, input.shape[-1])
    for piece in rows.split(max(1, _ELEMENTS // max(1, rows.shape[-1]))):
        yield Columns(piece, at)


# --------------------------------------------------------------------------------------------- convolutions


def _patches(module: _ConvNd, input: Tensor) -> Iterator[Tensor]:
    """``[count, groups of the convolution, inputs]``, a few images at a time."""
    dims = len(module.kernel_size)
    batch = input if input.dim() == dims + 2 else input.unsqueeze(0)
    if module.transposed:
        # Each place of the input is multiplied by itself; where its output overlaps that of another is not
        # looked at.
        rows = batch.movedim(1, -1).flatten(0, -2).unflatten(1, (module.groups, -1))
        yield from rows.split(max(1, _ELEMENTS // batch.shape[1]))
        return
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    sides = module._reversed_padding_repeated_twice
    per_image = module.weight[0].numel() * module.groups * math.prod(batch.shape[2:])
    for images in batch.split(max(1, _ELEMENTS // max(1, per_image))):
        patches = F.pad(images, sides, mode=mode) if any(sides) else images
        for i, (size, stride, dilation) in enumerate(
            zip(module.kernel_size, module.stride, module.dilation, strict=True)
        ):
            patches = patches.unfold(2 + i, (size - 1) * dilation + 1, stride)[..., ::dilation]
        # [images, channels, positions..., kernel...] -> [columns, conv groups, kernel and channels]
        by_position = patches.unflatten(1, (module.groups, -1)).movedim((1, 2), (dims + 1, -1))
        yield by_position.flatten(0, dims).flatten(2)


# ------------------------------------------------------------------------------------------------ attention


def _attention(
    weight: Weight,
    attention: nn.MultiheadAttention,
    module: nn.Module,
    attr: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Iterator[Columns]:
    if module is not attention:
        yield from _rows(_before_projection(attention, args, kwargs))
        return
    given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
    inputs = [_features(weight, given[name]) for name in ("query", "key", "value")]
    if attr != "in_proj_weight":
        yield from _rows(inputs["qkv".index(attr[0])])
    elif given["query"] is given["key"] is given["value"]:
        yield from _rows(inputs[0])
    else:
        for at, input in enumerate(inputs):
            yield from _rows(input, at)


def _before_projection(
    attention: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor:
    """What reaches the projection out of the heads.

    Attention multiplies with the weight of out_proj without calling it. With an identity there, its output is
    what the weight would have been multiplied with. The module is replaced, as its weight may be the result
    of a parametrization.
    """
    out = attention.out_proj
    identity = nn.Linear(out.in_features, out.in_features, bias=False, device="meta")
    identity.weight = nn.Parameter(torch.eye(out.in_features).to(out.weight))
    try:
        attention._modules["out_proj"] = identity
        with without_fast_path():  # which wants a bias
            return attention.forward(*args, **kwargs)[0].detach()
    finally:
        attention._modules["out_proj"] = out


# -------------------------------------------------------------------------------------------- other modules

_PRODUCTS = {
    F.linear: (0, 1),
    torch.matmul: (0, 1),
    torch.mm: (0, 1),
    torch.bmm: (0, 1),
    torch.addmm: (1, 2),
    torch.baddbmm: (1, 2),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),
    Tensor.mm: (0, 1),
    Tensor.bmm: (0, 1),
}


class _Watch(TorchFunctionMode):
    """Notes what a parameter, or a part of it, is multiplied with."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self._weight = weight
        self._count = matrices_of(weight)
        self.found: list[Columns] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        places = _PRODUCTS.get(func)
        if places is not None and len(args) > places[1]:
            input, factor = (args[place] for place in places)
            self._note(input, factor)
        return func(*args, **kwargs)

    def _note(self, input: Tensor, factor: Tensor) -> None:
        parameter = self._weight.parameter
        if factor.untyped_storage()._cdata != parameter.untyped_storage()._cdata:
            return
        each = parameter.numel() // self._count
        if factor.numel() == parameter.numel():
            if self._count == 1:
                self.found += _rows(_features(self._weight, input))
            elif factor.dim() == 3:  # all at once, each with rows of its own
                rows = input.expand(self._count, *input.shape[-2:])
                for at, part in enumerate(rows):
                    self.found += _rows(_features(self._weight, part), at)
        elif factor.numel() == each:
            at = (factor.storage_offset() - parameter.storage_offset()) // each
            self.found += _rows(_features(self._weight, input), at)


def _watched(
    weight: Weight, module: nn.Module, attr: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Columns]:
    with _one_by_one(module), _Watch(weight) as watch:
        module.forward(*args, **kwargs)
    return watch.found


@contextlib.contextmanager
def _one_by_one(module: nn.Module) -> Iterator[None]:
    """Has transformers' experts multiplied one after the other, as they are written down."""
    config = getattr(module, "config", None)
    chosen = getattr(config, "_experts_implementation", None)
    if chosen is None:
        yield
        return
    try:
        config._experts_implementation = "eager"  # type: ignore[union-attr]
        yield
    finally:
        config._experts_implementation = chosen  # type: ignore[union-attr]
