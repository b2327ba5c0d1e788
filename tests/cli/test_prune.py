"""``nmsparse prune``: files, factories, folders; what it needs and what it leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nmsparse_ext as nms

DATA = """
import torch

def batches():
    torch.manual_seed(1)
    while True:  # taken from as long as they are needed
        yield torch.randn(16, 64)

def ids():
    return [{"input_ids": torch.randint(50, (2, 8))} for _ in range(2)]

def nothing():
    return []
"""


@pytest.fixture
def data(here: Path) -> Path:
    (here / "cli_data.py").write_text(DATA)
    return here


def dense() -> dict[str, torch.Tensor]:
    import cli_models

    return {name: tensor.detach() for name, tensor in cli_models.net().state_dict().items()}


def test_file_by_magnitude(run, here):
    save_file(dense(), "m.safetensors")
    before = (here / "m.safetensors").read_bytes()
    result = run("prune", "m.safetensors", "-p", "2:4", "-o", "out.safetensors", "--skip", "4")
    assert result.code == 0
    assert "2 of 3 weights pruned" in result.out
    assert "skipped by '4'" in result.out
    assert (here / "m.safetensors").read_bytes() == before
    found = load_file("out.safetensors")
    for name, tensor in dense().items():
        expected = nms.nm_prune(tensor, "2:4") if name in ("0.weight", "2.weight") else tensor
        assert torch.equal(found[name], expected), name
    assert run("verify", "out.safetensors", "2:4", "--layers", "0", "--layers", "2").code == 0
    assert run("prune", "m.safetensors", "-o", "out.safetensors").code == 2  # it exists
    assert run("prune", "m.safetensors", "-o", "out.safetensors", "--force", "--pad").code == 0
    assert nms.find_violation(load_file("out.safetensors")["4.weight"], "2:4", remainder="pad") is None


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_factory_with_calibration(run, data, criterion):
    result = run(
        "prune", "cli_models:net", "-p", "1:4", "--criterion", criterion, "--calibration", "cli_data:batches",
        "--batches", 3, "-o", "out.safetensors", "--packed", "--permute", "--json",
    )  # fmt: skip
    assert result.code == 0
    record = result.json
    assert record["written"] is True
    rows = {row["name"]: row for row in record["weights"]}
    assert rows["0.weight"]["criterion"] == criterion
    assert 0 < rows["0.weight"]["error"] < 1
    assert record["permutation"]["spaces"]
    packed = nms.load_file("out.safetensors")
    assert str(packed["0.weight"].pattern) == "1:4"


def test_scheme_file(run, data):
    nms.Scheme({"0": "1:8", "2": "2:4"}).save("scheme.json")
    assert run("prune", "cli_models:net", "--scheme", "scheme.json", "-o", "out.safetensors").code == 0
    found = load_file("out.safetensors")
    assert nms.find_violation(found["0.weight"], "1:8") is None
    assert torch.equal(found["4.weight"], dense()["4.weight"])


def test_transformers_folder(run, data, transformers_folders):
    pruned = ["--criterion", "sparsegpt", "--calibration", "cli_data:ids", "--skip", "lm_head"]
    assert run("prune", transformers_folders["llama"], "-o", "folder", *pruned).code == 0
    assert (data / "folder" / "config.json").exists()
    weights = load_file("folder/model.safetensors")
    assert nms.find_violation(weights["model.layers.0.mlp.down_proj.weight"], "2:4") is None
    assert nms.find_violation(weights["lm_head.weight"], "2:4") is not None


def test_what_stays_dense_is_said(run, data):
    (data / "cli_data.py").write_text(
        DATA.replace("torch.randint(50, (2, 8))", "torch.zeros(2, 3, dtype=int)")
    )
    words = "def words():\n    return [torch.zeros(2, 3, dtype=torch.long)]\n"
    (data / "cli_words.py").write_text(f"import torch\n{words}")
    result = run(
        "prune",
        "cli_models:words",
        "--criterion",
        "wanda",
        "--calibration",
        "cli_words:words",
        "-o",
        "a.safetensors",
    )
    assert result.code == 0
    assert result.err == ""
    assert "embeddings stay dense" in result.out
    assert "no calibration batch calls it" in result.out
    refused = run(
        "prune", "cli_models:words", "--criterion", "wanda", "--calibration", "cli_words:words",
        "--uncalibrated", "error", "-o", "b.safetensors",
    )  # fmt: skip
    assert refused.code == 2
    assert not (data / "b.safetensors").exists()


def test_dry_run(run, data):
    result = run("prune", "cli_models:net", "-o", "out.safetensors", "--dry-run")
    assert result.code == 0
    assert "would write out.safetensors" in result.out
    assert not (data / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cli_models:net", "--criterion", "wanda"), "needs --calibration"),
        (("cli_models:net", "--permute"), "needs --calibration"),
        (("cli_models:net", "--criterion", "hessian"), "needs --calibration"),
        (("cli_models:net", "--criterion", "x", "--calibration", "cli_data:batches"), "criterion must be"),
        (("m.safetensors", "--calibration", "cli_data:batches"), "nobody knows how its layers are called"),
        (("cli_models:net", "--calibration", "cli_data:nothing", "--permute"), "at least one batch"),
        (("cli_models:net", "--calibration", "cli_data:absent"), "has no function"),
        (("cli_models:net", "-p", "2:5x"), "n:m"),
        (("nowhere",), "no file"),
    ],
)
def test_what_is_refused(run, data, arguments, message):
    save_file(dense(), "m.safetensors")
    result = run("prune", *arguments, "-o", "out.safetensors")
    assert result.code == 2
    assert message in result.err
    assert not (data / "out.safetensors").exists()
