"""What `make gpu` does with tests that break the GPU, and that it collects all that need one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_tests  # noqa: E402


class Process:
    """Runs "a", "b", ... of which some break the GPU."""

    def __init__(self, *breaking: str, code: int = 0) -> None:
        self.breaking, self.code, self.begun = breaking, code, list[list[str]]()

    def __call__(self, more: Sequence[str], told: Path) -> int:
        after = more[more.index("--after") + 1] if "--after" in more else ""
        self.begun.append(list(more))
        for test in "abcdef":
            if test > after and test in self.breaking:
                told.write_text(test, encoding="utf-8")
                return gpu_tests.BROKEN
        return self.code


def test_the_others_run_in_a_process_anew(tmp_path: Path) -> None:
    process = Process("b", "e")
    assert gpu_tests.run(process, tmp_path) == (gpu_tests.BROKEN, ["b", "e"])
    assert [more[-1] for more in process.begun] == [
        str(tmp_path / f"gpu_tests{number}.xml") for number in ("", 1, 2)
    ]
    assert [more[:2] for more in process.begun[1:]] == [["--after", "b"], ["--after", "e"]]
    assert gpu_tests.run(Process()) == (0, [])
    assert gpu_tests.run(Process(code=1)) == (1, [])
    assert gpu_tests.run(Process(*"abcdef"), most=3) == (gpu_tests.BROKEN, ["a", "b", "c"])


SUITE = """
import pytest, torch
broken = []
torch.cuda.is_available = lambda: True
def synchronize():
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
torch.cuda.synchronize = synchronize

@pytest.mark.needs_cuda
@pytest.mark.parametrize("i", range(5))
def test(i):
    if i in (1, 3):
        broken.append(i)

def test_another():
    assert False
"""


def test_pytest_stops_and_goes_on(tmp_path: Path) -> None:
    """With conftest.py's real hooks, and a stand-in for the GPU."""
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n", encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = needs_cuda\n", encoding="utf-8")
    (tmp_path / "test_suite.py").write_text(SUITE, encoding="utf-8")
    outputs = []

    def start(more: Sequence[str], told: Path) -> int:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "needs_cuda", "-p", "no:cacheprovider", *more],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "NMSPARSE_BROKEN_GPU": str(told)},
            capture_output=True,
            text=True,
            check=False,
        )
        outputs.append(done.stdout + done.stderr)
        return done.returncode

    code, broken = gpu_tests.run(start)
    assert (code, broken) == (9, ["test_suite.py::test[1]", "test_suite.py::test[3]"]), outputs
    assert "the GPU cannot be used after test_suite.py::test[1]: CUDA error" in outputs[0]
    assert "1 passed" in outputs[2]


def test_the_files_that_are_collected() -> None:
    names = gpu_tests.files()
    kernels = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("tests/gpu/test_*.py"))]
    assert names[: len(kernels)] == kernels
    # With the mark, a fixture, an annotated one, a parameter; and one that has none of it.
    for name in ("train/test_cuda", "search/test_vote_ops", "test_engines", "train/test_optim_sparse"):
        assert f"tests/{name}.py" in names
    assert "tests/test_macs.py" not in names


@pytest.mark.parametrize("script", ["gpu.sh", "cuda_build.sh"])
def test_scripts_are_shell(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / "scripts" / script)], check=True)
