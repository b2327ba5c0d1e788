"""The bench of int8 layers on tiny sizes: that all candidates run, and what it stores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nmsparse_ext._build import extension

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.mark.skipif(extension is None, reason="benches measure compiled kernels")
def test_dry_run(tmp_path: Path) -> None:
    out = tmp_path / "int8_cpu.json"
    command = [sys.executable, "-W", "ignore", str(BENCH / "bench_int8.py"), "--dry-run", "--out", str(out)]
    run = subprocess.run([*command, "--pattern", "2:4", "1:16"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "4 rows" in run.stdout
    stored = json.loads(out.read_text())
    assert [(row["batch"], row["pattern"]) for row in stored["rows"]] == [
        (batch, pattern) for batch in (1, 4) for pattern in ("2:4", "1:16")
    ]
    candidates = stored["candidates (ms)"]["64x128 batch 4"]
    assert any(name.startswith("dynamic") for name in candidates)
    assert {"2:4", "1:16", "float32 packed 2:4", "bfloat16 dense"} <= set(candidates)
    # Measured again, a row takes its old one's place; the README's table is made of them.
    run = subprocess.run([*command, "--pattern", "2:4"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(json.loads(out.read_text())["rows"]) == 4
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table: int8_cpu (how) -->\n<!-- end of table -->\n")
    table = [sys.executable, str(BENCH / "make_readme_table.py"), "--page", str(readme)]
    subprocess.run([*table, "--results", str(tmp_path)], check=True)
    assert "| 1:16 | 64x128 | 4 |" in readme.read_text()
