"""``nmsparse demo``: the whole job, on handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nmsparse_ext.cli.options import EXIT_FAILED, usage_errors


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
) -> None:
    """Do the whole job on handwritten digits: train 2:4, check, pack, save, load, compare, report."""
    with usage_errors():
        try:
            from nmsparse_ext.recipes.demo import Settings, run_demo

            if quick:
                epochs, seeds = min(epochs, 2), 1
            outcome = run_demo(
                Settings(out=out, epochs=epochs, seeds=seeds, seed=seed, threads=threads, quick=quick)
            )
        except ModuleNotFoundError as error:
            raise ValueError(f"{error}; the demo needs `pip install nmsparse_ext[demo]`") from None
    if not outcome.ok:
        typer.echo("nmsparse: a check failed, see the report", err=True)
        raise typer.Exit(EXIT_FAILED)
