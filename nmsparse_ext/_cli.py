"""What the commands share: exit codes, errors in one line, options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

EXIT_FAILED = 1
EXIT_USAGE = 2

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn errors that the caller can mend into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"nmsparse: {error}", err=True)
        raise typer.Exit(EXIT_USAGE) from None
