"""``nmsparse report``: an HTML page about a model or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nmsparse_ext.cli.examples import BatchOption, TokensOption, example_for, running, unpack
from nmsparse_ext.cli.options import (
    DryRunOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    check_output,
    usage_errors,
)
from nmsparse_ext.cli.output import emit, progress, show
from nmsparse_ext.cli.patterns import read_pattern
from nmsparse_ext.cli.sources import load_model


def report(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The page (HTML).")] = Path(
        "report.html"
    ),
    pattern: Annotated[
        str | None,
        typer.Option(
            "--pattern",
            "-p",
            metavar="PATTERN",
            help="n:m, or a scheme file: report on the model as if it had these. By default what it holds.",
            show_default=False,
        ),
    ] = None,
    time: Annotated[
        bool,
        typer.Option("--time", help="Also time every layer, as `nmsparse explain` does; needs --pattern."),
    ] = False,
    batch: BatchOption = None,
    tokens: TokensOption = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="The picture alone, too (PNG).")
    ] = None,
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a page about MODEL: which weights are sparse, a picture of them, and what it saves.

    The page is one file that refers to nothing outside of it.
    """
    with usage_errors("search,demo"):
        import nmsparse_ext as nms
        from nmsparse_ext.cli.tensor_model import TensorModel
        from nmsparse_ext.deploy.explain import explain
        from nmsparse_ext.model_report import write_model_report
        from nmsparse_ext.scheme_chart import save_summary_chart

        if time and pattern is None:
            raise ValueError("--time needs --pattern: which pattern is to be compared with dense?")
        outputs = [out, *([] if picture is None else [picture])]
        if not dry_run:
            for path in outputs:
                check_output(path, force)
        found = load_model(model)
        scheme = None if pattern is None else read_pattern(pattern, found.model)
        # Of a file nothing is run to count MACs: it does not say what runs how often.
        example = found.example_input if batch is None and tokens is None and not time else None
        if not isinstance(found.model, TensorModel) and example is None and found.example_input is not None:
            example = example_for(found, batch, tokens, model)
        with running(model), progress("measuring"):
            rows = nms.summary(found.model, scheme, example)
            times = None
            if time and scheme is not None:
                example = example_for(found, batch, tokens, model)
                times = explain(unpack(found.model), scheme, example)
        if not dry_run:
            write_model_report(rows, out, title=model, assumed=scheme is not None, times=times)
            if picture is not None:
                save_summary_chart(rows, picture)
    record = {
        "model": model,
        "out": str(out),
        "picture": None if picture is None else str(picture),
        "written": not dry_run,
        "weights": rows.to_json(),
        "times": None if times is None else times.to_json(),
    }

    def text() -> None:
        for path in outputs:
            emit(f"would write {path}" if dry_run else f"wrote {path}")

    show(as_json, record, text)
