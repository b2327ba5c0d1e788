"""``nmsparse explain``, ``bench`` and ``report``: what they measure, what they say, what they refuse."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import nmsparse_ext as nms
from nmsparse_ext.deploy import compare, explain
from nmsparse_ext.deploy.plan import Seconds
from nmsparse_ext.deploy.repeated import Spread

# -------------------------------------------------------------------------------------------------- explain


@pytest.fixture
def timed(monkeypatch):
    """Times that are known: ``timed(tokens -> (dense, prepacked, packed))``, in place of the clock."""

    def use(times):
        def time_layer(caller, module, attr, packed, args, kwargs, **_):
            rows = args[0].numel() // args[0].shape[-1]
            dense, prepacked, sparse = times(rows)
            found = Seconds(dense, prepacked, min(dense, prepacked or dense), sparse, sparse)
            return dict.fromkeys(packed, found)

        for module in ("race", "explain"):  # of which deploy has functions of that name
            monkeypatch.setattr(sys.modules[f"nmsparse_ext.deploy.{module}"], "time_layer", time_layer)

    return use


def verdicts(run, *args) -> dict:
    result = run("explain", *args, "--json")
    assert result.code == 0
    return {row["name"]: row for row in result.json["weights"]}


def test_where_it_pays(run, here, timed):
    timed(lambda rows: (4e-3, 2e-3, 1e-3))
    rows = verdicts(run, "cli_models:example")
    assert rows["0.weight"]["pays"] is True
    assert rows["0.weight"]["code"] == "faster"
    assert rows["0.weight"]["tokens"] == 4
    assert rows["0.weight"]["ratio"] == pytest.approx(2)
    assert [rows["0.weight"][key] for key in ("dense_ms", "prepacked_ms", "packed_ms")] == [4, 2, 1]
    assert rows["0.weight"]["engine"] in nms.engines.ENGINES
    assert rows["4.weight"]["code"] == "shape"  # 30 inputs
    assert "not aligned: group dim 1 has 30 weights, not a multiple of m = 4" in rows["4.weight"]["reason"]


def test_dense_faster_has_both_times(run, here, timed):
    timed(lambda rows: (2e-3, 1e-3, 3e-3))
    row = verdicts(run, "cli_models:example")["0.weight"]
    assert row["pays"] is False
    assert row["code"] == ("engine" if nms.build_info().reference else "dense faster")
    assert "dense is 3.00x as fast: 1.000 ms against 3.000 ms packed" in row["reason"]


@pytest.mark.parametrize(("pays", "word", "count"), [(1, "many", 1), (64, "few", 64)])
def test_other_numbers_of_tokens(run, here, timed, pays, word, count):
    timed(lambda rows: (1e-3, 1e-3, 0.5e-3 if rows == pays else 2e-3))
    row = verdicts(run, "cli_models:example", "--batch", "8")["0.weight"]
    assert row["tokens"] == 8
    hint = f"too {word} tokens (with {count} packed is 2.00x as fast); dense is 2.00x as fast"
    reference = nms.build_info().reference  # then that is the reason
    assert row["code"] == ("engine" if reference else "tokens")
    assert reference or row["reason"].startswith(hint)


def test_layer_types(run, here, timed):
    timed(lambda rows: (2e-3, 0.0, 1e-3))
    rows = verdicts(run, "cli_models:words", "--tokens", "5")
    assert rows["embed.weight"]["code"] == "layer type"
    assert "an embedding looks rows up" in rows["embed.weight"]["reason"]
    assert "fused kernels of LSTM" in rows["body.weight_ih_l0"]["reason"]
    assert rows["unused.weight"]["code"] == "not run"
    assert "did not reach" in rows["unused.weight"]["reason"]


def test_no_engine_says_why(run, here, monkeypatch):
    from nmsparse_ext import _build

    monkeypatch.setattr(_build, "extension", None)
    monkeypatch.setattr(_build, "reference_reason", "NMSPARSE_REFERENCE=1")
    result = run("explain", "cli_models:example", "--layers", "0", "--json").json
    row = result["weights"][0]
    if row["engine"] == "decompress":
        assert row["code"] == "engine"
        assert "no engine: pure PyTorch (NMSPARSE_REFERENCE=1)" in row["reason"]
    assert "CPU engines: none, NMSPARSE_REFERENCE=1" in result["notes"]


def test_patterns_that_tensor_cores_cannot_run(run, here, timed):
    timed(lambda rows: (2e-3, 0.0, 1e-3))
    result = run("explain", "cli_models:example", "-p", "3:8")
    assert "3:8 does not embed in 2:4: sparse tensor cores cannot run it" in result.out
    assert "embed in 2:4" not in run("explain", "cli_models:example", "-p", "2:8").out
    nms.Scheme({"0": "2:4", "2": "3:8"}).save("scheme.json")
    rows = verdicts(run, "cli_models:example", "-p", "scheme.json")
    assert (rows["0.weight"]["pattern"], rows["2.weight"]["pattern"]) == ("2:4", "3:8")
    assert rows["4.weight"]["code"] == "left out"


def test_really_measured(run, packed_file, transformers_folders):
    """No known times: files, packed or not, convolutions, a model of transformers."""
    result = run("explain", packed_file, "--batch", "2", "--tokens", "3", "--layers", "[02]")
    assert result.code == 0
    assert re.search(r"^0\.weight +2:4 +6 +[0-9.]+ ", result.out, re.MULTILINE)
    assert "sparse pays for" in result.out
    rows = verdicts(run, "cli_models:images", "--batch", "2")
    assert rows["0.0.weight"]["tokens"] == 2 * 5 * 5
    assert rows["0.2.weight"]["code"] == "shape"  # depthwise: one weight along dim 1
    rows = verdicts(run, transformers_folders["llama"], "--tokens", "7", "--batch", "2", "--layers", "*mlp*")
    assert {row["tokens"] for row in rows.values()} == {14}


def test_files_do_not_tell_sizes_of_images(run, here):
    nms.save_file({"conv.weight": torch.ones(8, 8, 3, 3), "fc.weight": torch.ones(8, 8)}, "c.safetensors")
    assert "does not say how large" in verdicts(run, "c.safetensors")["conv.weight"]["reason"]
    nms.save_file({"conv.weight": torch.ones(8, 8, 3, 3)}, "c.safetensors")
    assert "no linear layers" in run("explain", "c.safetensors").err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("cli_models:pruned",), "nothing is known that this model could be called with"),
        (("cli_models:wrong_input",), "does not run on its example input: RuntimeError: mat1 and mat2"),
        (("cli_models:example", "--tokens", "3"), "--tokens: cli_models:example is called with no token ids"),
        (("cli_models:example", "-p", "5:4"), "pattern '5:4'"),
        (("cli_models:example", "-p", "none.json"), "there is no scheme file of that name"),
        (("cli_models:example", "--layers", "nix"), "--layers: 'nix' matches nothing in the model"),
        (("cli_models:example", "--skip", "nix*"), "--skip: 'nix*' matches nothing in the model"),
        (("cli_models:example", "--batch", "0"), ""),
    ],
)
@pytest.mark.parametrize("command", ["explain", "bench"])
def test_wrong_arguments(run, here, command, args, message):
    result = run(command, *args)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


def test_packed_models_are_refused_as_baselines():
    model = nn.Sequential(nn.Linear(8, 8))
    nms.nm_prune_(model[0].weight.data, "2:4")
    nms.convert(model, "2:4", policy="always")
    with pytest.raises(ValueError, match=r"must be dense, to be compared with, but 0\.weight is packed"):
        explain(model, "2:4", torch.ones(1, 8))


def test_explain_leaves_the_model_alone_and_prints(timed):
    timed(lambda rows: (2e-3, 0.0, 1e-3))
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = explain(model, "2:4", torch.ones(1, 8))
    assert len(found) == 2
    assert found[0].name == "0.weight"
    assert "sparse pays for 2 of 2 weights here" in str(found)
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


# ---------------------------------------------------------------------------------------------------- bench


def test_bench_of_shapes(run, here):
    arguments = ("-p", "2:4", "-p", "1:8", "--batch", 1, "--batch", 3, "--rounds", 2, "--json")
    record = run("bench", "32x64", "16x32", *arguments).json
    rows = record["rows"]
    assert [(row["name"], row["pattern"], row["tokens"]) for row in rows] == [
        (f"{shape}.weight", pattern, tokens)
        for pattern in ("2:4", "1:8")
        for tokens in (1, 3)
        for shape in ("16x32", "32x64")
    ]
    for row in rows:
        assert row["dense_ms"] > 0
        assert row["packed_ms"] > 0
        assert row["to_best"]["low"] <= row["to_best"]["median"] <= row["to_best"]["high"]
    assert record["rounds"] == 2
    assert record["machine"]["processor"]


def test_bench_of_a_model(run, here):
    result = run("bench", "cli_models:example", "--rounds", "2")
    assert result.code == 0
    assert re.search(
        r"^the model +2:4 +- +[0-9.]+ +- +[0-9.]+ +[0-9.]+x \([0-9.]+-[0-9.]+\)", result.out, re.M
    )
    assert "4.weight: not timed, group dim 1 has 30 weights" in result.out
    result = run("bench", "cli_models:example", "--rounds", "1", "--layers", "0", "--json")
    assert [row["name"] for row in result.json["rows"]] == ["0.weight", "the model"]
    assert result.json["left_dense"] == {}


def test_bench_dtype(run, here):
    assert run("bench", "16x32", "--dtype", "bfloat16", "--rounds", 1).code == 0
    assert "--dtype must be one of" in run("bench", "16x32", "--dtype", "int8").err


def test_bench_of_one_model_or_of_shapes(run, here):
    assert "got 'cli_models:net' among 2" in run("bench", "16x32", "cli_models:net").err
    assert "no weight that could run packed" in run("bench", "16x30").err
    assert run("bench").code == 2


def test_compare_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    before = list(model.parameters())
    rounds = []
    found = compare(
        model, nms.Scheme.uniform(model, "2:4"), torch.ones(2, 8), rounds=3, after=lambda: rounds.append(1)
    )
    assert len(rounds) == 3
    assert [row.name for row in found.rows] == ["0.weight", "2.weight", "the model"]
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert str(Spread.of([1.0, 3.0, 2.0])) == "2.00x (1.00-3.00)"


# --------------------------------------------------------------------------------------------------- report


def test_report_of_a_file(run, dense_file):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    result = run("report", dense_file)
    assert (result.code, result.out.strip()) == (0, "wrote report.html")
    page = Path("report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "2 of 3" in page
    assert "1 in 2:4" in page
    assert not re.search(r'(?:src|href)="https?://', page)
    assert "give --force" in run("report", dense_file).err


def test_report_with_times_and_picture(run, here, timed):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    timed(lambda rows: (2e-3, 0.0, 1e-3))
    arguments = ("-p", "1:4", "--time", "--picture", "p.png", "-o", "r.html", "--json")
    dry = run("report", "cli_models:example", *arguments, "--dry-run")
    assert dry.json["written"] is False
    assert not Path("r.html").exists()
    record = run("report", "cli_models:example", *arguments).json
    assert record["times"]["weights"][0]["pays"] is True
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    page = Path("r.html").read_text(encoding="utf-8")
    assert "Speed here" in page
    assert "multiply-accumulates are left" in page
    assert "--time needs --pattern" in run("report", "cli_models:example", "--time").err


def test_report_of_what_has_no_weights(run, here):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    nms.save_file({"bias": torch.ones(3)}, "bias.safetensors")
    assert run("report", "bias.safetensors").code == 0
    assert "0 of 0" in Path("report.html").read_text(encoding="utf-8")
