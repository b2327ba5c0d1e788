"""Packing the weights of a model where it pays."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from ..engines import find_engine
from ..pattern import Pattern
from ..scheme import Scheme, as_scheme
from ..tensor import KEEPS, Keep, NMTensor, compress
from ..weights import Weight, weights
from .detect import detect_pattern, has_nonzero
from .example import ExampleInput
from .fuse import fuse_activations
from .listeners import announce_packed
from .plan import Plan, Target
from .race import RIVALS, race
from .report import Report, attach
from .support import dtensor_type, why_not_packed, with_engine_for
from .whole import undo_slower

POLICIES = ("auto", "always")

#: What autocast can cast to.
LOW_DTYPES = (torch.bfloat16, torch.float16)


def convert(
    model: nn.Module,
    scheme: Scheme | Mapping[str, Pattern | str] | Pattern | str | None = None,
    *,
    example_input: ExampleInput | None = None,
    policy: str = "auto",
    against: str = "best",
    engine: str | None = None,
    keep: Keep = "both",
    dtype: torch.dtype | None = None,
    fuse: bool = False,
) -> nn.Module:
    """Packs the sparse weights of a model: each becomes a frozen ``nn.Parameter`` that holds an `NMTensor`.

    Modules, names and calling code stay as they are. What was done with each weight and why is in
    ``deploy.report(model)``.

    With ``policy="auto"`` the model runs once on ``example_input``, in eval mode and without gradients. Each
    layer is timed there on every input that reaches it, packed against dense in turn, and packed only if that
    is faster. The dense rival is the layer as it stands, in eager mode, or the same product with a weight
    that oneDNN or MKL packed beforehand, whichever is faster: the latter is what a compiled and frozen model
    calls. Weights of models that are larger than the last level cache come from memory for this, as they do
    when the model runs. In the end the whole model is timed, and as long as it is slower packed than dense,
    the layers that gained least become dense again. All of these times are in the report. Without an
    ``example_input`` nothing can be timed: weights are packed, which may cost time, and a warning says so.

    Args:
        model: The model, with the zeros in its weights (as a `Sparsifier` leaves it); changed in place.
        scheme: Patterns of the weights. ``None`` detects for each prunable weight the lowest density, then
            the smallest m, among `deploy.USUAL_PATTERNS`; weights that hold none, and all-zero ones, stay
            dense.
        example_input: What the model is called with in earnest: a tensor, a tuple of arguments or a mapping
            of keyword arguments.
        policy: ``"auto"`` packs where that is measured to be faster, ``"always"`` wherever the pattern holds.
        against: ``"best"`` packs what is faster in eager mode, and whose bare product, as compiled models
            call it, is faster than the fastest dense one. ``"eager"`` packs what is faster than the layer in
            eager mode, for models that will not be compiled. ``"compiled"`` compares bare products alone,
            and then times the whole model compiled: dense with freezing, and packed with
            `inductor_options`. Each version is compiled, which takes its time, and is a copy of the model.
        engine: Name of the engine to run packed weights with; ``None`` chooses the best for each. Weights
            that it cannot run get the best one that can, and the report says why.
        keep: ``"both"`` holds the packed form and what the engine multiplies with. ``"engine"`` holds only
            the latter, so that the weights take n/m of their memory, plus indices; see `NMTensor.keep`.
            Weights whose engine has no form of its own, or one that the packed form cannot be made from
            again, hold the packed form in either case.
        dtype: Dtype of the packed weights, for models that run under autocast to it; they are timed under it,
            too. ``None`` keeps the weights' own. In eager mode autocast casts packed weights once, but a
            compiled graph has no place where a cast weight could stay, and multiplies in the weight's own
            dtype.
        fuse: Let packed linear layers apply the ReLU, GELU or SiLU that follows them in an ``nn.Sequential``;
            see `deploy.fuse_activations`. It is not part of what is timed.

    Returns:
        ``model``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a weight violates the pattern that ``scheme`` gives it (the group is named), or an
            argument is not allowed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {POLICIES}, got {policy!r}")
    if against not in RIVALS:
        raise ValueError(f"against must be one of {RIVALS}, got {against!r}")
    if keep not in KEEPS:
        raise ValueError(f"keep must be one of {KEEPS}, got {keep!r}")
    if engine is not None:
        find_engine(engine)
    if dtype is not None and dtype not in LOW_DTYPES:
        raise ValueError(f"dtype must be None or one of {', '.join(map(str, LOW_DTYPES))}, got {dtype}")
    plans = _plan(model, scheme, Target(engine, keep, dtype))
    candidates = [plan for plan in plans if plan.choice is None]
    cold, whole = False, None
    if policy == "always":
        for plan in candidates:
            plan.choose("packed", "policy 'always'")
    elif example_input is None:
        if candidates:
            warnings.warn(
                f"convert packs {len(candidates)} weights without timing them, which may make the model "
                "slower: pass example_input to pack only where that is faster, or policy='always' if memory "
                "is the point",
                UserWarning,
                stacklevel=2,
            )
        for plan in candidates:
            plan.choose("packed", "not timed: no example_input")
    else:
        cold = race(model, candidates, example_input, dtype, against)
        whole = undo_slower(model, candidates, example_input, dtype, compiled=against == "compiled")
    for plan in candidates:
        if plan.choice == "packed":
            for module, attr in plan.weight.places:
                setattr(module, attr, plan.packed)
    fused = fuse_activations(model) if fuse else {}
    for plan in plans:
        activations = {fused[name] for name in map(_module_name, plan.weight.names) if name in fused}
        plan.reason += "".join(f"; applies {activation}" for activation in activations)
    attach(getattr(model, "_orig_mod", model), Report(tuple(plan.row() for plan in plans), cold, whole))
    ignore_in_ddp(model)
    announce_packed(model)
    return model


def _module_name(parameter_name: str) -> str:
    return parameter_name.rpartition(".")[0]


def ignore_in_ddp(model: nn.Module) -> None:
    """Lets ``DistributedDataParallel(model)`` leave packed weights alone: it would broadcast dense ones.

    They are frozen, so there is nothing to reduce; that they are equal everywhere is left to whoever converts
    or loads them. `convert` calls this for the model it is given. Call it for a model that holds a converted
    one as a part.

    FSDP2 is told with its own argument, ``fully_shard(model, ignored_params={the packed weights})``; without
    it, it refuses them.
    """
    names = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, NMTensor) and name not in names:
            names.append(name)
    if names:
        model._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]


# --------------------------------------------------------------------------------------------------- planning


def _plan(
    model: nn.Module,
    scheme: Scheme | Mapping[str, Pattern | str] | Pattern | str | None,
    target: Target,
) -> list[Plan]:
    """One plan for each weight of two or more dims; those with a pattern come with the packed weight."""
    _refuse_shards(model)
    resolved = None if scheme is None else as_scheme(scheme, model)
    named = {} if resolved is None else resolved.resolve(model)
    plans = []
    for weight in weights(model):
        plan = Plan(weight, target.engine)
        plans.append(plan)
        if isinstance(weight.parameter, NMTensor):
            plan.pattern, plan.packed = weight.parameter.pattern, weight.parameter
            plan.choose("packed", "was packed before")
            continue
        if resolved is not None:
            plan.pattern = named[weight.name].pattern if weight.name in named else None
            because = resolved.dense.get(weight.name, "not in the scheme")
        elif weight.dense_because is not None:
            because = weight.dense_because
        else:
            plan.pattern, because = _detected(weight)
        if plan.pattern is None:
            plan.choose("dense", because)
            continue
        reasons = [why_not_packed(module, weight.parameter) for module, _ in weight.places]
        if any(reasons):
            plan.choose("dense", next(filter(None, reasons)))
            continue
        plan.packed = _packed(weight, plan.pattern, target)
    return plans


def _detected(weight: Weight) -> tuple[Pattern | None, str]:
    assert weight.group_dim is not None  # prunable weights have one
    parameter = weight.parameter.detach()
    if not has_nonzero(parameter):
        return None, "all weights are zero"
    pattern = detect_pattern(parameter, dim=weight.group_dim, allowed=lambda p: weight.misfit(p) is None)
    return pattern, "holds none of the usual patterns"


def _packed(weight: Weight, pattern: Pattern, target: Target) -> nn.Parameter:
    assert weight.group_dim is not None
    try:
        packed = compress(weight.parameter.detach(), pattern, dim=weight.group_dim)
        if target.dtype is not None:
            packed = cast(NMTensor, packed.to(target.dtype))
        packed = with_engine_for(weight.module, packed, target.engine, target.keep)
    except ValueError as error:
        raise ValueError(f"{weight.name}: {error}") from None
    return nn.Parameter(packed, requires_grad=False)


def _refuse_shards(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, dtensor_type()):
            raise ValueError(
                f"model must not be sharded, but {name} is a DTensor (FSDP2, tensor parallelism): convert "
                "the whole model, from its gathered state dict"
            )
