"""Runs the commands of a page: its ``console`` blocks, between the ``python`` ones, as a reader does.

In a block, a line that begins with ``$ nmsparse`` is run, and ``$ echo $?`` is the exit code of the one
before; the lines below are what they print, stdout and stderr. ``...`` stands for anything. After a comment
``<!-- output varies -->`` only the exit code (0) and the first line without its numbers are compared. A
``python`` block with ``title="name.py"`` is a file.
"""

from __future__ import annotations

import doctest
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from typer.testing import CliRunner

from nmsparse_ext.cli import app

VARIES = "<!-- output varies -->"
_BLOCK = re.compile(
    rf"(?P<varies>{VARIES}\n+)?^```(?P<kind>python|console)(?: title=\"(?P<title>[^\"]+)\")?[^\n]*\n"
    r"(?P<text>.*?)^```",
    flags=re.MULTILINE | re.DOTALL,
)
_NUMBER = re.compile(r"[0-9][0-9a-z.+]*")  # or a version
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run_page(path: Path) -> int:
    """Runs all blocks of a page in the current folder; returns how many commands there were.

    Raises:
        AssertionError: If a command prints something else than the page says.
    """
    names = {"__name__": "__main__"}
    count = 0
    for number, block in enumerate(_BLOCK.finditer(path.read_text(encoding="utf-8"))):
        if block["title"]:
            Path(block["title"]).write_text(block["text"], encoding="utf-8")
        elif block["kind"] == "python":
            exec(compile(block["text"], f"{path}, block {number}", "exec"), names)
        else:
            count += _run_block(block["text"], bool(block["varies"]))
    return count


def _run_block(text: str, varies: bool) -> int:
    code, count = 0, 0
    for command, expected in commands(text):
        if command == "echo $?":
            assert expected.strip() == str(code), f"the exit code is {code}, not {expected.strip()}"
            continue
        words = shlex.split(command, comments=True)
        assert words[0] == "nmsparse", f"{command} is no command that is run here"
        result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
        code, count = result.exit_code, count + 1
        got = result.output
        if varies:
            assert code == 0, f"$ {command}\n{got}"
            expected, got = (_NUMBER.sub("#", part.splitlines()[0]) + "\n" for part in (expected, got))
        same = doctest.OutputChecker().check_output(expected, got, _FLAGS)
        assert same, f"$ {command}\nprints\n{got}\nbut the page says\n{expected}"
    return count


def commands(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a block, each with what it prints; a backslash at the end goes on in the next line."""
    for part in re.split(r"^\$ ", text.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield " ".join(command.split()), output
