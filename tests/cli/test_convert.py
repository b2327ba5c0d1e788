"""``nmsparse convert``: from other tools' checkpoints and to them. The formats have tests of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nmsparse_ext as nms
from nmsparse_ext.deploy import FORMATS


def state() -> dict[str, torch.Tensor]:
    import cli_models

    return cli_models.pruned().state_dict()


def test_list(run):
    result = run("convert", "--list", "--json")
    assert {row["name"] for row in result.json["formats"]} == set(FORMATS)
    assert "compressed-tensors" in run("convert", "--list").out


def test_dense_to_packed(run, dense_file):
    result = run("convert", dense_file, "-o", "packed.safetensors", "--json")
    assert (result.code, result.err) == (0, "")
    assert result.json["from"] == "dense"
    assert result.json["packed"] == 2
    assert str(nms.load_file("packed.safetensors")["2.weight"].pattern) == "1:8"


@pytest.mark.parametrize("name", ["compressed-tensors", "pytorch-cutlass", "torch-pruning", "dense"])
def test_to_a_peer_and_back(run, here, name):
    """Of shapes that all of them can hold."""
    torch.manual_seed(0)
    weight = nms.nm_prune(torch.randn(64, 64, dtype=torch.bfloat16), "2:4")
    nms.save_file({"fc.weight": nms.compress(weight, "2:4"), "fc.bias": torch.ones(64)}, "ours.safetensors")
    assert run("convert", "ours.safetensors", "-o", "theirs", "--to", name).code == 0
    back = run("convert", "theirs", "-o", "back.safetensors", "--json")
    assert back.code == 0
    assert back.json["from"] == name
    loaded = nms.load_file("back.safetensors")
    assert torch.equal(loaded["fc.weight"].to_dense(), weight)


def test_kept_or_pruned_is_asked_for(run, dense_file):
    arguments = ("convert", dense_file, "-o", "x.safetensors", "-p", "2:8")
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "keep 2 of every 8, or prune them" in result.err
    assert "does not satisfy 2:8" in run(*arguments, "--counts", "kept").err
    assert "6:8" in run(*arguments, "--counts", "pruned", "--prune").out
    nms.Scheme({"0.weight": "2:4"}).save("scheme.json")  # which always says what is kept
    assert run("convert", dense_file, "-o", "y.safetensors", "-p", "scheme.json").code == 0


def test_with_a_model(run, here):
    import cli_models

    model = cli_models.images()[0]
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, "official.pth")
    arguments = ("--from", "nm-sparsity", "--model", "cli_models:images", "-p", "2:4", "--counts", "kept")
    assert run("convert", "official.pth", "-o", "packed.safetensors", *arguments).code == 0
    loaded = nms.load_file("packed.safetensors")
    assert torch.equal(loaded["0.0.weight"].to_dense(), nms.nm_prune(model[0][0].weight.data, "2:4"))
    assert not isinstance(loaded["1.weight"], nms.NMTensor)  # linear layers were dense


def test_from_a_factory(run, here):
    assert run("convert", "cli_models:pruned", "-o", "dense.safetensors", "--to", "dense").code == 0
    found = load_file("dense.safetensors")
    assert torch.equal(found["0.weight"], state()["0.weight"])


def test_transformers_folders_say_how_weights_lie(run, here, transformers_folders):
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel.from_pretrained(transformers_folders["gpt2"])
    for name in nms.Scheme.uniform(model, "2:4"):
        nms.nm_prune_(model.get_parameter(name).data, "2:4", dim=0)
    model.save_pretrained("gpt2")
    assert run("convert", "gpt2", "-o", "packed.safetensors").code == 0
    assert nms.load_file("packed.safetensors")["transformer.h.0.mlp.c_fc.weight"].group_dim == 0


def test_options_of_formats(run, dense_file):
    arguments = ("convert", dense_file, "-o", "m.safetensors", "--option", "max_shard_size=4KB")
    assert run(*arguments).code == 0
    assert list(Path().glob("m-*-of-*.safetensors"))
    result = run("convert", dense_file, "-o", "n.safetensors", "--option", "nonsense=3")
    assert "--option must be KEY=VALUE with KEY one of" in result.err


def test_dry_run(run, dense_file):
    before = sorted(os.listdir())
    result = run("convert", dense_file, "-o", "new.safetensors", "--dry-run")
    assert result.code == 0
    assert "would write new.safetensors" in result.out
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give SOURCE and --out, or --list"),
        (("dense.safetensors",), "give SOURCE and --out, or --list"),
        (("dense.safetensors", "-o", "x", "--to", "nix"), "--to must be one of nmsparse"),
        (("dense.safetensors", "-o", "x", "--from", "nix"), "--from must be one of nmsparse"),
        (("dense.safetensors", "-o", "dense.safetensors"), "give --force"),
        (("none.safetensors", "-o", "x"), "none.safetensors"),
        (("dense.safetensors", "-o", "x", "--counts", "kept"), "counts goes with a pattern"),
    ],
)
def test_wrong_arguments(run, dense_file, arguments, message):
    result = run("convert", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert not Path("x").exists()
