"""What the commands print: one JSON object, or text; colours and progress bars on terminals only."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, Protocol

import typer

from nmsparse_ext.cli.options import EXIT_BROKEN_PIPE

if TYPE_CHECKING:
    from rich.console import Console

#: Words that stand out in a table on a terminal.
_STYLES = {"holds": "green", "VIOLATES": "bold red", "packed": "green", "yes": "green", "no": "yellow"}


def emit(text: str) -> None:
    """Prints a text and a newline on stdout; ends quietly if nobody reads it any more (``| head``)."""
    try:
        print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered would raise once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_BROKEN_PIPE) from None


def emit_json(record: Mapping[str, Any]) -> None:
    """Prints the one JSON object of ``--json``. NaN and infinity, which JSON lacks, become null."""
    emit(json.dumps(_plain(record), indent=1, ensure_ascii=False, allow_nan=False))


def emit_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int] = (0,)) -> None:
    """Prints a table: drawn and coloured on a terminal, in plain aligned columns elsewhere.

    Args:
        head: The names of the columns.
        rows: The cells.
        words: Columns that stand to the left; numbers stand to the right.
    """
    if not sys.stdout.isatty():
        from nmsparse_ext.deploy.table import table

        emit(table(head, rows, words))
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(head):
        left = i in words
        drawn.add_column(name, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    console().print(drawn)


def console() -> Console:
    """Standard output as rich sees it: it honours NO_COLOR, and is plain where there is no terminal."""
    from rich.console import Console

    return Console(highlight=False)


@contextmanager
def own_stdout() -> Iterator[None]:
    """What others print on stdout meanwhile, in Python or below it, goes to stderr.

    Solvers and the caller's own functions print; stdout is for what a command has to say.
    """
    libc = ctypes.CDLL(None)
    try:
        kept = os.dup(1)
    except OSError:  # there is no stdout
        yield
        return
    try:
        sys.stdout.flush()
        libc.fflush(None)
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        libc.fflush(None)  # a pipe's buffer may still hold what they printed
        os.dup2(kept, 1)
        os.close(kept)


class Step(Protocol):
    """Moves a progress bar on."""

    def __call__(self, advance: int = 1, text: str | None = None) -> None:
        """Moves it by ``advance``, and says what comes next."""


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Step]:
    """A progress bar with the time left, on stderr, if that is a terminal; it is gone in the end.

    Args:
        what: What is being done.
        total: How many steps there are; ``None`` if nobody knows.

    Yields:
        What is called after each step.
    """
    if not sys.stderr.isatty():
        yield lambda advance=1, text=None: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)

        def step(advance: int = 1, text: str | None = None) -> None:
            bar.update(task, advance=advance, description=text)

        yield step


def show(as_json: bool, record: Mapping[str, Any], text: Callable[[], None]) -> None:
    """Prints ``record`` for ``--json``, or calls ``text``, which prints for people."""
    if as_json:
        emit_json(record)
    else:
        text()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
