"""The bench of convolutions, as far as it measures nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """``bench/bench_conv.py`` as a module."""
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("bench_conv", BENCH / "bench_conv.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["bench_conv"] = module  # dataclasses look it up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCH))
    return module


def test_dry_run_lists_every_layer(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--dry-run"]) == 0
    everything = capsys.readouterr().out.splitlines()
    assert len(everything) == 22 * 2 * 2 == len(set(everything))
    assert "float32 3x3/2 128@56 N=1 2:4 1:4 1:8 1:16" in everything
    parts = []
    for part in ("1/3", "2/3", "3/3"):
        bench.main(["--dry-run", "--part", part])
        parts += capsys.readouterr().out.splitlines()
    assert sorted(parts) == sorted(everything)
    bench.main(["--dry-run", "--layer", "3x3 64@56", "--batch", "8", "--dtype", "bfloat16"])
    assert capsys.readouterr().out == "bfloat16 3x3 64@56 N=8 2:4 1:4 1:8 1:16\n"


def row(**changed: Any) -> dict[str, Any]:
    """A row as `measure` makes it."""
    timing = {"median": 2e-3, "low": 1.9e-3, "high": 2.2e-3}
    return {
        "dtype": "float32",
        "layer": "3x3 64@56",
        "batch": 1,
        "pattern": "2:4",
        "over dense": {"ratio": 1.3},
        "packed": timing,
        "best dense": "oneDNN prepacked 2.5 ms",
        "goal": "met",
    } | changed


def test_verdicts(bench: ModuleType) -> None:
    goal = bench.Case("float32", 1, bench.RESNET50[0])
    assert bench.verdict(goal, "2:4", 1.25) == "met"
    assert bench.verdict(goal, "2:4", 1.2) == "1.25x"
    assert bench.verdict(goal, "2:4", 0.99) == "lost"
    assert bench.verdict(goal, "1:16", 3.0) == "-"
    assert bench.verdict(bench.Case("bfloat16", 1, bench.RESNET50[0]), "2:4", 1.2) == "-"
    assert bench.verdict(bench.Case("float32", 1, bench.RESNET50[-1]), "2:4", 1.2) == "-"


def test_parts_add_up_in_the_file(bench: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "conv.json"
    bench.store([row(pattern="1:8", **{"over dense": {"ratio": 0.9}}), row(batch=8)], path)
    bench.store([row(), row(layer="3x3 512@7", **{"over dense": {"ratio": 1.5}})], path)
    stored = json.loads(path.read_text())
    assert [(r["layer"], r["batch"], r["pattern"]) for r in stored["rows"]] == [
        ("3x3 64@56", 1, "2:4"),
        ("3x3 64@56", 1, "1:8"),
        ("3x3 64@56", 8, "2:4"),
        ("3x3 512@7", 1, "2:4"),
    ]
    assert stored["summary"][0] == {
        "dtype": "float32",
        "kernel": "3x3",
        "batch": 1,
        "2:4": "1.30-1.50x, median 1.40x",
        "1:4": "-",
        "1:8": "0.90-0.90x, median 0.90x; 1 of 1 lost",
        "1:16": "-",
    }


def test_lines_name_losers(bench: ModuleType) -> None:
    assert bench.line(row(goal="lost")).endswith("lost")
