"""Tables for terminals."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], body: Sequence[Sequence[str]], words: Sequence[int]) -> str:
    """Lays cells out in columns: those of ``words`` to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]

    def laid_out(line: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if i in words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([laid_out(head), "  ".join("-" * width for width in widths), *map(laid_out, body)])


def number(value: int | None) -> str:
    """A count with separators; a dash for ``None``."""
    return "-" if value is None else f"{value:,}"
