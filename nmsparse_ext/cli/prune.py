"""``nmsparse prune``: a trained model pruned in one shot, and written."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmsparse_ext.cli.folders import save_transformers
from nmsparse_ext.cli.options import (
    DryRunOption,
    ForceOption,
    JsonOption,
    LayersOption,
    ModelArgument,
    SkipOption,
    completed,
    usage_errors,
)
from nmsparse_ext.cli.output import emit, emit_table, progress, show
from nmsparse_ext.cli.pack import OutOption, ShardOption, check_place, wrote
from nmsparse_ext.cli.patterns import scheme_for
from nmsparse_ext.cli.sources import calibration_batches, load_model

if TYPE_CHECKING:
    from torch import nn

    from nmsparse_ext.prune import PruneReport
    from nmsparse_ext.recipes.searched import Searched


def prune(
    model: ModelArgument,
    out: OutOption,
    pattern: Annotated[
        str,
        typer.Option(
            "--pattern",
            "--scheme",
            "-p",
            metavar="PATTERN",
            help="n:m, n kept of every m, for example 2:4; or a scheme file with a pattern for each weight.",
        ),
    ] = "2:4",
    criterion: Annotated[
        str,
        typer.Option(
            help="Which weights stay: magnitude; wanda or sparsegpt, which need --calibration.",
            autocompletion=completed("magnitude", "wanda", "sparsegpt"),
        ),
    ] = "magnitude",
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FUNCTION",
            help="pkg.mod:function, which returns batches that the model is called with: tensors, tuples of "
            "arguments or mappings of keyword arguments. Recipes bring their own.",
            show_default=False,
        ),
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="At most so many batches.")] = 128,
    permute: Annotated[
        bool, typer.Option("--permute", help="Reorder channels before, so that more is kept.")
    ] = False,
    uncalibrated: Annotated[
        str,
        typer.Option(
            help="For weights whose inputs are not seen: skip (they stay dense), magnitude, error.",
            autocompletion=completed("skip", "magnitude", "error"),
        ),
    ] = "skip",
    pad: Annotated[
        bool, typer.Option("--pad", help="Also prune sizes that are no multiple of m, as if zeros followed.")
    ] = False,
    packed: Annotated[
        bool, typer.Option("--packed", help="Write values and indices, as `nmsparse compress` does.")
    ] = False,
    layers: LayersOption = None,
    skip: SkipOption = None,
    max_shard_size: ShardOption = None,
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Prune a trained MODEL in one shot, without training, and write it with zeros in place.

    `nmsparse prune my.models:net --criterion sparsegpt --calibration my.data:batches -o net.safetensors`. A
    file says nothing of how its layers are called, so it can be pruned by magnitude alone.
    """
    with usage_errors():
        import nmsparse_ext as nms

        whole_folder = check_place(model, out, force, dry_run)
        found = load_model(model)
        data = _calibration(found, model, calibration, batches, criterion != "magnitude" or permute)
        _own_memory(found.model)
        scheme = scheme_for(found.model, pattern, layers, skip, remainder="pad" if pad else "error")
        with progress("calibrating", len(scheme) or None) as step, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the report says what stays dense
            report = nms.prune_model(
                found.model,
                scheme,
                criterion=criterion,  # type: ignore[arg-type]
                calibration=data,
                permute=permute,
                uncalibrated=uncalibrated,  # type: ignore[arg-type]
                remainder="pad" if pad else "error",
                progress=lambda name, number, total: step(text=name),
            )
        if not dry_run:
            with progress(f"writing {out}"):
                _write(found.model, report, Path(model), out, whole_folder, packed, max_shard_size)
    record: dict[str, Any] = {"model": model, "out": str(out), "written": not dry_run, **report.to_json()}

    def text() -> None:
        emit_table(
            ("weight", "pattern", "criterion", "output error", "kept", "stays dense"),
            [
                [
                    row.name,
                    row.pattern or "dense",
                    row.criterion or "-",
                    "-" if row.error is None else f"{row.error:.4f}",
                    f"{row.kept:.2%}",
                    row.skipped or "",
                ]
                for row in report
            ],
            words=(0, 1, 2, 5),
        )
        if report.permutation is not None:
            emit(str(report.permutation))
        norms = f"; statistics of {len(report.recalibrated)} batch norms anew" if report.recalibrated else ""
        emit(f"{len(report.pruned)} of {len(report)} weights pruned in {report.seconds:.2f} s{norms}")
        emit(wrote(out, dry_run))

    show(as_json, record, text)


def _calibration(
    found: Searched, argument: str, function: str | None, batches: int, needed: bool
) -> list[Any] | None:
    """The batches to calibrate with; ``None`` if there are none and none are needed."""
    if function is not None:
        return calibration_batches(found, argument, function, batches)
    if found.inputs is not None:
        return found.calibration(min(batches, 16))
    if needed:
        raise ValueError(
            "this needs --calibration pkg.mod:function, which returns batches that the model is called with"
        )
    return None


def _own_memory(model: nn.Module) -> None:
    """Parameters may be the memory of a file, which is not to be written to."""
    import nmsparse_ext as nms

    for parameter in model.parameters():
        if not isinstance(parameter, nms.NMTensor):
            parameter.data = parameter.data.clone()


def _write(
    model: nn.Module,
    report: PruneReport,
    source: Path,
    out: Path,
    whole_folder: bool,
    packed: bool,
    max_shard_size: str | None,
) -> None:
    import nmsparse_ext as nms

    if packed and not whole_folder:
        nms.save_file(model, out, report.scheme, max_shard_size=max_shard_size)
        return
    if packed:
        nms.convert(model, report.scheme, policy="always")
    if whole_folder:
        save_transformers(model, source, out, max_shard_size)
    else:
        from nmsparse_ext.deploy.interchange._containers import write_plain

        write_plain(model.state_dict(keep_vars=True), out)
