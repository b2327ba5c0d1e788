"""Names and globs that users write: what they match, and what they probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from torch import nn

from .weights import Weight, canonical_name, weights


def check_globs(argument: str, globs: Iterable[str], model: nn.Module) -> tuple[str, ...]:
    """Returns ``globs`` without the parts that wrappers add.

    Raises:
        TypeError: If they are no list of names; a single string is refused, as it would be one of letters.
        ValueError: If one matches no module or parameter. It is a slip, which would go unnoticed otherwise.
    """
    if isinstance(globs, str) or not isinstance(globs, Iterable):
        raise TypeError(f"{argument} must be a list or tuple of names, got {globs!r}")
    known = [canonical_name(name) for name, _ in model.named_modules(remove_duplicate=False)]
    known += [canonical_name(name) for name, _ in model.named_parameters(remove_duplicate=False)]
    result = []
    for glob in globs:
        if not isinstance(glob, str):
            raise TypeError(f"{argument} must hold names, got {glob!r}")
        name = canonical_name(glob)
        if not any(fnmatchcase(path, name) for path in known):
            raise ValueError(f"{argument}: {glob!r} matches nothing in the model{_did_you_mean(name, known)}")
        result.append(name)
    return tuple(result)


def first_match(globs: Iterable[str], weight: Weight) -> str | None:
    """Returns the first glob that matches a name of ``weight`` or a module above it."""
    return next((glob for glob in globs if any(fnmatchcase(path, glob) for path in _paths(weight))), None)


def is_named(names: Iterable[str], weight: Weight) -> bool:
    """Whether ``names`` has ``weight`` or the module that holds it, in full and not by a glob."""
    return any(name in (full, full.rpartition(".")[0]) for name in names for full in weight.names)


def why_left_dense(weight: Weight, skip: Iterable[str], include: tuple[str, ...] | None) -> str | None:
    """Returns why ``weight`` stays dense whatever the pattern, or ``None`` if it may be pruned.

    Args:
        weight: The weight.
        skip: Globs of what stays dense; see `check_globs`.
        include: Globs of what may be pruned, ``None`` for everything. What stays dense unless it is named
            needs its full name here.
    """
    if (glob := first_match(skip, weight)) is not None:
        return f"skipped by {glob!r}"
    if include is not None and first_match(include, weight) is None:
        return "not included"
    named = weight.group_dim is not None and is_named(include or (), weight)
    return None if named else weight.dense_because


def unknown_name(key: str, model: nn.Module) -> str:
    """Returns the error text for a name that is none of the model's weights."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if canonical_name(name) in (key, f"{key}.weight"):
            return f"{key} cannot be pruned: its shape is {tuple(parameter.shape)}"
    names = [name for weight in weights(model) for name in weight.names]
    if any(canonical_name(name) == key for name, _ in model.named_modules(remove_duplicate=False)):
        below = [name for name in names if name.startswith(f"{key}.")]
        hint = f"; below it are {', '.join(below[:3])}{', ...' if len(below) > 3 else ''}" if below else ""
        return f"{key} is a module without a weight of its own{hint}"
    stems = [name.removesuffix(".weight") for name in names]
    return f"the model has no {key}{_did_you_mean(key, [*names, *stems])}"


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = dict.fromkeys(difflib.get_close_matches(name, list(known), n=3))
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _paths(weight: Weight) -> Iterator[str]:
    for name in weight.names:
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            yield ".".join(parts[:length])
