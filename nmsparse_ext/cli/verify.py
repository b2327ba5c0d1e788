"""``nmsparse verify``: does every group of every weight hold its pattern?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from nmsparse_ext.cli.options import (
    EXIT_FAILED,
    JsonOption,
    LayersOption,
    ModelArgument,
    SkipOption,
    usage_errors,
)
from nmsparse_ext.cli.output import emit, emit_table, progress, show
from nmsparse_ext.cli.patterns import choice, read_pattern
from nmsparse_ext.cli.sources import load_model

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nmsparse_ext import Pattern
    from nmsparse_ext.weights import Weight

_VERDICTS = {True: "holds", False: "VIOLATES", None: "not checked"}


def verify(
    model: ModelArgument,
    pattern: Annotated[
        str,
        typer.Argument(
            metavar="PATTERN",
            help="n:m, n kept of every m, for example 2:4; or a scheme file with a pattern for each weight.",
            show_default=False,
        ),
    ],
    layers: LayersOption = None,
    skip: SkipOption = None,
    dim: Annotated[
        int | None,
        typer.Option(
            help="Group dim of dense weights. By default what each layer has: input features or channels, "
            "which in a file are taken to be dim 1.",
            show_default=False,
        ),
    ] = None,
    pad: Annotated[
        bool, typer.Option("--pad", help="Also check sizes that are no multiple of m, as if zeros followed.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check that every weight of MODEL holds PATTERN, group by group.

    Names the first offending group of each weight that does not hold. Exit code 1 if there is one.

    Not checked: embeddings and what is tied to them, and what --layers does not name or --skip does. A scheme
    file has all its weights checked, and no others.
    """
    with usage_errors():
        loaded = load_model(model).model
        patterns = _patterns(pattern, loaded)
        rows = _verify_all(loaded, patterns, layers, skip, dim, pad)
        if not any(row["holds"] is not None for row in rows):
            raise ValueError(f"{model}: no tensor to check against {pattern}")
    failed = [row["name"] for row in rows if row["holds"] is False]
    record = {"file": model, "pattern": pattern, "tensors": rows, "failed": failed, "holds": not failed}

    def text() -> None:
        cells = [[row["name"], row["pattern"], _VERDICTS[row["holds"]], row["why"]] for row in rows]
        emit_table(("weight", "pattern", "verdict", "why"), cells, words=(0, 1, 2, 3))
        checked = sum(row["holds"] is not None for row in rows)
        emit(f"{checked - len(failed)} of {checked} checked tensors hold {pattern}")

    show(as_json, record, text)
    if failed:
        raise typer.Exit(EXIT_FAILED)


def _patterns(text: str, model: nn.Module) -> Pattern | dict[str, Pattern]:
    """One pattern for all, or those of a scheme file by parameter name."""
    import nmsparse_ext as nms

    found = read_pattern(text, model)
    if isinstance(found, nms.Pattern):
        return found
    return {name: weight.pattern for name, weight in found.resolve(model, strict=False).items()}


def _verify_all(
    model: nn.Module,
    patterns: Pattern | dict[str, Pattern],
    layers: list[str] | None,
    skip: list[str] | None,
    dim: int | None,
    pad: bool,
) -> list[dict[str, Any]]:
    from nmsparse_ext.weights import weights

    chosen = choice(model, layers, skip)
    listed = [
        weight
        for weight in weights(model)
        if chosen(weight) and (not isinstance(patterns, dict) or weight.name in patterns)
    ]
    rows = []
    with progress("checking", len(listed)) as step:
        for weight in listed:
            pattern = patterns[weight.name] if isinstance(patterns, dict) else patterns
            # Dense by default is an embedding: checked if it is asked for by name.
            named = isinstance(patterns, dict) or weight.name in (layers or ())
            because = None if named or dim is not None else weight.dense_because
            found = {"holds": None, "why": because} if because else verify_one(weight, pattern, dim, pad)
            rows.append({"name": weight.name, "pattern": str(pattern), **found})
            step(text=weight.name)
    return rows


def verify_one(weight: Weight, pattern: Pattern, dim: int | None = None, pad: bool = False) -> dict[str, Any]:
    """Whether one weight holds the pattern (None: it cannot be checked), and why."""
    import nmsparse_ext as nms

    tensor: Tensor = weight.parameter.detach()
    if isinstance(tensor, nms.NMTensor):
        if tensor.pattern == pattern:
            # It cannot but hold: its indices were checked when it was loaded.
            return {"holds": True, "why": f"packed as {pattern}"}
        dim, tensor = tensor.group_dim, tensor.to_dense()
    elif dim is None:
        if weight.group_dim is None:
            return {"holds": None, "why": weight.dense_because}
        misfit = weight.misfit(pattern)
        if misfit is not None and not (pad and weight.span == tensor.shape[weight.group_dim]):
            return {"holds": None, "why": misfit}
        dim = weight.group_dim
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
