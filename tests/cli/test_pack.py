"""``nmsparse compress`` and ``decompress``: files, shards, folders; what is refused, what is left behind."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import nmsparse_ext as nms
from nmsparse_ext.cli.folders import atomic_folder


def state() -> dict[str, torch.Tensor]:
    import cli_models

    return cli_models.pruned().state_dict()


def test_there_and_back(run, dense_file):
    packed = run("compress", dense_file, "-o", "packed.safetensors")
    assert packed.code == 0
    assert "2 of 3 weights packed" in packed.out
    assert "wrote packed.safetensors" in packed.out
    loaded = nms.load_file("packed.safetensors")
    assert [str(loaded[name].pattern) for name in ("0.weight", "2.weight")] == ["2:4", "1:8"]
    back = run("decompress", "packed.safetensors", "-o", "back.safetensors", "--json")
    assert back.json["unpacked"] == 2
    with safe_open("back.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    found = load_file("back.safetensors")
    assert set(found) == set(state())
    for name, tensor in state().items():
        assert torch.equal(found[name], tensor)


def test_json_says_what_the_file_has(run, dense_file):
    record = run("compress", dense_file, "-o", "packed.safetensors", "--json").json
    assert record["written"] is True
    assert record["file_bytes"] == os.path.getsize("packed.safetensors")
    rows = {row["name"]: row for row in record["weights"]}
    assert rows["0.weight"]["bytes"] == nms.Pattern(2, 4).packed_bytes((48, 64), 1, 4)
    assert (rows["4.weight"]["pattern"], rows["4.weight"]["reason"]) == (
        None,
        "holds none of the usual patterns",
    )
    assert record["bytes"] == sum(row["bytes"] for row in record["weights"])


def test_given_patterns(run, dense_file):
    assert run("compress", dense_file, "-o", "a.safetensors", "-p", "2:4", "--layers", "0").code == 0
    packed = {k for k, t in nms.load_file("a.safetensors").items() if isinstance(t, nms.NMTensor)}
    assert packed == {"0.weight"}
    assert run("compress", dense_file, "-o", "b.safetensors", "--skip", "2*").code == 0
    packed = {k for k, t in nms.load_file("b.safetensors").items() if isinstance(t, nms.NMTensor)}
    assert packed == {"0.weight"}
    nms.Scheme({"0.weight": "4:8", "2.weight": "2:8"}).save("scheme.json")
    assert run("compress", dense_file, "-o", "c.safetensors", "-p", "scheme.json").code == 0
    loaded = nms.load_file("c.safetensors")
    assert [str(loaded[name].pattern) for name in ("0.weight", "2.weight")] == ["4:8", "2:8"]
    assert run("compress", dense_file, "-o", "d.safetensors", "-p", "scheme.json", "--skip", "0").code == 0
    assert not isinstance(nms.load_file("d.safetensors")["0.weight"], nms.NMTensor)


def test_violations_write_nothing_and_are_named(run, dense_file):
    result = run("compress", dense_file, "-o", "x.safetensors", "-p", "1:4")
    assert (result.code, result.out) == (1, "")
    assert "0.weight does not hold 1:4: the group at [0, 0] along dim 1 has 2 nonzeros" in result.err
    assert "nmsparse prune" in result.err
    assert not Path("x.safetensors").exists()


def test_packed_stays_packed(run, packed_file):
    result = run("compress", packed_file, "-o", "again.safetensors", "--json")
    assert {row["reason"] for row in result.json["weights"] if row["pattern"]} == {"packed"}
    for name, tensor in nms.load_file(packed_file).items():
        again = nms.load_file("again.safetensors")[name]
        if isinstance(tensor, nms.NMTensor):
            assert torch.equal(again.values, tensor.values)
            assert torch.equal(again.indices, tensor.indices)


@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_dry_run_writes_nothing(run, here, dense_file, command):
    before = sorted(os.listdir())
    result = run(command, dense_file, "-o", "new.safetensors", "--dry-run")
    assert result.code == 0
    assert "would write new.safetensors" in result.out
    assert run(command, dense_file, "-o", "new.safetensors", "--dry-run", "--json").json["written"] is False
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_outputs_that_are_refused(run, here, dense_file, command):
    Path("there.safetensors").write_bytes(b"precious")
    Path("folder").mkdir()
    for out, message in (
        ("there.safetensors", "give --force"),
        ("folder", "is a folder"),
        ("none/x.safetensors", "there is no folder"),
        ("/proc/x.safetensors", "x.safetensors"),
    ):
        result = run(command, dense_file, "-o", out)
        assert (result.code, result.out) == (2, "")
        assert message in result.err
        assert len(result.err.splitlines()) == 1
    assert Path("there.safetensors").read_bytes() == b"precious"
    assert run(command, dense_file, "-o", "there.safetensors", "--force").code == 0
    assert nms.load_file("there.safetensors")
    assert run(command, dense_file).code == 2  # no --out


def test_a_file_may_take_its_own_place(run, dense_file):
    assert run("compress", dense_file, "-o", dense_file, "-f").code == 0
    assert isinstance(nms.load_file(dense_file)["0.weight"], nms.NMTensor)
    assert run("decompress", dense_file, "-o", dense_file, "-f").code == 0
    assert torch.equal(load_file(dense_file)["0.weight"], state()["0.weight"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_writes_leave_nothing(run, here, dense_file, monkeypatch, error):
    import nmsparse_ext.deploy.shards as shards

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(shards, "write_safetensors", fail)
    before = sorted(os.listdir())
    result = run("compress", dense_file, "-o", "new.safetensors")
    assert result.code == (130 if error is KeyboardInterrupt else 2)
    assert sorted(os.listdir()) == before


def test_shards(run, dense_file):
    result = run("compress", dense_file, "-o", "m.safetensors", "--max-shard-size", "4KB")
    assert result.code == 0
    assert not Path("m.safetensors").exists()
    names = sorted(path.name for path in Path().glob("m-*"))
    assert len(names) > 1
    for source in ("m.safetensors", "m.safetensors.index.json"):
        assert run("verify", source, "2:4", "--layers", "0").code == 0
    assert run("decompress", "m.safetensors", "-o", "whole.safetensors").code == 0
    assert torch.equal(load_file("whole.safetensors")["2.weight"], state()["2.weight"])
    assert (
        "must look like" in run("compress", dense_file, "-o", "n.safetensors", "--max-shard-size", "big").err
    )


def test_tied_names_all_stand_in_a_dense_file(run, here):
    tied = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    tied["b"].weight = tied["a"].weight
    nms.nm_prune_(tied["a"].weight.data, "2:4")
    nms.save_file(tied, "tied.safetensors")
    assert run("decompress", "tied.safetensors", "-o", "dense.safetensors").code == 0
    found = load_file("dense.safetensors")
    assert torch.equal(found["a.weight"], found["b.weight"])
    assert set(found) == {"a.weight", "b.weight"}


def test_transformers_folders(run, here, transformers_folders):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(transformers_folders["llama"])
    scheme = nms.Scheme.uniform(model, "2:4", skip=["lm_head"])
    for name in scheme:
        nms.nm_prune_(model.get_parameter(name).data, "2:4")
    model.save_pretrained("pruned")
    Path("pruned/tokenizer.json").write_text("{}")
    result = run("compress", "pruned", "-o", "packed")
    assert (result.code, result.err) == (0, "")
    assert Path("packed/tokenizer.json").read_text() == "{}"
    packed = transformers.AutoModelForCausalLM.from_pretrained("packed")
    assert isinstance(packed.model.layers[0].mlp.up_proj.weight, nms.NMTensor)
    assert run("verify", "packed", "2:4", "--skip", "lm_head").code == 0
    assert "give --force" in run("decompress", "packed", "-o", "pruned").err
    assert run("decompress", "packed", "-o", "pruned", "--force").code == 0
    back = transformers.AutoModelForCausalLM.from_pretrained("pruned")
    for name, parameter in model.named_parameters():
        assert torch.equal(back.get_parameter(name), parameter)
    assert not [name for name in os.listdir() if name.startswith(".")]
    # The same into a file.
    assert run("compress", "pruned", "-o", "packed.safetensors").code == 0
    assert isinstance(nms.load_file("packed.safetensors")["model.layers.0.mlp.up_proj.weight"], nms.NMTensor)


def test_folders_are_whole_or_not_there(here):
    target = here / "out"
    for content in ("old", "new"):
        with atomic_folder(target) as folder:
            (folder / "file").write_text(content)
        assert (target / "file").read_text() == content

    def interrupted() -> None:
        with atomic_folder(target) as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (target / "file").read_text() == "new"
    assert sorted(path.name for path in here.iterdir()) == ["cli_models.py", "out"]


def test_folders_that_are_not_replaced(run, here, transformers_folders):
    """--force replaces a model, and not somebody's photographs."""
    made = shutil.copytree(transformers_folders["llama"], here / "model")
    (here / "photos").mkdir()
    (here / "photos" / "1.jpg").write_text("me")
    (made / "notes").mkdir()
    for command in ("compress", "decompress", "prune"):
        for out, message in (
            ("photos", "no model's folder"),
            ("model", r"holds folders \(notes\)"),
            (".", "no model's folder"),
        ):
            result = run(command, transformers_folders["llama"], "-o", out, "--force")
            assert result.code == 2
            assert re.search(message, result.err)
    assert (here / "photos" / "1.jpg").read_text() == "me"
    assert (made / "config.json").exists()
    (made / "notes").rmdir()
    (here / "link").symlink_to("model")
    assert run("decompress", made, "-o", "link", "--force").code == 0
    assert (here / "link").is_symlink()
    assert sorted(path.name for path in here.iterdir()) == ["cli_models.py", "link", "model", "photos"]


def test_groups_of_other_layouts(run, here, transformers_folders):
    """GPT-2's weights are [in, out]: their groups run along dim 0, which only the model can tell."""
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel.from_pretrained(transformers_folders["gpt2"])
    scheme = nms.Scheme.uniform(model, "1:4")
    for name in scheme:
        nms.nm_prune_(model.get_parameter(name).data, "1:4", dim=0)
    model.save_pretrained("gpt2")
    assert run("verify", "gpt2", "1:4").code == 0
    assert run("compress", "gpt2", "-o", "gpt2.safetensors").code == 0
    assert nms.load_file("gpt2.safetensors")["transformer.h.0.mlp.c_fc.weight"].group_dim == 0
    assert (
        run("verify", "gpt2/model.safetensors", "1:4", "--layers", "*c_fc").code == 1
    )  # a file does not say


def test_an_empty_file(run, here):
    save_file({}, "empty.safetensors")
    assert run("compress", "empty.safetensors", "-o", "packed.safetensors").code == 0
    assert run("inspect", "empty.safetensors").code == 0
