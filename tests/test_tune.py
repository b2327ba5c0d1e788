"""``nmsparse tune`` and what is behind it, with a GPU that is none."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import nmsparse_ext as nms
from nmsparse_ext import _crossover_timer, crossover, cusparselt
from nmsparse_ext import tune as tuning
from nmsparse_ext._as_on_a_gpu import as_on_a_gpu
from nmsparse_ext.cli import app
from nmsparse_ext.crossover import DENSE, LT, SMALL_BATCH
from nmsparse_ext.cusparselt import Choice, Found
from nmsparse_ext.pattern import Pattern
from nmsparse_ext.tune import Job

MODELS = """
import torch
from torch import nn
import nmsparse_ext as nms

def net():
    half = torch.float16
    linear = nn.Linear(64, 32), nn.Linear(64, 32, bias=False), nn.Linear(64, 128), nn.Linear(30, 8)
    model = nn.ModuleList([*linear, nn.Conv2d(8, 8, 3)]).to(half)
    packed = nms.compress(model[2].weight.detach(), "1:4", prune=True)
    model[2].weight = nn.Parameter(packed, requires_grad=False)
    return model
"""


class Timer:
    """The small-batch kernel wins up to 8 tokens, cuSPARSELt from 256."""

    def __init__(self, weight: nms.NMTensor) -> None:
        assert weight.engine == "cuda-packed"

    def microseconds(self, tokens: int, branches: Sequence[str]) -> dict[str, float]:
        times = {SMALL_BATCH: float(tokens), LT: 100.0 + tokens, DENSE: 9.0 + 2 * tokens}
        return {branch: times[branch] for branch in branches}


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[tuple[int, bool]]]:
    """A GPU; what the search for algorithms was asked for."""
    asked: list[tuple[int, bool]] = []

    def search(weight: cusparselt.LtWeight, tokens: int, *, bias: bool) -> Found:
        asked.append((tokens, bias))
        return Found(Choice(1), 5.0, 6.0, 3, (), 0)

    monkeypatch.setattr(tuning, "why_not", lambda: None)
    monkeypatch.setattr(_crossover_timer, "CudaTimer", Timer)
    monkeypatch.setattr(cusparselt, "search", search)
    with as_on_a_gpu(tmp_path / "crossovers.json"):
        yield asked


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "tune_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    yield "tune_models:net"
    sys.modules.pop("tune_models", None)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["tune", *arguments], catch_exceptions=False)


# ------------------------------------------------------------------------------------------------ the library


def test_shapes(searched: list[tuple[int, bool]]) -> None:
    jobs = tuning.jobs_of_shapes([(64, 64)], [Pattern(2, 4), Pattern(4, 8)], torch.bfloat16)
    done: list[tuning.Tuned] = []
    assert tuning.tune(jobs, (1, 8, 256), device="cpu", report=done.append) == done
    first, second = done
    assert str(first.choices) == "small-batch 1 to 8, cusparselt from 9 tokens"
    assert first.reasons == {SMALL_BATCH: None, LT: None, DENSE: None}
    assert searched == [(256, False), (256, True)]
    assert str(second.choices) == "small-batch 1 to 8, dense from 9 tokens"
    assert "4:8 does not embed in 2:4" in str(second.reasons[LT])
    # From now on weights go by it.
    packed = nms.compress(torch.randn(64, 64).bfloat16(), "2:4", prune=True)
    assert packed.engine == "cuda"
    assert packed.form_blob.numel()
    assert not packed.form_dense.numel()
    json.dumps([tuned.to_json() for tuned in done])


def test_models(model: str) -> None:
    import tune_models

    net = tune_models.net()
    scheme = nms.Scheme.uniform(net, "2:4")
    jobs = tuning.jobs_of_model(net, scheme)
    assert jobs == [
        Job(32, 64, Pattern(2, 4), torch.float16, (False, True), ("0.weight", "1.weight")),
        Job(128, 64, Pattern(1, 4), torch.float16, (True,), ("2.weight",)),
    ]
    assert {job.dtype for job in tuning.jobs_of_model(net, scheme, torch.bfloat16)} == {torch.bfloat16}
    assert str(jobs[1]) == "float16 1:4 128x64"
    assert tuning.jobs_of_model(nn.Linear(64, 32).double(), nms.Scheme({"weight": "2:4"})) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(ValueError, match="tune measures on an NVIDIA GPU"):
        tuning.tune([Job(64, 64, Pattern(2, 4), torch.float16)])


def test_tokens_must_be_some(searched: list[tuple[int, bool]]) -> None:
    for tokens in ((), (0, 4)):
        with pytest.raises(ValueError, match="tokens must be numbers of at least 1"):
            tuning.tune([Job(64, 64, Pattern(2, 4), torch.float16)], tokens, device="cpu")


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_without_a_gpu(model: str) -> None:
    for arguments in (["--shape", "64x64"], [model]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "an NVIDIA GPU" in result.stderr
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1


def test_what_would_be_done(model: str) -> None:
    result = run(model, "--tokens", "1,16", "--dry-run", "--json")
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert record["tokens"] == [1, 16]
    assert [(job["shape"], job["pattern"], job["weights"]) for job in record["jobs"]] == [
        ([32, 64], "2:4", ["0.weight", "1.weight"]),
        ([128, 64], "1:4", ["2.weight"]),
    ]
    result = run("--shape", "4096x11008", "-p", "2:4", "-p", "1:4", "--dry-run")
    assert result.exit_code == 0
    assert result.stdout.count("4096x11008") == 2
    assert "would be measured with 1, 4, 8" in result.stdout


def test_what_it_prints(
    searched: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    tune = tuning.tune
    monkeypatch.setattr(tuning, "tune", lambda *args, **kw: tune(*args, **{**kw, "device": "cpu"}))
    result = run("--shape", "64x64", "--tokens", "1,8,256", "--no-algorithms", "--json")
    assert result.exit_code == 0
    (job,) = json.loads(result.stdout)["jobs"]
    assert job["microseconds"]["256"] == {"cusparselt": 356.0, "dense": 521.0}
    assert searched == []
    text = run(model, "--tokens", "1,64", "--layers", "0", "--pattern", "4:8").stdout
    assert "float16 4:8 32x64: small-batch 1, dense from 2 tokens" in text
    assert "4:8 does not embed in 2:4" in text
    assert os.fspath(crossover.table_path()) in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "a model or --shape"),
        (["x.safetensors", "--shape", "4x4"], "a model or --shape"),
        (["--shape", "4096"], "--shape must be like 4096x11008"),
        (["--shape", "0x4"], "--shape must be like"),
        (["--shape", "64x64", "--tokens", "1,a"], "--tokens must be numbers"),
        (["--shape", "64x64", "--tokens", "0"], "--tokens must be numbers"),
        (["--shape", "64x64", "--dtype", "int4"], "--dtype must be one of bfloat16"),
        (["--shape", "64x64", "--pattern", "5:4"], "5:4"),
        (["missing.safetensors"], "no file"),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str) -> None:
    result = run(*arguments, "--dry-run")
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_model_without_matrices(model: str) -> None:
    result = run(model, "--layers", "4", "--dry-run")
    assert result.exit_code == 2
    assert run(model, "-p", "2:4", "-p", "1:4", "--dry-run").exit_code == 2
