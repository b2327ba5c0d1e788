"""What `prune_model` did with each weight, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

from ..deploy.table import table
from ..scheme import Scheme
from ..search.permute import Permutation


@dataclass(frozen=True)
class PrunedWeight:
    """One weight of a pruned model.

    Attributes:
        name: Parameter name.
        pattern: Its pattern as text; ``None`` if it stays dense.
        criterion: What it was pruned by; ``None`` if it stays dense.
        error: By how much the layer's output changed on the calibration data: ``|W' x - W x| / |W x|``, norms
            over all outputs and tokens or positions. ``None`` if nothing was measured.
        kept: Which part of the weight's sum of squares stood where weights were kept, 0 to 1, before any
            update of them; 1 for a dense one.
        seconds: What choosing its mask and its values took.
        skipped: Why it stays dense; ``None`` if it was pruned.
    """

    name: str
    pattern: str | None
    criterion: str | None
    error: float | None
    kept: float
    seconds: float
    skipped: str | None


@dataclass(frozen=True)
class PruneReport(Sequence[PrunedWeight]):
    """The rows of all weights, in the model's order; ``print`` shows them as a table.

    Attributes:
        rows: One for each weight.
        scheme: What the model has now: for `convert`, a `Sparsifier`, or a file.
        permutation: What was reordered before; ``None`` if nothing was to be.
        recalibrated: Names of the batch norms whose statistics were taken anew.
        seconds: Of everything.
    """

    rows: tuple[PrunedWeight, ...]
    scheme: Scheme
    permutation: Permutation | None
    recalibrated: tuple[str, ...]
    seconds: float

    @overload
    def __getitem__(self, index: int) -> PrunedWeight: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[PrunedWeight, ...]: ...
    def __getitem__(self, index: int | slice) -> PrunedWeight | tuple[PrunedWeight, ...]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[PrunedWeight]:
        return iter(self.rows)

    @property
    def pruned(self) -> tuple[str, ...]:
        """Names of the weights that are pruned."""
        return tuple(row.name for row in self.rows if row.skipped is None)

    @property
    def skipped(self) -> dict[str, str]:
        """``{name: why}`` of the weights that stay dense."""
        return {row.name: row.skipped for row in self.rows if row.skipped is not None}

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return {
            "weights": [asdict(row) for row in self.rows],
            "permutation": None if self.permutation is None else self.permutation.to_json(),
            "recalibrated": list(self.recalibrated),
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        body = [
            (
                row.name,
                row.pattern or "-",
                row.criterion or "-",
                "-" if row.error is None else f"{row.error:.4f}",
                f"{row.kept:.2%}",
                f"{row.seconds:.2f}",
                row.skipped or "",
            )
            for row in self.rows
        ]
        head = ("weight", "pattern", "criterion", "output error", "kept", "seconds", "stays dense")
        lines = [table(head, body, words=(0, 1, 2, 6))]
        if self.permutation is not None:
            lines.append(str(self.permutation))
        total = f"{len(self.pruned)} of {len(self)} weights pruned in {self.seconds:.2f} s"
        if self.recalibrated:
            total += f"; statistics of {len(self.recalibrated)} batch norms taken anew"
        return "\n".join([*lines, total])
