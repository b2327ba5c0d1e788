"""What a Sparsifier refuses, and the watch over optimizers that have lost theirs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from ..tensor import NMTensor
from ..weights import canonical_name

# In every parameter group of an optimizer with a Sparsifier: the number of steps made. It travels with copies
# and checkpoints, which hooks do not.
STEP_KEY = "nm_step"
# On an optimizer with a Sparsifier: that. It does not travel.
_ATTRIBUTE = "_nm_sparsifier"

_watching = False

# Which Sparsifier trains a parameter; neither is kept alive by it.
_owners = WeakIdKeyDictionary()


def check_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Returns the optimizer, unwrapped; refuses what is none, or whose steps cannot be hooked.

    Raises:
        TypeError: If it is no ``torch.optim`` optimizer.
        ValueError: If it evaluates its closure several times, records its steps, or has a Sparsifier already.
    """
    # Wrappers such as accelerate's claim to be optimizers, but it is the one inside whose hooks are called.
    while not _has_hooks(optimizer) and isinstance(
        getattr(optimizer, "optimizer", None), torch.optim.Optimizer
    ):
        optimizer = optimizer.optimizer
    if not _has_hooks(optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "optimizer LBFGS evaluates its closure several times a step, on weights that N:M training would "
            "have to mask in between; use an optimizer that takes one gradient a step"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError("optimizer has differentiable=True: the change of a mask has no gradient")
    if sparsifier_of(optimizer) is not None:
        raise ValueError("optimizer has a Sparsifier already; finalize() that one first")
    return optimizer


def _has_hooks(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks")


def check_model(model: nn.Module, scheme: Any) -> None:
    """Refuses models whose parameters are not the weights that they compute with.

    Raises:
        TypeError: If it is no module.
        ValueError: Naming the FSDP1 wrapper, or the parametrized weights that the scheme asks for.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"{name or 'model'} is wrapped in FullyShardedDataParallel (FSDP1), which flattens weights "
                f"so that groups are lost; use torch.distributed.fsdp.fully_shard (FSDP2)"
            )
    parametrized = _parametrized(model)
    if isinstance(scheme, Mapping):
        named = {canonical_name(key) for key in scheme}
        parametrized = {
            key: how for key, how in parametrized.items() if named & {key, key.removesuffix(".weight")}
        }
    if parametrized:
        raise ValueError(
            "weights that are computed from other parameters cannot be sparse: "
            + ", ".join(f"{name} ({how})" for name, how in parametrized.items())
            + "; remove the parametrization, or leave them out of the scheme"
        )


def check_not_packed(parameters: Mapping[str, Tensor]) -> None:
    """Refuses packed weights, which are frozen.

    Raises:
        ValueError: Naming them.
    """
    packed = [name for name, parameter in parameters.items() if isinstance(parameter, NMTensor)]
    if packed:
        raise ValueError(
            f"packed weights cannot be trained: {', '.join(packed)}; leave them out of the scheme, or put "
            f"nn.Parameter(weight.to_dense()) in their place"
        )


def _parametrized(model: nn.Module) -> dict[str, str]:
    """Names of the weights that are recomputed from other parameters, and by what."""
    found: dict[str, str] = {}
    for prefix, module in model.named_modules():
        dot = f"{canonical_name(prefix)}." if canonical_name(prefix) else ""
        if torch.nn.utils.parametrize.is_parametrized(module):
            for attr in module.parametrizations:
                found[f"{dot}{attr}"] = "torch.nn.utils.parametrize"
        for attr in module._parameters:
            # The older weight_norm, spectral_norm and torch.nn.utils.prune keep weight_v or weight_orig.
            stem = attr.removesuffix("_orig") if attr.endswith("_orig") else attr.removesuffix("_v")
            if (
                stem != attr
                and stem not in module._parameters
                and isinstance(getattr(module, stem, None), Tensor)
            ):
                found[f"{dot}{stem}"] = f"made from {attr}"
    return found


def claim(sparsifier: Any, parameters: Mapping[str, Tensor]) -> None:
    """Notes whose parameters these are, until `release` or the Sparsifier's end.

    Raises:
        ValueError: Naming a parameter that another Sparsifier trains.
    """
    for name, parameter in parameters.items():
        owner = _owner(parameter)
        if owner is not None and owner is not sparsifier:
            del owner
            gc.collect()  # an optimizer and its Sparsifier refer to each other, and may both be forgotten
            if _owner(parameter) is not None:
                raise ValueError(
                    f"model already has a Sparsifier, which trains {name}; finalize() that one first, or "
                    f"give the two schemes that have no weight in common"
                )
    for parameter in parameters.values():
        _owners[parameter] = weakref.ref(sparsifier)


def release(parameters: Mapping[str, Tensor]) -> None:
    """Takes back what `claim` has noted."""
    for parameter in parameters.values():
        _owners.pop(parameter, None)


def _owner(parameter: Tensor) -> Any:
    reference = _owners.get(parameter)
    return None if reference is None else reference()


def sparsifier_of(optimizer: torch.optim.Optimizer) -> Any:
    """The Sparsifier whose hooks are on ``optimizer``, or ``None``."""
    return optimizer.__dict__.get(_ATTRIBUTE)


def set_sparsifier(optimizer: torch.optim.Optimizer, sparsifier: Any) -> None:
    """Notes whose hooks are on ``optimizer``, and starts the watch over those that lose theirs."""
    global _watching
    if sparsifier is None:
        optimizer.__dict__.pop(_ATTRIBUTE, None)
        return
    optimizer.__dict__[_ATTRIBUTE] = sparsifier
    if not _watching:
        register_optimizer_step_pre_hook(_refuse_without_hooks)
        _watching = True


@torch.compiler.disable
def _refuse_without_hooks(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """A step without hooks would train the sparse weights as if they were all there is, unnoticed."""
    if sparsifier_of(optimizer) is None and any(STEP_KEY in group for group in optimizer.param_groups):
        raise RuntimeError(
            "this optimizer's state belongs to a Sparsifier, but it has none: hooks do not survive "
            "copying or loading. Copy the three together, copy.deepcopy((model, optimizer, sparsifier)), or "
            "make nms.Sparsifier(model, optimizer, scheme) for this one; finalize() that to go on without one"
        )
