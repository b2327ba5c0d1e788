"""The stored study: its page and the README say what its file of results says."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="the train extra is not installed")
pytest.importorskip("sklearn", reason="the train extra is not installed")

from nmsparse_ext.recipes.study.plan import load_plan
from nmsparse_ext.recipes.study.runs import read_records
from nmsparse_ext.recipes.study.sr_ste.report import render, short_table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def stored():
    plan = load_plan()
    return plan, read_records(ROOT / "bench" / "results" / "study.jsonl", plan.digest)


def test_every_run_is_one_of_the_plan(stored):
    plan, records = stored
    jobs = {job.key: job for job in plan.jobs()}
    assert records
    assert records.keys() <= jobs.keys()
    for key, record in records.items():
        job = jobs[key]
        assert (record["arm"], record["pattern"], record["seed"]) == (job.arm, job.pattern, job.seed)
        assert bool(record["test"]) == (job.stage == "main")


def test_chosen_lambdas_are_those_of_the_selection(stored):
    plan, records = stored
    for job in plan.jobs():
        if job.stage == "main" and job.key in records and job.arm.startswith("sr-ste"):
            chosen = plan.experiment(job.experiment).chosen_lambda(job.arm, job.pattern, records)
            assert records[job.key]["lambda_w"] == chosen


def test_page_is_up_to_date(stored):
    plan, records = stored
    assert (ROOT / "docs" / "study.md").read_text(encoding="utf-8") == render(records, plan)


def test_readme_is_up_to_date(stored):
    plan, records = stored
    assert short_table(records, plan) in (ROOT / "README.md").read_text(encoding="utf-8")
