"""The README's code must run, and its generated parts must be what the scripts make of the files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_there_is_code():
    assert PYTHON_BLOCKS


@pytest.mark.parametrize("number", range(len(PYTHON_BLOCKS)))
def test_code_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it may write files
    exec(compile(PYTHON_BLOCKS[number], f"README.md, block {number}", "exec"), {"__name__": "__main__"})


def test_first_block_is_short():
    lines = [
        line for line in PYTHON_BLOCKS[0].splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]
    assert len(lines) <= 16


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", README) + re.findall(
        r'(?:src|srcset)="(?!https?:)([^"]+)"', README
    )
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test"} <= named
    assert [target for target in named if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE)] == []


def test_tables_are_up_to_date():
    check = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "make_readme_table.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert check.returncode == 0, check.stdout + check.stderr


def test_a_table_is_made_of_its_result_file(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table: some_bench (how) -->\nold\n<!-- end of table -->\nafter\n")
    rows = [
        {"pattern": p, "time": {"median": t, "low": 0.9 * t, "high": 1.2 * t}, "faster": {"ratio": 61.7}}
        for p, t in (("2:4", 0.0123), ("1:16", 8.5e-5))
    ]
    machine = {"processor": "CPU", "engine": "avx2", "threads": 2, "torch": "2.13.0", "date": "2030-01-01"}
    (tmp_path / "some_bench.json").write_text(json.dumps({"machine": machine, "what": "Call.", "rows": rows}))
    command = [sys.executable, str(ROOT / "bench" / "make_readme_table.py"), "--page", str(readme)]
    command += ["--results", str(tmp_path)]
    assert subprocess.run([*command, "--check"], capture_output=True).returncode == 1
    assert subprocess.run(command).returncode == 0
    assert subprocess.run([*command, "--check"]).returncode == 0
    text = readme.read_text()
    assert "| 2:4 | 12.3 ms ± 20 % | 61.7x |\n| 1:16 | 85 µs ± 20 % | 61.7x |" in text
    assert "2 threads" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
