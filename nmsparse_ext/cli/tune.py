"""``nmsparse tune``: measure ahead of time what multiplies the fastest on this GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from nmsparse_ext.cli.options import (
    JsonOption,
    LayersOption,
    SkipOption,
    completed,
    usage_errors,
)
from nmsparse_ext.cli.output import emit, emit_table, progress, show

if TYPE_CHECKING:
    from nmsparse_ext.tune import Job


def tune(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A safetensors file (or its index, or a folder with it), the folder of a transformers "
            "model, or a factory pkg.mod:function; or none, with --shape.",
            show_default=False,
        ),
    ] = "",
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="OUTxIN", help="A layer, for example 4096x11008; may be repeated."),
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            "--pattern",
            "-p",
            metavar="PATTERN",
            help="n:m; for a model the pattern of what is not packed, "
            "or a scheme file. By default 2:4. Several for shapes.",
        ),
    ] = None,
    tokens: Annotated[
        str, typer.Option(metavar="N,N,...", help="Numbers of tokens. By default from 1 to 16384.")
    ] = "",
    dtype: Annotated[
        str,
        typer.Option(
            help="bfloat16, float16 or float32. By default that of the model's weights; bfloat16 for shapes.",
            autocompletion=completed("bfloat16", "float16", "float32"),
        ),
    ] = "",
    layers: LayersOption = None,
    skip: SkipOption = None,
    algorithms: Annotated[
        bool,
        typer.Option(
            "--algorithms/--no-algorithms", help="Search for cuSPARSELt's fastest right algorithms first."
        ),
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be measured; needs no GPU.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure, on this GPU, which way of multiplying with packed weights wins for how many tokens.

    For every shape and number of tokens the small-batch kernel, cuSPARSELt and the dense product are timed in
    turns; every algorithm of cuSPARSELt is checked against algorithm 0 before it may win. The results are
    kept in the user's cache folder, for this GPU and these library versions, and packed weights are
    multiplied by them from then on.
    """
    with usage_errors():
        from nmsparse_ext import crossover
        from nmsparse_ext import tune as tuning
        from nmsparse_ext.cusparselt import algorithms_path

        counts = _tokens(tokens) if tokens else list(crossover.TOKENS)
        jobs = _jobs(model, shape or [], pattern or ["2:4"], dtype, layers, skip)
        files = {"crossovers": crossover.table_path(), "algorithms": algorithms_path()}
        if not dry_run:
            reason = tuning.why_not()
            if reason is not None:
                raise ValueError(f"{reason}; --dry-run says what would be measured")
    if dry_run:
        plan = [
            {
                "shape": [job.rows, job.k],
                "pattern": str(job.pattern),
                "dtype": str(job.dtype).removeprefix("torch."),
                "weights": list(job.names),
            }
            for job in jobs
        ]
        show(
            as_json,
            {"dry_run": True, "jobs": plan, "tokens": counts, "files": files},
            lambda: _text_of_plan(jobs, counts, files),
        )
        return
    with usage_errors(), progress("tuning", len(jobs)) as step:
        done = tuning.tune(jobs, counts, algorithms=algorithms, report=lambda tuned: step(1, str(tuned.job)))
    record = {"dry_run": False, "jobs": [tuned.to_json() for tuned in done], "tokens": counts, "files": files}

    def text() -> None:
        for tuned in done:
            emit(f"{tuned.job}: {tuned.choices}")
            ways = [way for way in crossover.BRANCHES if tuned.reasons[way] is None]
            rows = [
                [str(count), *(f"{times[way]:.1f}" if way in times else "-" for way in ways)]
                for count, times in tuned.measured.points.items()
            ]
            emit_table(["tokens", *(f"{way} us" for way in ways)], rows, words=())
            for reason in filter(None, tuned.reasons.values()):
                emit(f"  {reason}")
        emit(f"kept in {files['crossovers']} and {files['algorithms']}")

    show(as_json, record, text)


def _text_of_plan(jobs: list[Job], counts: list[int], files: dict[str, str]) -> None:
    emit_table(
        ["shape", "pattern", "dtype", "weights"],
        [
            [
                f"{job.rows}x{job.k}",
                str(job.pattern),
                str(job.dtype).removeprefix("torch."),
                ", ".join(job.names) or "-",
            ]
            for job in jobs
        ],
        words=(0, 1, 2, 3),
    )
    emit(f"would be measured with {', '.join(map(str, counts))} tokens, and kept in {files['crossovers']}")


def _tokens(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(f"--tokens must be numbers of at least 1 like 1,16,4096, got {text!r}")
    return counts


def _jobs(
    model: str,
    shapes: list[str],
    patterns: list[str],
    dtype: str,
    layers: list[str] | None,
    skip: list[str] | None,
) -> list[Job]:
    from nmsparse_ext import Pattern
    from nmsparse_ext import tune as tuning
    from nmsparse_ext.cli.patterns import choice, scheme_for
    from nmsparse_ext.cli.sources import load_model

    if dtype and dtype not in tuning.DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(tuning.DTYPES)}, got {dtype!r}")
    if bool(model) == bool(shapes):
        raise ValueError("tune takes a model or --shape OUTxIN, and not both")
    if shapes:
        parsed = [Pattern.parse(text) for text in patterns]
        return tuning.jobs_of_shapes(
            [_shape(text) for text in shapes], parsed, tuning.DTYPES[dtype or "bfloat16"]
        )
    if len(patterns) > 1:
        raise ValueError("a model takes one --pattern (or a scheme file)")
    found = load_model(model).model
    jobs = tuning.jobs_of_model(
        found,
        scheme_for(found, patterns[0], layers, skip),
        tuning.DTYPES[dtype] if dtype else None,
        choice(found, layers, skip),
    )
    if not jobs:
        raise ValueError(f"{model} has no matrices to measure as {patterns[0]}")
    return jobs


def _shape(text: str) -> tuple[int, int]:
    sizes = text.lower().split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"--shape must be like 4096x11008 (outputs x inputs), got {text!r}")
    return int(sizes[0]), int(sizes[1])
