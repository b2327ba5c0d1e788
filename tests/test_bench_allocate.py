"""``bench/bench_allocate.py`` runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("bench_allocate", "common"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import bench_allocate

    file = tmp_path / "allocate.json"
    assert bench_allocate.main(["--dry-run", "--threads", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    criteria = ["magnitude", "taylor", "output"] * 2
    assert [row["criterion"] for row in rows] == [criterion for criterion in criteria for _ in range(2)]
    assert {row["model"] for row in rows} == {"ResNet-50", "Llama, 1B parameters, bfloat16"}
