"""``nmsparse demo``: the whole job, on handwritten digits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmsparse_ext.cli.options import EXIT_FAILED, DryRunOption, JsonOption, usage_errors
from nmsparse_ext.cli.output import emit, emit_json, show

if TYPE_CHECKING:
    from rich.console import Console

_FILES = {
    "report": "report.html",
    "picture": "overview.png",
    "result": "result.json",
    "dense": "dense.safetensors",
    "packed": "packed.safetensors",
}


def demo(
    out: Annotated[Path, typer.Option(help="Folder for report, picture, models and numbers.")] = Path(
        "demo_out"
    ),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of every training run.")] = 20,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per method.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="PyTorch threads.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two epochs, one seed, a narrow network: does it run?")
    ] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Do the whole job on handwritten digits: train 2:4, check, pack, save, load, compare, report.

    Files of an earlier demo in the same folder are replaced. Exit code 1 if a check fails.
    """
    with usage_errors("demo"):
        from nmsparse_ext.recipes.demo import Settings, run_demo

        if quick:
            epochs, seeds = min(epochs, 2), 1
        settings = Settings(out=out, epochs=epochs, seeds=seeds, seed=seed, threads=threads, quick=quick)
        if dry_run:
            files = {name: str(out / file) for name, file in _FILES.items()}
            record: dict[str, Any] = {"command": settings.command, "files": files, "written": False}
            show(as_json, record, lambda: emit("\n".join(f"would write {file}" for file in files.values())))
            return
        outcome = run_demo(settings, _nowhere() if as_json else None)
    if as_json:
        paths = {name: str(path) for name, path in outcome.files.items()}
        emit_json({"ok": outcome.ok, "files": paths, "result": outcome.result})
    if not outcome.ok:
        typer.echo("nmsparse: a check failed, see the report", err=True)
        raise typer.Exit(EXIT_FAILED)


def _nowhere() -> Console:
    """A console that shows only its progress bar, on stderr: the tables of the demo are for people."""
    from rich.console import Console

    return Console(stderr=True, quiet=not sys.stderr.isatty())
