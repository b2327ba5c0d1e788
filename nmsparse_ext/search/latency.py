"""How long each layer takes with each pattern: measured with the library's own engines, on this machine.

Every layer is timed in place, on what reaches it in one run of the model, as ``convert`` does it: dense in
the fastest way there is (eager, or packed beforehand by oneDNN or MKL) against every pattern packed. A
pattern counts only where it beats that; where it does not, the layer would run dense, zeros and all, and so
that is what it costs. A search thus gains nothing from pruning a layer that pruning does not speed up.

Times are kept in a file, by machine (processor, instruction set, threads, versions) and kind of layer, so
that a second search measures nothing. Linear layers are looked up by their number of tokens, with a straight
line between two counts that were measured and lie no more than a factor of four apart.
"""

from __future__ import annotations

import json
import os
from bisect import bisect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._atomic import atomic_write
from .._build import build_info
from .._machine import cpu_model
from ..deploy.example import ExampleInput, caller_of, run_example, tokens
from ..deploy.race import MIN_GAIN, SIMPLE, flush_for, layer_kind, signature, time_layer
from ..deploy.support import engine_for, why_not_packed
from ..pattern import Pattern
from ..tensor import compress
from ..weights import Weight, prunable_weights
from .budget import Budget
from .constraints import Candidates
from .costs import Costs, Latency

#: Seconds by form: "dense" and patterns as text.
Times = dict[str, float]

_DENSE = "dense"
#: Between token counts further apart than this a straight line says little.
_WIDEST = 4.0


class LatencyTable:
    """Seconds of each weight's layer on one example input; call it as ``table(name, pattern or None)``.

    Args:
        times: ``{name: {"dense": seconds, "2:4": seconds, ...}}``; of patterns as packed.
        unpacked: ``{name: reason}`` of the weights that cannot run packed here; each of their patterns takes
            as long as dense.
    """

    def __init__(self, times: Mapping[str, Times], unpacked: Mapping[str, str] | None = None) -> None:
        self.times = times
        self.unpacked = dict(unpacked or {})

    def __call__(self, name: str, pattern: Pattern | None) -> float:
        """Seconds with the pattern; those of the dense layer if packed is not faster.

        Raises:
            ValueError: If that was not measured.
        """
        if name not in self.times:
            raise ValueError(f"the latency of {name} was not measured")
        times = self.times[name]
        dense = times[_DENSE]
        if pattern is None or pattern.is_dense:
            return dense
        if str(pattern) not in times:
            raise ValueError(f"the latency of {name} with {pattern} was not measured")
        packed = times[str(pattern)]
        return packed if packed * MIN_GAIN <= dense else dense


def measure_latency(
    model: nn.Module,
    example_input: ExampleInput,
    candidates: Candidates,
    *,
    cache: str | os.PathLike[str] | bool = True,
) -> LatencyTable:
    """Times every layer of a model dense and with its candidates.

    Args:
        model: The model, dense; it runs once, in eval mode and without gradients, and is left as it was.
        example_input: What it is called with in earnest: a tensor, a tuple of arguments or a mapping of
            keyword arguments.
        candidates: The patterns of each weight.
        cache: The file that keeps the times; ``True`` for ``latency.json`` in `cache_folder`, ``False`` for
            none.

    Returns:
        The table, for all prunable weights. A layer that is called several times has the sum of its calls,
        one that is not called takes no time. Attention, which multiplies with several weights in one call,
        counts for equal parts with each of them.

    Raises:
        TypeError: If ``example_input`` is none of these.
    """
    file = cache_folder() / "latency.json" if cache is True else None if cache is False else Path(cache)
    kept = _File(file)
    listed = dict(candidates.weights) | {weight.name: weight for weight in prunable_weights(model)}
    places: dict[nn.Module, list[tuple[Weight, nn.Module, str]]] = {}
    for weight in listed.values():
        for module, attr in weight.places:
            places.setdefault(caller_of(model, module), []).append((weight, module, attr))
    device = next((weight.parameter.device.type for weight in listed.values()), "cpu")
    flush = flush_for(model, device)
    totals: dict[str, Times] = {name: {} for name in listed}
    unpacked: dict[str, str] = {}

    def before_forward(caller: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for weight, module, attr in places[caller]:
            patterns = [pattern for pattern in candidates.get(weight.name, ()) if not pattern.is_dense]
            layer, count = _key(caller, module, attr, args, kwargs, cold=flush is not None)
            times = kept.find(layer, count, [_DENSE, *map(str, patterns)])
            reason = why_not_packed(module, weight.parameter) if patterns else None
            if times is None:
                packed = _packed(weight, module, patterns) if reason is None else {}
                times, refusal = _timed(caller, module, attr, packed, args, kwargs, flush, patterns)
                reason = reason or refusal
                kept.add(layer, count, times)
            if reason is not None:
                unpacked.setdefault(weight.name, reason)
            share = len(places[caller])
            total = totals[weight.name]
            for form in (_DENSE, *map(str, patterns)):
                # Of a call that serves several weights: its equal part, and what this one changes.
                seconds = times[_DENSE] / share + (times[form] - times[_DENSE])
                total[form] = total.get(form, 0.0) + max(0.0, seconds)

    run_example(model, example_input, dict.fromkeys(places, before_forward))
    kept.save()
    for name, total in totals.items():
        if not total:
            total.update(dict.fromkeys([_DENSE, *map(str, candidates.get(name, ()))], 0.0))
    return LatencyTable(totals, unpacked)


def priced(
    model: nn.Module, found: Candidates, budget: Budget, example_input: object, latency: Latency | None
) -> tuple[Costs, dict[str, float]]:
    """What candidates cost, and the budget in absolute numbers; layers are timed if the budget asks for it.

    Raises:
        ValueError: If the candidates cannot meet the budget, or an example input is missing.
    """
    if latency is None and budget.latency is not None and example_input is not None:
        latency = measure_latency(model, cast(ExampleInput, example_input), found)
    costs = Costs(model, example_input, candidates=found, latency=latency)
    limits = costs.limits(budget)
    costs.check(found, limits)
    return costs, limits


def cache_folder() -> Path:
    """Where measurements are kept: ``NMSPARSE_CACHE``, or ``nmsparse`` in the user's cache folder."""
    own = os.environ.get("NMSPARSE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nmsparse"


def _timed(
    caller: nn.Module,
    module: nn.Module,
    attr: str,
    packed: Mapping[str, nn.Parameter],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    flush: Any,
    patterns: Iterable[Pattern],
) -> tuple[Times, str | None]:
    """The times, and why the module does not run with a packed weight, if that came out."""
    refusal = None
    try:
        seconds = time_layer(caller, module, attr, packed, args, kwargs, flush=flush)
    except NotImplementedError as error:  # it does something with its weight that packed ones cannot
        packed, refusal = {}, str(error) or f"{type(caller).__name__} does not take packed weights"
        seconds = time_layer(caller, module, attr, packed, args, kwargs, flush=flush)
    dense = seconds[_DENSE].best_dense
    rest = {str(p): seconds[str(p)].packed if str(p) in packed else dense for p in patterns}
    return {_DENSE: dense, **rest}, refusal


def _packed(weight: Weight, module: nn.Module, patterns: Iterable[Pattern]) -> dict[str, nn.Parameter]:
    """The weight in each pattern, as `convert` would pack it."""
    assert weight.group_dim is not None  # weights without one have no candidates
    packed = {}
    for pattern in patterns:
        tensor = compress(weight.parameter.detach(), pattern, dim=weight.group_dim, prune=True)
        engine = engine_for(module, tensor).name
        tensor = tensor if tensor.engine == engine else tensor.with_engine(engine)
        packed[str(pattern)] = nn.Parameter(tensor, requires_grad=False)
    return packed


def _key(
    caller: nn.Module, module: nn.Module, attr: str, args: tuple, kwargs: Mapping[str, Any], *, cold: bool
) -> tuple[str, int]:
    """What kind of layer it is, as text, and on how many tokens it runs."""
    kind = layer_kind(caller, module, attr)
    count = tokens(module, args, kwargs)
    inputs: object = signature((args, kwargs))
    simple = type(module) in SIMPLE and caller is module
    if isinstance(module, nn.Linear) and simple:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        inputs = (first.dtype, first.is_contiguous())
    # Modules of other types are told apart by their place in memory: good for one run, never for a file.
    return f"{'' if simple else '!'}{kind} {inputs} {'cold' if cold else 'warm'}", count


def machine_key() -> str:
    """What times depend on besides the layer."""
    info = build_info()
    engine = "reference" if info.reference else f"{info.cpu_isa}, debug {info.debug}"
    return f"{cpu_model()}, {engine}, {torch.get_num_threads()} threads, {info.version}, torch {info.torch}"


class _File:
    """Times by kind of layer and number of tokens, for this machine; other machines' are kept beside."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._machine = machine_key()
        self._changed = False
        self._layers: dict[str, dict[int, Times]] = {}
        for layer, counts in self._read().get(self._machine, {}).items():
            self._layers[layer] = {int(count): times for count, times in counts.items()}

    def _read(self) -> dict[str, Any]:
        if self._path is None or not self._path.exists():
            return {}
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a damaged cache is an empty one
            return {}
        return content if isinstance(content, dict) else {}

    def find(self, layer: str, count: int, forms: Iterable[str]) -> Times | None:
        """The times of all forms, measured or between two that were; ``None`` if one is missing."""
        measured = self._layers.get(layer, {})
        times: Times = {}
        for form in forms:
            points = sorted((at, rows[form]) for at, rows in measured.items() if form in rows)
            seconds = _between(points, count)
            if seconds is None:
                return None
            times[form] = seconds
        return times

    def add(self, layer: str, count: int, times: Times) -> None:
        self._layers.setdefault(layer, {}).setdefault(count, {}).update(times)
        self._changed = True

    def save(self) -> None:
        if self._path is None or not self._changed:
            return
        content = self._read()
        content[self._machine] = {k: v for k, v in self._layers.items() if not k.startswith("!")}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self._path) as file:
            file.write(json.dumps(content, indent=1).encode())


def _between(points: list[tuple[int, float]], count: int) -> float | None:
    """The value at ``count`` of a line through sorted points; ``None`` outside them or in too wide a gap."""
    at = bisect(points, (count, float("inf")))
    if at and points[at - 1][0] == count:
        return points[at - 1][1]
    if at in (0, len(points)) or points[at][0] > _WIDEST * points[at - 1][0]:
        return None
    (low, first), (high, last) = points[at - 1], points[at]
    return first + (last - first) * (count - low) / (high - low)
