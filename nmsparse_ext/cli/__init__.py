"""The ``nmsparse`` command.

Exit codes, for scripts: 0 it holds or worked; 1 a check failed; 2 wrong arguments or an unreadable file.
Imports that take long (torch, and whatever needs it) stand inside the commands, so that ``nmsparse --help``
answers at once.

How to add a command: a file here with a function that typer understands, and
a line below. What it needs is shared:

- `sources`: ``load_model(argument)`` and ``load_tensors(argument)`` for all that MODEL and FILE may be;
  ``chosen(name, layers, skip)`` for ``--layers`` and ``--skip``.
- `options`: the options that several commands have, exit codes, ``usage_errors()`` around the body,
  ``check_output(path, force)`` before work is done.
- `output`: ``show(as_json, record, text)``, ``emit``, ``emit_table``, ``progress``.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer

from nmsparse_ext.cli.bench import bench
from nmsparse_ext.cli.convert import convert
from nmsparse_ext.cli.demo import demo
from nmsparse_ext.cli.explain import explain
from nmsparse_ext.cli.info import info
from nmsparse_ext.cli.inspect import inspect
from nmsparse_ext.cli.pack import compress, decompress
from nmsparse_ext.cli.prune import prune
from nmsparse_ext.cli.report import report
from nmsparse_ext.cli.search import search
from nmsparse_ext.cli.study import study
from nmsparse_ext.cli.train import train
from nmsparse_ext.cli.tune import tune
from nmsparse_ext.cli.verify import verify

app = typer.Typer(
    help="N:M sparsity for PyTorch: choose a pattern, train with it, pack it, run it.",
    epilog="Exit codes: 0 it worked, or what was checked holds; 1 a check failed; 2 wrong arguments, or "
    "something cannot be read or written; 130 interrupted. Errors are one line on stderr; with "
    "NMSPARSE_TRACEBACK=1 they come with their traceback.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # which fills paragraphs
    context_settings={"help_option_names": ["-h", "--help"]},
)

_TO_OTHERS = {"allow_extra_args": True, "ignore_unknown_options": True}

# Wrong arguments. Typer has its own copy of click, or in older releases click's; both begin here.
_ClickException: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app.command()(inspect)
app.command()(verify)
app.command()(compress)
app.command()(decompress)
app.command()(convert)
app.command()(prune)
app.command()(explain)
app.command()(tune)
app.command()(bench)
app.command()(report)
app.command(context_settings=_TO_OTHERS)(search)
app.command(context_settings={**_TO_OTHERS, "help_option_names": []}, add_help_option=False)(train)
app.add_typer(study, name="study")
app.command()(info)
app.command()(demo)


def _version(asked: bool) -> None:
    if asked:
        import nmsparse_ext

        typer.echo(nmsparse_ext.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """N:M sparsity for PyTorch: choose a pattern, train with it, pack it, run it."""


def main() -> None:
    """Entry point of the ``nmsparse`` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names that the terminal cannot show are no reason to stop
            stream.reconfigure(errors="backslashreplace")
    if not sys.warnoptions:  # -W and PYTHONWARNINGS have their way
        for kind in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", kind)  # they are for whoever writes programs
        warnings.showwarning = _show_warning
    try:
        code = app(standalone_mode=False)
    except _ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            context = getattr(error, "ctx", None)
            path = "nmsparse" if context is None else context.command_path
            typer.echo(f"nmsparse: {error.format_message().rstrip('.')}; see `{path} --help`", err=True)
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """In a line, as errors."""
    typer.echo(f"nmsparse: warning: {message}", err=True)
