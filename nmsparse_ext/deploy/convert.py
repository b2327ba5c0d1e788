"""Packing the weights of a model where it pays."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..engines import find_engine
from ..pattern import Pattern
from ..scheme import Scheme, as_scheme
from ..tensor import KEEPS, Keep, NMTensor, compress
from ..weights import Weight, weights
from .detect import detect_pattern, has_nonzero
from .example import ExampleInput, caller_of, run_example, tokens
from .fuse import fuse_activations
from .measure import alternate
from .report import LayerReport, attach
from .support import dtensor_type, engine_for, why_not_packed, why_unpacked

POLICIES = ("auto", "always")

#: What autocast can cast to.
LOW_DTYPES = (torch.bfloat16, torch.float16)

#: Packed must be this much faster before "auto" chooses it: less than this is the noise of a measurement.
MIN_GAIN = 1.03


def convert(
    model: nn.Module,
    scheme: Scheme | Mapping[str, Pattern | str] | Pattern | str | None = None,
    *,
    example_input: ExampleInput | None = None,
    policy: str = "auto",
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
    is faster. What it is compared with is the layer as it stands, in eager mode: the one that it replaces.
    Without an ``example_input`` nothing can be timed: weights are packed, which may cost time, and a warning
    says so.

    Args:
        model: The model, with the zeros in its weights (as a `Sparsifier` leaves it); changed in place.
        scheme: Patterns of the weights. ``None`` detects for each prunable weight the lowest density, then
            the smallest m, among `deploy.USUAL_PATTERNS`; weights that hold none, and all-zero ones, stay
            dense.
        example_input: What the model is called with in earnest: a tensor, a tuple of arguments or a mapping
            of keyword arguments.
        policy: ``"auto"`` packs where that is measured to be faster, ``"always"`` wherever the pattern holds.
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
    if keep not in KEEPS:
        raise ValueError(f"keep must be one of {KEEPS}, got {keep!r}")
    if engine is not None:
        find_engine(engine)
    if dtype is not None and dtype not in LOW_DTYPES:
        raise ValueError(f"dtype must be None or one of {', '.join(map(str, LOW_DTYPES))}, got {dtype}")
    plans = _plan(model, scheme, _Target(engine, keep, dtype))
    candidates = [plan for plan in plans if plan.choice is None]
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
        _measure(model, candidates, example_input, dtype)
    for plan in candidates:
        if plan.choice == "packed":
            for module, attr in plan.weight.places:
                setattr(module, attr, plan.packed)
    fused = fuse_activations(model) if fuse else {}
    for plan in plans:
        activations = {fused[name] for name in map(_module_name, plan.weight.names) if name in fused}
        plan.reason += "".join(f"; applies {activation}" for activation in activations)
    attach(getattr(model, "_orig_mod", model), [plan.row() for plan in plans])
    ignore_in_ddp(model)
    return model


def _module_name(parameter_name: str) -> str:
    return parameter_name.rpartition(".")[0]


def ignore_in_ddp(model: nn.Module) -> None:
    """Lets ``DistributedDataParallel(model)`` leave packed weights alone: it would broadcast dense ones.

    They are frozen, so there is nothing to reduce; that they are equal everywhere is left to whoever converts
    or loads them. `convert` calls this for the model it is given. Call it for a model that holds a converted
    one as a part.
    """
    names = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, NMTensor) and name not in names:
            names.append(name)
    if names:
        model._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True)
class _Target:
    """What packed weights are to be; see `convert`."""

    engine: str | None
    keep: Keep
    dtype: torch.dtype | None


@dataclasses.dataclass(eq=False)
class _Plan:
    """What is known about one weight, and in the end what happens to it."""

    weight: Weight
    asked_for: str | None = None  # name of an engine
    pattern: Pattern | None = None
    packed: nn.Parameter | None = None  # an NMTensor as a parameter
    choice: str | None = None  # "packed" or "dense"; None: not decided yet
    reason: str = ""
    dense_seconds: float = 0.0
    packed_seconds: float = 0.0
    tokens: int = 0

    def choose(self, choice: str, reason: str) -> None:
        self.choice, self.reason = choice, reason

    def row(self) -> LayerReport:
        shape, itemsize = self.weight.parameter.shape, self.weight.parameter.itemsize
        tensor = self.packed
        assert self.choice is not None
        measured = self.dense_seconds > 0
        return LayerReport(
            name=self.weight.name,
            pattern=None if self.pattern is None else str(self.pattern),
            tokens=self.tokens if measured else None,
            dense_ms=self.dense_seconds * 1e3 if measured else None,
            packed_ms=self.packed_seconds * 1e3 if measured and self.packed_seconds else None,
            dense_bytes=shape.numel() * itemsize,
            packed_bytes=tensor.held_nbytes if isinstance(tensor, NMTensor) else None,
            engine=tensor.engine if isinstance(tensor, NMTensor) else None,
            choice=self.choice,
            reason=self.reason + self._unpacked() + self._other_engine(),
        )

    def _other_engine(self) -> str:
        """What there is to add where the engine that was asked for cannot run the weight."""
        if self.asked_for is None or not isinstance(self.packed, NMTensor):
            return ""
        reason = find_engine(self.asked_for).why_not(self.packed)
        return "" if reason is None else f"; not by engine {self.asked_for!r}: {reason}"

    def _unpacked(self) -> str:
        """What there is to add to the reason for a packed weight that is unpacked when it runs."""
        if self.choice != "packed" or not isinstance(self.packed, NMTensor):
            return ""
        reasons = [why_unpacked(module, self.packed) for module, _ in self.weight.places]
        return next((f"; unpacked in every call: {reason}" for reason in reasons if reason), "")


# --------------------------------------------------------------------------------------------------- planning


def _plan(
    model: nn.Module,
    scheme: Scheme | Mapping[str, Pattern | str] | Pattern | str | None,
    target: _Target,
) -> list[_Plan]:
    """One plan for each weight of two or more dims; those with a pattern come with the packed weight."""
    _refuse_shards(model)
    resolved = None if scheme is None else as_scheme(scheme, model)
    named = {} if resolved is None else resolved.resolve(model)
    plans = []
    for weight in weights(model):
        plan = _Plan(weight, target.engine)
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


def _packed(weight: Weight, pattern: Pattern, target: _Target) -> nn.Parameter:
    assert weight.group_dim is not None
    try:
        packed = compress(weight.parameter.detach(), pattern, dim=weight.group_dim)
        if target.dtype is not None:
            packed = cast(NMTensor, packed.to(target.dtype))
        chosen = engine_for(weight.module, packed)
        if target.engine is not None and find_engine(target.engine).why_not(packed) is None:
            chosen = find_engine(target.engine)
        alone: Keep = target.keep if chosen.restore is not None else "both"
        if (chosen.name, alone) != (packed.engine, packed.keep):
            packed = packed.with_engine(chosen.name, keep=alone)
    except ValueError as error:
        raise ValueError(f"{weight.name}: {error}") from None
    return nn.Parameter(packed, requires_grad=False)


# -------------------------------------------------------------------------------------------------- measuring


def _refuse_shards(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, dtensor_type()):
            raise ValueError(
                f"model must not be sharded, but {name} is a DTensor (FSDP2, tensor parallelism): convert "
                "the whole model, from its gathered state dict"
            )


def _measure(
    model: nn.Module, candidates: list[_Plan], example_input: ExampleInput, dtype: torch.dtype | None
) -> None:
    """Runs the model once and lets every candidate be timed in place, on the arguments its module gets."""
    plans_of: dict[nn.Module, list[tuple[_Plan, nn.Module, str]]] = {}
    for plan in candidates:
        for module, attr in plan.weight.places:
            plans_of.setdefault(caller_of(model, module), []).append((plan, module, attr))
    failures: dict[_Plan, str] = {}
    timings: dict[tuple, tuple[float, float]] = {}

    def before_forward(caller: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for plan, module, attr in plans_of[caller]:
            if plan in failures:
                continue
            signature = (id(caller), id(module), attr, _signature((args, kwargs)))
            plan.tokens += tokens(module, args, kwargs)
            try:
                if signature not in timings:
                    timings[signature] = _race(caller, module, attr, plan.packed, args, kwargs)
            except NotImplementedError as error:
                failures[plan] = str(error)
                continue
            dense, packed = timings[signature]
            plan.dense_seconds += dense
            plan.packed_seconds += packed

    device = next((plan.weight.parameter.device.type for plan in candidates), "cpu")
    with contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype):
        run_example(model, example_input, dict.fromkeys(plans_of, before_forward))
    for plan in candidates:
        _decide(plan, failures.get(plan))


def _decide(plan: _Plan, failure: str | None) -> None:
    if failure is not None:
        plan.dense_seconds = plan.packed_seconds = 0.0
        plan.choose("dense", failure)
    elif plan.dense_seconds == 0:
        plan.choose("dense", "not timed: the example input did not reach its module")
    else:
        ratio = plan.dense_seconds / plan.packed_seconds
        if ratio >= MIN_GAIN:
            plan.choose("packed", f"packed is {ratio:.2f}x as fast")
        elif ratio >= 1:
            plan.choose("dense", f"packed is {ratio:.2f}x as fast, within the noise")
        else:
            plan.choose("dense", f"dense is {1 / ratio:.2f}x as fast")


def _race(
    caller: nn.Module,
    module: nn.Module,
    attr: str,
    packed: nn.Parameter | None,
    args: tuple,
    kwargs: dict[str, Any],
) -> tuple[float, float]:
    """Seconds of ``caller.forward`` with the dense and with the packed weight."""
    dense = module._parameters[attr]

    def with_weight(parameter: nn.Parameter | None) -> Callable[[], None]:
        def call() -> None:
            # Straight into the table of parameters: __setattr__ would cost as much as a small layer. And
            # forward, not __call__: hooks are not ours to run twice.
            module._parameters[attr] = parameter
            caller.forward(*args, **kwargs)

        return call

    device = dense.device if dense is not None else torch.device("cpu")
    try:
        seconds = alternate({"dense": with_weight(dense), "packed": with_weight(packed)}, device)
    finally:
        module._parameters[attr] = dense
    return seconds["dense"], seconds["packed"]


def _signature(value: object) -> object:
    """Equal for arguments that take equally long: shapes and layouts, not contents."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(_signature(item) for item in value)
    if isinstance(value, Mapping):
        return tuple((key, _signature(item)) for key, item in value.items())
    return value if isinstance(value, (int, float, str, bool, type(None))) else type(value)
