"""`nmsparse train` and `nmsparse study`, and training over two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("sklearn", reason="the train extra is not installed")
pytest.importorskip("jsonargparse", reason="the train extra is not installed")

from recipes.small import corpus
from recipes.test_study import PLAN
from typer.testing import CliRunner

import nmsparse_ext as nms
from nmsparse_ext.cli import app
from nmsparse_ext.recipes.catalog import RECIPES

SMALL = ["--progress=false", "--tensorboard=false", "--device=cpu", "--threads=1"]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_recipes_are_listed():
    for arguments in (["train"], ["train", "--help"]):
        listed = call(*arguments)
        assert listed.exit_code == 0
        assert all(name in listed.output for name in RECIPES)
    unknown = call("train", "alexnet")
    assert unknown.exit_code == 2
    assert "digits-resnet" in unknown.output


def test_train(tmp_path):
    settings = ["--width=16", "--blocks=1", "--epochs=1", "--batch_size=512", f"--out={tmp_path}", *SMALL]
    done = call("train", "digits-resnet", *settings)
    assert done.exit_code == 0, done.output
    assert "test_accuracy" in done.output
    assert (tmp_path / "model.safetensors").exists()


def test_wrong_settings_are_one_line():
    failed = call("train", "digits-resnet", "--epochs=0")
    assert failed.exit_code == 2
    assert "epochs must be at least 1, got 0" in failed.output


def test_settings_are_listed(capsys):
    shown = call("train", "digits-resnet", "--help")
    assert shown.exit_code == 0
    assert "--lambda_w" in shown.output
    assert "Strength of SR-STE's pull" in shown.output


def test_study(tmp_path):
    pytest.importorskip("scipy")
    (tmp_path / "plan.toml").write_text(PLAN)
    plan = ["--plan", tmp_path / "plan.toml"]
    ran = call("study", "run", tmp_path / "r.jsonl", *plan, "--limit", "1")
    assert ran.exit_code == 0, ran.output
    assert "1/13 digits / selection" in ran.output
    assert "not complete yet" in ran.output
    page = call("study", "report", tmp_path / "r.jsonl", "--out", tmp_path / "o", *plan)
    assert page.exit_code == 0, page.output
    assert "12 runs are missing" in (tmp_path / "o" / "study.md").read_text()
    assert call("study", "report", tmp_path / "none.jsonl").exit_code == 2


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_torchrun_gives_what_one_process_gives(tmp_path):
    settings = [
        "train", "stdlib-gpt", f"--corpus={corpus(tmp_path / 'c')}", "--layers=1", "--width=16", "--heads=2",
        "--context=16", "--batch_size=8", "--accumulate=2", "--steps=4", "--epochs=2", "--lambda_w=0.01",
        *SMALL,
    ]  # fmt: skip
    assert call(*settings, f"--out={tmp_path / 'one'}").exit_code == 0
    # Begun by one process, finished by two.
    assert call(*settings, f"--out={tmp_path / 'two'}", "--stop_after=1").exit_code == 0
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "nmsparse_ext", *settings, f"--out={tmp_path / 'two'}", "--resume"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert one["test"] == pytest.approx(two["test"], rel=1e-4)
    for a, b in zip(one["epochs"], two["epochs"], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    weights = [nms.load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, first in weights[0].items():
        pair = [w.to_dense() if isinstance(w, nms.NMTensor) else w for w in (first, weights[1][name])]
        torch.testing.assert_close(*pair, rtol=1e-2, atol=1e-4)
