"""The stored study of searches: its page and the README say what its file of results says."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="the train extra is not installed")
pytest.importorskip("sklearn", reason="the train extra is not installed")

import nmsparse_ext as nms
from nmsparse_ext.recipes.study.plan import load_plan
from nmsparse_ext.recipes.study.runs import read_records
from nmsparse_ext.recipes.study.search.report import render, short_table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def stored():
    plan = load_plan(Path("search_study"))
    return plan, read_records(ROOT / "bench" / "results" / "search_study.jsonl", plan.digest, *plan.extends)


def test_every_run_is_one_of_the_plan(stored):
    plan, records = stored
    jobs = {job.key: job for job in plan.jobs()}
    assert records
    assert records.keys() <= jobs.keys()
    for key, record in records.items():
        job = jobs[key]
        assert (record["arm"], record["pattern"], record["metric"]) == (job.arm, job.pattern, job.metric)
        assert record["seed"] == job.seed


def test_no_scheme_keeps_more_than_its_uniform_pattern(stored):
    for record in stored[1].values():
        if record["arm"] != "dense":
            most = nms.Pattern.parse(record["pattern"]).density
            assert record["shares"][record["metric"] or "params"] <= most + 1e-6, record["key"]
            kept = sum(
                size * nms.Pattern.parse(record["scheme"][name]).density
                for name, size in record["sizes"].items()
            )
            assert kept / sum(record["sizes"].values()) == pytest.approx(record["shares"]["params"], abs=1e-6)


def test_budgets_of_the_gpt_are_of_both(stored):
    """Which is why it has no budgets of MACs of its own."""
    for record in stored[1].values():
        if record["experiment"] == "gpt" and record["arm"] != "dense":
            assert record["shares"]["macs"] == pytest.approx(record["shares"]["params"], abs=1e-6)


def test_every_budget_is_one_of_weights_and_of_macs(stored):
    plan, records = stored
    assert all(job.key in records for job in plan.jobs())
    budgets = plan.experiment("digits").budgets
    assert budgets["macs"] == budgets["params"] == plan.experiment("gpt").budgets["params"]


def test_page_is_up_to_date(stored):
    plan, records = stored
    assert (ROOT / "docs" / "search_study.md").read_text(encoding="utf-8") == render(records, plan)


def test_readme_is_up_to_date(stored):
    plan, records = stored
    assert short_table(records, plan) in (ROOT / "README.md").read_text(encoding="utf-8")
