"""``bench/bench_prune.py`` runs, and its models are what they stand for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from nmsparse_ext.recipes.gpt import Gpt

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(autouse=True)
def _bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("bench_prune", "prune_models", "common"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_dry_run(tmp_path: Path) -> None:
    import bench_prune

    page = tmp_path / "page.md"
    page.write_text(f"before\n{bench_prune.START}\nold\n{bench_prune.END}\nafter\n")
    file, rows = tmp_path / "prune.json", tmp_path / "rows.jsonl"
    arguments = ["--dry-run", "--seeds", "2", "--only", "stdlib-gpt", "--threads", "1", "--docs", str(page)]
    arguments += ["--json", str(file), "--rows", str(rows), "--models", str(tmp_path)]
    assert bench_prune.main(arguments) == 0
    record = json.loads(file.read_text())
    made = [row for row in record["rows"] if row["seed"] == 0]
    assert {row["pattern"] for row in made} == {"-", "2:4", "1:8"}
    assert {row["criterion"] for row in made if row["permuted"]} == set(bench_prune.CRITERIA)
    by_method = {(row["tool"], row["criterion"]): row for row in made if row["pattern"] == "2:4"}
    ours, theirs = (
        by_method[key]
        for key in (("nmsparse_ext", "magnitude"), ("torch.ao.pruning", "WeightNormSparsifier"))
    )
    assert ours["zeros"] == theirs["zeros"] == 0.5
    assert ours["weights"] == theirs["weights"] == 4
    assert any(test["second"][0] == "torch.ao.pruning" for test in record["others"]["comparisons"])
    text = page.read_text()
    assert "old" not in text
    assert "| sparsegpt | yes | " in text
    assert "| magnitude minus torch.ao.pruning WeightNormSparsifier | +0.0000<br>p 1, 0 / 0 |" in text
    before = rows.read_text()
    assert bench_prune.main(arguments) == 0  # nothing is done twice
    assert rows.read_text() == before


def test_plain_gpt_computes_the_same() -> None:
    from prune_models import PlainGpt

    torch.manual_seed(0)
    gpt = Gpt(20, 8, layers=2, width=16, heads=2).eval()
    tokens = torch.randint(20, (3, 8))
    torch.testing.assert_close(PlainGpt(gpt)(tokens), gpt(tokens))


def test_page_has_the_tables_of_the_results() -> None:
    import bench_prune

    record = json.loads((bench_prune.RESULTS / "prune_quality.json").read_text(encoding="utf-8"))
    rows = record["rows"]
    page = (BENCH.parent / "docs" / "prune.md").read_text(encoding="utf-8")
    assert bench_prune.markdown(rows, record["others"]["comparisons"]) in page
    for test in record["others"]["comparisons"]:
        assert test["seeds"] >= 5
        again = bench_prune.compare(rows, test["model"], tuple(test["first"]), tuple(test["second"]))
        assert again is not None
        assert again["difference"] == pytest.approx(test["difference"])
        assert again["p"] == pytest.approx(test["p"], rel=1e-3)
