"""The study of searches: its plan, its comparisons and its page."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("sklearn", reason="the train extra is not installed")
pytest.importorskip("scipy", reason="the train extra is not installed")

from recipes.search_plan import SEARCH_PLAN

from nmsparse_ext.recipes.study.plan import load_plan
from nmsparse_ext.recipes.study.report import write_report
from nmsparse_ext.recipes.study.runs import read_records, run_study
from nmsparse_ext.recipes.study.search.comparisons import compare_all, figures_by_seed
from nmsparse_ext.recipes.study.search.figures import kept_by_layer
from nmsparse_ext.recipes.study.search.methods import METHODS
from nmsparse_ext.recipes.study.search.plan import DenseModels, make_run
from nmsparse_ext.recipes.study.search.report import render, short_table

ARMS = ("uniform", "erk", "domino", "magnitude", "taylor", "output", "refined")


@pytest.fixture
def plan_of(tmp_path):
    def load(text):
        file = tmp_path / "plan.toml"
        file.write_text(text)
        return load_plan(file)

    return load


# ------------------------------------------------------------------------------------------------------ plan


def test_jobs(plan_of):
    keys = [job.key for job in plan_of(SEARCH_PLAN).jobs()]
    assert len(set(keys)) == len(keys) == 2 * (1 + 1 + 2 * 6)
    assert keys[:6] == [
        "digits / dense / seed 11",
        "digits / 4:16 / uniform / seed 11",
        "digits / 4:16 / params / erk / seed 11",
        "digits / 4:16 / macs / erk / seed 11",
        "digits / 4:16 / params / domino / seed 11",
        "digits / 4:16 / macs / domino / seed 11",
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "search"', 'kind = "grid"', "kind must be one of sr-ste, search, got 'grid'"),
        ('"uniform", ', '"even", ', r"digits.arms must be of uniform, .*, got even"),
        ('kind = "search"', 'kind = "search"\nextends = "a"', "extends must be a list of digests"),
        ("budgets.params", "budgets.bytes", "digits.budgets must be lists of patterns by metric"),
        ("pilot_seeds = [1]", "pilot_seeds = [11]", r"digits: seeds \[11\] are both of the pilot runs"),
        ("pilot_seeds = [1]\n", "", "digits must be a table with the entries"),
        ('recipe = "digits-resnet"', 'recipe = "x"', "digits.recipe must be one of"),
    ],
)
def test_a_wrong_plan_is_refused(plan_of, old, new, message):
    assert old in SEARCH_PLAN
    with pytest.raises(ValueError, match=message):
        plan_of(SEARCH_PLAN.replace(old, new))


def test_budgets_are_of_one_m(plan_of):
    with pytest.raises(ValueError, match=r"digits.budgets must be patterns of one m, got m of \[8, 16\]"):
        plan_of(SEARCH_PLAN.replace('budgets.macs = ["4:16"]', 'budgets.macs = ["2:8"]'))


# ------------------------------------------------------------------------------------------------------ runs


def results(path):
    """All that a run has computed, without when and how fast."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        for name in ("seconds", "cpu_seconds"):
            record.get("search", {}).pop(name, None)
    return {r["key"]: {k: v for k, v in r.items() if k not in ("date", "cpu_seconds")} for r in records}


def test_run_and_resume(tmp_path, plan_of):
    text = SEARCH_PLAN.replace("seeds = [11, 12]", "seeds = [11]")
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert run_study(whole, plan_of(text))
    found = results(whole)
    assert len(found) == 14
    dense = found["digits / dense / seed 11"]
    assert "scheme" not in dense
    for key, record in found.items():
        if key == dense["key"]:
            continue
        assert record["shares"][record["metric"] or "params"] <= 0.25, key
        assert list(record["scheme"]) == ["block1.conv1.weight", "block1.conv2.weight"]
        assert record["sizes"] == {"block1.conv1.weight": 2304, "block1.conv2.weight": 2304}
        assert (record["search"]["steps"] > 0) == (record["arm"] in ("domino", "refined"))
        assert record["test"]["accuracy"] <= 1
    assert set(found["digits / 4:16 / uniform / seed 11"]["scheme"].values()) == {"4:16"}
    # Another process, without the dense model at hand, goes on to the same results.
    assert not run_study(parts, plan_of(text), limit=3)
    assert not run_study(parts, plan_of(text), only="digits", limit=2)
    assert results(parts).items() <= found.items()
    assert len(results(parts)) == 5
    page = write_report(whole, plan_of(text), tmp_path / "out")
    assert page.name == "search_study.md"
    with pytest.raises(ValueError, match="the plan has no experiment 'gpt'; there are digits"):
        run_study(parts, plan_of(text), only="gpt")


def test_a_plan_that_extends_another_goes_on_with_its_runs(tmp_path, plan_of):
    text = SEARCH_PLAN.replace("seeds = [11, 12]", "seeds = [11]")
    text = text.replace('"erk", "domino", "magnitude", "taylor", "output", "refined"', '"erk"')
    first = plan_of(text)
    file = tmp_path / "r.jsonl"
    assert run_study(file, first)
    before = results(file)
    more = text.replace('budgets.macs = ["4:16"]', 'budgets.macs = ["4:16", "1:16"]')
    with pytest.raises(ValueError, match=f"a run of plan {first.digest}, not of"):
        run_study(file, plan_of(more))
    plan = plan_of(f'extends = ["{first.digest}"]\n{more}')
    assert run_study(file, plan)
    after = results(file)
    assert before.items() <= after.items()
    assert {after[key]["plan"] for key in after.keys() - before.keys()} == {plan.digest}
    assert set(after) == {job.key for job in plan.jobs()}
    page = write_report(file, plan, tmp_path / "out").read_text()
    assert f"It extends a plan ({first.digest}) that was fixed before its tested runs were made" in page
    assert "4 of the runs are of that one" in page
    assert "seen before the other 2 were made" in page
    records = read_records(file, plan.digest, first.digest)
    assert "extends" not in render({key: records[key] for key in before}, first)


def test_pilot_runs_do_not_look_at_test_data(plan_of):
    experiment = plan_of(SEARCH_PLAN).experiments[0]
    models = DenseModels()
    for job in list(experiment.jobs(1))[:2]:
        record = make_run(experiment, job, models, test=False)
        assert record["test"] == {}
        assert record["validation"]["accuracy"] <= 1


def test_what_keeps_too_much_is_refused(plan_of, monkeypatch):
    monkeypatch.setitem(METHODS, "uniform", lambda problem, budget: (problem.uniform("8:16"), 0))
    experiment = plan_of(SEARCH_PLAN).experiments[0]
    with pytest.raises(ValueError, match=r"uniform keeps Cost\(params=.*, more than Budget\(params="):
        make_run(experiment, list(experiment.jobs(1))[1], DenseModels(), test=False)


# ----------------------------------------------------------------------------------------------- comparisons


@pytest.fixture
def many_seeds(plan_of):
    return plan_of(SEARCH_PLAN.replace("seeds = [11, 12]", f"seeds = {list(range(11, 19))}", 1).replace(
        'budgets.params = ["4:16"]', 'budgets.params = ["4:16", "1:16"]'
    ))  # fmt: skip


def made_up(plan, accuracy):
    """Records of all runs, from a function of the job."""
    records = {}
    for job in plan.jobs():
        mixed = {"a.weight": "2:16", "b.weight": "16:16" if job.seed % 2 else "1:16"}
        records[job.key] = {
            "key": job.key, "plan": plan.digest, "experiment": job.experiment, "arm": job.arm,
            "pattern": job.pattern, "metric": job.metric, "seed": job.seed, "lambda_w": 0.02,
            "test": {"accuracy": accuracy(job)}, "steps": 6, "data": {"data": "made up"}, "cpu_seconds": 1.0,
        }  # fmt: skip
        if job.arm != "dense":
            cost = {"uniform": 0.0, "domino": 5.0}.get(job.arm, 0.005)
            records[job.key] |= {
                "scheme": mixed,
                "sizes": {"a.weight": 3000, "b.weight": 1000},
                "shares": {"params": 0.25, "macs": 0.3},
                "search": {"seconds": cost, "cpu_seconds": cost, "steps": 100 if cost == 5 else 0},
            }
    return records


GAIN = {"dense": 0.1, "erk": 0.05, "magnitude": 0.02, "taylor": -0.02}


def accuracy(job):
    noise = 0.002 * math.sin(job.seed) + 0.0005 * math.sin(job.seed * 31 + len(job.arm) * len(job.metric))
    return 0.8 + GAIN.get(job.arm, 0.0) + noise + (0.0 if job.pattern == "4:16" else -0.1)


def test_verdicts_follow_the_numbers(many_seeds):
    records = made_up(many_seeds, accuracy)
    found = {(c.case, c.arm, c.against): c for c in compare_all(many_seeds, records)}
    assert len(found) == 4 * (6 + 5)  # 4:16 and 1:16 params, their mean, 4:16 macs
    verdict = {key: c.verdict(0.05) for key, c in found.items()}
    assert verdict["4:16 params", "erk", "uniform"] == "higher, as expected"
    assert verdict["1:16 params", "taylor", "uniform"] == "lower, against expectation"
    assert verdict["4:16 macs", "erk", "domino"] == "higher, against expectation"
    assert verdict["all params", "magnitude", "domino"] == "higher"
    assert verdict["4:16 params", "output", "uniform"] == "no difference shown"
    # Holm's correction counts the tests of a question, means and single budgets apart.
    single = [c for c in found.values() if c.against == "uniform" and not c.case.startswith("all")]
    least, first = min(c.paired.p for c in single), min(c.corrected for c in single)
    assert first == pytest.approx(min(1.0, 3 * 6 * least))


def test_figures_by_seed(many_seeds):
    records = made_up(many_seeds, accuracy)
    experiment = many_seeds.experiments[0]
    assert figures_by_seed(records, experiment, "uniform", "4:16", "params") == figures_by_seed(
        records, experiment, "uniform", "4:16", "macs"
    )
    whole = figures_by_seed(records, experiment, "erk", "all", "params")
    each = [figures_by_seed(records, experiment, "erk", p, "params") for p in ("4:16", "1:16")]
    assert whole[13] == pytest.approx((each[0][13] + each[1][13]) / 2)
    records["digits / 1:16 / params / erk / seed 13"]["test"]["accuracy"] = None
    del records["digits / 4:16 / params / erk / seed 14"]
    whole = figures_by_seed(records, experiment, "erk", "all", "params")
    assert whole[13] is None
    assert 14 not in whole


def test_budgets_that_are_of_both_say_so(many_seeds):
    records = made_up(many_seeds, accuracy)
    assert "at equal weights, mean" in short_table(records, many_seeds)
    for record in records.values():
        if "shares" in record:
            record["shares"]["macs"] = record["shares"]["params"]
    assert "at equal weights and MACs, mean" in short_table(records, many_seeds)
    assert "**At equal weights and MACs**" in render(records, many_seeds)


def test_kept_by_layer(many_seeds):
    table = kept_by_layer(made_up(many_seeds, accuracy), many_seeds.experiments[0], "1:16", "params")
    assert list(table) == list(ARMS)
    assert table["erk"] == pytest.approx({"a.weight": 2, "b.weight": 4})  # half the seeds 16, half 1


# ------------------------------------------------------------------------------------------------------ page


def test_page_and_plots(many_seeds, tmp_path):
    records = made_up(many_seeds, accuracy)
    text = render(records, many_seeds)
    assert "Not complete" not in text
    assert "- **ERK, rounded against uniform:** better in 3 of 3 budgets (digits 4:16 params" in text
    assert "- **allocate, taylor against uniform:** better in 0 of 3 budgets, worse in 3" in text
    assert "DominoSearch takes 5.00 s of processor time (median); of that, ERK, rounded 1/1,000" in text
    assert "2 searched weights of 4,000 entries" in text
    assert "| ERK, rounded | 24 | 0 | 5.0 ms |" in text
    table = short_table(records, many_seeds)
    heads = "digits, accuracy at equal weights, mean of 2 budgets | digits, accuracy at equal MACs, 4:16"
    assert f"| way | {heads} |" in table
    assert "| uniform | 75." in table or "| uniform | 74." in table
    assert table.count("| 5.00 s |") == 1
    many_seeds.draw(records, tmp_path)
    assert (tmp_path / "search_study_digits.png").read_bytes().startswith(b"\x89PNG")


def test_page_of_a_part(many_seeds, tmp_path):
    """What is there after a few runs: no pairs, missing ways, a run that diverged."""
    jobs = list(many_seeds.jobs())[:6]
    keys = {job.key for job in jobs}
    records = {k: r for k, r in made_up(many_seeds, accuracy).items() if k in keys}
    records[jobs[2].key]["test"]["accuracy"] = None
    text = render(records, many_seeds)
    assert "**Not complete:" in text
    assert "against" not in text.split("## What was found")[1].split('"Better"')[0]
    assert "Not complete yet:" in short_table(records, many_seeds)
    many_seeds.draw(records, tmp_path)
