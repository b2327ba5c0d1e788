"""Timing every layer of a model dense against packed, on what reaches it in one run of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import engines_cuda, engines_cuda_8bit
from ..tensor import NMTensor
from .bare import bare_product
from .example import ExampleInput, caller_of, run_example, tokens
from .measure import Flush, alternate, last_level_cache
from .plan import Plan, Seconds
from .prepacked import prepacked_calls

#: What a packed layer has to beat: see `convert`.
RIVALS = ("best", "eager", "compiled")

#: Packed must be this much faster before "auto" chooses it: less than this is the noise of a measurement.
MIN_GAIN = 1.03

#: Modules that are all there is to how long they take.
SIMPLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")


def race(
    model: nn.Module,
    candidates: Sequence[Plan],
    example_input: ExampleInput,
    dtype: torch.dtype | None,
    rival: str,
    *,
    after: Callable[[str], object] = lambda name: None,
) -> bool:
    """Runs the model once, lets every candidate be timed in place, and decides for each.

    Layers of the same kind, shape and pattern on inputs of the same shape take equally long: one of them is
    timed for all.

    Returns:
        Whether weights came from memory: those of a model that is larger than the last level cache do when
        it runs, so they are driven out before every call.
    """
    plans_of: dict[nn.Module, list[tuple[Plan, nn.Module, str]]] = {}
    for plan in candidates:
        for module, attr in plan.weight.places:
            plans_of.setdefault(caller_of(model, module), []).append((plan, module, attr))
    device = next((plan.weight.parameter.device.type for plan in candidates), "cpu")
    flush = flush_for(model, device)
    failures: dict[Plan, str] = {}
    timings: dict[tuple, Seconds] = {}

    def before_forward(caller: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for plan, module, attr in plans_of[caller]:
            if plan in failures:
                continue
            if dtype is None:
                plan.packed = _tuned(plan.packed, tokens(module, args, kwargs))
            kind = (*layer_kind(caller, module, attr), _form(plan.packed), signature((args, kwargs)))
            plan.tokens += tokens(module, args, kwargs)
            try:
                if kind not in timings:
                    alone = {"packed": plan.packed}
                    timed = time_layer(caller, module, attr, alone, args, kwargs, dtype=dtype, flush=flush)
                    timings[kind] = timed["packed"]
            except NotImplementedError as error:
                failures[plan] = str(error)
                continue
            plan.seconds += timings[kind]
            after(plan.weight.name)

    with contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype):
        run_example(model, example_input, dict.fromkeys(plans_of, before_forward))
    for plan in candidates:
        _decide(plan, failures.get(plan), rival)
    return flush is not None


def _tuned(packed: nn.Parameter | None, count: int) -> nn.Parameter:
    """A weight on a GPU is raced as it will run: the way that wins for so many tokens."""
    assert isinstance(packed, NMTensor)
    eight_bits = packed.engine in engines_cuda_8bit.ROUNDED
    faster = (engines_cuda_8bit if eight_bits else engines_cuda).tuned(packed, count)
    return packed if faster is packed else nn.Parameter(faster, requires_grad=False)


def flush_for(model: nn.Module, device: str) -> Flush | None:
    """What drives a model's weights out of the CPU's caches, if they do not stay there when it runs."""
    held = sum(p.held_nbytes if isinstance(p, NMTensor) else p.nbytes for p in model.parameters())
    return Flush() if device == "cpu" and held > last_level_cache() else None


def _decide(plan: Plan, failure: str | None, rival: str) -> None:
    seconds = plan.seconds
    if failure is not None:
        plan.seconds = Seconds()
        plan.choose("dense", failure)
        return
    if seconds.dense == 0:
        plan.choose("dense", "not timed: the example input did not reach its module")
        return
    gains = {"eager": seconds.over_eager, "best": seconds.gain, "compiled": seconds.over_best}
    gain = gains[rival]
    if rival != "eager" and seconds.best_dense < seconds.dense:
        reason = (
            f"packed is {_times(seconds.over_best)} as with a prepacked dense weight, "
            f"{_times(seconds.over_eager)} as in eager mode"
        )
    else:
        reason = f"packed is {_times(gain)}" if gain >= 1 else f"dense is {_times(1 / gain)}"
    if gain >= MIN_GAIN:
        plan.choose("packed", reason)
    else:
        plan.choose("dense", f"{reason}, within the noise" if gain >= 1 else reason)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x as fast"


def time_layer(
    caller: nn.Module,
    module: nn.Module,
    attr: str,
    packed: Mapping[str, nn.Parameter | None],
    args: tuple,
    kwargs: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
    flush: Flush | None = None,
) -> dict[str, Seconds]:
    """Seconds of ``caller.forward`` with the dense and with packed weights, all timed in turn.

    Args:
        caller: The module that is called; see `caller_of`.
        module: The module that holds the weight.
        attr: Its attribute there.
        packed: ``{name: packed weight}``; without any, only the dense one is timed.
        args: What ``caller`` is called with.
        kwargs: The same.
        dtype: What autocast casts to; ``None`` for none.
        flush: Runs before every call; see `flush_for`.

    Returns:
        ``{name: seconds}`` of the packed weights, and of the dense one as ``"dense"``.

    Raises:
        NotImplementedError: If a packed weight does not take what the module does with it.
    """
    dense = module._parameters[attr]

    def with_weight(parameter: nn.Parameter | None) -> Callable[[], None]:
        def call() -> None:
            # Straight into the table of parameters: __setattr__ would cost as much as a small layer. And
            # forward, not __call__: hooks are not ours to run twice.
            module._parameters[attr] = parameter
            caller.forward(*args, **kwargs)

        return call

    def before() -> None:
        cast(Flush, flush)()
        for value in (*args, *kwargs.values()):  # inputs have just been made by the layer before
            if isinstance(value, Tensor):
                value.clone()

    calls: dict[str, Callable[[], object]] = {"dense": with_weight(dense)}
    calls |= {name: with_weight(parameter) for name, parameter in packed.items()}
    plain = caller is module and attr == "weight"
    rivals = prepacked_calls(module, args, kwargs, dtype) if plain else {}
    device = dense.device if dense is not None else torch.device("cpu")
    bare: dict[str, Callable[[], object]] = {}
    try:
        if plain and device.type == "cpu":
            calls["dense"]()  # what is wrong with the inputs is said by PyTorch, then
            ops = {f"{name}, bare": bare_product(calls[name]) for name in packed}
            bare = {name: op for name, op in ops.items() if op is not None}
        seconds = alternate(calls | bare | rivals, device, before=None if flush is None else before)
    finally:
        module._parameters[attr] = dense
    prepacked = min((seconds[name] for name in rivals), default=0.0)
    best = min(seconds["dense"], prepacked) if rivals else seconds["dense"]
    found = {"dense": Seconds(seconds["dense"], prepacked, best, best, best)}
    for name in packed:
        time = seconds[name]
        found[name] = Seconds(
            seconds["dense"], prepacked, best, time, min(time, seconds.get(f"{name}, bare", time))
        )
    return found


def layer_kind(caller: nn.Module, module: nn.Module, attr: str) -> tuple:
    """Equal for weights whose modules take equally long on equal inputs in equal forms.

    Plain values, but for modules that are not all there is to how long they take: these are like no other.
    """
    if caller is not module or type(module) not in SIMPLE:
        return id(caller), id(module), attr
    weight = module._parameters[attr]
    geometry = tuple(signature(getattr(module, name, None)) for name in _GEOMETRY)
    return type(module).__name__, signature(weight), module.bias is None, geometry


def _form(packed: nn.Parameter | None) -> tuple:
    assert isinstance(packed, NMTensor)
    return packed.pattern, packed.group_dim, packed.engine, packed.keep, packed.dtype


def signature(value: object) -> object:
    """Equal for arguments that take equally long: shapes and layouts, not contents."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(signature(item) for item in value)
    if isinstance(value, Mapping):
        return tuple((key, signature(item)) for key, item in value.items())
    return value if isinstance(value, (int, float, str, bool, type(None))) else type(value)
