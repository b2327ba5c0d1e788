"""The long fuzz run that is on record; see docs/format.md."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_long_run_is_on_record() -> None:
    result = json.loads((ROOT / "bench/results/fuzz_files.json").read_text(encoding="utf-8"))
    assert result["mutations"] >= 10_000
    assert result["sanitizer"] == "address,undefined"
    assert not result["build"]["reference"]
    assert result["failures"] == []
