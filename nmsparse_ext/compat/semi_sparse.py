"""torchao's ``sparsify_`` and ``SemiSparseLinear``: weights packed for inference, pruned anew in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..deploy.convert import convert
from ..pattern import Pattern
from ..scheme import Scheme
from ..weights import canonical_name, prunable_weights

#: ``filter_fn(module, its name) -> whether it is meant``.
Filter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class SemiSparseWeightConfig:
    """Weights are to be packed.

    Attributes:
        pattern: n **kept** of every m; torchao knew 2:4 alone.
    """

    pattern: Pattern | str = "2:4"


def semi_sparse_weight() -> SemiSparseWeightConfig:
    """The older spelling of `SemiSparseWeightConfig`."""
    return SemiSparseWeightConfig()


def sparsify_(
    model: nn.Module, config: SemiSparseWeightConfig | None = None, filter_fn: Filter | None = None
) -> nn.Module:
    """Packs the weights of linear layers, in place: ``torchao.sparsity.sparsify_``.

    Differs from the original: it runs on CPUs too, for any pattern; a weight that does not hold the pattern
    is refused by name before anything is changed (prune it before: `apply_fake_sparsity`, `prune_model`). By
    default heads that share their weight with an embedding stay dense, and the projections out of
    ``nn.MultiheadAttention`` do not; in the original it is the other way round.

    Equivalent to ``nms.convert(model, {names: pattern}, policy="always")``.

    Args:
        model: The model.
        config: What is to be done.
        filter_fn: Which modules are meant; ``None`` for every ``nn.Linear``.

    Returns:
        The model.

    Raises:
        TypeError: If ``config`` is none.
        ValueError: If a weight cannot have the pattern, or does not hold it.
    """
    config = SemiSparseWeightConfig() if config is None else config
    if not isinstance(config, SemiSparseWeightConfig):
        raise TypeError(f"config must be a SemiSparseWeightConfig, got {type(config).__name__}")
    return convert(model, _scheme(model, config.pattern, filter_fn), policy="always")


def apply_fake_sparsity(
    model: nn.Module, *, filter_fn: Filter | None = None, pattern: Pattern | str = "2:4"
) -> None:
    """Prunes linear layers by magnitude, in place: ``torchao.sparsity.apply_fake_sparsity``.

    Equivalent to ``nms.prune_model(model, {names: pattern})``. By default as for `sparsify_`.

    Args:
        model: The model.
        filter_fn: Which modules are meant; ``None`` for every ``nn.Linear``.
        pattern: n **kept** of every m.
    """
    from ..prune import prune_model

    prune_model(model, _scheme(model, pattern, filter_fn))


def _scheme(model: nn.Module, pattern: Pattern | str, filter_fn: Filter | None) -> Scheme:
    if filter_fn is None:
        names = [w.name for w in prunable_weights(model) if isinstance(w.module, nn.Linear)]
    else:
        names = [f"{n}.weight" if n else "weight" for n, m in model.named_modules() if filter_fn(m, n)]
    return Scheme(dict.fromkeys(names, Pattern.parse(pattern)))


# ------------------------------------------------------------------------------------------------- training


class SemiSparseLinear(nn.Linear):
    """A linear layer whose weight is pruned at every forward: ``torchao.sparsity.training.SemiSparseLinear``.

    The weight stays dense. In each 4x4 tile the best of the masks that are 2:4 along rows and along columns
    is taken, and the gradient goes to all weights as if there were none (straight-through).

    Differs from the original: it multiplies dense, so it trains like the original but not faster; the mask
    is the best one, where the original's kernel chose greedily; it runs on CPUs, and in any float dtype.
    A `Sparsifier` with ``method="ste", transposable=True`` does the same with the model left as it is.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        return F.linear(x, _StraightThrough.apply(self.weight), self.bias)

    @classmethod
    def from_dense(cls, linear: nn.Linear) -> SemiSparseLinear:
        """A layer with the same parameters.

        Raises:
            ValueError: If a size is no multiple of 4.
        """
        if linear.in_features % 4 or linear.out_features % 4:
            raise ValueError(
                "linear must have sizes that are multiples of 4, "
                f"got {linear.out_features} x {linear.in_features}"
            )
        return _with_parameters(cls, linear)

    @classmethod
    def to_dense(cls, semi_sparse_linear: nn.Linear) -> nn.Linear:
        """An ``nn.Linear`` with the same parameters, which are dense."""
        return _with_parameters(nn.Linear, semi_sparse_linear)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return ops.apply_bits(weight, ops.transposable_mask(weight, bits=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _with_parameters(kind: type[Any], linear: nn.Linear) -> Any:
    made = kind(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    made.weight, made.bias = linear.weight, linear.bias
    return made.train(linear.training)


def swap_linear_with_semi_sparse_linear(
    model: nn.Module, config: Mapping[str, type[SemiSparseLinear]]
) -> None:
    """Replaces linear layers, in place: ``torchao.sparsity.training.swap_linear_with_semi_sparse_linear``.

    Differs from the original: names that the model does not have as linear layers are refused.

    Args:
        model: The model.
        config: ``{module name: SemiSparseLinear}``.

    Raises:
        TypeError: If an argument is of the wrong type, or something is swapped for another class.
        ValueError: If a name is no linear layer's, or the model is itself the layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a mapping of module names, got {type(config).__name__}")
    linears = {canonical_name(n): m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, kind in config.items():
        if canonical_name(name) not in linears:
            some = ", ".join(map(repr, list(linears)[:5])) + (", ..." if len(linears) > 5 else "")
            raise ValueError(f"config must name linear layers of the model ({some}), got {name!r}")
        if not (isinstance(kind, type) and issubclass(kind, SemiSparseLinear)):
            raise TypeError(f"config[{name!r}] must be SemiSparseLinear, got {kind!r}")
    swaps = {linears[canonical_name(name)]: kind.from_dense for name, kind in config.items()}
    _swap(model, {linear: make(linear) for linear, make in swaps.items()})


def swap_semi_sparse_linear_with_linear(model: nn.Module) -> None:
    """Puts ``nn.Linear`` back for every `SemiSparseLinear`, in place. The weights are dense then.

    Raises:
        TypeError: If ``model`` is no module.
        ValueError: If it is itself the layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    found = [m for m in model.modules() if isinstance(m, SemiSparseLinear)]
    _swap(model, {m: SemiSparseLinear.to_dense(m) for m in found})


def _swap(model: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> None:
    if model in swaps:
        made = "to_dense" if isinstance(model, SemiSparseLinear) else "from_dense"
        raise ValueError(
            f"model must be a module around its linear layers, got {type(model).__name__}, a layer that is "
            f"in no other module and so cannot be replaced in place: take SemiSparseLinear.{made}(model)"
        )
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() has a shared layer only once
            if child is not None and child in swaps:
                setattr(parent, name, swaps[child])
