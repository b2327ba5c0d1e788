"""``Budget``: how much of a model may be left, in parameters, MACs, bytes or seconds."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

#: What a budget can limit, in the order in which it is shown.
METRICS = ("params", "macs", "bytes", "latency")

Amount: TypeAlias = "float | int | str"

_TEXT = re.compile(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-zµ%]*)\s*", flags=re.IGNORECASE)
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_UNITS = {
    "params": 'a number of weights such as 5_000_000 or "5M"',
    "macs": 'a number of multiply-accumulates such as 10**9 or "1G"',
    "bytes": 'a number of bytes such as 10**7 or "10MB"',
    "latency": 'a time such as "3.5ms"',
}


class Limit(NamedTuple):
    """One limit: an absolute value, or (``relative``) a fraction of the dense model's."""

    value: float
    relative: bool


@dataclass(frozen=True, slots=True)
class Budget:
    """What a search may leave of a model; of several limits all hold.

    What is counted, and what a fraction is a fraction of: the model's prunable weights, dense; see `Costs`.

    Args:
        params: Weights kept. A float in (0, 1] is a fraction of the dense model's, a larger number absolute;
            so is text with a unit: ``"12.5%"``, ``"5M"``.
        macs: Multiply-accumulates of one call on the example input, in the same way.
        bytes: Bytes of values and indices as packed, in the same way; ``"10MB"`` (powers of 1000).
        latency: Time of the layers' products for one call on the example input: a fraction, or text with a
            unit, such as ``"3.5ms"``, as a bare number would not say which one it is in.

    Raises:
        TypeError: If a limit is no number and no text.
        ValueError: If there is no limit, or one is not allowed.

    Example:
        >>> Budget(params=0.125, latency="20ms")
        Budget(params=0.125, latency='20ms')
    """

    params: Amount | None = None
    macs: Amount | None = None
    bytes: Amount | None = None
    latency: Amount | None = None

    def __post_init__(self) -> None:
        if not self.limits():
            raise ValueError(f"Budget needs at least one of {', '.join(METRICS)}")

    def __repr__(self) -> str:
        given = {metric: getattr(self, metric) for metric in METRICS if getattr(self, metric) is not None}
        return f"Budget({', '.join(f'{metric}={value!r}' for metric, value in given.items())})"

    @classmethod
    def parse(cls, values: Iterable[str] | Mapping[str, Amount] | Budget) -> Budget:
        """Returns a budget from ``["params=0.125", "latency=3ms"]`` or ``{"params": 0.125}``.

        Raises:
            TypeError: If ``values`` is none of these.
            ValueError: If an entry is malformed, unknown or given twice.
        """
        if isinstance(values, Budget):
            return values
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise TypeError(
                f'budget must be a Budget, a mapping or a list like ["params=0.125"], got {values!r}'
            )
        pairs = list(values.items()) if isinstance(values, Mapping) else [_pair(text) for text in values]
        names = [name for name, _ in pairs]
        for name in names:
            if name not in METRICS:
                raise ValueError(f"budget limits one of {', '.join(METRICS)}, got {name!r}")
            if names.count(name) > 1:
                raise ValueError(f"budget limits {name} twice")
        return cls(**dict(pairs))

    def limits(self) -> dict[str, Limit]:
        """The limits that there are: ``{metric: Limit}``; latency in seconds."""
        given = {metric: getattr(self, metric) for metric in METRICS}
        return {metric: _limit(metric, value) for metric, value in given.items() if value is not None}


def _pair(text: object) -> tuple[str, str]:
    if not isinstance(text, str):
        raise TypeError(f'budget entries must be text such as "params=0.125", got {text!r}')
    name, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f'budget entries look like "params=0.125", got {text!r}')
    return name.strip(), value.strip()


def _limit(metric: str, given: object) -> Limit:
    allowed = f"a fraction in (0, 1], or {_UNITS[metric]}"
    unit = ""
    number: float
    if isinstance(given, str):
        match = _TEXT.fullmatch(given)
        try:
            number = float(match[1]) if match else math.nan
        except ValueError:  # "1.2.3"
            number = math.nan
        unit = match[2].lower() if match else ""
        whole = match is not None and match[1].isdigit()
    elif isinstance(given, numbers.Real) and not isinstance(given, bool):
        number, whole = float(given), isinstance(given, numbers.Integral)
    else:
        raise TypeError(f"{metric} must be {allowed}, got {given!r} of type {type(given).__name__}")
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{metric} must be {allowed}, got {given!r}")
    if unit == "%":
        number, unit, whole = number / 100, "", False
        if number > 1:
            raise ValueError(f"{metric} must be at most 100 % of the dense model, got {given!r}")
    if not unit and number <= 1:
        if whole:
            raise ValueError(
                f"{metric}={given!r} is ambiguous: 1.0 is all of the dense model; it must be {allowed}"
            )
        return Limit(number, relative=True)
    if metric == "latency":
        if unit not in _SECONDS:
            raise ValueError(f"latency must be {allowed}, got {given!r}")
        return Limit(number * _SECONDS[unit], relative=False)
    prefix = unit.removesuffix("b") if metric == "bytes" else unit
    if prefix not in _FACTORS:
        raise ValueError(f"{metric} must be {allowed}, got {given!r}")
    return Limit(number * _FACTORS[prefix], relative=False)
