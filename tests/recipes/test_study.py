"""The study: its plan, its runs, its statistics and its page."""

from __future__ import annotations

import json
import math
import statistics
from importlib import resources

import pytest

pytest.importorskip("sklearn", reason="the train extra is not installed")
pytest.importorskip("scipy", reason="the train extra is not installed")

from hypothesis import given
from hypothesis import strategies as st

from nmsparse_ext.recipes.study.plan import load_plan
from nmsparse_ext.recipes.study.report import write_report
from nmsparse_ext.recipes.study.runs import read_records, run_study
from nmsparse_ext.recipes.study.sr_ste.comparisons import compare_all, figures_by_seed
from nmsparse_ext.recipes.study.sr_ste.report import render
from nmsparse_ext.recipes.study.statistics import compare, holm, mean_interval

PLAN = """
alpha = 0.05
[digits]
recipe = "digits-resnet"
metric = "accuracy"
patterns = ["1:4"]
seeds = [11, 12]
[digits.selection]
seeds = [1]
lambdas.gradient = [0.1, 0.2]
lambdas.decoupled = [1.0]
[digits.sweep]
pattern = "1:4"
lambdas = [-0.01]
[digits.config]
width = 16
blocks = 1
epochs = 1
batch_size = 128
test_share = 0.6
validation_share = 0.4
"""


@pytest.fixture
def plan(tmp_path):
    file = tmp_path / "plan.toml"
    file.write_text(PLAN)
    return load_plan(file)


# ------------------------------------------------------------------------------------------------------ plan


def test_jobs(plan):
    keys = [job.key for job in plan.jobs()]
    assert len(set(keys)) == len(keys) == 3 + 2 * 5
    assert keys[0] == "digits / selection / sr-ste / 1:4 / seed 1 / lambda 0.1"
    assert keys[2] == "digits / selection / sr-ste-decoupled / 1:4 / seed 1 / lambda 1"
    assert keys[3:8] == [
        "digits / main / dense / 1:4 / seed 11",
        "digits / main / ste / 1:4 / seed 11",
        "digits / main / sr-ste / 1:4 / seed 11",
        "digits / main / sr-ste-decoupled / 1:4 / seed 11",
        "digits / main / sweep / 1:4 / seed 11 / lambda -0.01",
    ]


def test_the_library_s_own_plan():
    plan = load_plan()
    assert [experiment.recipe for experiment in plan.experiments] == ["digits-resnet", "stdlib-gpt"]
    for experiment in plan.experiments:
        assert len(experiment.seeds) >= 5
        for job in plan.jobs():
            if job.experiment == experiment.name:
                assert (job.stage == "main") == (job.seed in experiment.seeds)
    assert plan.experiments[0].patterns == ("2:4", "1:4", "1:8", "1:16")
    assert any(value < 0 for value in plan.experiments[0].sweep)


def test_selection_runs_do_not_look_at_test_data(plan):
    jobs = list(plan.jobs())
    tasks = [plan.experiments[0].task(job, 0.1) for job in (jobs[0], jobs[4])]
    assert [task.config.test for task in tasks] == [False, True]
    assert tasks[0].config.seed == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('recipe = "digits-resnet"', 'recipe = "x"', "digits.recipe must be one of"),
        ('metric = "accuracy"', 'metric = "bleu"', "digits.metric must be accuracy or loss, got 'bleu'"),
        ("seeds = [11, 12]", "seeds = [1, 12]", r"digits: seeds \[1\] are both"),
        ("alpha = 0.05", "alpha = 2.0", "alpha must lie between 0 and 1"),
        ("lambdas.decoupled", "lambdas.other", "digits.selection.lambdas must be lists by penalty"),
        ('pattern = "1:4"\n', "", "digits.sweep must be a table with the entries lambdas, pattern"),
        ("[digits]", "[digits", "no TOML"),
    ],
)
def test_a_wrong_plan_is_refused(tmp_path, old, new, message):
    assert old in PLAN
    file = tmp_path / "plan.toml"
    file.write_text(PLAN.replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_plan(file)


def test_an_empty_plan_is_refused(tmp_path):
    file = tmp_path / "plan.toml"
    file.write_text("alpha = 0.05\n")
    with pytest.raises(ValueError, match="no experiments"):
        load_plan(file)


# ------------------------------------------------------------------------------------------------------ runs


def results(path):
    """All that a run has computed, without when and how fast."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("date", "cpu_seconds")} for r in records]


def test_run_and_resume(tmp_path, plan):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    seen = []
    assert run_study(whole, plan, report=lambda done, total, record: seen.append((done, total)))
    assert seen == [(i, 13) for i in range(1, 14)]
    assert not run_study(parts, plan, limit=4)
    with parts.open("a") as file:
        file.write('{"key": "torn')
    assert len(read_records(parts)) == 4
    assert run_study(parts, plan)
    assert results(whole) == results(parts)

    records = read_records(whole, plan.digest)
    losses = {
        lam: records[f"digits / selection / sr-ste / 1:4 / seed 1 / lambda {lam}"] for lam in (0.1, 0.2)
    }
    best = min(losses, key=lambda lam: losses[lam]["validation"]["loss"])
    assert records["digits / main / sr-ste / 1:4 / seed 11"]["lambda_w"] == best
    assert records["digits / main / ste / 1:4 / seed 11"]["lambda_w"] == 0
    assert records["digits / selection / sr-ste / 1:4 / seed 1 / lambda 0.1"]["test"] == {}
    assert run_study(whole, plan, report=lambda *_: pytest.fail("nothing was missing"))

    text = write_report(whole, plan, tmp_path / "out").read_text()
    assert "Not complete" not in text
    assert (tmp_path / "out" / "images" / "study_digits.png").read_bytes().startswith(b"\x89PNG")


def test_results_of_another_plan_are_refused(tmp_path, plan):
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps({"key": "a", "plan": "other"}) + "\n")
    with pytest.raises(ValueError, match=f"line 1: a run of plan other, not of {plan.digest}"):
        run_study(file, plan)
    line = json.dumps({"key": "a", "plan": plan.digest}) + "\n"
    file.write_text(line + line)
    with pytest.raises(ValueError, match="line 2: the run a is there twice"):
        read_records(file)


def test_two_processes_do_not_write_to_one_file(tmp_path, plan):
    import fcntl

    file = tmp_path / "r.jsonl"
    with file.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError):
            run_study(file, plan)


def test_lambda_needs_the_whole_selection(plan):
    with pytest.raises(ValueError, match="selection stage is not complete"):
        plan.experiments[0].chosen_lambda("sr-ste", "1:4", {})


# ------------------------------------------------------------------------------------------------ statistics


def test_paired_comparison_by_hand():
    found = compare([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])  # differences 2, 3, 1
    assert found.mean == pytest.approx(2)
    # Student's t with 2 degrees of freedom: 4.302653 x 1 / sqrt(3)
    assert (found.low, found.high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    assert found.effect == pytest.approx(2)
    # t = 2 sqrt(3), and with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2)
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert found.p_signs == pytest.approx(2 / 8)
    assert found.pairs == 3


def test_equal_differences():
    same = compare([1.0, 2.0], [1.0, 2.0])
    assert (same.mean, same.effect, same.p) == (0, 0, 1)
    shifted = compare([2.0, 3.0], [1.0, 2.0])
    assert (shifted.low, shifted.high, shifted.effect, shifted.p) == (1, 1, math.inf, 0)


@pytest.mark.parametrize(("a", "b"), [([1.0], [2.0]), ([1.0, 2.0], [1.0])])
def test_too_few_pairs(a, b):
    with pytest.raises(ValueError, match="must be pairs, two or more"):
        compare(a, b)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_lies_between_none_and_bonferroni(values):
    corrected = holm(values)
    for p, c in zip(values, corrected, strict=True):
        assert p <= c <= min(1.0, len(values) * p) or c == pytest.approx(min(1.0, len(values) * p))
    order = sorted(range(len(values)), key=values.__getitem__)
    assert [corrected[i] for i in order] == sorted(corrected)


def test_mean_interval():
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert (mean, half) == pytest.approx((2, 2.484138), abs=1e-5)
    assert mean_interval([4.0]) == (4.0, 0.0)


# ---------------------------------------------------------------------------------------------------- report


def made_up(plan, accuracy, sad):
    """Records of the tested runs, from functions of arm and seed."""
    records = {}
    for job in plan.jobs():
        if job.stage == "main":
            records[job.key] = {
                "key": job.key, "plan": plan.digest, "experiment": job.experiment, "stage": "main",
                "arm": job.arm, "pattern": job.pattern, "seed": job.seed,
                "lambda_w": job.lambda_w or (0.1 if job.method == "sr-ste" else 0.0),
                "test": {"accuracy": accuracy(job)}, "sad": [sad(job)] * 3, "sad_from_start": 0.25,
                "steps": 6, "prunable": 100, "data": {"data": "made up"}, "cpu_seconds": 1.0,
            }  # fmt: skip
    return records


@pytest.fixture
def many_seeds(tmp_path):
    file = tmp_path / "many.toml"
    file.write_text(PLAN.replace("seeds = [11, 12]", f"seeds = {list(range(11, 19))}"))
    return load_plan(file)


def test_verdicts_follow_the_numbers(many_seeds):
    gain = {"dense": 0.1, "ste": 0.0, "sr-ste": 0.05, "sr-ste-decoupled": 0.0, "sweep": -0.1}
    noise = {seed: 0.001 * math.sin(seed) for seed in range(11, 19)}

    def accuracy(job):
        spread = noise[job.seed] if job.arm != "sr-ste-decoupled" else -7 * noise[job.seed]
        return 0.8 + gain[job.arm] + spread + 0.0005 * (job.seed % 3) * (job.arm == "sr-ste")

    def sad(job):
        worse = {"sr-ste": 0.02, "sweep": 0.03}.get(job.arm, 0.01)
        return worse + 0.0001 * (job.seed % 4) * (job.arm in ("sr-ste", "sweep"))

    records = made_up(many_seeds, accuracy, sad)
    found = {(c.arm, c.against, c.figure): c for c in compare_all(many_seeds, records)}
    verdict = {key: c.verdict(0.05) for key, c in found.items()}
    assert verdict["sr-ste", "ste", "accuracy"] == "higher, as expected"
    assert verdict["sr-ste", "ste", "sad"] == "higher, against expectation"
    assert verdict["sr-ste-decoupled", "ste", "accuracy"] == "no difference shown"
    assert verdict["sr-ste-decoupled", "sr-ste", "accuracy"] == "lower"
    assert verdict["sweep", "ste", "accuracy"] == "lower, as expected"
    assert verdict["sweep", "ste", "sad"] == "higher, as expected"
    assert found["sr-ste", "ste", "accuracy"].paired.mean == pytest.approx(
        statistics.fmean(0.05 + 0.0005 * (seed % 3) for seed in range(11, 19))
    )

    text = render(records, many_seeds)
    assert "- **SR-STE better than STE:** shown in 1 of 2 comparisons (digits 1:4); " in text
    assert "the opposite in 1 (digits 1:4)" in text
    assert "**Not complete: 3 runs are missing" in text
    assert text.count("| dense |") == 2  # once a table
    assert "| -0.01 | 8 |" in text


def test_runs_that_diverged_are_said_and_left_out(many_seeds):
    records = made_up(
        many_seeds,
        lambda job: None if (job.arm, job.seed) == ("sweep", 12) else 0.5 + 0.01 * math.cos(job.seed * 7),
        lambda job: 0.01,
    )
    values = figures_by_seed(records, many_seeds.experiments[0], "sweep", "1:4", "accuracy", -0.01)
    assert values[12] is None
    (found,) = [c for c in compare_all(many_seeds, records) if (c.arm, c.figure) == ("sweep", "accuracy")]
    assert (found.pairs, found.diverged, found.paired.pairs) == (8, 1, 7)
    assert "(1 diverged)" in render(records, many_seeds)


def test_one_seed_is_not_enough(many_seeds):
    records = {
        k: r for k, r in made_up(many_seeds, lambda job: 0.5, lambda job: 0.1).items() if r["seed"] == 11
    }
    assert {c.verdict(0.05) for c in compare_all(many_seeds, records)} == {"not enough pairs"}
    assert "8 seeds planned" in render(records, many_seeds)


def test_no_results_no_page(tmp_path, plan):
    with pytest.raises(ValueError, match="holds no results"):
        write_report(tmp_path / "none.jsonl", plan, tmp_path)


def test_plan_is_packaged():
    assert resources.files("nmsparse_ext.recipes").joinpath("study.toml").is_file()
