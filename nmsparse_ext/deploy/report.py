"""What `convert` did with each weight, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

from torch import nn

from .table import number, table

_ATTRIBUTE = "_nmsparse_report"


@dataclass(frozen=True)
class LayerReport:
    """One weight of a converted model.

    Attributes:
        name: Parameter name.
        pattern: Its pattern as text; ``None`` if none was found or given.
        tokens: Rows of input that one run of the example multiplies with it; ``None`` if not measured.
        dense_ms: Median time of its module with the dense weight, in eager mode, summed over that run;
            ``None`` if not measured.
        prepacked_ms: The same product with a weight that oneDNN or MKL packed beforehand, as compiled and
            frozen models call it; ``None`` where there is none.
        packed_ms: The time of the module with the packed weight, in eager mode.
        bare_ms: The faster of that and of its product alone, as compiled models call it.
        dense_bytes: Bytes of the dense weight.
        packed_bytes: Bytes of the packed weight, with what its engine keeps; ``None`` without a pattern.
        engine: The engine that runs, or would run, the packed weight; ``None`` without a pattern.
        choice: ``"packed"`` or ``"dense"``.
        reason: Why, in words.
    """

    name: str
    pattern: str | None
    tokens: int | None
    dense_ms: float | None
    prepacked_ms: float | None
    packed_ms: float | None
    bare_ms: float | None
    dense_bytes: int
    packed_bytes: int | None
    engine: str | None
    choice: str
    reason: str


@dataclass(frozen=True)
class WholeModel:
    """Median times of the whole model on the example input.

    Attributes:
        dense_ms: With dense weights.
        packed_ms: As it was converted; never the larger one, because what made it slower was undone.
        compiled: Whether both were compiled, with dense weights as constants of the graph; else they ran in
            eager mode.
    """

    dense_ms: float
    packed_ms: float
    compiled: bool = False


@dataclass(frozen=True)
class Report(Sequence[LayerReport]):
    """The rows of all weights, in the model's order; ``print`` shows them as a table.

    Attributes:
        rows: One for each weight.
        cold: Whether layers were timed with weights from memory, not from the caches.
        whole: Times of the whole model; ``None`` if it was not timed.
    """

    rows: tuple[LayerReport, ...]
    cold: bool = False
    whole: WholeModel | None = None

    @overload
    def __getitem__(self, index: int) -> LayerReport: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[LayerReport, ...]: ...
    def __getitem__(self, index: int | slice) -> LayerReport | tuple[LayerReport, ...]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.rows)

    @property
    def packed(self) -> tuple[str, ...]:
        """Names of the weights that are packed now."""
        return tuple(row.name for row in self.rows if row.choice == "packed")

    @property
    def dense_bytes(self) -> int:
        """Bytes of all weights, were they dense."""
        return sum(row.dense_bytes for row in self.rows)

    @property
    def bytes(self) -> int:
        """Bytes of all weights as they are now."""
        return sum(_bytes_now(row) for row in self.rows)

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as plain JSON types."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        head = (
            "layer",
            "pattern",
            "tokens",
            "dense ms",
            "prepacked ms",
            "packed ms",
            "bare ms",
            "dense bytes",
            "packed bytes",
            "choice",
            "reason",
        )
        body = [
            (
                row.name,
                row.pattern or "-",
                number(row.tokens),
                _milliseconds(row.dense_ms),
                _milliseconds(row.prepacked_ms),
                _milliseconds(row.packed_ms),
                _milliseconds(row.bare_ms),
                number(row.dense_bytes),
                number(row.packed_bytes),
                row.choice,
                row.reason,
            )
            for row in self.rows
        ]
        total = f"{len(self.packed)} of {len(self)} weights packed; "
        total += f"{self.bytes:,} bytes of {self.dense_bytes:,} dense"
        if self.cold:
            total += "; layers timed with weights from memory"
        if self.whole is not None:
            compiled = "compiled " if self.whole.compiled else ""
            total += f"; the {compiled}model takes {self.whole.packed_ms:.3f} ms, "
            total += f"dense {self.whole.dense_ms:.3f} ms"
        return f"{table(head, body, words=(0, 1, 9, 10))}\n{total}"


def report(model: nn.Module) -> Report:
    """Returns the report of the last `convert` of ``model``.

    Raises:
        ValueError: If it has not been converted.
    """
    found = getattr(getattr(model, "_orig_mod", model), _ATTRIBUTE, None)
    if found is None:
        raise ValueError(
            f"this {type(model).__name__} has not been converted: call nmsparse_ext.convert first"
        )
    return found


def attach(model: nn.Module, report: Report) -> None:
    """Keeps a report with its model, so that copies have it too; it is no part of the state dict."""
    setattr(model, _ATTRIBUTE, report)


def _bytes_now(row: LayerReport) -> int:
    return row.packed_bytes if row.choice == "packed" and row.packed_bytes is not None else row.dense_bytes


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
