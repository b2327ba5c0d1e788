"""``nmsparse search``: a scheme for a model, from the command line."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmsparse_ext.cli.options import (
    DryRunOption,
    ForceOption,
    JsonOption,
    LayersOption,
    check_output,
    completed,
    usage_errors,
)
from nmsparse_ext.cli.output import emit, own_stdout, progress, show
from nmsparse_ext.cli.sources import calibration_batches, load_model

if TYPE_CHECKING:
    from nmsparse_ext import Budget, Scheme
    from nmsparse_ext.recipes.searched import Searched

METHODS = ("allocate", "domino", "erk")


def search(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="A recipe's name, a factory pkg.mod:fn, the folder of a transformers model, or a file.",
            show_default=False,
        ),
    ],
    budget: Annotated[
        list[str],
        typer.Option(
            help="params=0.125, macs=, bytes=10MB or latency=3ms: fractions of dense, or absolute; "
            "several hold at once.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where the scheme goes (JSON).", show_default=False)
    ] = None,
    method: Annotated[
        str, typer.Option(help=f"One of {', '.join(METHODS)}.", autocompletion=completed(*METHODS))
    ] = "allocate",
    criterion: Annotated[
        str,
        typer.Option(
            help="For allocate: magnitude, taylor or output.",
            autocompletion=completed("magnitude", "taylor", "output"),
        ),
    ] = "magnitude",
    m: Annotated[int, typer.Option(min=2, help="The group size.")] = 16,
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="n:m that a weight may become; by default powers of two, and dense."),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="What stays dense; globs allowed. By default what a recipe says."),
    ] = None,
    layers: LayersOption = None,
    at_least: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB=N:M", help="No sparser than this pattern; may be repeated."),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB=N:M,N:M", help="Candidates of these weights alone; may be repeated."),
    ] = None,
    embeds_in_24: Annotated[
        bool,
        typer.Option(
            "--embeds-in-24",
            help="Only patterns that run on sparse tensor cores, for all searched weights; by default 2 and "
            "1 of 4, 8 and so on up to --m.",
        ),
    ] = False,
    permute: Annotated[
        Path | None,
        typer.Option(help="For allocate: reorder channels too; the reordered weights go to this file."),
    ] = None,
    step: Annotated[
        str | None,
        typer.Option(help="pkg.mod:fn, fn(model) -> loss; for domino and taylor where no recipe has one."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FUNCTION",
            help="pkg.mod:function, which returns batches that the model is called with; for output. Recipes "
            "bring their own, factories their example input.",
            show_default=False,
        ),
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Batches that taylor and output look at.")] = 8,
    max_steps: Annotated[int, typer.Option(min=1, help="For domino: the most steps.")] = 100_000,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="For domino: written to every 1000 steps; if it is there, the search goes on from it.",
            show_default=False,
        ),
    ] = None,
    chart: Annotated[
        Path | None, typer.Option(help="A picture of the scheme (PNG).", show_default=False)
    ] = None,
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Search a pattern for every weight of MODEL within a budget, and save the scheme.

    Further flags go to the recipe: `nmsparse search digits-resnet --budget params=0.25 --start FILE`.
    """
    with usage_errors("search,train"):
        from nmsparse_ext import Budget
        from nmsparse_ext.search import Constraints

        if method not in METHODS:
            raise ValueError(f"--method must be one of {', '.join(METHODS)}, got {method!r}")
        limits = Budget.parse([part for text in budget for part in text.split(",")])
        outputs = [path for path in (out, chart, permute) if path is not None]
        if not dry_run:
            for path in outputs:
                check_output(path, force)
        found = load_model(model, context.args, step=step)
        arguments: dict[str, Any] = {
            "m": m,
            "candidates": candidate or None,
            "skip": found.skip if skip is None else skip,
            "constraints": Constraints(
                include=layers or None,
                allowed={glob: text.split(",") for glob, text in _by_glob("--allow", allow)},
                at_least=dict(_by_glob("--at-least", at_least)),
                embeds_in_24=embeds_in_24,
            ),
            "example_input": found.example_input,
        }
        if permute is not None:
            if method != "allocate" or found.example_input is None:
                raise ValueError("--permute needs --method allocate and a model with an example input")
            arguments["permute"] = True
        if method == "allocate" and criterion == "output":
            arguments["calibration"] = (
                found.calibration(batches)
                if calibration is None
                else calibration_batches(found, model, calibration, batches)
            )
        if method == "domino":
            arguments |= {"max_steps": max_steps, "checkpoint": None if dry_run else checkpoint}
        elif checkpoint is not None:
            raise ValueError("--checkpoint is for --method domino; the others take seconds")
        # DominoSearch has a bar of its own, and two on one line show neither.
        with nullcontext() if method == "domino" else progress("searching"), own_stdout():
            scheme, text, record = _run(found, method, criterion, limits, batches, arguments)
        if permute is not None and not dry_run:
            from nmsparse_ext import save_file

            save_file(found.model, permute)
        if out is not None and not dry_run:
            scheme.save(out)
        if chart is not None and not dry_run:
            from nmsparse_ext.scheme_chart import save_chart

            save_chart(found.model, scheme, chart, found.example_input)
    record |= {"out": None if out is None else str(out), "written": not dry_run and bool(outputs)}
    done = [f"would write {path}" if dry_run else f"saved to {path}" for path in outputs]
    show(as_json, record, lambda: emit("\n".join([_text(scheme, text), *done])))


def _run(
    found: Searched,
    method: str,
    criterion: str,
    budget: Budget,
    batches: int,
    arguments: dict[str, Any],
) -> tuple[Scheme, str, dict[str, Any]]:
    """Searches; returns the scheme, and what to print as text and as JSON."""
    import nmsparse_ext as nms
    from nmsparse_ext.search import Costs, erk_scheme

    if method == "allocate":
        allocation = nms.allocate(
            found.model,
            budget,
            criterion=criterion,
            step=found.step,
            steps=batches,
            **arguments,
        )
        return allocation.scheme, str(allocation), allocation.to_json()
    if method == "erk":
        scheme = erk_scheme(found.model, budget, **arguments)
    else:
        if found.step is None:
            raise ValueError("--method domino trains the model: a recipe, or --step pkg.mod:fn, says how")
        domino = nms.search.domino_search(found.model, found.step, budget=budget, **arguments)
        scheme = domino.scheme
    costs = Costs(found.model, found.example_input)
    left = ", ".join(f"{metric} {share:.1%}" for metric, share in costs.shares(scheme).items())
    record = {
        "scheme": {name: str(pattern) for name, pattern in scheme.items()},
        "stays_dense": dict(scheme.dense),
        "costs": costs.total(scheme).as_dict(),
        "dense": costs.dense.as_dict(),
    }
    return scheme, f"{scheme}\nleft: {left}", record


def _by_glob(option: str, given: list[str] | None) -> list[tuple[str, str]]:
    """``[(glob, value)]`` of options like ``encoder.*=4:16``."""
    pairs = [text.rpartition("=") for text in given or ()]
    for (glob, _, value), text in zip(pairs, given or (), strict=True):
        if not glob or not value:
            raise ValueError(f"{option} must look like GLOB=n:m, got {text!r}")
    return [(glob, value) for glob, _, value in pairs]


def _text(scheme: Scheme, text: str) -> str:
    width = max(map(len, (*scheme, *scheme.dense)), default=0)
    lines = [f"{name:<{width}}  {pattern}" for name, pattern in scheme.items()]
    lines += [f"{name:<{width}}  dense: {reason}" for name, reason in scheme.dense.items()]
    return "\n".join([*lines, text])
