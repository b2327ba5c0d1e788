"""bench_linear.py runs from end to end, and what it stores can be gone on with, tabulated and drawn."""

from __future__ import annotations

import json

import bench_linear
import make_readme_table
import plot_linear
import pytest

import nmsparse_ext as nms

needs_kernels = pytest.mark.skipif(nms.build_info().reference, reason="there are no kernels to measure")


def row(batch: int, f: float, d: float, pattern: str = "2:4") -> dict:
    times = {"median": 1e-3, "low": 1e-3, "high": 1e-3}
    made = {"dtype": "float32", "pattern": pattern, "weight": "4096x4096", "batch": batch}
    made |= {"F": {"ratio": f}, "D": {"ratio": d}, "packed": times, "F.linear": times, "best dense": times}
    made["which"] = "F.linear"
    made["goal"] = bench_linear.verdict(made)
    return made


@needs_kernels
def test_dry_run_of_everything(tmp_path, capsys):
    threads = bench_linear.torch.get_num_threads()
    try:
        assert bench_linear.main(["--dry-run", "--results", str(tmp_path)]) == 0
    finally:
        bench_linear.torch.set_num_threads(threads)
    text = capsys.readouterr().out
    assert all(f"-- {part[0]}:" in text for part in bench_linear.parts())
    goals = json.loads((tmp_path / bench_linear.GOAL_FILE).read_text())
    other = json.loads((tmp_path / bench_linear.OTHER_FILE).read_text())
    # Tiny layers all have one shape, so rows of two shapes and of batches above 5 fall together.
    assert {(r["dtype"], r["pattern"]) for r in goals["rows"]} == {
        (d, p) for d in bench_linear.DTYPES for p in bench_linear.PATTERNS
    }
    assert {r["kind"] for r in other["rows"]} == {
        "small layer",
        "large batch",
        "AVX2 kernels",
        "AVX2 kernels, dense limited to AVX2",
    }
    assert {r["pattern"] for r in other["packing"]} == set(bench_linear.PACKING_PATTERNS)
    for result, key in ((goals, "rows"), (goals, ""), (other, ""), (other, "packing")):
        assert make_readme_table.table(result, key).startswith("| ")


def test_verdicts():
    assert row(1, 3.0, 1.8)["goal"] == "met"
    assert row(1, 2.9, 1.8)["goal"] == row(1, 3.0, 1.7)["goal"] == "F 3 D 1.8"
    assert row(1, 3.0, 0.99)["goal"] == "lost"
    assert row(512, 1.1, 1.1)["goal"] == row(1, 9, 9, "4:8")["goal"] == "-"


def test_rows_of_a_later_run_take_the_places_of_old_ones(tmp_path):
    path = tmp_path / bench_linear.GOAL_FILE
    bench_linear.store(path, "rows", [row(1, 3, 2), row(4, 6, 2)])
    bench_linear.store(path, "rows", [row(1, 1, 0.5), row(16, 4, 1.2)])
    stored = json.loads(path.read_text())
    assert [r["batch"] for r in stored["rows"]] == [1, 4, 16]
    assert stored["summary"] == [
        {
            "dtype": "float32",
            "weight": "4096x4096",
            "pattern": "2:4",
            "batch 1": "1 / 0.5 lost",
            "batch 4": "6 / 2",
            "batch 16": "4 / 1.2 *",
        }
    ]
    text = bench_linear.summary(stored["rows"])
    assert "3 rows, 1 lost against the best dense, 1 below their goal" in text


def test_table_has_a_column_for_each_batch(tmp_path):
    bench_linear.store(tmp_path / bench_linear.GOAL_FILE, "rows", [row(1, 3, 2)])
    readme = "<!-- table: linear_cpu (x) -->\n<!-- end of table -->\n"
    assert "| float32 | 4096x4096 | 2:4 | 3 / 2 |" in make_readme_table.filled(readme, tmp_path)


def test_chart(tmp_path):
    bench_linear.store(tmp_path / bench_linear.GOAL_FILE, "rows", [row(1, 3, 2), row(4, 2, 1)])
    picture = tmp_path / "chart.png"
    plot_linear.main(["--result", str(tmp_path / bench_linear.GOAL_FILE), "--picture", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
