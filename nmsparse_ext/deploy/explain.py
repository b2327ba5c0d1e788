"""Does it pay to make a model sparse, here? Per weight the times, and what speaks against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from .._build import BuildInfo, build_info
from ..engines import ENGINES
from ..pattern import Pattern
from ..scheme import Scheme, as_scheme
from ..tensor import NMTensor, compress
from ..weights import Weight, weights
from .example import ExampleInput
from .plan import Plan, Seconds
from .race import MIN_GAIN, flush_for, layer_kind, race, time_layer
from .support import engine_for, why_not_packed, why_unpacked
from .table import number, table

#: Numbers of tokens that are tried where packed is not faster with the example's.
_OTHER_TOKENS = (1, 8, 64, 512)
#: Seconds: of layers that take longer than this no other number of tokens is tried.
_LONG = 0.5


@dataclass(frozen=True)
class Verdict:
    """Whether packing one weight pays.

    Attributes:
        name: Parameter name.
        shape: Its shape.
        pattern: The pattern, as text; ``None`` if it stays dense whatever the pattern.
        pays: Whether the packed layer is faster than the fastest dense one.
        code: Why, for programs: ``"faster"``; ``"dense faster"``; ``"tokens"`` (dense is faster with so many
            of them, packed with another number); ``"engine"`` (none that multiplies with the packed weight
            as it is); ``"shape"``; ``"layer type"``; ``"left out"``; ``"not run"`` (the example does not
            reach it).
        reason: The same in words.
        tokens: Rows of input that one run of the example multiplies with it; ``None`` if it was not timed.
        dense_ms: Median time of the layer with the dense weight in eager mode; ``None`` if not timed.
        prepacked_ms: The same with a weight that oneDNN or MKL packed beforehand; ``None`` where there is
            none.
        packed_ms: The same with the packed weight.
        ratio: The faster of the dense times, divided by the packed one.
        engine: The engine that runs the packed weight.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str | None
    pays: bool
    code: str
    reason: str
    tokens: int | None = None
    dense_ms: float | None = None
    prepacked_ms: float | None = None
    packed_ms: float | None = None
    ratio: float | None = None
    engine: str | None = None


@dataclass(frozen=True)
class Explanation(Sequence[Verdict]):
    """The verdicts on all weights, in the model's order; ``print`` shows them as a table.

    Attributes:
        rows: One for each weight.
        cold: Whether layers were timed with weights from memory, not from the caches.
        notes: What holds for all of them: engines that this machine lacks, and why.
    """

    rows: tuple[Verdict, ...]
    cold: bool
    notes: tuple[str, ...]

    @overload
    def __getitem__(self, index: int) -> Verdict: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Verdict, ...]: ...
    def __getitem__(self, index: int | slice) -> Verdict | tuple[Verdict, ...]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.rows)

    #: Of the table.
    head = ("weight", "pattern", "tokens", "dense ms", "prepacked ms", "packed ms", "pays", "why")
    words = (0, 1, 6, 7)

    def cells(self) -> list[tuple[str, ...]]:
        """The table."""
        return [
            (
                row.name,
                row.pattern or "-",
                number(row.tokens),
                *(
                    "-" if ms is None else f"{ms:.3f}"
                    for ms in (row.dense_ms, row.prepacked_ms, row.packed_ms)
                ),
                "yes" if row.pays else "no",
                row.reason,
            )
            for row in self.rows
        ]

    @property
    def total(self) -> str:
        """What it comes to, in a line."""
        paying = sum(row.pays for row in self.rows)
        weights = "weights from memory" if self.cold else "weights in the caches"
        return f"sparse pays for {paying} of {len(self.rows)} weights here ({weights})"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        rows = [asdict(row) | {"shape": list(row.shape)} for row in self.rows]
        return {"weights": rows, "cold": self.cold, "notes": list(self.notes)}

    def __str__(self) -> str:
        return "\n".join([table(self.head, self.cells(), self.words), self.total, *self.notes])


def explain(
    model: nn.Module,
    scheme: Scheme | Mapping[str, Pattern | str] | Pattern | str,
    example_input: ExampleInput,
    *,
    choose: Callable[[Weight], bool] = lambda weight: True,
    after: Callable[[str], object] = lambda name: None,
) -> Explanation:
    """Tells for each weight whether it pays to prune and pack it, on this machine and this input.

    Nothing is changed, and weights need not be pruned: they are pruned by magnitude for the measurement,
    which is that of `convert`. Where dense is faster, linear layers are timed with other numbers of tokens,
    too, to say whether that is what matters.

    Args:
        model: The model.
        scheme: The patterns.
        example_input: What the model is called with in earnest: a tensor, a tuple of arguments or a mapping
            of keyword arguments. It decides how many tokens each layer gets.
        choose: Which weights to look at.
        after: Called with the name of each weight that has been timed.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``scheme`` does not match the model, or weights of it are packed already.
    """
    given = as_scheme(scheme, model)
    plans = {plan.weight.name: plan for plan in packed_plans(model, given)}
    listed = [weight for weight in weights(model) if choose(weight)]
    raced = [plans[weight.name] for weight in listed if weight.name in plans]
    cold = race(model, raced, example_input, None, "best", after=after)
    hints = _Hints(model)
    uniform = Pattern.parse(scheme) if isinstance(scheme, (Pattern, str)) else None
    rows = []
    for weight in listed:
        plan = plans.get(weight.name)
        rows.append(_left(weight, given, uniform) if plan is None else _raced(plan, hints))
    patterns = dict.fromkeys(plan.pattern for plan in raced if plan.pattern is not None)
    return Explanation(tuple(rows), cold, tuple(_notes(build_info(), patterns)))


def packed_plans(model: nn.Module, scheme: Scheme) -> list[Plan]:
    """The weights that the scheme names and that can run packed, pruned by magnitude and packed.

    They are as `convert` would pack them; the model is left as it is.
    """
    named = scheme.resolve(model, strict=False)
    plans = []
    for weight in weights(model):
        if weight.name not in named or _unsupported(weight) is not None:
            continue
        assert weight.group_dim is not None
        pattern = named[weight.name].pattern
        if isinstance(weight.parameter, NMTensor):
            raise ValueError(f"model must be dense, to be compared with, but {weight.name} is packed")
        packed = compress(weight.parameter.detach(), pattern, dim=weight.group_dim, prune=True)
        engine = engine_for(weight.module, packed).name
        packed = packed if packed.engine == engine else packed.with_engine(engine)
        plans.append(Plan(weight, None, pattern, nn.Parameter(packed, requires_grad=False)))
    return plans


# ---------------------------------------------------------------------------------------------- what it found


def _left(weight: Weight, scheme: Scheme, pattern: Pattern | None) -> Verdict:
    """Of a weight that was not timed."""
    shape = tuple(weight.parameter.shape)
    because = _unsupported(weight)
    code = "layer type"
    if because is None and weight.dense_because is not None:
        because = weight.dense_because
    if because is None and pattern is not None and weight.misfit(pattern) is not None:
        because, code = f"not aligned: {weight.misfit(pattern)}", "shape"
    if because is None:
        because, code = scheme.dense.get(weight.name, "not in the scheme"), "left out"
    return Verdict(weight.name, shape, None, False, code, because)


def _raced(plan: Plan, hints: _Hints) -> Verdict:
    packed = cast(NMTensor, plan.packed)
    seconds = plan.seconds
    measured = seconds.dense > 0
    pays = plan.choice == "packed"
    code, reason = "faster" if pays else "dense faster", plan.reason
    if not measured:
        code = "layer type" if plan.tokens else "not run"
    elif not pays:
        reason = _times(seconds)
        lacking = _why_no_engine(plan)
        if lacking is not None:
            code, reason = "engine", f"{lacking}; {reason}"
        elif (hint := hints.tokens_that_pay(plan)) is not None:
            code, reason = "tokens", f"{hint}; {reason}"
    return Verdict(
        plan.weight.name,
        tuple(plan.weight.parameter.shape),
        str(plan.pattern),
        pays,
        code,
        reason,
        plan.tokens if measured else None,
        seconds.dense * 1e3 if measured else None,
        seconds.prepacked * 1e3 if seconds.prepacked else None,
        seconds.packed * 1e3 if measured else None,
        seconds.gain if measured else None,
        packed.engine,
    )


def _times(seconds: Seconds) -> str:
    dense, packed = seconds.hardest
    both = f"{dense * 1e3:.3f} ms against {packed * 1e3:.3f} ms packed"
    if packed >= dense:
        return f"dense is {packed / dense:.2f}x as fast: {both}"
    return f"packed gains less than the noise of a measurement: dense {both}"


def _unsupported(weight: Weight) -> str | None:
    reasons = [why_not_packed(module, weight.parameter) for module, _ in weight.places]
    return next(filter(None, reasons), None)


def _why_no_engine(plan: Plan) -> str | None:
    """Why no engine multiplies with the packed weight as it is; ``None`` if one does."""
    packed = cast(NMTensor, plan.packed)
    unpacked = next(filter(None, (why_unpacked(module, packed) for module, _ in plan.weight.places)), None)
    if unpacked is not None:
        return f"unpacked in every call: {unpacked}"
    if ENGINES[packed.engine].forms:
        return None
    info = build_info()
    if info.reference and packed.device.type == "cpu":
        return f"no engine: pure PyTorch ({info.reference_reason})"
    reasons = dict.fromkeys(
        f"{name}: {why}"
        for name, engine in ENGINES.items()
        if engine.forms and engine.automatic and (why := engine.why_not(packed)) is not None
    )
    return f"no engine ({'; '.join(reasons)})"


def _notes(info: BuildInfo, patterns: Mapping[Pattern, None]) -> Iterator[str]:
    if info.reference:
        yield f"CPU engines: none, {info.reference_reason}"
    if info.cuda_reason:
        yield f"GPU engines: none, {info.cuda_reason}"
    if info.cusparselt_reason:
        yield f"sparse tensor cores: none, no cuSPARSELt: {info.cusparselt_reason}"
    for pattern in patterns:
        if not pattern.embeds_in_24:
            yield f"{pattern} does not embed in 2:4: sparse tensor cores cannot run it, wherever it runs"


class _Hints:
    """Whether another number of tokens would make packed faster."""

    def __init__(self, model: nn.Module) -> None:
        self._flush = flush_for(model, "cpu")
        self._known: dict[tuple, dict[int, Seconds]] = {}

    def tokens_that_pay(self, plan: Plan) -> str | None:
        module, attr = plan.weight.places[0]
        if type(module) is not nn.Linear or plan.seconds.dense > _LONG or not plan.tokens:
            return None
        packed = cast(NMTensor, plan.packed)
        kind = (*layer_kind(module, module, attr), packed.pattern, packed.engine)
        timed = self._known.setdefault(kind, {})
        near = sorted(_OTHER_TOKENS, key=lambda count: abs(count.bit_length() - plan.tokens.bit_length()))
        for count in near:
            if count == plan.tokens or plan.seconds.dense * count / plan.tokens > _LONG:
                continue
            if count not in timed:
                x = _rows(count, module)
                alone = {"packed": plan.packed}
                timed[count] = time_layer(module, module, attr, alone, (x,), {}, flush=self._flush)["packed"]
            ratio = timed[count].gain
            if ratio >= MIN_GAIN:
                few = "few" if plan.tokens < count else "many"
                return f"too {few} tokens (with {count} packed is {ratio:.2f}x as fast)"
        return None


def _rows(count: int, module: nn.Linear) -> Tensor:
    weight = module.weight
    with torch.random.fork_rng():
        return torch.randn(count, module.in_features).to(weight.device, weight.dtype)
