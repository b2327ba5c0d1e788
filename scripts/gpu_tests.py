"""Runs the tests that need a GPU; where one breaks the GPU for its process, the others in a process anew.

    python scripts/gpu_tests.py [--reports FOLDER] [PYTEST ARGUMENTS...]

After an illegal access every call of CUDA fails, so that one wrong kernel would fail all the tests behind it.
``tests/conftest.py`` ends the process there, and says which test it was. Only files that can have such tests
are collected, those of the kernels first.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: What a test that needs a GPU has: the mark, or a fixture that brings it.
_SIGNS = re.compile(r"needs_cuda|\bCUDA\b|def \w+\([^)]*\b(compiled_engine|engine|device)\b")

#: What a process answers in which no test can use the GPU any more.
BROKEN = 9
MOST_PROCESSES = 8


def files(root: Path = ROOT) -> list[str]:
    """The files to collect, relative to ``root``: those that need a GPU throughout come first."""
    found = [
        path.relative_to(root).as_posix()
        for path in sorted(root.glob("tests/**/test_*.py"))
        if _SIGNS.search(path.read_text(encoding="utf-8"))
    ]
    return sorted(found, key=lambda name: not name.startswith("tests/gpu/"))


def run(
    start: Callable[[Sequence[str], Path], int],
    reports: Path | None = None,
    most: int = MOST_PROCESSES,
) -> tuple[int, list[str]]:
    """Runs all tests, in as many processes as it takes.

    Args:
        start: ``(more arguments of pytest, file that a broken test is written to) -> exit code``.
        reports: Folder for the reports, one for each process.
        most: So many processes at most.

    Returns:
        The first exit code that was not 0, and the tests that broke the GPU.
    """
    code, broken = 0, []
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "broken"
        for number in range(most):
            more = ["--after", broken[-1]] if broken else []
            if reports is not None:
                more += ["--junitxml", str(reports / f"gpu_tests{number or ''}.xml")]
            told.unlink(missing_ok=True)
            found = start(more, told)
            code = code or found
            if found != BROKEN or not told.exists():
                break
            broken.append(told.read_text(encoding="utf-8"))
    return code, broken


def main(argv: list[str] | None = None) -> int:
    """Runs the tests; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reports", type=Path, default=None, help="where reports go")
    arguments, rest = parser.parse_known_args(argv)
    # An interrupt is for pytest, which then writes its report; this process waits for that.
    interrupted: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: interrupted.append(number))

    def start(more: Sequence[str], told: Path) -> int:
        if interrupted:
            return 130
        command = [sys.executable, "-m", "pytest", "-q", "-m", "needs_cuda", *files(), *rest, *more]
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "NMSPARSE_BROKEN_GPU": str(told)},
            check=False,
        ).returncode

    code, broken = run(start, arguments.reports)
    for test in broken:
        print(f"after {test} the GPU could not be used any more; the others ran in a process of their own")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
