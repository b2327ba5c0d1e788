"""``nmsparse search``: recipes, factories, folders; what it prints and saves."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import nmsparse_ext as nms
from nmsparse_ext.cli import app
from nmsparse_ext.scheme_chart import draw_chart

pytest.importorskip("scipy")
pytest.importorskip("jsonargparse")
DIGITS = ("digits-resnet", "--width", "16")


def run(*args) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a module of models."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_models.py").write_text(
        """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

def with_input():
    return net(), torch.ones(2, 16)

def step(model):
    return (model(torch.randn(8, 16)) - 1).square().mean()

def number():
    return 3
"""
    )
    return tmp_path


def test_permute(here):
    arguments = ("search", "own_models:with_input", "--budget", "params=0.4", "--m", 4, "--json")
    code, out, err = run(*arguments, "--permute", "reordered.safetensors")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record["objective"] < json.loads(run(*arguments)[1])["objective"]
    assert list(record["permutation"]["refused"]) == ["0.weight"]
    import own_models

    net, x = own_models.with_input()
    torch.testing.assert_close(nms.load_into(own_models.net(), "reordered.safetensors")(x), net(x))
    code, _, err = run("search", "own_models:net", "--budget", "params=0.4", "--permute", "x.safetensors")
    assert code == 2
    assert "--permute needs" in err


def test_factory(here):
    code, out, err = run("search", "own_models:net", "--budget", "params=0.25", "-o", "scheme.json")
    assert (code, err) == (0, "")
    assert "saved to scheme.json" in out
    scheme = nms.Scheme.load("scheme.json")
    import own_models

    assert nms.allocate(own_models.net(), {"params": 0.25}).scheme == scheme
    assert scheme.complete


def test_json_and_several_budgets(here):
    budget = ("--budget", "params=0.5,bytes=60%", "--budget", "macs=0.5")
    code, out, _ = run("search", "own_models:with_input", *budget, "--json")
    found = json.loads(out)
    assert code == 0
    assert set(found["limits"]) == {"params", "bytes", "macs"}
    assert all(found["costs"][metric] <= limit * (1 + 1e-9) for metric, limit in found["limits"].items())


@pytest.mark.parametrize("criterion", ["taylor", "output"])
def test_criteria(here, criterion):
    arguments = ("--criterion", criterion, "--step", "own_models:step", "--batches", "2", "--json")
    code, out, _ = run("search", "own_models:with_input", "--budget", "params=0.25", *arguments)
    assert code == 0
    assert json.loads(out)["objective"] > 0


def test_other_methods(here):
    code, out, _ = run("search", "own_models:net", "--budget", "params=0.3", "--method", "erk")
    assert code == 0
    assert "left: params" in out
    arguments = ("--method", "domino", "--step", "own_models:step", "--max-steps", "101", "--json")
    with pytest.warns(RuntimeWarning, match="not reached"):  # which so few steps do not reach
        code, out, _ = run("search", "own_models:net", "--budget", "params=0.3", *arguments)
    assert code == 0
    assert {"scheme", "stays_dense", "costs", "dense", "written"} <= set(json.loads(out))


def test_domino_goes_on_from_its_checkpoint(here):
    """The recipe's data, too, goes on where it was."""
    pytest.importorskip("sklearn")
    arguments = ("search", *DIGITS, "--budget", "params=0.9", "--method", "domino", "--json")
    arguments += ("--batch_size", "256", "--checkpoint")
    with pytest.warns(RuntimeWarning, match="not reached"):
        assert run(*arguments, "parts.pt", "--max-steps", 5)[0] == 0
    assert torch.load("parts.pt", weights_only=True)["steps"] == 5
    with pytest.warns(RuntimeWarning, match="not reached"):
        assert run(*arguments, "parts.pt", "--max-steps", 8)[0] == 0
    with pytest.warns(RuntimeWarning, match="not reached"):
        assert run(*arguments, "whole.pt", "--max-steps", 8)[0] == 0
    parts, whole = (torch.load(f"{name}.pt", weights_only=True) for name in ("parts", "whole"))
    assert parts["ranks"][0]["step"] == whole["ranks"][0]["step"]
    assert whole["ranks"][0]["step"]["epoch"] > 0
    for name, tensor in whole["tensors"].items():
        assert torch.equal(parts["tensors"][name], tensor), name
    code, _, err = run("search", "own_models:net", "--budget", "params=0.5", "--checkpoint", "x.pt")
    assert code == 2
    assert "--checkpoint is for --method domino" in err


def test_candidates_and_skip(here):
    arguments = ("--candidate", "2:4", "--candidate", "1:4", "--skip", "0", "--embeds-in-24", "--json")
    code, out, _ = run("search", "own_models:net", "--budget", "params=0.7", *arguments)
    assert code == 0
    found = json.loads(out)
    assert set(found["scheme"]) == {"2.weight"}
    assert found["stays_dense"]["0.weight"] == "skipped by '0'"


def test_constraints(here):
    arguments = ("search", "own_models:net", "--budget", "params=0.3", "--json")
    limits = ("--at-least", "0=4:16", "--allow", "2=1:4,2:16", "--allow", "*=8:16,4:16")
    code, out, err = run(*arguments, *limits)
    assert (code, err) == (0, "")
    found = json.loads(out)["scheme"]
    assert found["0.weight"] == "4:16"
    assert found["2.weight"] in ("1:4", "2:16")
    scheme = json.loads(run(*arguments[:3], "params=0.6", "--layers", "2", "--json")[1])["scheme"]
    assert set(scheme) == {"2.weight"}
    code, out, _ = run(*arguments[:3], "params=0.5", "--embeds-in-24", "--json")
    assert code == 0
    assert set(json.loads(out)["scheme"].values()) == {"2:4"}
    for option in (("--at-least", "4:16"), ("--allow", "0=")):
        code, _, err = run(*arguments, *option)
        assert code == 2
        assert f"{option[0]} must look like GLOB=n:m" in err
    code, _, err = run(*arguments, "--at-least", "nothing=4:16")
    assert code == 2
    assert "at_least: 'nothing' matches nothing" in err


def test_latency(here, monkeypatch):
    monkeypatch.setenv("NMSPARSE_CACHE", str(here))
    code, out, _ = run("search", "own_models:with_input", "--budget", "latency=1.0", "--json")
    assert code == 0
    assert json.loads(out)["costs"]["latency"] > 0


def test_recipe_with_flags_and_chart(here):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    code, out, _ = run(
        "search",
        *DIGITS,
        "--budget",
        "params=0.4",
        "--chart",
        "scheme.png",
        "--criterion",
        "output",
        "--batches",
        "1",
        "--batch_size",
        "4",
    )
    assert code == 0
    assert "dense: skipped by" in out
    assert (here / "scheme.png").read_bytes().startswith(b"\x89PNG")


def test_transformers_folder(here):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained("llama")
    code, out, _ = run("search", "llama", "--budget", "params=0.25,macs=0.25", "--json")
    assert code == 0
    assert "model.layers.0.mlp.down_proj.weight" in json.loads(out)["scheme"]
    # It brings no data, and noise would say nothing of what its layers are worth.
    output = ("search", "llama", "--budget", "params=0.25", "--criterion", "output", "--json")
    code, _, err = run(*output)
    assert code == 2
    assert "no input to calibrate with" in err
    (here / "own_texts.py").write_text(
        """
import torch

def batches():
    for seed in range(3):
        yield {"input_ids": torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(seed))}

def step(model):
    ids = next(batches())["input_ids"]
    return model(input_ids=ids, labels=ids).loss
"""
    )
    code, out, err = run(*output, "--calibration", "own_texts:batches", "--batches", 2)
    assert (code, err) == (0, "")
    assert json.loads(out)["objective"] > 0
    code, out, err = run(*output[:5], "taylor", "--step", "own_texts:step", "--batches", 2, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["objective"] > 0
    weights = next((here / "llama").glob("*.safetensors"))
    code, _, err = run("search", weights, *output[2:], "--calibration", "own_texts:batches")
    assert code == 2
    assert "is a file, and nobody knows how its layers are called" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", "--budget", "params=0.5"), "'nothing' is no recipe"),
        (("own_models:net", "--budget", "size=0.5"), "got 'size'"),
        (("own_models:net", "--budget", "params=0.001"), "the budget of params is"),
        (("own_models:net", "--budget", "latency=0.5"), "latency needs an example_input"),
        (("own_models:net", "--budget", "params=0.5", "--method", "guess"), "--method must be one of"),
        (("own_models:net", "--budget", "params=0.5", "--method", "domino"), "--step pkg.mod:fn"),
        (("own_models:net", "--budget", "params=0.5", "--criterion", "output"), "no input to calibrate"),
        (("own_models:net", "--budget", "params=0.5", "--width", "3"), "only recipes take further flags"),
        (("own_models:none", "--budget", "params=0.5"), "has no function none"),
        (("own_models:number", "--budget", "params=0.5"), "must return an nn.Module"),
        ((":net", "--budget", "params=0.5"), "must look like"),
        (("digits-resnet", "--budget", "params=0.5", "--nonsense", "3"), "nonsense"),
    ],
)
def test_wrong_arguments(here, arguments, message):
    code, _, err = run("search", *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_missing_budget_and_modules(here):
    assert run("search", "own_models:net")[0] == 2
    code, _, err = run("search", "no_such_module:net", "--budget", "params=0.5")
    assert code == 2
    assert "no_such_module" in err


def test_chart_of_a_model_without_macs():
    pytest.importorskip("matplotlib")
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    scheme = {"0": "2:16"}
    assert len(draw_chart(nms.summary(model, scheme)).axes) == 2
    figure = draw_chart(nms.summary(model, scheme, torch.ones(1, 16)))
    assert len(figure.axes) == 3
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["2:16", "dense"]
    assert [bar.get_width() for bar in figure.axes[0].patches] == [12.5, 100]
