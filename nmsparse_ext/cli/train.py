"""``nmsparse train``: the recipes."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from nmsparse_ext.cli.options import EXIT_USAGE, usage_errors


def train(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The recipe; none lists them.", show_default=False)] = "",
) -> None:
    """Train a recipe: `nmsparse train NAME --help` lists its settings, from flags or --config FILE.toml.

    Several processes: `torchrun --nproc-per-node 4 -m nmsparse_ext train NAME ...`.
    """
    from nmsparse_ext.recipes.catalog import RECIPES

    if name not in RECIPES:
        typer.echo("nmsparse train NAME [--config FILE.toml] [flags]; NAME --help lists the settings")
        width = max(map(len, RECIPES))
        for recipe in RECIPES.values():
            typer.echo(f"  {recipe.name:<{width}}  {recipe.summary}")
        raise typer.Exit(0 if name in ("", "--help") else EXIT_USAGE)
    with usage_errors():
        try:
            from nmsparse_ext.recipes.config import parse_config
            from nmsparse_ext.recipes.loop import out_folder
            from nmsparse_ext.recipes.loop import train as run

            config = parse_config(RECIPES[name].config, context.args, name=name)
            config.out = out_folder(config, name)
            outcome = run(RECIPES[name].task(config))
        except ModuleNotFoundError as error:
            raise ValueError(f"{error}; recipes need `pip install nmsparse_ext[train]`") from None
    if os.environ.get("RANK", "0") == "0":
        figures = {**outcome.rows[-1], **outcome.test} if outcome.rows else outcome.test
        shown = ", ".join(f"{k} {v:.4f}" for k, v in figures.items() if k.startswith(("validation", "test")))
        typer.echo(f"{config.out}: {shown}" + ("" if outcome.finished else "; stopped, go on with --resume"))
