"""The command as a shell has it: processes, pipes, terminals, completion, what it imports."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from typer.main import get_command

import nmsparse_ext as nms
from nmsparse_ext.cli import app
from nmsparse_ext.cli.convert import FORMAT_NAMES

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "nmsparse_ext")
COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]


def start(*args: object, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.Popen(
        [*COMMAND, *map(str, args)],
        env=environment,
        text=True,
        # Where the tests themselves run in the background of a shell, Ctrl-C would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def process(*args: object, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.run(
        [*COMMAND, *map(str, args)], env=environment, text=True, capture_output=True, **options
    )


def test_all_commands_are_there():
    expected = {"inspect", "verify", "compress", "decompress", "search", "train", "tune", "bench", "convert"}
    assert expected | {"report", "explain", "info", "demo"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(run, name):
    result = run(name, "--help")
    assert result.code == 0
    assert "Usage" in result.out or name == "train"
    assert "--json" in result.out or name == "study"


def test_what_others_print_is_no_output(tmp_path):
    """Solvers write lines to stdout from C, and the user's own functions print what they like."""
    (tmp_path / "noisy.py").write_text(
        """
import ctypes
import torch

def net():
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)), torch.ones(2, 16)

def step(model):
    print("a line of Python")
    ctypes.CDLL(None).printf(b"a line of C")
    return model(torch.ones(2, 16)).square().mean()
"""
    )
    pytest.importorskip("scipy")
    arguments = ("search", "noisy:net", "--budget", "params=0.5", "--criterion", "taylor", "--json")
    found = process(*arguments, "--step", "noisy:step", "--batches", 1, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["objective"] > 0
    assert "a line of Python" in found.stderr
    assert "a line of C" in found.stderr


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; sys.argv[1:] = ['--help']; sys.modules['torch'] = None\n"
        "from nmsparse_ext.cli import main\n"
        "main()"
    )
    found = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert "inspect" in found.stdout
    # Processor time of all imports, which is what the machine's load does not change much.
    times = {line.split("|")[2].strip(): int(line.split("|")[1]) for line in found.stderr.splitlines()[1:]}
    assert not {"torch", "numpy", "transformers"} & set(times)
    assert times["nmsparse_ext.cli"] < 1_000_000


def test_a_process(dense_file):
    found = process("verify", dense_file, "1:4", "--json")
    assert found.returncode == 1
    assert json.loads(found.stdout)["failed"] == ["0.weight"]
    assert found.stderr == ""


def test_names_that_the_terminal_cannot_show(here):
    import torch
    from safetensors.torch import save_file

    save_file({"слой.weight": torch.ones(4, 4)}, "m.safetensors")
    found = process("inspect", "m.safetensors", env={"PYTHONIOENCODING": "ascii"})
    assert found.returncode == 0
    assert "\\u0441" in found.stdout


def test_a_reader_that_goes_away(dense_file):
    child = start("inspect", dense_file, "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert child.stderr.read() == ""
    child.stderr.close()
    assert child.wait() == 128 + signal.SIGPIPE


def test_ctrl_c_leaves_nothing_half_written(here):
    """While a factory takes its time, and while a file is being written."""
    (here / "slow.py").write_text(
        """
import time
import cli_models, nmsparse_ext.deploy.shards as shards

def write(*args):
    with open(args[1], "wb") as file:
        file.write(b"half")
    print("now", flush=True)
    time.sleep(60)

def net():
    shards.write_safetensors = write
    return cli_models.pruned()
"""
    )
    child = start(
        "compress", "slow:net", "-o", "out.safetensors", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout.readline() == "now\n"
    time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate()
    assert child.returncode == 130
    assert (out, err) == ("", "nmsparse: interrupted\n")
    assert not [name for name in os.listdir() if "out" in name]


def on_a_terminal(*args: object, **env: str) -> str:
    """What the command shows where stdout and stderr are a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    environment = {"TERM": "xterm-256color", "COLUMNS": "120", **env}
    child = start(*args, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # what Linux says when the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    child.wait()
    return shown.decode()


def test_colours_and_bars_are_for_terminals(dense_file, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = on_a_terminal("verify", dense_file, "2:4")
    assert "\x1b[32mholds" in shown  # green
    assert "checking" in shown  # the progress bar
    assert re.search(r"\d:\d\d:\d\d|-:--:--", shown)  # with the time that is left
    plain = on_a_terminal("verify", dense_file, "2:4", NO_COLOR="1")
    assert "\x1b[32m" not in plain
    assert "holds" in plain


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("nmsparse ver", "verify"),
        ("nmsparse prune --crit", "--criterion"),
        ("nmsparse prune --criterion s", "sparsegpt"),
        ("nmsparse search --method d", "domino"),
        ("nmsparse convert --counts p", "pruned"),
        ("nmsparse convert --to pytorch-c", "pytorch-cutlass"),
        ("nmsparse bench --dtype b", "bfloat16"),
        ("nmsparse tune --dtype b", "bfloat16"),
    ],
)
def test_completion(line, expected):
    count = str(len(line.split()) - 1)
    words = {"_NMSPARSE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": count}
    # It answers at once: a shell that waits for torch at every key is no help.
    code = (
        "import sys; sys.argv[:] = ['nmsparse']; sys.modules['torch'] = None\n"
        "from nmsparse_ext.cli import main; main()"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **words},
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == [expected], found.stderr


def test_formats_that_are_completed():
    assert tuple(nms.deploy.FORMATS) == FORMAT_NAMES


def test_version(run):
    import nmsparse_ext

    assert run("--version").out.strip() == nmsparse_ext.__version__


def test_the_bar_of_domino_search(tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    pytest.importorskip("tqdm")
    (tmp_path / "small_model.py").write_text(
        """
import torch

def net():
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16))

def step(model):
    return model(torch.ones(2, 16)).square().mean()
"""
    )
    monkeypatch.chdir(tmp_path)
    arguments = ("small_model:net", "--budget", "params=0.3", "--method", "domino", "--max-steps", "101")
    shown = on_a_terminal("search", *arguments, "--step", "small_model:step")
    assert "DominoSearch" in shown
    assert "last domino" in shown
    assert "searching" not in shown
