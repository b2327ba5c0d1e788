"""``nmsparse study``: many small runs, by a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nmsparse_ext.cli.options import JsonOption, usage_errors
from nmsparse_ext.cli.output import emit, show

study = typer.Typer(help="Put questions to small recipes, by a plan fixed beforehand.", no_args_is_help=True)

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
    as_json: JsonOption = False,
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
                f"{done}/{total} {record['key']}: {record['test'] or record['validation']}", err=as_json
            ),
        )
    record = {"file": str(file), "complete": complete}
    show(as_json, record, lambda: emit("complete" if complete else "not complete yet"))


@study.command("report")
def study_report(
    file: ResultsArgument,
    out: Annotated[Path, typer.Option(help="Folder for the page and its pictures.")] = Path("."),
    plan: PlanOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the study's page, with tables and plots, from the results in FILE."""
    with usage_errors():
        from nmsparse_ext.recipes.study.plan import load_plan
        from nmsparse_ext.recipes.study.report import write_report

        page = write_report(file, load_plan(plan), out)
    show(as_json, {"page": str(page)}, lambda: emit(str(page)))
