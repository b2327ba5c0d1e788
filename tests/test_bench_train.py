"""``bench/bench_train.py`` runs, and every path trains alike."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("bench_train", "common", "official"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import bench_train

    file = tmp_path / "train.json"
    assert bench_train.main(["--dry-run", "--rounds", "3", "--threads", "1", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert len(record["rows"]) == 2 * len(bench_train.PATHS)
    assert {row["model"] for row in record["rows"]} == {"MLP, SGD", "GPT-2 block, AdamW"}
    assert len(record["others"]["losses"]) == 4
    assert all(entry["largest relative difference"] < 1e-4 for entry in record["others"]["losses"])
