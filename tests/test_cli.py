"""The ``nmsparse`` command: what it prints, its JSON and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import nmsparse_ext as nms
from nmsparse_ext.cli import app


def run(*args) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def dense_file(tmp_path):
    """A weight that holds 2:4, one that violates it in a known group, one that no group of 4 fits, a bias."""
    good = nms.nm_prune(torch.randn(4, 8), "2:4")
    bad = good.clone()
    bad[2, 4:8] = torch.tensor([1.0, 2.0, 0.0, 3.0])
    path = tmp_path / "dense.safetensors"
    save_file({"good": good, "bad": bad, "odd": torch.ones(4, 6), "bias": torch.ones(4)}, path)
    return path


@pytest.fixture
def packed_file(tmp_path):
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    nms.nm_prune_(model[0].weight.data, "2:4")
    nms.convert(model, {"0.weight": "2:4"}, policy="always")
    path = tmp_path / "packed.safetensors"
    nms.save_file(model, path)
    return path


# --------------------------------------------------------------------------------------------------- verify


def test_verify_names_the_first_offending_group(dense_file):
    code, out, _ = run("verify", dense_file, "2:4")
    assert code == 1
    assert "the group at [2, 4] along dim 1 has 3 nonzeros" in out
    assert "1 of 2 checked tensors hold 2:4" in out


def test_verify_passes_without_the_offender(dense_file):
    code, out, _ = run("verify", dense_file, "2:4", "--skip", "ba*")
    assert code == 0
    assert "1 of 1 checked tensors hold 2:4" in out
    assert run("verify", dense_file, "2:4", "--only", "good")[0] == 0


def test_verify_json(dense_file):
    code, out, _ = run("verify", dense_file, "2:4", "--json")
    rows = {row["name"]: row for row in json.loads(out)["tensors"]}
    assert code == 1
    assert rows["good"]["holds"] is True
    assert rows["bad"]["holds"] is False
    assert rows["bad"]["group"] == [2, 4]
    assert rows["bad"]["nonzeros"] == 3
    assert rows["odd"]["holds"] is None
    assert "bias" not in rows


def test_verify_along_another_dim(dense_file):
    assert run("verify", dense_file, "4:4", "--dim", "0")[0] == 0


def test_verify_sizes_that_are_no_multiple(dense_file):
    assert "group dim 1 has 6 weights, not a multiple of m = 4" in run("verify", dense_file, "2:4")[1]
    code, out, _ = run("verify", dense_file, "2:4", "--only", "odd", "--pad")
    assert code == 1
    assert "the group at [0, 0] along dim 1 has 4 nonzeros" in out
    assert run("verify", dense_file, "4:4", "--only", "odd", "--pad")[0] == 0


def test_verify_packed(packed_file):
    assert run("verify", packed_file, "2:4", "--only", "0.weight")[0] == 0
    assert run("verify", packed_file, "2:8", "--only", "0.weight")[0] == 1  # it keeps 4 of 8
    assert (
        run("verify", packed_file, "4:8", "--only", "0.weight")[0] == 0
    )  # another pattern, which 2:4 implies


@pytest.mark.parametrize("pattern", ["5:4", "two:four", "2", "0:4", "2:100"])
def test_verify_refuses_a_bad_pattern(dense_file, pattern):
    code, _, err = run("verify", dense_file, pattern)
    assert code == 2
    assert err.startswith("nmsparse: ")


def test_verify_with_nothing_to_check(dense_file):
    code, _, err = run("verify", dense_file, "2:4", "--only", "nothing")
    assert code == 2
    assert "'nothing' matches nothing" in err


def test_unreadable_files(tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a safetensors file")
    for path in (broken, tmp_path / "missing.safetensors"):
        for command in (("verify", path, "2:4"), ("inspect", path)):
            code, out, err = run(*command)
            assert (code, out) == (2, "")
            assert err.startswith("nmsparse: ")
            assert len(err.splitlines()) == 1


# -------------------------------------------------------------------------------------------------- inspect


def test_inspect_dense(dense_file):
    code, out, _ = run("inspect", dense_file, "--json")
    report = json.loads(out)
    rows = {row["name"]: row for row in report["tensors"]}
    assert code == 0
    assert rows["good"] == {
        "name": "good",
        "shape": [4, 8],
        "dtype": "float32",
        "bytes": 128,
        "dense_bytes": 128,
        "packed": False,
        "pattern": "2:4",
        "encoding": None,
        "group_dim": 1,
        "nonzero": 0.5,
        "tied_to": None,
    }
    assert rows["bias"]["nonzero"] is None
    assert report["bytes"] == report["dense_bytes"] == 128 + 128 + 96 + 16


def test_inspect_packed(packed_file):
    rows = {row["name"]: row for row in json.loads(run("inspect", packed_file, "--json")[1])["tensors"]}
    weight = rows["0.weight"]
    assert (weight["pattern"], weight["encoding"], weight["group_dim"]) == ("2:4", "index", 1)
    assert weight["shape"] == [8, 16]
    assert weight["bytes"] == 8 * 8 * 4 + 8 * 2  # half the values, one bit a position
    out = run("inspect", packed_file)[1]
    assert "packed 2:4 along dim 1 (index)" in out
    assert "dense" in out


# --------------------------------------------------------------------------------------------- info, general


def test_info():
    code, out, _ = run("info")
    assert code == 0
    assert torch.__version__ in out
    assert json.loads(run("info", "--json")[1])["torch"] == torch.__version__


def test_help_imports_no_plots():
    """What only the demo needs may be missing, and takes its time to import."""
    code = "import sys, nmsparse_ext.cli; sys.exit('matplotlib' in sys.modules or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("args", [(), ("--help",), ("demo", "--help"), ("verify", "--help")])
def test_help(args):
    code, out, err = run(*args)
    assert code in (0, 2)  # click 8.2 made "no command" a usage error
    assert "Usage" in out + err


@pytest.mark.parametrize(
    "args", [("demo", "--epochs", "0"), ("demo", "--threads", "x"), ("nonsense",), ("verify",)]
)
def test_wrong_arguments(args):
    assert run(*args)[0] == 2
