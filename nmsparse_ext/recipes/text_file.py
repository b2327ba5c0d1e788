"""A user's text data: CSV, JSON lines or plain text, parted for training, validation and test."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Example(NamedTuple):
    """One text, and its label if there are labels."""

    text: str
    label: str | None = None


def read_examples(path: Path, text_column: str, label_column: str | None) -> list[Example]:
    """Read a data file.

    Args:
        path: ``.csv`` or ``.tsv`` with a header, ``.jsonl`` with an object a line, or a text file, in which
            empty lines part one example from the next.
        text_column: Column or key of the text.
        label_column: Column or key of the label; ``None`` if there is none. Plain text has none.

    Returns:
        The examples, in order.

    Raises:
        ValueError: Naming file and line, if the file is not what its name says, or a column is missing.
    """
    if not path.is_file():
        raise ValueError(f"data: there is no file {path}")
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","))
        numbered = [(i, row) for i, row in enumerate(rows, 2)]
    elif suffix in (".jsonl", ".json"):
        numbered = []
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"data: {path}, line {i}: no JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"data: {path}, line {i}: must be an object, got {row!r}")
            numbered.append((i, row))
    else:
        if label_column is not None:
            raise ValueError(f"data: {path} is plain text and has no labels; use .csv, .tsv or .jsonl")
        pieces = path.read_text(encoding="utf-8").split("\n\n")
        return [Example(piece.strip("\n")) for piece in pieces if piece.strip()]
    columns = [text_column] if label_column is None else [text_column, label_column]
    for i, row in numbered:
        for column in columns:
            if row.get(column) is None:
                raise ValueError(
                    f"data: {path}, line {i}: no {column!r}; there are {', '.join(map(str, row))}"
                )
    return [
        Example(str(row[text_column]), None if label_column is None else str(row[label_column]))
        for _, row in numbered
    ]


def part_examples(
    examples: Sequence[Example], validation_share: float, test_share: float
) -> dict[str, list[Example]]:
    """Parts the examples into "train", "validation" and "test".

    Which part an example is in is told by a hash of its text: the same in every run, whatever the seed, and
    equal texts are in the same part.

    Raises:
        ValueError: If a part would be empty.
    """
    ranked = sorted(
        examples, key=lambda example: (hashlib.sha256(example.text.encode()).digest(), example.label or "")
    )
    cuts = [
        _whole_texts(ranked, round(share * len(ranked)))
        for share in (test_share, test_share + validation_share)
    ]
    parts = {"train": ranked[cuts[1] :], "validation": ranked[cuts[0] : cuts[1]], "test": ranked[: cuts[0]]}
    for name, part in parts.items():
        if not part:
            raise ValueError(f"data: {len(examples)} examples are too few, nothing is left for {name}")
    return parts


def _whole_texts(ranked: Sequence[Example], cut: int) -> int:
    """Moves a cut up, so that it does not fall between equal texts."""
    while 0 < cut < len(ranked) and ranked[cut].text == ranked[cut - 1].text:
        cut += 1
    return cut
