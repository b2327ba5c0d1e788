"""``nmsparse train``: the recipes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmsparse_ext.cli.options import EXIT_USAGE, DryRunOption, ForceOption, JsonOption, usage_errors
from nmsparse_ext.cli.output import emit, show

if TYPE_CHECKING:
    from nmsparse_ext.recipes.config import TrainConfig
    from nmsparse_ext.recipes.task import Task

_USAGE = """nmsparse train NAME [--config FILE.toml] [flags]; NAME --help lists the settings
  --json     print one JSON object, and nothing else
  --dry-run  make the model and its scheme, and say what would be trained
  --force    train over a run that is finished

recipes:"""


def train(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The recipe; none lists them.", show_default=False)] = "",
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe: `nmsparse train NAME --help` lists its settings, from flags or --config FILE.toml.

    Several processes: `torchrun --nproc-per-node 4 -m nmsparse_ext train NAME ...`.
    """
    from nmsparse_ext.recipes.catalog import RECIPES

    if name not in RECIPES:
        if name not in ("", "--help"):
            typer.echo(f"nmsparse: there is no recipe {name!r}, only {', '.join(RECIPES)}", err=True)
            raise typer.Exit(EXIT_USAGE)
        width = max(map(len, RECIPES))
        listed = [f"  {recipe.name:<{width}}  {recipe.summary}" for recipe in RECIPES.values()]
        recipes = {recipe.name: recipe.summary for recipe in RECIPES.values()}
        show(as_json, {"recipes": recipes}, lambda: emit("\n".join([_USAGE, *listed])))
        return
    with usage_errors("train"):
        from nmsparse_ext.recipes.config import parse_config, plain
        from nmsparse_ext.recipes.loop import out_folder
        from nmsparse_ext.recipes.loop import train as run

        config = parse_config(RECIPES[name].config, context.args, name=name)
        config.out = out_folder(config, name)
        task = RECIPES[name].task(config)
        record: dict[str, Any] = {"recipe": name, "out": str(config.out), "config": plain(config)}
        if dry_run:
            record |= _plan(config, task)
            show(as_json, record, lambda: emit(_planned(record)))
            return
        if (config.out / "result.json").exists() and not (config.resume or force):
            raise ValueError(
                f"{config.out} holds a finished run; give --force to train over it, or another --out"
            )
        outcome = run(task)
        record |= {
            "finished": outcome.finished,
            "epochs": outcome.rows,
            "test": outcome.test,
            "seconds": outcome.seconds,
        }
    if os.environ.get("RANK", "0") == "0":
        figures = {**outcome.rows[-1], **outcome.test} if outcome.rows else outcome.test
        shown = ", ".join(f"{k} {v:.4f}" for k, v in figures.items() if k.startswith(("validation", "test")))
        line = f"{config.out}: {shown}" + ("" if outcome.finished else "; stopped, go on with --resume")
        show(as_json, record, lambda: emit(line))


def _plan(config: TrainConfig, task: Task) -> dict[str, Any]:
    from nmsparse_ext.recipes.runtime import seed_everything
    from nmsparse_ext.recipes.task import Place

    seed_everything(config.seed, Place.WEIGHTS)
    model = task.build_model()
    scheme = task.scheme(model)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": config.epochs * task.steps_per_epoch,
        "scheme": {name: str(pattern) for name, pattern in scheme.items()},
        "stays_dense": dict(scheme.dense),
    }


def _planned(record: dict[str, Any]) -> str:
    config = record["config"]
    lines = [
        f"would train {record['recipe']} ({record['parameters']:,} parameters) with {config['method']} for "
        f"{config['epochs']} epochs, {record['steps']} steps, into {record['out']}"
    ]
    width = max(map(len, (*record["scheme"], *record["stays_dense"])), default=0)
    lines += [f"{name:<{width}}  {pattern}" for name, pattern in record["scheme"].items()]
    lines += [f"{name:<{width}}  dense: {why}" for name, why in record["stays_dense"].items()]
    return "\n".join(lines)
