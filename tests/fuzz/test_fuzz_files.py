"""A small share of the fuzz run whose totals are in bench/results/fuzz_files.json."""

from __future__ import annotations

from pathlib import Path

from fuzz.fuzz_files import run


def test_damaged_files_are_refused_or_right(tmp_path: Path) -> None:
    result = run(300, seed=1, folder=tmp_path)
    assert not result["failures"], "\n".join(result["failures"])
    assert result["refused"] > 100
    assert result["loaded"] > 20
