"""What MODEL may be: files, shards, folders, pickles, transformers models, factories; and what may not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nmsparse_ext as nms
from nmsparse_ext.cli.sources import Kind, kind_of, load_model, load_tensors
from nmsparse_ext.cli.tensor_model import TensorModel
from nmsparse_ext.weights import prunable_weights, weights


def names(rows: list[dict]) -> list[str]:
    return [row["name"] for row in rows]


def test_kinds(dense_file, sharded_folder, transformers_folders):
    torch.save({}, "m.pt")
    assert kind_of(dense_file) is Kind.FILE
    assert kind_of(sharded_folder) is Kind.INDEX
    assert kind_of("m.pt") is Kind.PICKLE
    assert kind_of(transformers_folders["bert"]) is Kind.TRANSFORMERS
    assert kind_of("cli_models:net") is Kind.FACTORY
    assert kind_of("digits-resnet") is Kind.RECIPE


def test_the_same_from_everywhere(run, dense_file, packed_file, sharded_folder):
    import cli_models

    state = cli_models.pruned().state_dict()
    torch.save({"state_dict": state, "epoch": 3}, "m.pth")
    index = f"{sharded_folder}/model.safetensors.index.json"
    for source in (dense_file, sharded_folder, index, "m.pth", "cli_models:pruned", packed_file):
        tensors = load_tensors(source)
        assert set(tensors) == set(state)
        for name, tensor in tensors.items():
            dense = tensor.to_dense() if isinstance(tensor, nms.NMTensor) else tensor
            assert torch.equal(dense, state[name])
        result = run("inspect", source, "--json")
        assert result.code == 0
        rows = {row["name"]: row for row in result.json["tensors"]}
        assert rows["0.weight"]["pattern"] == "2:4"
        assert rows["2.weight"]["pattern"] == "1:8"
        assert rows["4.weight"]["pattern"] is None
        assert rows["0.weight"]["packed"] is (source == packed_file)
        assert run("verify", source, "2:4", "--skip", "4").code == 0


def test_packed_tensors_in_a_pickle(here):
    """A process of its own: this one has imported everything that torch.load has to know."""
    packed = nms.compress(torch.randn(8, 16), "2:4", prune=True)
    torch.save({"0.weight": packed}, "packed.pt")
    (here / "loading.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "def net():\n"
        "    model = nn.Sequential(nn.Linear(16, 8, bias=False))\n"
        "    model[0].weight = nn.Parameter(torch.load('packed.pt')['0.weight'], requires_grad=False)\n"
        "    return model\n"
    )
    for source in ("packed.pt", "loading:net"):
        command = [sys.executable, "-m", "nmsparse_ext", "verify", source, "2:4"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, "")
        assert "packed as 2:4" in result.stdout


def test_folder_with_one_file(run, here):
    (here / "other").mkdir()
    save_file({"fc.weight": torch.ones(4, 4)}, here / "other" / "weights.safetensors")
    assert names(run("inspect", "other", "--json").json["tensors"]) == ["fc.weight"]
    save_file({"fc.weight": torch.ones(4, 4)}, here / "other" / "more.safetensors")
    assert (
        "several models, name one: ['more.safetensors', 'weights.safetensors']" in run("inspect", "other").err
    )


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_transformers_folder(run, transformers_folders, name):
    folder = transformers_folders[name]
    result = run("inspect", folder, "--json")
    assert (result.code, result.err) == (0, "")
    rows = {row["name"]: row for row in result.json["tensors"]}
    tied = {
        "llama": None,
        "bert": "bert.embeddings.word_embeddings.weight",
        "gpt2": "transformer.wte.weight",
    }[name]
    head = "cls.predictions.decoder.weight" if name == "bert" else "lm_head.weight"
    assert rows[head]["tied_to"] == tied
    verified = run("verify", folder, "4:8", "--json")
    assert verified.code == 1  # nothing is pruned
    checked = {row["name"]: row for row in verified.json["tensors"]}
    embedding = {
        "llama": "model.embed_tokens.weight",
        "bert": "bert.embeddings.word_embeddings.weight",
        "gpt2": "transformer.wte.weight",
    }[name]
    assert checked[embedding]["holds"] is None
    if name == "gpt2":  # whose weights lie the other way round
        assert "along dim 0" in checked["transformer.h.0.mlp.c_fc.weight"]["why"]


def test_transformers_folders_from_strangers(run, here):
    """Code in them is not run, nor asked about; what they call their class need be none."""
    folder = here / "strange"
    folder.mkdir()
    (folder / "code.py").write_text("raise SystemExit('ran')")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    result = run("inspect", folder)
    assert result.code == 2
    assert "trust_remote_code" in result.err
    (folder / "config.json").write_text('{"model_type": "bert", "architectures": ["pipeline"]}')
    result = run("inspect", folder)
    assert result.code == 2
    assert "transformers has no model 'pipeline'" in result.err


def test_a_model_of_tensors():
    tied = torch.ones(6, 8)
    tensors = {
        "model.layers.10.fc.weight": torch.ones(4, 8, dtype=torch.bfloat16),
        "model.layers.2.fc.weight": torch.ones(4, 8),
        "model.layers.2.fc.bias": torch.ones(4),
        "model.layers.2.fc.lora.weight": torch.ones(2, 8),  # below a module with a weight of its own
        "model.embed_tokens.weight": tied,
        "lm_head.weight": tied,
        "conv.weight": torch.ones(4, 8, 3, 3),
        "conv.bias": torch.ones(4, dtype=torch.int64),
        "bn.running_mean": torch.ones(4),
        "bn.num_batches_tracked": torch.tensor(3),
        "attn.in_proj_weight": torch.ones(12, 4),
        "attn.relative_table": torch.ones(12, 4),
        "type.forward.weight": torch.ones(4, 4),
        "scale": torch.tensor(1.5),
        "empty.weight": torch.ones(0, 4),
        "quantized.weight": torch.ones(4, 4, dtype=torch.int8),
    }
    model = TensorModel(tensors)
    state = model.state_dict(keep_vars=True)
    assert set(state) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor)
        assert state[name].dtype == tensor.dtype
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
    found = {weight.name: weight for weight in weights(model)}
    order = [name for name in found if name.startswith("model.layers")]
    assert order[0].startswith("model.layers.2")
    assert order[-1] == "model.layers.10.fc.weight"
    prunable = {weight.name for weight in prunable_weights(model)}
    assert not prunable & {"model.embed_tokens.weight", "lm_head.weight", "attn.relative_table"}
    assert {"conv.weight", "attn.in_proj_weight", "type.forward.weight", "quantized.weight"} <= prunable
    assert found["attn.relative_table"].dense_because == "a file does not say what it is"
    assert isinstance(model.get_submodule("conv"), nn.Conv2d)


def test_a_model_of_tensors_runs_its_linear_layers():
    model = TensorModel({"a.weight": torch.ones(4, 8), "b.weight": torch.ones(3, 5), "b.bias": torch.ones(3)})
    shapes = []
    for layer in model.linear_layers():
        layer.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    model(torch.empty(7, 0))
    assert shapes == [(7, 4), (7, 3)]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("missing.safetensors", "no file, no folder, and no factory"),
        ("nothing-like-it", "no file, no folder, and no factory"),
        ("no_such_module:net", "no_such_module"),
        ("cli_models:none", "has no function none"),
        ("cli_models:", "must look like package.module:function"),
        ("cli_models:broken", "this factory is broken"),
        ("empty_folder", "no safetensors file and no config.json"),
        ("bad_config", "bad_config"),
        ("broken.safetensors", "broken.safetensors"),
        ("broken.index.json", "index"),
        ("outside.index.json", "outside.index.json"),
        ("broken.pt", "broken.pt"),
        ("list.pt", "no state dict"),
        ("code.pt", "code.pt"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(run, here, argument, message):
    (here / "empty_folder").mkdir()
    (here / "bad_config").mkdir()
    (here / "bad_config" / "config.json").write_text("{}")
    for name in ("broken.safetensors", "broken.pt"):
        (here / name).write_bytes(b"neither the one nor the other")
    (here / "broken.index.json").write_text('{"weight_map": [3]}')
    (here / "outside.index.json").write_text(json.dumps({"weight_map": {"w": "../up.safetensors"}}))
    torch.save([torch.ones(2)], "list.pt")
    torch.save({"model": nn.Linear(2, 2)}, "code.pt")
    for command in (("inspect", argument), ("verify", argument, "2:4")):
        result = run(*command)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("nmsparse: ")
        assert message in result.err
        assert len(result.err.splitlines()) == 1


def test_traceback_on_request(here, monkeypatch):
    from typer.testing import CliRunner

    from nmsparse_ext.cli import app

    monkeypatch.setenv("NMSPARSE_TRACEBACK", "1")
    result = CliRunner().invoke(app, ["inspect", "missing.safetensors"])
    assert isinstance(result.exception, FileNotFoundError)


def test_unicode_names(run, here):
    save_file({"слой.gewicht-ß.weight": nms.nm_prune(torch.randn(4, 8), "2:4")}, Path("モデル.safetensors"))
    for command in (("inspect", "モデル.safetensors"), ("verify", "モデル.safetensors", "2:4")):
        result = run(*command)
        assert result.code == 0
        assert "слой.gewicht-ß.weight" in result.out
    assert run("compress", "モデル.safetensors", "-o", "gepackt-ß.safetensors").code == 0
    assert names(run("inspect", "gepackt-ß.safetensors", "--json").json["tensors"]) == [
        "слой.gewicht-ß.weight"
    ]


def test_recipes_are_models_too(run):
    pytest.importorskip("sklearn")
    pytest.importorskip("jsonargparse")
    assert any("conv" in name for name in names(run("inspect", "digits-resnet", "--json").json["tensors"]))


def test_step_of_a_file(dense_file):
    assert load_model(dense_file).step is None
    assert load_model(dense_file, step="cli_models:net").step is not None
