"""PATTERN arguments: a pattern for all weights, or a scheme file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import nn

    from nmsparse_ext import Pattern, Scheme
    from nmsparse_ext.weights import Weight

PatternOption = Annotated[
    str,
    typer.Option(
        "--pattern",
        "-p",
        metavar="PATTERN",
        help="n:m, n kept of every m, for example 2:4; or a scheme file with a pattern for each weight.",
    ),
]


def read_pattern(text: str, model: nn.Module) -> Pattern | Scheme:
    """The pattern, or the scheme of the file of that name.

    Raises:
        ValueError: If it is neither, or the file is no scheme, or one for another model.
    """
    import nmsparse_ext as nms

    if Path(text).is_file():
        return nms.Scheme.load(text, model)
    try:
        return nms.Pattern.parse(text)
    except ValueError as error:
        if ":" in text:
            raise  # it was meant for one
        raise ValueError(f"{error}; and there is no scheme file of that name") from None


def choice(
    model: nn.Module, layers: Sequence[str] | None, skip: Sequence[str] | None
) -> Callable[[Weight], bool]:
    """Which weights ``--layers`` and ``--skip`` choose.

    Raises:
        ValueError: If something in one of them matches nothing: it is a slip, which would go unnoticed.
    """
    from nmsparse_ext._naming import check_globs, first_match

    skips = check_globs("--skip", skip or (), model)
    includes = check_globs("--layers", layers, model) if layers else ("*",)
    return lambda weight: first_match(skips, weight) is None and first_match(includes, weight) is not None


def scheme_for(
    model: nn.Module,
    text: str,
    layers: Sequence[str] | None = None,
    skip: Sequence[str] | None = None,
    *,
    remainder: str = "error",
) -> Scheme:
    """The scheme that ``PATTERN --layers ... --skip ...`` stands for.

    A pattern is for all prunable weights that it fits (see `Scheme.uniform`); an embedding, or what is tied
    to one, has to be named in full in ``layers``. Of a scheme file, what is not chosen stays dense.

    Raises:
        ValueError: If something in ``layers`` or ``skip`` matches nothing, or as for `read_pattern`.
    """
    import nmsparse_ext as nms
    from nmsparse_ext.weights import weights

    found = read_pattern(text, model)
    chosen = choice(model, layers, skip)
    if isinstance(found, nms.Pattern):
        return nms.Scheme.uniform(model, found, skip=skip or (), include=layers or None, remainder=remainder)
    named = found.resolve(model, strict=False, remainder=remainder)
    kept = {w.name: named[w.name].pattern for w in weights(model) if w.name in named and chosen(w)}
    return nms.Scheme(kept, dense=dict(found.dense) | {n: "left out" for n in named if n not in kept})
