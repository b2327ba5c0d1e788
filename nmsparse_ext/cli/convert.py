"""``nmsparse convert``: checkpoints of other tools to packed files, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from nmsparse_ext.cli.examples import example_for
from nmsparse_ext.cli.options import (
    DryRunOption,
    ForceOption,
    JsonOption,
    check_output,
    completed,
    usage_errors,
)
from nmsparse_ext.cli.output import emit, emit_table, progress, show
from nmsparse_ext.cli.sources import Kind, kind_of, load_model

if TYPE_CHECKING:
    from nmsparse_ext import Pattern, Scheme
    from nmsparse_ext.recipes.searched import Searched

#: Formats that are folders with a config, not files.
_FOLDERS = ("compressed-tensors",)
#: For completion, which must not wait for torch: the names of `deploy.FORMATS`.
FORMAT_NAMES = (
    "nmsparse",
    "compressed-tensors",
    "pytorch-cutlass",
    "cusparselt",
    "torch-pruning",
    "modelopt",
    "apex-asp",
    "nm-sparsity",
    "dominosearch",
    "onnx",
    "dense",
)


def convert(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            help="A checkpoint: a file or a folder, of a format that --list names; or a model, as "
            "pkg.mod:factory.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="PATH", help="What to write.", show_default=False),
    ] = None,
    from_format: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FORMAT",
            help="What SOURCE is. By default detected.",
            show_default=False,
            autocompletion=completed(*FORMAT_NAMES),
        ),
    ] = None,
    to_format: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="What to write; `nmsparse` is our packed file.",
            autocompletion=completed(*FORMAT_NAMES),
        ),
    ] = "nmsparse",
    pattern: Annotated[
        str | None,
        typer.Option(
            "--pattern",
            "-p",
            metavar="PATTERN",
            help="n:m of all weights (with --counts), or a scheme file. By default what masks say, or "
            "what weights hold.",
            show_default=False,
        ),
    ] = None,
    counts: Annotated[
        str | None,
        typer.Option(
            metavar="kept|pruned",
            help="What n of --pattern n:m counts. Tools differ, so it has to be said.",
            show_default=False,
            autocompletion=completed("kept", "pruned"),
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="What SOURCE is a checkpoint of: the folder of a transformers model, or pkg.mod:factory. "
            "Says which weights are prunable, and along which dim.",
            show_default=False,
        ),
    ] = None,
    prune: Annotated[
        bool | None,
        typer.Option(
            "--prune/--no-prune",
            help="Whether weights that violate --pattern are pruned by magnitude. By default only of formats "
            "that hold dense weights by nature.",
            show_default=False,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Of a format, such as layout=sm90 (cusparselt), grouping=flat (nm-sparsity) or "
            "max_shard_size=5GB (nmsparse); may be repeated.",
        ),
    ] = None,
    list_formats: Annotated[bool, typer.Option("--list", help="List the formats, and stop.")] = False,
    dry_run: DryRunOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint: from another tool's format to a packed file, or the other way round.

    Everything in SOURCE is checked. What is written appears in one step.
    """
    with usage_errors():
        from nmsparse_ext import NMTensor
        from nmsparse_ext.deploy import detect_format, from_peer, to_peer

        if list_formats:
            _list(as_json)
            return
        if source is None or out is None:
            raise ValueError("give SOURCE and --out, or --list for the formats")
        _check_formats(from_format, to_format)
        if not dry_run:
            check_output(out, force, folder=to_format in _FOLDERS)
        options = dict(_option(text) for text in option or [])
        found = _model(source, model)
        with progress(f"reading {source}"):
            given: Any = found.model if model is None and found is not None else source
            read = from_format or detect_format(given)
            if read == "dense" and found is None and kind_of(source) is Kind.TRANSFORMERS:
                # Its modules say along which dim each weight is grouped, which its file does not.
                found = load_model(source)
                given = found.model
            tensors = from_peer(
                given,
                format=read,
                pattern=_pattern(pattern, found),
                counts=cast("Literal['kept', 'pruned'] | None", counts),
                model=None if found is None else found.model,
                prune=prune,
                **_of(read, options),
            )
        rows: list[dict[str, Any]] = [
            {
                "name": name,
                "shape": list(tensor.shape),
                "pattern": str(tensor.pattern) if isinstance(tensor, NMTensor) else None,
                "bytes": tensor.nbytes,
                "dense_bytes": tensor.numel() * tensor.element_size(),
            }
            for name, tensor in tensors.items()
        ]
        with progress(f"writing {out}"):
            written = _of(to_format, options)
            if to_format == "onnx" and found is not None:
                written["example_input"] = example_for(found, None, None, model or source)
            architecture = None if found is None else found.model
            to_peer(tensors, None if dry_run else out, format=to_format, model=architecture, **written)
    packed = [row for row in rows if row["pattern"] is not None]
    record = {
        "source": source,
        "from": read,
        "to": to_format,
        "out": str(out),
        "written": not dry_run,
        "packed": len(packed),
        "tensors": rows,
    }

    def text() -> None:
        cells = [
            [row["name"], row["pattern"] or "dense", f"{row['dense_bytes']:,}", f"{row['bytes']:,}"]
            for row in rows
        ]
        emit_table(("tensor", "pattern", "dense bytes", "packed bytes"), cells, words=(0, 1))
        emit(f"{len(packed)} of {len(rows)} tensors are sparse; from {read} to {to_format}")
        emit(f"would write {out}" if dry_run else f"wrote {out}")

    show(as_json, record, text)


def _model(source: str, model: str | None) -> Searched | None:
    """The model that the checkpoint is of, where it is known."""
    if model is not None:
        return load_model(model)
    return load_model(source) if kind_of(source) is Kind.FACTORY else None


def _pattern(text: str | None, found: Searched | None) -> Pattern | Scheme | str | None:
    import nmsparse_ext as nms

    if text is None or not Path(text).is_file():
        return text
    return nms.Scheme.load(text, None if found is None else found.model)


def _check_formats(read: str | None, written: str) -> None:
    from nmsparse_ext.deploy import FORMATS

    for flag, name in (("--from", read), ("--to", written)):
        if name is not None and name not in FORMATS:
            raise ValueError(f"{flag} must be one of {', '.join(FORMATS)}, got {name!r}")
    if read is not None and FORMATS[read].read is None:
        raise ValueError(f"--from: {read} can be written only")
    if FORMATS[written].write is None:
        raise ValueError(f"--to: {written} can be read only")


def _option(text: str) -> tuple[str, str]:
    from nmsparse_ext.deploy import FORMATS

    key, equals, value = text.partition("=")
    known = sorted({name for peer in FORMATS.values() for name in peer.options} - {"example_input"})
    if not equals or key not in known:
        raise ValueError(f"--option must be KEY=VALUE with KEY one of {', '.join(known)}, got {text!r}")
    return key, value


def _of(name: str, options: dict[str, str]) -> dict[str, Any]:
    """The options that a format takes."""
    from nmsparse_ext.deploy import FORMATS

    return {key: value for key, value in options.items() if key in FORMATS[name].options}


def _list(as_json: bool) -> None:
    from nmsparse_ext.deploy import FORMATS

    rows: list[dict[str, Any]] = [
        {
            "name": peer.name,
            "title": peer.title,
            "read": peer.read is not None,
            "write": peer.write is not None,
            "options": sorted(peer.options),
        }
        for peer in FORMATS.values()
    ]

    def text() -> None:
        cells = [
            [
                row["name"],
                "yes" if row["read"] else "no",
                "yes" if row["write"] else "no",
                ", ".join(row["options"]),
                row["title"],
            ]
            for row in rows
        ]
        emit_table(("format", "from", "to", "options", "what it is"), cells, words=(0, 1, 2, 3, 4))

    show(as_json, {"formats": rows}, text)
