"""Walks a model and lists the weights that can be pruned, each once and under a name that does not change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from ._checks import WEIGHT_DTYPES
from .pattern import Pattern
from .registry import find_rule

# Parts of a parameter's path that wrappers add (DDP, DataParallel and AveragedModel; torch.compile;
# activation checkpointing; FSDP). Without them a scheme made for the plain model holds for the wrapped one.
_WRAPPER_PARTS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def canonical_name(name: str) -> str:
    """Returns the path of a parameter or module without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A parameter of two or more dims, and where its model holds it.

    Attributes:
        name: Canonical name; of a tied parameter the first one.
        names: All its canonical names.
        module: The module that holds it; of a tied parameter the first that is prunable.
        attr: Its attribute name there.
        places: All ``(module, attr)`` that hold it.
        parameter: The parameter itself.
        group_dim: The dim that groups run along (``>= 0``); ``None`` if the registry does not know it,
            or its dtype cannot be pruned.
        span: Groups must not cross multiples of this along ``group_dim``; usually the size of that dim.
        dense_because: Why it stays dense unless a scheme names it; ``None`` for a prunable weight.
    """

    name: str
    names: tuple[str, ...]
    module: nn.Module
    attr: str
    places: tuple[tuple[nn.Module, str], ...]
    parameter: nn.Parameter
    group_dim: int | None
    span: int
    dense_because: str | None

    def misfit(self, pattern: Pattern, remainder: str = "error") -> str | None:
        """Returns why ``pattern`` does not fit, or ``None`` if it does. A dense pattern fits every weight.

        With the remainder ``"pad"`` a short last group is fine, unless further groups would come after it.
        """
        if pattern.is_dense:
            return None
        if self.group_dim is None:
            return self.dense_because
        has = f"group dim {self.group_dim} has {self.parameter.shape[self.group_dim]} weights"
        if self.span != self.parameter.shape[self.group_dim]:
            has += f" in parts of {self.span}"
        if remainder == "pad" and self.span == self.parameter.shape[self.group_dim]:
            return None
        if self.span < pattern.m:
            return f"{has}, fewer than m = {pattern.m}"
        if self.span % pattern.m:
            return f"{has}, not a multiple of m = {pattern.m}"
        return None

    def kept(self, pattern: Pattern | None, total: int | None = None) -> int:
        """How much of ``total`` (by default the number of weights) is left with ``pattern``.

        Args:
            pattern: The pattern; ``None`` means dense, where all of it is left.
            total: What every weight has an equal share in, such as the MACs.
        """
        shape = self.parameter.shape
        total = shape.numel() if total is None else total
        if pattern is None or self.group_dim is None:
            return total
        k = shape[self.group_dim]
        return total * pattern.kept(k) // k if k else 0

    def nbytes(self, pattern: Pattern | None) -> int:
        """Bytes of the weight, packed as ``pattern`` (values and indices); ``None`` means dense."""
        shape, itemsize = self.parameter.shape, self.parameter.itemsize
        if pattern is None or self.group_dim is None:
            return shape.numel() * itemsize
        return pattern.packed_bytes(shape, self.group_dim, itemsize)


class _Place(NamedTuple):
    name: str
    path: str
    module: nn.Module
    attr: str
    parameter: nn.Parameter


def weights(model: nn.Module) -> list[Weight]:
    """Lists every parameter of two or more dims, tied ones once, in the order of ``named_parameters()``.

    Args:
        model: The model, wrapped or not.

    Raises:
        TypeError: If ``model`` is no module.
        ValueError: If a parameter is not initialised yet (lazy modules), if a registered group dim is no dim
            of its parameter, or if two parameters have the same name without the parts that wrappers add.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    by_parameter: dict[int, list[_Place]] = {}
    by_name: dict[str, _Place] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attr, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            path = f"{prefix}.{attr}" if prefix else attr
            place = _Place(canonical_name(path), path, module, attr, parameter)
            if is_lazy(parameter):
                raise ValueError(f"{place.name} is not initialised yet: run the lazy module once before")
            other = by_name.setdefault(place.name, place)
            if other.parameter is not parameter:
                raise ValueError(f"{other.path} and {path} would both be called {place.name}")
            if parameter.dim() >= 2:
                by_parameter.setdefault(id(parameter), []).append(place)
    return [_weight(places) for places in by_parameter.values()]


def prunable_weights(model: nn.Module) -> Iterator[Weight]:
    """Yields the weights that may be pruned without being named; see `weights`.

    Left out are embeddings, what is tied to one, and parameters that the registry does not know.
    """
    return (weight for weight in weights(model) if weight.dense_because is None)


def _weight(places: list[_Place]) -> Weight:
    """Looks all places of one parameter up, and settles what they say together."""
    first = places[0]
    main: _Place | None = None
    layouts: dict[tuple[int, int], str] = {}
    dense_because: str | None = None
    for place in places:
        rule = find_rule(place.module, place.attr)
        layout = None if rule is None else _layout(rule.group_dim, place)
        if rule is None or layout is None:
            continue
        layouts.setdefault(layout, place.name)
        if rule.dense_because is None:
            main = main or place
        else:
            tied = f"tied to {place.name}: " if len(places) > 1 else ""
            dense_because = tied + rule.dense_because
    group_dim, span = next(iter(layouts), (None, 0))
    if group_dim is None:
        dense_because = f"{type(first.module).__name__}.{first.attr} is not in the registry (register_module)"
    elif len(layouts) > 1:
        group_dim, span = None, 0
        dense_because = f"tied, but not with the same group dim: {', '.join(layouts.values())}"
    elif first.parameter.dtype not in WEIGHT_DTYPES:
        group_dim, span = None, 0
        dense_because = f"weights of dtype {first.parameter.dtype} cannot be pruned"
    main = main or first
    return Weight(
        name=first.name,
        names=tuple(dict.fromkeys(place.name for place in places)),
        module=main.module,
        attr=main.attr,
        places=tuple({(id(p.module), p.attr): (p.module, p.attr) for p in places}.values()),
        parameter=first.parameter,
        group_dim=group_dim,
        span=span,
        dense_because=dense_because,
    )


def _layout(group_dim: object, place: _Place) -> tuple[int, int] | None:
    """Returns (group dim, span) with the group dim checked and not negative."""
    shape = tuple(place.parameter.shape)
    found = group_dim(place.module, place.parameter) if callable(group_dim) else group_dim
    if found is None:
        return None
    dim, span = found if isinstance(found, tuple) else (found, None)
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"{place.name}: the registry gives it group dim {dim}, but its shape is {shape}")
    dim %= len(shape)
    return dim, shape[dim] if span is None else span
