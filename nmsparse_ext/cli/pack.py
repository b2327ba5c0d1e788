"""``nmsparse compress`` and ``decompress``: dense files to packed ones, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmsparse_ext.cli.examples import unpack
from nmsparse_ext.cli.folders import check_replaceable, save_transformers
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
from nmsparse_ext.cli.sources import Kind, kind_of, load_model, load_tensors

if TYPE_CHECKING:
    from torch import nn

    from nmsparse_ext import Scheme

OutOption = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        metavar="PATH",
        help="The file to write; of a transformers folder also a folder, without .safetensors at its end.",
        show_default=False,
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--max-shard-size",
        metavar="SIZE",
        help="Such as 5GB: a larger model is written in several files, with an index.",
        show_default=False,
    ),
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
    max_shard_size: ShardOption = None,
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL with its sparse weights packed: values and indices in place of zeros.

    Weights must hold their pattern already: nothing is pruned (that is `nmsparse prune`). Exit code 1, and no
    file, if one that --pattern names does not. What is written appears in one step; `nmsparse decompress`
    gives the dense tensors back, bit for bit. A folder is one that transformers' from_pretrained loads,
    packed.
    """
    with usage_errors():
        import nmsparse_ext as nms
        from nmsparse_ext.cli.verify import verify_one
        from nmsparse_ext.weights import weights

        whole_folder = check_place(model, out, force, dry_run)
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
        for row in rows:
            if pattern is None and row["reason"] == "scheme":
                row["reason"] = "holds it"
        if not failed and not dry_run:
            with progress(f"writing {out}"):
                if whole_folder:
                    nms.convert(loaded, scheme, policy="always")
                    save_transformers(loaded, Path(model), out, max_shard_size)
                else:
                    nms.save_file(loaded, out, scheme, max_shard_size=max_shard_size)
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
        emit(wrote(out, dry_run))

    show(as_json, record, text)


def decompress(
    model: ModelArgument,
    out: OutOption,
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL with all of its weights dense, zeros in place: plain safetensors for any reader."""
    with usage_errors():
        import nmsparse_ext as nms

        whole_folder = check_place(model, out, force, dry_run)
        found = load_model(model).model if whole_folder else None
        tensors = load_tensors(model) if found is None else found.state_dict(keep_vars=True)
        rows = []
        for name, tensor in tensors.items():
            row: dict[str, Any] = {"name": name, "pattern": None, "bytes": tensor.nbytes}
            if isinstance(tensor, nms.NMTensor):
                row["pattern"] = str(tensor.pattern)
            rows.append(row | {"dense_bytes": tensor.numel() * tensor.element_size()})
        if not dry_run:
            with progress(f"writing {out}"):
                if found is not None:
                    save_transformers(unpack(found), Path(model), out, None)
                else:
                    from nmsparse_ext.deploy.interchange._containers import write_plain

                    write_plain(tensors, out)
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
        emit(wrote(out, dry_run))

    show(as_json, record, text)


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


def check_place(model: str, out: Path, force: bool, dry_run: bool) -> bool:
    """Refuses, before any work is done, what cannot be written or should not be replaced.

    Returns:
        Whether a folder is to be written: of a transformers model, unless a file is asked for.

    Raises:
        ValueError: If there is something and not ``force``, or a folder that is no model's.
        OSError: If ``out`` cannot be written.
    """
    whole_folder = kind_of(model) is Kind.TRANSFORMERS and out.suffix != ".safetensors"
    if not dry_run:
        check_output(out, force, folder=whole_folder)
        if whole_folder:
            check_replaceable(out)
    return whole_folder


def wrote(out: Path, dry_run: bool) -> str:
    """What is said in the end."""
    return f"would write {out}" if dry_run else f"wrote {out}, {_size(out):,} bytes"


def _size(path: Path) -> int:
    """Bytes of a file, of all files of a model in shards, or of a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if path.exists():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}-*-of-*{path.suffix}"))
