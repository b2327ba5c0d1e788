"""What the commands share: exit codes, errors in one line, options."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

#: A check failed: what was asked about does not hold.
EXIT_FAILED = 1
#: Wrong arguments, or what they name cannot be read or written.
EXIT_USAGE = 2
#: The reader of our output went away, as the shell reports it for a program that SIGPIPE ends.
EXIT_BROKEN_PIPE = 128 + 13
#: Ctrl-C, as the shell reports it.
EXIT_INTERRUPTED = 128 + 2

#: Set to 1, errors come with their traceback.
TRACEBACK = "NMSPARSE_TRACEBACK"

#: MODEL of the commands that need to know what each weight is.
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A safetensors file (or its index, or a folder with it), the folder of a transformers model, or "
        "a factory pkg.mod:function.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Do everything but write: say what would be written.")
]
ForceOption = Annotated[bool, typer.Option("--force", "-f", help="Overwrite what exists.")]
LayersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--layers",
        "--only",
        metavar="GLOB",
        help="Only weights of this name, or below this module; globs allowed, may be repeated.",
    ),
]
SkipOption = Annotated[
    list[str] | None,
    typer.Option(
        "--skip",
        metavar="GLOB",
        help="Leave out weights of this name, or below this module; globs allowed, may be repeated.",
    ),
]


def completed(*words: str) -> Callable[[str], list[str]]:
    """What shells complete an option's value to, for ``autocompletion=`` of typer."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


@contextmanager
def usage_errors(extra: str = "") -> Iterator[None]:
    """Turns errors that the caller can mend into a message on stderr and exit code 2.

    The message has one line; where a check found several things, each has a line of its own below it.

    Args:
        extra: The extra (of ``pip install nmsparse_ext[extra]``) that brings what the command needs.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        typer.echo("nmsparse: interrupted", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except Exception as error:
        if os.environ.get(TRACEBACK) == "1" or not _mendable(error):
            raise
        hint = (
            f"; try `pip install nmsparse_ext[{extra}]`" if extra and isinstance(error, ImportError) else ""
        )
        typer.echo(f"nmsparse: {_text(error)}{hint}", err=True)
        raise typer.Exit(EXIT_USAGE) from None


def check_output(path: Path, force: bool, *, folder: bool = False) -> Path:
    """Refuses, before any work is done, a path that cannot be written or that would be overwritten.

    Args:
        path: What is to be written.
        force: Whether it may exist.
        folder: Whether it is a folder; if not, it must not be one.

    Raises:
        ValueError: If there is such a file and not ``force``, or ``path`` is a folder.
        OSError: If the folder does not exist or cannot be written.
    """
    if path.is_dir() and not folder:
        raise ValueError(f"{path} is a folder; give the name of the file to write")
    if path.is_file() and folder:
        raise ValueError(f"{path} is a file, and a folder is to be written")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {parent}")
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: no permission to write into {parent}")
    if not force and (path.exists() or path.with_name(f"{path.name}.index.json").exists()):
        raise ValueError(f"{path} exists; give --force to overwrite it")
    return path


def _mendable(error: Exception) -> bool:
    # NotImplementedError is a RuntimeError that says what a packed weight cannot do; safetensors has an
    # exception of its own that is nothing but an Exception.
    kinds = (ValueError, TypeError, OSError, ImportError, NotImplementedError)
    return isinstance(error, kinds) or type(error).__name__ == "SafetensorError"


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"  # without the number of the error
    return str(error) or type(error).__name__
