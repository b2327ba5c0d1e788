"""``nmsparse train``, ``search``, ``demo`` and ``study``: JSON, dry runs, and what is overwritten."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import nmsparse_ext as nms

pytest.importorskip("sklearn")
pytest.importorskip("jsonargparse")

QUICK = (
    "digits-resnet",
    "--width",
    16,
    "--epochs",
    1,
    "--batch_size",
    512,
    "--no-tensorboard",
    "--threads",
    1,
)


def test_train_lists_its_recipes(run):
    assert set(run("train", "--json").json["recipes"]) >= {"digits-resnet", "stdlib-gpt"}
    assert "digits-resnet" in run("train").out
    result = run("train", "nothing")
    assert (result.code, result.out) == (2, "")
    assert "there is no recipe 'nothing', only digits-resnet" in result.err


def test_a_run_of_training(run, here):
    before = sorted(os.listdir())
    dry = run("train", *QUICK, "--out", "run", "--dry-run", "--json")
    assert (dry.code, dry.err) == (0, "")
    assert dry.json["scheme"]["block1.conv1.weight"] == "2:4"
    assert dry.json["stays_dense"]["fc.weight"] == "skipped by 'fc'"
    assert dry.json["steps"] > 0
    assert "would train digits-resnet" in run("train", *QUICK, "--dry-run").out
    assert sorted(os.listdir()) == before
    record = run("train", *QUICK, "--out", "run", "--json").json
    assert record["finished"] is True
    assert 0 < record["test"]["test_accuracy"] <= 1
    assert len(record["epochs"]) == 1
    saved = Path("run/model.safetensors").read_bytes()
    again = run("train", *QUICK, "--out", "run", "--seed", 1)
    assert (again.code, again.out) == (2, "")
    assert "run holds a finished run; give --force" in again.err
    assert Path("run/model.safetensors").read_bytes() == saved
    assert run("train", *QUICK, "--out", "run", "--force", "--seed", 1).code == 0
    assert Path("run/model.safetensors").read_bytes() != saved
    assert run("verify", "run/model.safetensors", "2:4", "--layers", "block*").code == 0


def test_search_writes_only_when_it_may(run, dense_file):
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    arguments = (
        "search",
        dense_file,
        "--budget",
        "params=0.5",
        "--m",
        2,
        "-o",
        "scheme.json",
        "--chart",
        "s.png",
    )
    dry = run(*arguments, "--dry-run")
    assert dry.code == 0
    assert "would write scheme.json" in dry.out
    assert not Path("scheme.json").exists()
    record = run(*arguments, "--json").json
    assert record["written"] is True
    assert nms.Scheme.load("scheme.json")["0.weight"] == nms.Pattern(1, 2)
    assert Path("s.png").read_bytes().startswith(b"\x89PNG")
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "scheme.json exists; give --force" in result.err
    assert run(*arguments, "--force").code == 0
    assert run("verify", dense_file, "scheme.json").code == 1


def test_demo_dry_run(run, here):
    result = run("demo", "--quick", "--dry-run", "--out", "d", "--json")
    assert result.json["files"]["report"] == "d/report.html"
    assert not Path("d").exists()


def test_demo_json(run, here, monkeypatch):
    """What it does has tests of its own; here, that stdout is the JSON alone."""
    import nmsparse_ext.recipes.demo as demo

    def quick(settings, console):
        console.print("not on stdout")
        return demo.Outcome({"runs": []}, {"report": settings.out / "report.html"}, ok=False)

    monkeypatch.setattr(demo, "run_demo", quick)
    result = run("demo", "--json")
    assert result.code == 1
    assert result.json == {"ok": False, "files": {"report": "demo_out/report.html"}, "result": {"runs": []}}
    assert "a check failed" in result.err


def test_study_json(run, here, monkeypatch):
    import nmsparse_ext.recipes.study.runs as runs

    def one_run(file, plan, *, limit, only, report):
        report(1, 2, {"key": "a", "test": {"accuracy": 0.5}, "validation": {}})
        return False

    monkeypatch.setattr(runs, "run_study", one_run)
    result = run("study", "run", "results.jsonl", "--json")
    assert result.json == {"file": "results.jsonl", "complete": False}
    assert result.err == "1/2 a: {'accuracy': 0.5}\n"
    assert json.loads(json.dumps(result.json))
    assert "not complete yet" in run("study", "run", "results.jsonl").out
