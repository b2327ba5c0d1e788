"""The bench of whole models runs, and keeps the rows of earlier runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_models", BENCH / "bench_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_models", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", ["bert", "llama", "resnet"])
def test_dry_run(
    bench: ModuleType,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    # Compiling takes most of the time, and is what other tests are for.
    monkeypatch.setattr(bench.torch, "compile", lambda module, **options: module)
    stored = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["bench", model, "--dry-run", "--json", str(stored)])
    assert bench.main() == 0
    out = capsys.readouterr().out
    for word in (f"{model} float32 2:4", "packed compiled", "over eager", "over compiled", "reason"):
        assert word in out
    assert not stored.exists()


def test_rows_are_merged(bench: ModuleType, tmp_path: Path) -> None:
    def row(model: str, dtype: str, value: int) -> dict[str, Any]:
        return {"model": model, "dtype": dtype, "pattern": "2:4", "batch": "1", "value": value}

    path = tmp_path / "models.json"
    runs = [("llama", "float32"), ("bert", "bfloat16"), ("bert", "float32"), ("llama", "float32")]
    for number, (model, dtype) in enumerate(runs):
        path.write_text(json.dumps(bench.merged(path, row(model, dtype, number))), encoding="utf-8")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [(r["model"], r["dtype"], r["value"]) for r in rows] == [
        ("bert", "float32", 2),
        ("bert", "bfloat16", 1),
        ("llama", "float32", 3),
    ]


def test_different_outputs_end_it(bench: ModuleType) -> None:
    ones = bench.torch.ones(3)
    bench._check({"eager": ones, "packed": ones * 1.001}, 0.01)
    with pytest.raises(SystemExit, match=r"packed differs from eager by 0\.5"):
        bench._check({"eager": ones, "packed": ones * 1.5}, 0.01)
