"""What is sparse in a model, and what that saves: per weight the pattern, parameters, MACs and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

from torch import nn

from ..macs import count_macs
from ..pattern import Pattern
from ..scheme import Scheme, as_scheme
from ..tensor import NMTensor
from ..weights import Weight, weights
from .detect import detect_pattern, has_nonzero
from .example import ExampleInput
from .table import number, table


@dataclass(frozen=True)
class WeightSummary:
    """One weight.

    Attributes:
        name: Parameter name.
        shape: Its shape.
        pattern: Its pattern as text; ``None`` if it is dense.
        reason: Why it is dense, or where the pattern comes from.
        params: How many weights it has.
        kept: How many of them the pattern keeps.
        macs: Multiply-accumulates of one run of the example, were it dense; ``None`` without an example, or
            for a module type whose products `count_macs` does not know.
        kept_macs: The same with the pattern.
        dense_bytes: Bytes of the dense weight.
        bytes: Bytes with the pattern, packed.
        held_bytes: Bytes that it takes in memory now; of a packed weight with all that its engine keeps.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str | None
    reason: str
    params: int
    kept: int
    macs: int | None
    kept_macs: int | None
    dense_bytes: int
    bytes: int
    held_bytes: int


@dataclass(frozen=True)
class Summary(Sequence[WeightSummary]):
    """All weights, in the model's order; ``print`` shows them as a table with totals."""

    rows: tuple[WeightSummary, ...]

    @overload
    def __getitem__(self, index: int) -> WeightSummary: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[WeightSummary, ...]: ...
    def __getitem__(self, index: int | slice) -> WeightSummary | tuple[WeightSummary, ...]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[WeightSummary]:
        return iter(self.rows)

    def total(self, column: str) -> int | None:
        """Sum of a column of numbers as far as they are known; ``None`` if none is."""
        known = [value for row in self.rows if (value := getattr(row, column)) is not None]
        return sum(known) if known or not self.rows else None

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as plain JSON types."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        numbers = ("params", "kept", "macs", "kept_macs", "dense_bytes", "bytes", "held_bytes")
        body = [
            [row.name, "x".join(map(str, row.shape)), row.pattern or "dense"]
            + [number(getattr(row, column)) for column in numbers]
            + [row.reason]
            for row in self.rows
        ]
        body.append(["total", "", ""] + [number(self.total(column)) for column in numbers] + [""])
        head = [
            "weight",
            "shape",
            "pattern",
            "params",
            "kept",
            "MACs",
            "kept MACs",
            "dense bytes",
            "bytes",
            "held now",
            "why",
        ]
        return table(head, body, words=(0, 1, 2, 10))


def summary(
    model: nn.Module,
    scheme: Scheme | Mapping[str, Pattern | str] | Pattern | str | None = None,
    example_input: ExampleInput | None = None,
) -> Summary:
    """Lists the weights of two or more dims with their pattern and what it saves.

    Args:
        model: The model, packed or not.
        scheme: Patterns to assume. ``None`` takes those of packed weights, and detects those that dense
            weights hold.
        example_input: A tensor, a tuple of arguments or a mapping of keyword arguments, to count MACs with:
            the model runs once on it.

    Returns:
        One row for each weight, tied ones once.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``scheme`` does not match the model.
    """
    given = None if scheme is None else as_scheme(scheme, model)
    named = {} if given is None else given.resolve(model)
    everything = weights(model)
    macs = None if example_input is None else count_macs(model, example_input)
    rows = []
    for weight in everything:
        parameter = weight.parameter
        pattern: Pattern | None
        if isinstance(parameter, NMTensor):
            pattern, reason = parameter.pattern, "packed"
        elif given is not None:
            pattern = named[weight.name].pattern if weight.name in named else None
            reason = "scheme" if pattern is not None else given.dense.get(weight.name, "not in the scheme")
        else:
            pattern, reason = _detected(weight)
        rows.append(_row(weight, pattern, reason, None if macs is None else macs[weight.name]))
    return Summary(tuple(rows))


def _detected(weight: Weight) -> tuple[Pattern | None, str]:
    if weight.dense_because is not None or weight.group_dim is None:
        return None, weight.dense_because or ""
    parameter = weight.parameter.detach()
    if not has_nonzero(parameter):
        return None, "all weights are zero"
    found = detect_pattern(parameter, dim=weight.group_dim, allowed=lambda p: weight.misfit(p) is None)
    return found, "holds none of the usual patterns" if found is None else "detected"


def _row(weight: Weight, pattern: Pattern | None, reason: str, macs: int | None) -> WeightSummary:
    parameter = weight.parameter
    dense_bytes = weight.nbytes(None)
    return WeightSummary(
        name=weight.name,
        shape=tuple(parameter.shape),
        pattern=None if pattern is None else str(pattern),
        reason=reason,
        params=weight.kept(None),
        kept=weight.kept(pattern),
        macs=macs,
        kept_macs=None if macs is None else weight.kept(pattern, macs),
        dense_bytes=dense_bytes,
        bytes=weight.nbytes(pattern),
        held_bytes=parameter.held_nbytes if isinstance(parameter, NMTensor) else dense_bytes,
    )
