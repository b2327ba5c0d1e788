"""``nmsparse bench``: dense against packed, measured several times over."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmsparse_ext.cli.examples import TokensOption, example_for, running, unpack
from nmsparse_ext.cli.options import (
    JsonOption,
    LayersOption,
    SkipOption,
    completed,
    usage_errors,
)
from nmsparse_ext.cli.output import emit, emit_table, progress, show
from nmsparse_ext.cli.patterns import choice, scheme_for
from nmsparse_ext.cli.sources import load_model

if TYPE_CHECKING:
    from nmsparse_ext.deploy.repeated import Compared
    from nmsparse_ext.recipes.searched import Searched

_SHAPE = re.compile(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})")
_DTYPES = ("float32", "bfloat16", "float16")
_HEAD = ("what", "pattern", "tokens", "dense ms", "prepacked ms", "packed ms", "to eager", "to best dense")


def bench(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL|SHAPE...",
            help="A model (file, folder, or factory), or shapes OUTxIN of linear layers, for example "
            "4096x1024.",
            show_default=False,
        ),
    ],
    pattern: Annotated[
        list[str] | None,
        typer.Option("--pattern", "-p", help="n:m, or a scheme file; may be repeated. [default: 2:4]"),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="How many inputs at a time; may be repeated. [default: the model's, or 1]"),
    ] = None,
    tokens: TokensOption = None,
    layers: LayersOption = None,
    skip: SkipOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often everything is measured.")] = 5,
    dtype: Annotated[
        str,
        typer.Option(help=f"Of shapes: one of {', '.join(_DTYPES)}.", autocompletion=completed(*_DTYPES)),
    ] = "float32",
    as_json: JsonOption = False,
) -> None:
    """Time layers, and the whole model, dense against packed.

    Two dense baselines: the layer in eager mode, and the same product with a weight that oneDNN or MKL packed
    beforehand, as compiled and frozen models call it; "to best dense" is against the faster one. Ratios above
    1 mean that packed is faster; in brackets the lowest and the highest of all rounds. Rows where packed
    loses are shown like the others.
    """
    with usage_errors():
        from nmsparse_ext._machine import machine
        from nmsparse_ext.cli.tensor_model import TensorModel
        from nmsparse_ext.deploy.repeated import compare
        from nmsparse_ext.weights import weights

        found = _load(what, dtype)
        unpack(found.model)
        name = " ".join(what)
        runs = [(p, b) for p in pattern or ["2:4"] for b in batch or [None]]  # type: ignore[list-item]
        rows: list[dict[str, Any]] = []
        cells: list[list[str]] = []
        left: dict[str, str] = {}
        cold = False
        with progress("timing", rounds * len(runs)) as step:
            for one_pattern, one_batch in runs:
                scheme = scheme_for(found.model, one_pattern, layers, skip)
                chosen = choice(found.model, layers, skip)
                for weight in weights(found.model):
                    if chosen(weight) and weight.name in scheme.dense:
                        left[weight.name] = scheme.dense[weight.name]
                example = example_for(found, one_batch, tokens, name)
                whole = not isinstance(found.model, TensorModel)
                with running(name):
                    measured = compare(
                        found.model, scheme, example, rounds=rounds, whole=whole, after=lambda: step()
                    )
                cold, left = measured.cold, left | measured.left
                for row in measured.rows:
                    rows.append(row.to_json() | {"batch": one_batch})
                    cells.append(_cells(row, one_pattern))
    here = machine()
    record = {"what": name, "rounds": rounds, "cold": cold, "machine": here, "rows": rows, "left_dense": left}

    def text() -> None:
        emit_table(_HEAD, cells, words=(0, 1))
        where = "weights from memory" if cold else "weights in the caches"
        emit(f"{where}; {here['processor']}, {here['engine']}, {here['threads']} thread(s)")
        for name, why in left.items():
            emit(f"{name}: not timed, {why}")

    show(as_json, record, text)


def _cells(row: Compared, pattern: str) -> list[str]:
    times = (row.dense_ms, row.prepacked_ms, row.packed_ms)
    return [
        row.name.removesuffix(".weight"),
        row.pattern or pattern,
        "-" if row.tokens is None else str(row.tokens),
        *("-" if ms is None else f"{ms:.3f}" for ms in times),
        str(row.to_eager),
        str(row.to_best),
    ]


def _load(what: list[str], dtype: str) -> Searched:
    """The model, or one made of layers of these shapes."""
    import torch

    from nmsparse_ext.cli.tensor_model import TensorModel
    from nmsparse_ext.recipes.searched import Searched

    if dtype not in _DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    shapes = [_SHAPE.fullmatch(text) for text in what]
    if all(shapes):
        generator = torch.Generator().manual_seed(0)
        weights = {
            f"{match[0]}.weight": torch.randn(int(match[1]), int(match[2]), generator=generator).to(
                getattr(torch, dtype)
            )
            for match in shapes
            if match is not None
        }
        return Searched(TensorModel(weights))
    if len(what) > 1:
        wrong = next(text for text, match in zip(what, shapes, strict=True) if match is None)
        raise ValueError(f"give one model, or shapes like 4096x1024 only; got {wrong!r} among {len(what)}")
    return load_model(what[0])
