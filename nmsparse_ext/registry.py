"""The registry: which parameters of a module type can be N:M sparse, and along which dim their groups run.

Training, search and deployment all ask here, so that a weight is grouped the same way wherever it is met.
Groups run along the weights that are summed into one output: the input features of a linear map, the input
channels of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Generic, TypeAlias, TypeVar

from torch import Tensor, nn

# What a function in the registry returns: the group dim; or (group dim, span), where groups must not cross
# multiples of span along it; or None for "not prunable here".
Layout: TypeAlias = "int | tuple[int, int] | None"
# Either the group dim, or a function for types whose layout depends on the instance.
GroupDim: TypeAlias = "int | Callable[[nn.Module, Tensor], Layout]"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rule:
    """How a parameter is grouped.

    Attributes:
        group_dim: The group dim, or a function that finds it.
        dense_because: If set, the parameter stays dense for this reason unless a scheme names it.
    """

    group_dim: GroupDim
    dense_because: str | None = None


class TypeTable(Generic[T]):
    """A table by module type; subclasses share the entry of their nearest base.

    Types of packages that may not be installed are entered by qualified name, or by a glob of such names; an
    exact name goes before a glob, and an earlier glob before a later one. Wrappers that change a module's
    class (FSDP2, lazy modules) make a subclass, so they change nothing here.
    """

    def __init__(self) -> None:
        self._entries: dict[type | str, T] = {}

    def __setitem__(self, module_type: type | str, entry: T) -> None:
        self._entries[module_type] = entry

    def find(self, module: nn.Module) -> T | None:
        """Returns the entry of ``module``'s type or of its nearest base that has one."""
        for cls in type(module).__mro__:
            name = f"{cls.__module__}.{cls.__qualname__}"
            for key in (cls, name):
                if key in self._entries:
                    return self._entries[key]
            for glob, entry in self._entries.items():
                if isinstance(glob, str) and fnmatchcase(name, glob):
                    return entry
        return None


_RULES: TypeTable[dict[str, Rule]] = TypeTable()


def register_module(module_type: type[nn.Module] | str, group_dims: Mapping[str, GroupDim]) -> None:
    """Makes parameters of a module type prunable.

    Subclasses inherit the entry of their nearest registered base. Registering a type again replaces its
    entry.

    Args:
        module_type: The type, or its qualified name (``"package.module.Class"``, globs allowed) where
            importing it just for this would be a burden.
        group_dims: ``{parameter name or glob: group dim}``. The group dim is the dim whose weights are summed
            into one output; it may be negative. A function ``(module, parameter) -> group dim`` serves types
            whose layout depends on the instance. It may return ``(group dim, span)`` if groups must not cross
            multiples of ``span`` along it, or ``None`` if this parameter is not prunable.

    Raises:
        TypeError: If an argument is of the wrong type.

    Example:
        >>> class Experts(nn.Module):  # w_in, w_out: [experts, in, out]
        ...     pass
        >>> register_module(Experts, {"w_*": 1})
    """
    is_type = isinstance(module_type, type) and issubclass(module_type, nn.Module)
    if not (is_type or isinstance(module_type, str)):
        raise TypeError(f"module_type must be an nn.Module type or its qualified name, got {module_type!r}")
    if not isinstance(group_dims, Mapping):
        raise TypeError(f"group_dims must map parameter names to group dims, got {group_dims!r}")
    for glob, group_dim in group_dims.items():
        if not isinstance(glob, str):
            raise TypeError(f"group_dims must have parameter names as keys, got {glob!r}")
        if isinstance(group_dim, bool) or not (isinstance(group_dim, int) or callable(group_dim)):
            raise TypeError(f"group_dims[{glob!r}] must be an int or a function, got {group_dim!r}")
    register_rules(module_type, {glob: Rule(group_dim) for glob, group_dim in group_dims.items()})


def register_rules(module_type: type[nn.Module] | str, rules: Mapping[str, Rule]) -> None:
    """As `register_module`, for parameters of which some stay dense unless a scheme names them."""
    _RULES[module_type] = dict(rules)


def find_rule(module: nn.Module, attr: str) -> Rule | None:
    """Returns the rule for the parameter ``attr`` of ``module``, or ``None`` if there is none."""
    rules = _RULES.find(module) or {}
    if attr in rules:
        return rules[attr]
    return next((rule for glob, rule in rules.items() if fnmatchcase(attr, glob)), None)


# ---------------------------------------------------------------------------------------------------------
# What is known from the start
# ---------------------------------------------------------------------------------------------------------


def _conv_transpose(module: nn.Module, weight: Tensor) -> Layout:
    # [in, out / groups, ...]: the input channels of all conv groups stand one after the other in dim 0.
    return 0, weight.shape[0] // int(module.groups)  # type: ignore[arg-type]


def _experts(module: nn.Module, weight: Tensor) -> Layout:
    # The same class has had different layouts in different releases of transformers. Those that offer a
    # choice of expert kernels say on the instance which one it is; without that word we do not guess.
    transposed = getattr(module, "is_transposed", None)
    if weight.dim() != 3 or transposed is None:
        return None
    return 1 if transposed else 2  # [experts, in, out] or [experts, out, in]


def _dbrx_down(module: nn.Module, weight: Tensor) -> Layout:
    # [experts * ffn, hidden], applied transposed: it sums over ffn, and the experts lie below each other.
    return 0, int(module.ffn_hidden_size)  # type: ignore[arg-type]


register_module(nn.Linear, {"weight": 1})
for _conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register_module(_conv, {"weight": 1})  # [out, in / groups, ...]
for _transposed in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register_module(_transposed, {"weight": _conv_transpose})
register_module(nn.MultiheadAttention, {"in_proj_weight": 1, "[qkv]_proj_weight": 1})  # out_proj: a Linear
register_module(nn.RNNBase, {"weight_[ih][hr]_l*": 1})  # RNN, LSTM, GRU; ih, hh, hr; layers and _reverse
register_module(nn.RNNCellBase, {"weight_[ih]h": 1})
for _embedding in (nn.Embedding, nn.EmbeddingBag):
    register_rules(_embedding, {"weight": Rule(1, dense_because="embeddings stay dense unless named")})

register_module("transformers.pytorch_utils.Conv1D", {"weight": 0})  # [in, out]

_PROJECTIONS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
for _glob in ("llama4.*Experts", "gpt_oss.*Experts"):  # [experts, in, out]
    register_module(f"transformers.models.{_glob}", dict.fromkeys(_PROJECTIONS, 1))
for _glob in ("inkling*.*SharedExperts", "longcat_flash.*Experts", "step3p7.*Experts"):  # [experts, out, in]
    register_module(f"transformers.models.{_glob}", dict.fromkeys(_PROJECTIONS, 2))
register_module("transformers.models.*ParallelExperts", {"weight": 2})  # [experts, out, in]
register_module("transformers.models.aria.*ExpertsGemm", {"weight": 1})  # [experts, in, out]
register_module("transformers.models.dbrx.*ExpertGLU", {"[wv]1": 1, "w2": _dbrx_down})
register_module("transformers.models.*Experts", dict.fromkeys(_PROJECTIONS, _experts))  # all the others
