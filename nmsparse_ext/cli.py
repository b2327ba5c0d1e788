"""The ``nmsparse`` command.

Exit codes, for scripts: 0 it holds or worked; 1 a check failed; 2 wrong arguments or an unreadable file.
Imports that take long stand inside the commands, so that ``nmsparse --help`` answers at once.
"""

from __future__ import annotations

import json
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmsparse_ext._cli import EXIT_FAILED, EXIT_USAGE, JsonOption, usage_errors
from nmsparse_ext.cli_search import search

if TYPE_CHECKING:
    from torch import Tensor

    from nmsparse_ext import Pattern

app = typer.Typer(
    help="N:M sparsity for PyTorch: choose a pattern, train with it, pack it, run it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FileArgument = Annotated[
    Path, typer.Argument(help="A safetensors file, dense or packed.", show_default=False)
]


def main() -> None:
    """Entry point of the ``nmsparse`` command."""
    app()


# ----------------------------------------------------------------------------------------------------- demo


@app.command()
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


# ---------------------------------------------------------------------------------------------------- train


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
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


# ---------------------------------------------------------------------------------------------------- study

study = typer.Typer(help="Put questions to small recipes, by a plan fixed beforehand.", no_args_is_help=True)
app.add_typer(study, name="study")

PlanOption = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        help="A plan in TOML, or one of the library's own: study (the SR-STE paper's claims), search_study "
        "(uniform patterns, DominoSearch, allocation).",
    ),
]
ResultsArgument = Annotated[
    Path, typer.Argument(help="The file of results (JSON lines).", show_default=False)
]


@study.command("run")
def study_run(
    file: ResultsArgument,
    plan: PlanOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Make at most this many runs.")] = None,
    only: Annotated[str | None, typer.Option(help="Make the runs of this experiment alone.")] = None,
) -> None:
    """Make the runs of the plan that FILE lacks, one after the other, adding a line for each."""
    with usage_errors():
        from nmsparse_ext.recipes.study.plan import load_plan
        from nmsparse_ext.recipes.study.runs import run_study

        complete = run_study(
            file,
            load_plan(plan),
            limit=limit,
            only=only,
            report=lambda done, total, record: typer.echo(
                f"{done}/{total} {record['key']}: {record['test'] or record['validation']}"
            ),
        )
    typer.echo("complete" if complete else "not complete yet")


@study.command("report")
def study_report(
    file: ResultsArgument,
    out: Annotated[Path, typer.Option(help="Folder for the page and its pictures.")] = Path("."),
    plan: PlanOption = None,
) -> None:
    """Write the study's page, with tables and plots, from the results in FILE."""
    with usage_errors():
        from nmsparse_ext.recipes.study.plan import load_plan
        from nmsparse_ext.recipes.study.report import write_report

        typer.echo(str(write_report(file, load_plan(plan), out)))


# --------------------------------------------------------------------------------------------------- search

app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(search)


# ----------------------------------------------------------------------------------------------------- info


@app.command()
def info(as_json: JsonOption = False) -> None:
    """Say what was compiled in, what runs on this machine, and why."""
    import nmsparse_ext as nms

    build = nms.build_info()
    typer.echo(json.dumps(build.as_dict(), indent=1) if as_json else str(build))


# --------------------------------------------------------------------------------------------------- verify


@app.command()
def verify(
    file: FileArgument,
    pattern: Annotated[
        str, typer.Argument(help="n:m, n kept of every m, for example 2:4.", show_default=False)
    ],
    only: Annotated[
        list[str] | None, typer.Option(help="Check only tensors of this name; globs allowed.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Leave out tensors of this name; globs allowed.")
    ] = None,
    dim: Annotated[int, typer.Option(help="Group dim of dense tensors: input features or channels.")] = 1,
    pad: Annotated[
        bool, typer.Option("--pad", help="Also check sizes that are no multiple of m, as if zeros followed.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check that every weight in FILE holds PATTERN, group by group.

    Looks at all tensors of two or more dims. Names the first offending group of each that does not hold.
    """
    import nmsparse_ext as nms

    with usage_errors():
        parsed = nms.Pattern.parse(pattern)
        tensors = nms.load_file(file)
        rows = [
            {"name": name, **_verify_one(tensor, parsed, dim, pad)}
            for name, tensor in tensors.items()
            if tensor.dim() >= 2 and _chosen(name, only, skip)
        ]
        if not any(row["holds"] is not None for row in rows):
            raise ValueError(f"{file}: no tensor to check against {parsed}")
    failed = [row for row in rows if row["holds"] is False]
    if as_json:
        typer.echo(
            json.dumps(
                {"file": str(file), "pattern": str(parsed), "tensors": rows, "holds": not failed}, indent=1
            )
        )
    else:
        width = max(len(row["name"]) for row in rows)
        for row in rows:
            verdict = {True: "holds", False: "VIOLATES", None: "not checked"}[row["holds"]]
            typer.echo(f"{row['name']:<{width}}  {verdict:<11}  {row['why']}".rstrip())
        checked = sum(row["holds"] is not None for row in rows)
        typer.echo(f"{checked - len(failed)} of {checked} checked tensors hold {parsed}")
    if failed:
        raise typer.Exit(EXIT_FAILED)


def _chosen(name: str, only: list[str] | None, skip: list[str] | None) -> bool:
    if only and not any(fnmatchcase(name, glob) for glob in only):
        return False
    return not any(fnmatchcase(name, glob) for glob in skip or [])


def _verify_one(tensor: Tensor, pattern: Pattern, dim: int, pad: bool) -> dict[str, Any]:
    """Whether one tensor holds the pattern (None: it cannot be checked), and why."""
    import nmsparse_ext as nms

    if isinstance(tensor, nms.NMTensor):
        if tensor.pattern == pattern:
            # It cannot but hold: its indices were checked when it was loaded.
            return {"holds": True, "why": f"packed as {pattern}"}
        dim = tensor.group_dim
        tensor = tensor.to_dense()
    try:
        if not pad and tensor.shape[dim] % pattern.m:
            return {"holds": None, "why": f"{tensor.shape[dim]} along dim {dim}, no multiple of {pattern.m}"}
        violation = nms.find_violation(tensor, pattern, dim=dim, remainder="pad")
    except (ValueError, TypeError, IndexError) as error:  # such a dtype or dim
        return {"holds": None, "why": str(error)}
    if violation is None:
        return {"holds": True, "why": ""}
    at = ", ".join(map(str, violation.index))
    return {
        "holds": False,
        "why": f"the group at [{at}] along dim {dim} has {violation.kept} nonzeros",
        "group": list(violation.index),
        "nonzeros": violation.kept,
    }


# -------------------------------------------------------------------------------------------------- inspect


@app.command()
def inspect(file: FileArgument, as_json: JsonOption = False) -> None:
    """List what FILE holds: shapes, dtypes, bytes, and how sparse it is."""
    import nmsparse_ext as nms

    with usage_errors():
        rows = [{"name": name, **_describe(tensor)} for name, tensor in nms.load_file(file).items()]
    total = sum(row["bytes"] for row in rows)
    dense = sum(row["dense_bytes"] for row in rows)
    if as_json:
        typer.echo(
            json.dumps({"file": str(file), "tensors": rows, "bytes": total, "dense_bytes": dense}, indent=1)
        )
        return
    width = max([len(row["name"]) for row in rows], default=0)
    for row in rows:
        shape = "x".join(map(str, row["shape"])) or "scalar"
        if row["pattern"]:
            form = f"packed {row['pattern']} along dim {row['group_dim']} ({row['encoding']})"
        else:
            form = "dense" if row["nonzero"] is None else f"dense, {row['nonzero']:.1%} nonzero"
        typer.echo(f"{row['name']:<{width}}  {shape:>16}  {row['dtype']:<14} {row['bytes']:>12,} B  {form}")
    typer.echo(f"{len(rows)} tensors, {total:,} bytes; {dense:,} if all were dense")


def _describe(tensor: Tensor) -> dict[str, Any]:
    import nmsparse_ext as nms

    row: dict[str, Any] = {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "bytes": tensor.nbytes,
        "dense_bytes": tensor.numel() * tensor.element_size(),
        "pattern": None,
        "encoding": None,
        "group_dim": None,
        "nonzero": None,
    }
    if isinstance(tensor, nms.NMTensor):
        row |= {"pattern": str(tensor.pattern), "encoding": tensor.encoding, "group_dim": tensor.group_dim}
    elif tensor.dim() >= 2:  # how sparse a bias is says nothing
        row["nonzero"] = tensor.count_nonzero().item() / max(1, tensor.numel())
    return row


if __name__ == "__main__":
    main()
