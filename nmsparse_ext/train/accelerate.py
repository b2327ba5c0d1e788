"""Forward and backward passes of sparse layers through cuSPARSELt, while they are trained.

No module is swapped and no key of ``state_dict`` changes: a layer's ``forward`` is called in another way, and
the `Sparsifier` vouches after each step for what its weight holds (``masked_linear.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .dtensor import is_dtensor
from .masked_linear import disown, masked_linear, vouch, why_not_packed
from .rules import Rule
from .transposable import PATTERN as TRANSPOSABLE

if TYPE_CHECKING:
    from .weight import SparseWeight

BACKENDS = ("cusparselt",)

#: Below so many tokens in a product packing is not expected to pay; see `Accelerate.min_tokens`.
MIN_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Accelerate:
    """How a `Sparsifier` makes training faster.

    Attributes:
        backend: ``"cusparselt"``.
        min_tokens: Products of fewer tokens stay dense. Packing reads the weight once a step, so it takes as
            long for few tokens as for many. The default is what others have published for packing that takes
            longer, on other GPUs; measure yours with ``bench/bench_gpu_train_linear.py``.
    """

    backend: str = "cusparselt"
    min_tokens: int = MIN_TOKENS

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be {' or '.join(map(repr, BACKENDS))}, got {self.backend!r}")
        if isinstance(self.min_tokens, bool) or not isinstance(self.min_tokens, int) or self.min_tokens < 0:
            raise ValueError(f"min_tokens must be an int of at least 0, got {self.min_tokens!r}")

    @staticmethod
    def of(value: str | Accelerate | None) -> Accelerate | None:
        """What the argument ``accelerate`` means.

        Raises:
            TypeError: It is of another type.
            ValueError: It names no backend.
        """
        if value is None or isinstance(value, Accelerate):
            return value
        if not isinstance(value, str):
            raise TypeError(f"accelerate must be a str, an Accelerate or None, got {type(value).__name__}")
        if value not in BACKENDS:
            raise ValueError(f"accelerate must be {' or '.join(map(repr, BACKENDS))}, got {value!r}")
        return Accelerate(value)


class MaskedForward:
    """What stands in for the ``forward`` of an ``nn.Linear``; copied and pickled with it."""

    def __init__(self, module: nn.Linear, min_tokens: int) -> None:
        self.module, self.min_tokens = module, min_tokens

    def __call__(self, input: Tensor) -> Tensor:
        """``F.linear(input, weight, bias)``."""
        module = self.module
        return masked_linear(input, module.weight, module.bias, min_tokens=self.min_tokens)


class Accelerator:
    """Has the linear layers of a Sparsifier run through cuSPARSELt.

    Args:
        settings: How.
        weights: ``{name: weight}`` of the Sparsifier.
        places: ``{name: (module, attribute)}`` that hold them.

    Raises:
        ValueError: A weight is sharded.
    """

    def __init__(
        self,
        settings: Accelerate,
        weights: Mapping[str, SparseWeight],
        places: Mapping[str, tuple[nn.Module, str]],
    ) -> None:
        self._weights = weights
        self.reasons: dict[str, str | None] = {}
        self._modules: list[nn.Linear] = []
        for name, weight in weights.items():
            module, attr = places[name]
            self.reasons[name] = _why_not(weight, module, attr)
        for name in weights:
            module, _ = places[name]
            if self.reasons[name] is None and isinstance(module, nn.Linear):
                module.forward = MaskedForward(module, settings.min_tokens)  # type: ignore[method-assign]
                self._modules.append(module)

    def vouch(self, rule: Rule) -> None:
        """Vouches for the weights that hold nothing but their mask's weights now."""
        softens = type(rule).soften is not Rule.soften
        for name, weight in self._weights.items():
            pattern = weight.mask_pattern
            if self.reasons[name] is not None:
                continue
            if pattern is None or softens or weight.share or weight.touched():
                disown(weight.parameter)
            else:
                in_tiles = weight.tile_dim is not None and pattern == TRANSPOSABLE
                vouch(weight.parameter, pattern, transposable=in_tiles)

    def detach(self) -> None:
        """Gives the layers their own ``forward`` back."""
        for module in self._modules:
            module.__dict__.pop("forward", None)
        self._modules.clear()
        for name, weight in self._weights.items():
            if self.reasons[name] is None:
                disown(weight.parameter)


def _why_not(weight: SparseWeight, module: nn.Module, attr: str) -> str | None:
    """Why a weight's products stay dense, for reasons that no step lifts; None if they need not."""
    parameter: Any = weight.parameter
    if is_dtensor(parameter):
        raise ValueError(
            f"accelerate needs whole weights, but {weight.name} is sharded (fully_shard, tensor parallelism)"
        )
    if type(module) is not nn.Linear or attr != "weight":
        return f"it is {attr} of {type(module).__name__}; nn.Linear is what is accelerated"
    if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], MaskedForward):
        return "its forward was replaced by somebody else"
    because = [
        why_not_packed(parameter, dtype, weight.final_pattern)
        for dtype in dict.fromkeys((parameter.dtype, torch.bfloat16, torch.float16))
    ]
    return None if None in because else because[-1]
