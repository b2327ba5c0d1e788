"""The registry: which parameters of which module types can be N:M sparse, and along which dim their groups run.

One entry says all there is to know about a module type, and every room (training, search, deployment) asks here, so
that a weight is grouped the same way wherever it is met. Groups run along the weights that are summed into one
output: the input features of a linear map, the input channels of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Union

from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from .pattern import Pattern

# Either the group dim, or a function of (module, parameter) for types whose layout depends on the instance. It returns
# the group dim; or (group dim, span) where groups must not cross multiples of span; or None for "not this one".
GroupDim = Union[int, Callable[[nn.Module, Tensor], "int | tuple[int, int] | None"]]

# Parts of a parameter's path that wrappers add (DDP, DataParallel and AveragedModel; torch.compile; activation
# checkpointing; FSDP). A scheme written for the plain model holds for the wrapped one and the other way round.
_WRAPPER_PARTS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def canonical_name(name: str) -> str:
    """Returns the path of a parameter or module without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


@dataclass(frozen=True, slots=True)
class _Rule:
    group_dim: GroupDim
    dense_because: str | None = None  # set: prunable, but only where the scheme names it


_BY_TYPE: dict[type, dict[str, _Rule]] = {}
_BY_NAME: dict[str, dict[str, _Rule]] = {}  # "package.module.Class", or a glob of such names


def register_module(module_type: type[nn.Module] | str, group_dims: Mapping[str, GroupDim]) -> None:
    """Makes parameters of a module type prunable.

    Subclasses inherit the entry of their nearest registered base. Registering a type again replaces its entry.

    Args:
        module_type: The type, or its qualified name (``"package.module.Class"``, globs allowed) where importing it
            just for this would be a burden.
        group_dims: ``{parameter name or glob: group dim}``. The group dim is the dim whose weights are summed into one
            output; it may be negative. A function ``(module, parameter) -> group dim`` serves types whose layout
            depends on the instance; it may return ``(group dim, span)`` if groups must not cross multiples of
            ``span`` along it, or ``None`` if this parameter is not prunable.

    Raises:
        TypeError: If an argument is of the wrong type.

    Example:
        >>> class Experts(nn.Module):  # weights [experts, in, out]
        ...     pass
        >>> register_module(Experts, {"w_*": 1})
    """
    if not isinstance(module_type, str) and not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be an nn.Module type or its qualified name, got {module_type!r}")
    if not isinstance(group_dims, Mapping):
        raise TypeError(f"group_dims must map parameter names to group dims, got {type(group_dims).__name__}")
    rules = {}
    for glob, group_dim in group_dims.items():
        if not isinstance(glob, str):
            raise TypeError(f"group_dims must have parameter names as keys, got {glob!r}")
        if isinstance(group_dim, bool) or not (isinstance(group_dim, int) or callable(group_dim)):
            raise TypeError(f"group_dims[{glob!r}] must be an int or a function, got {group_dim!r}")
        rules[glob] = _Rule(group_dim)
    _register(module_type, rules)


def _register(module_type: type | str, rules: dict[str, _Rule]) -> None:
    if isinstance(module_type, str):
        _BY_NAME[module_type] = rules
    else:
        _BY_TYPE[module_type] = rules


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A parameter of two or more dims, and where it lives in its model.

    Attributes:
        name: Canonical name; for a tied parameter the first of its names.
        names: All its canonical names.
        module: The module that owns it (for a tied parameter the first one that can be pruned).
        attr: Its attribute name there.
        places: All ``(module, attr)`` that hold it.
        parameter: The parameter itself.
        group_dim: The dim that groups run along (``>= 0``), ``None`` if its module type is not registered.
        span: Groups must not cross multiples of this along ``group_dim``; usually that dim's size.
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

    def misfit(self, pattern: Pattern) -> str | None:
        """Returns why ``pattern`` does not fit this weight, or ``None`` if it does. A dense pattern always fits."""
        if pattern.is_dense:
            return None
        if self.group_dim is None:
            return self.dense_because
        size = self.parameter.shape[self.group_dim]
        within = "" if self.span == size else f" of {size} in parts of {self.span} that groups must not cross"
        if self.span < pattern.m:
            return f"group dim {self.group_dim} has {self.span} weights{within}, fewer than m = {pattern.m}"
        if self.span % pattern.m:
            return f"group dim {self.group_dim} has {self.span} weights{within}, not a multiple of m = {pattern.m}"
        return None


def weights(model: nn.Module) -> list[Weight]:
    """Lists every parameter of two or more dims, tied ones once, in the order of ``model.named_parameters()``.

    Raises:
        TypeError: If ``model`` is no module.
        ValueError: If a parameter is not initialised yet (lazy modules), if a registered group dim is no dim of its
            parameter, or if two parameters have the same name once wrapper prefixes are dropped.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    found: dict[int, list[tuple[str, nn.Module, str, nn.Parameter]]] = {}
    owner: dict[str, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attr, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            path = f"{prefix}.{attr}" if prefix else attr
            name = canonical_name(path)
            if isinstance(parameter, UninitializedTensorMixin):
                raise ValueError(f"{name} is not initialised yet: run the lazy module once before making a scheme")
            if parameter.dim() < 2:
                continue
            places = found.setdefault(id(parameter), [])
            other = owner.setdefault(name, path)
            if other != path and all(name != place[0] for place in places):
                raise ValueError(f"{other} and {path} have the same name {name} once wrapper prefixes are dropped")
            places.append((name, module, attr, parameter))
    return [_weight(places) for places in found.values()]


def prunable_weights(model: nn.Module) -> Iterator[Weight]:
    """Yields the weights that a scheme prunes without naming them. Errors as for `weights`."""
    return (weight for weight in weights(model) if weight.dense_because is None)


def _weight(places: list[tuple[str, nn.Module, str, nn.Parameter]]) -> Weight:
    """Looks all places of one parameter up, and settles what they say together."""
    parameter = places[0][3]
    first: tuple[nn.Module, str] | None = None
    layouts: dict[tuple[int, int], str] = {}
    only_named: str | None = None
    for name, module, attr, _ in places:
        rule = _rule(module, attr)
        layout = _layout(rule, module, parameter, name)
        if rule is None or layout is None:
            continue
        layouts.setdefault(layout, name)
        if rule.dense_because is not None:
            only_named = rule.dense_because if len(places) == 1 else f"tied to {name}: {rule.dense_because}"
        elif first is None:
            first = module, attr
    group_dim: int | None
    if len(layouts) == 1:
        group_dim, span = next(iter(layouts))
        because = only_named
    else:
        group_dim, span = None, 0
        if layouts:
            because = f"tied under group dims that differ: {', '.join(layouts.values())}"
        else:
            because = f"{type(places[0][1]).__name__}.{places[0][2]} is not in the registry (see register_module)"
    module, attr = first or places[0][1:3]
    names = tuple(dict.fromkeys(place[0] for place in places))
    held = tuple({(id(place[1]), place[2]): place[1:3] for place in places}.values())
    return Weight(names[0], names, module, attr, held, parameter, group_dim, span, because)


def _rule(module: nn.Module, attr: str) -> _Rule | None:
    """The rule of the nearest registered base; its parameter names may be globs."""
    for cls in type(module).__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        rules = _BY_TYPE.get(cls) or _BY_NAME.get(name)
        if rules is None:
            rules = next((rules for glob, rules in _BY_NAME.items() if fnmatchcase(name, glob)), None)
        if rules is not None:
            return rules.get(attr) or next((rule for glob, rule in rules.items() if fnmatchcase(attr, glob)), None)
    return None


def _layout(rule: _Rule | None, module: nn.Module, parameter: Tensor, name: str) -> tuple[int, int] | None:
    """Returns (group dim, span) with the group dim checked and made non-negative."""
    if rule is None:
        return None
    layout = rule.group_dim(module, parameter) if callable(rule.group_dim) else rule.group_dim
    if layout is None:
        return None
    group_dim, span = layout if isinstance(layout, tuple) else (layout, None)
    if not -parameter.dim() <= group_dim < parameter.dim():
        raise ValueError(
            f"{name}: the registry says group dim {group_dim}, but its shape is {tuple(parameter.shape)}"
        )
    group_dim %= parameter.dim()
    return group_dim, parameter.shape[group_dim] if span is None else span


# ---------------------------------------------------------------------------------------------------------------------
# What is known from the start
# ---------------------------------------------------------------------------------------------------------------------


def _conv_transpose(module: nn.Module, weight: Tensor) -> tuple[int, int]:
    # [in, out / groups, ...]: the input channels of all conv groups stand side by side in dim 0.
    return 0, weight.shape[0] // module.groups  # type: ignore[operator]


def _experts(module: nn.Module, weight: Tensor) -> int | None:
    # Releases of transformers differ in the layout of the same class, but those with a choice of expert kernels say on
    # the instance whether it is [experts, in, out] or [experts, out, in]. Without that word we do not guess.
    transposed = getattr(module, "is_transposed", None)
    if weight.dim() != 3 or transposed is None:
        return None
    return 1 if transposed else 2


def _dbrx_down(module: nn.Module, weight: Tensor) -> tuple[int, int]:
    # [experts * ffn, hidden], multiplied from the left: it sums over ffn, and experts lie one below the other.
    return 0, module.ffn_hidden_size  # type: ignore[return-value]


register_module(nn.Linear, {"weight": 1})
for _conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register_module(_conv, {"weight": 1})  # [out, in / groups, ...]
for _conv in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register_module(_conv, {"weight": _conv_transpose})
register_module(nn.MultiheadAttention, {"in_proj_weight": 1, "[qkv]_proj_weight": 1})  # out_proj is a Linear
register_module(nn.RNNBase, {"weight_[ih][hr]_l*": 1})  # RNN, LSTM, GRU; ih, hh, and hr with proj_size; _reverse
register_module(nn.RNNCellBase, {"weight_[ih]h": 1})
_register(nn.Embedding, {"weight": _Rule(1, "embeddings stay dense unless named")})

register_module("transformers.pytorch_utils.Conv1D", {"weight": 0})  # [in, out]
_EXPERT_WEIGHTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
for _glob in ("llama4.*Experts", "gpt_oss.*Experts"):  # [experts, in, out]
    register_module(f"transformers.models.{_glob}", dict.fromkeys(_EXPERT_WEIGHTS, 1))
for _glob in ("inkling*.*SharedExperts", "longcat_flash.*Experts", "step3p7.*Experts"):  # [experts, out, in]
    register_module(f"transformers.models.{_glob}", dict.fromkeys(_EXPERT_WEIGHTS, 2))
register_module("transformers.models.*ParallelExperts", {"weight": 2})
register_module("transformers.models.*Experts", dict.fromkeys(_EXPERT_WEIGHTS, _experts))  # after the special ones
register_module("transformers.models.aria.*ExpertsGemm", {"weight": 1})
register_module("transformers.models.dbrx.*ExpertGLU", {"w1": 1, "v1": 1, "w2": _dbrx_down})
