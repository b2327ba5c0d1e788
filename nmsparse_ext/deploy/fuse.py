"""Activations that packed linear layers apply themselves, before their sums are rounded and written."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from torch import Tensor, nn

from ..engines import ENGINES
from ..panels import Activation
from ..products import linear
from ..tensor import NMTensor

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class FusedLinear(nn.Linear):
    """A linear layer that ends with an activation: ``activation(F.linear(x, weight, bias))``.

    Attributes:
        activation: ``"relu"``, ``"gelu"`` or ``"silu"``.
    """

    activation: Activation

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        return linear(input, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{super().extra_repr()}, activation={self.activation!r}"


def fuse_activations(model: nn.Module) -> dict[str, str]:
    """Lets packed linear layers apply the activation that follows them in an ``nn.Sequential``.

    Only there the order of calls is known for certain. The layer becomes a `FusedLinear`, the activation an
    ``nn.Identity``: modules keep their places and the state dict its keys. Left alone are modules with hooks,
    which would see something else, layers that the model holds in several places, subclasses, and engines
    that have no such activation.

    Args:
        model: The model; changed in place.

    Returns:
        ``{name of the layer: activation}``.
    """
    places = Counter(id(child) for module in model.modules() for child in module._modules.values() if child)
    fused: dict[str, str] = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Sequential:
            continue
        keys = list(module._modules)
        for key, following in pairwise(keys):
            layer, activation = module._modules[key], _activation(module._modules[following])
            if activation is None or type(layer) is not nn.Linear or places[id(layer)] > 1:
                continue
            if _hooked(layer) or _hooked(module._modules[following]):
                continue
            weight = layer.weight
            if not isinstance(weight, NMTensor) or activation not in ENGINES[weight.engine].activations:
                continue
            layer.__class__ = FusedLinear
            layer.activation = activation  # type: ignore[assignment]
            module._modules[following] = nn.Identity()
            fused[f"{name}.{key}" if name else key] = activation
    return fused


def _activation(module: nn.Module | None) -> Activation | None:
    if type(module) is nn.ReLU:
        return "relu"
    if type(module) is nn.SiLU:
        return "silu"
    return "gelu" if type(module) is nn.GELU and module.approximate == "none" else None


def _hooked(module: nn.Module | None) -> bool:
    return any(getattr(module, hooks, None) for hooks in _HOOKS)
