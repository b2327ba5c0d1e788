"""``nmsparse compress`` and ``decompress``: dense files to packed ones, and back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmsparse_ext.cli.options import (
    EXIT_FAILED,
    DryRunOption,
    ForceOption,
    JsonOption,
    LayersOption,
    ModelArgument,
    SkipOption,
    check_output,
    usage_errors,
)
from nmsparse_ext.cli.output import emit, emit_table, progress, show
from nmsparse_ext.cli.patterns import choice, scheme_for
from nmsparse_ext.cli.sources import load_model, load_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nmsparse_ext import Scheme

OutOption = Annotated[
    Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write.", show_default=False)
]


def compress(
    model: ModelArgument,
    out: OutOption,
    pattern: Annotated[
        str | None,
        typer.Option(
            "--pattern",
            "-p",
            metavar="PATTERN",
            help="n:m, or a scheme file. By default what each weight is found to hold.",
            show_default=False,
        ),
    ] = None,
    layers: LayersOption = None,
    skip: SkipOption = None,
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL with its sparse weights packed: values and indices in place of zeros.

    Weights must hold their pattern already: nothing is pruned (that is `nmsparse prune`). Exit code 1, and no
    file, if one that --pattern names does not. The file is written in one step; `nmsparse decompress` gives
    the dense tensors back, bit for bit.
    """
    with usage_errors():
        import nmsparse_ext as nms
        from nmsparse_ext.cli.verify import verify_one
        from nmsparse_ext.weights import weights

        if not dry_run:
            check_output(out, force)
        loaded = load_model(model).model
        scheme = (
            _detected(loaded, layers, skip) if pattern is None else scheme_for(loaded, pattern, layers, skip)
        )
        failed = []
        named = scheme.resolve(loaded, strict=False)
        with progress("checking", len(named)) as step:
            for weight in weights(loaded):
                if weight.name in named:
                    found = verify_one(weight, named[weight.name].pattern)
                    if found["holds"] is False:
                        failed.append(
                            f"{weight.name} does not hold {named[weight.name].pattern}: {found['why']}"
                        )
                    step(text=weight.name)
        rows = [] if failed else nms.summary(loaded, scheme).to_json()
        if not failed and not dry_run:
            with progress(f"writing {out}"):
                nms.save_file(loaded, out, scheme)
    if failed:
        for line in failed:
            typer.echo(f"nmsparse: {line}", err=True)
        typer.echo("nmsparse: nothing was written; `nmsparse prune` prunes", err=True)
        raise typer.Exit(EXIT_FAILED)
    packed = [row for row in rows if row["pattern"] is not None]
    record = {
        "model": model,
        "out": str(out),
        "written": not dry_run,
        "bytes": sum(row["bytes"] for row in rows),
        "dense_bytes": sum(row["dense_bytes"] for row in rows),
        "file_bytes": None if dry_run else _size(out),
        "weights": rows,
    }

    def text() -> None:
        cells = [
            [
                row["name"],
                row["pattern"] or "dense",
                f"{row['dense_bytes']:,}",
                f"{row['bytes']:,}",
                row["reason"],
            ]
            for row in rows
        ]
        emit_table(("weight", "pattern", "dense bytes", "bytes", "why"), cells, words=(0, 1, 4))
        emit(
            f"{len(packed)} of {len(rows)} weights packed: {record['bytes']:,} bytes of "
            f"{record['dense_bytes']:,} dense"
        )
        emit(f"would write {out}" if dry_run else f"wrote {out}, {record['file_bytes']:,} bytes")

    show(as_json, record, text)


def decompress(
    model: ModelArgument,
    out: OutOption,
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL with all of its weights dense, zeros in place: a plain safetensors file for any reader."""
    with usage_errors():
        import nmsparse_ext as nms

        if not dry_run:
            check_output(out, force)
        tensors = load_tensors(model)
        rows = []
        dense: dict[str, Tensor] = {}
        with progress("unpacking", len(tensors)) as step:
            for name, tensor in tensors.items():
                tensor = tensor.detach()
                row: dict[str, Any] = {"name": name, "pattern": None, "bytes": tensor.nbytes}
                if isinstance(tensor, nms.NMTensor):
                    row["pattern"] = str(tensor.pattern)
                    tensor = tensor if dry_run else tensor.to_dense()
                rows.append(row | {"dense_bytes": tensor.numel() * tensor.element_size()})
                dense[name] = tensor
                step(text=name)
        if not dry_run:
            write_plain(dense, out)
    record: dict[str, Any] = {
        "model": model,
        "out": str(out),
        "written": not dry_run,
        "unpacked": sum(row["pattern"] is not None for row in rows),
        "dense_bytes": sum(row["dense_bytes"] for row in rows),
        "tensors": rows,
    }

    def text() -> None:
        emit(f"{record['unpacked']} of {len(rows)} tensors unpacked; {record['dense_bytes']:,} bytes in all")
        emit(f"would write {out}" if dry_run else f"wrote {out}, {_size(out):,} bytes")

    show(as_json, record, text)


def write_plain(tensors: dict[str, Tensor], out: Path) -> None:
    """Writes dense tensors for any reader of safetensors: each name has its own, tied ones are repeated."""
    from safetensors.torch import save_file

    from nmsparse_ext._atomic import atomic_write

    with progress(f"writing {out}"), atomic_write(out) as file:
        seen: set[int] = set()
        stored = {}
        for name, tensor in tensors.items():
            tensor = tensor.detach().cpu().contiguous()
            storage = tensor.untyped_storage()
            if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
                tensor = tensor.clone()
            seen.add(tensor.untyped_storage().data_ptr())
            stored[name] = tensor
        save_file(stored, file.name, {"format": "pt"})


def _detected(model: nn.Module, layers: list[str] | None, skip: list[str] | None) -> Scheme:
    """The patterns that the chosen weights hold, as far as they are not packed already."""
    import nmsparse_ext as nms
    from nmsparse_ext.weights import weights

    chosen = choice(model, layers, skip)
    names = {weight.name for weight in weights(model) if chosen(weight)}
    patterns, dense = {}, {}
    for row in nms.summary(model):
        if row.name not in names:
            dense[row.name] = "left out"
        elif row.pattern is None:
            dense[row.name] = row.reason
        else:
            patterns[row.name] = row.pattern
    return nms.Scheme(patterns, dense=dense)


def _size(path: Path) -> int:
    return os.stat(path).st_size
