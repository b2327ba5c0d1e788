"""``Scheme``: a pattern per weight. Made from a model, by hand, by a search, or read from a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from torch import nn

from ._arguments import check_choice
from ._naming import check_globs, unknown_name, why_left_dense
from .pattern import Pattern
from .registry import register_module
from .weights import Weight, canonical_name, prunable_weights, weights

__all__ = ["ResolvedWeight", "Scheme", "as_scheme", "canonical_name", "prunable_weights", "register_module"]

V = TypeVar("V")


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedWeight:
    """A weight of a model, with the pattern that a scheme gives it.

    Attributes:
        name: Canonical parameter name.
        parameter: The parameter.
        module: The module that holds it.
        attr: Its attribute name there.
        group_dim: The dim that groups run along, ``>= 0``.
        pattern: Its pattern; never a dense one.
        places: All ``(module, attr)`` that hold the parameter: more than one if it is tied.
    """

    name: str
    parameter: nn.Parameter
    module: nn.Module
    attr: str
    group_dim: int
    pattern: Pattern
    places: tuple[tuple[nn.Module, str], ...]


class Scheme(Mapping[str, Pattern]):
    """An immutable mapping ``{parameter name: Pattern}``, with the reasons why other weights stay dense.

    A module's name is shorthand for its ``.weight``, and what wrappers add to names (``module.``,
    ``_orig_mod.``, ``_checkpoint_wrapped_module.``) is ignored, both in the scheme's keys and in lookups.
    ``scheme | {"fc": "1:4"}`` is a copy with some entries added or replaced.

    Args:
        patterns: ``{parameter or module name: Pattern or text}``.
        dense: ``{parameter name: why it stays dense}``.
        complete: Whether every prunable weight of the model is meant to be named, in one of the two. If so,
            `resolve` refuses a model that has others; if not, the others stay dense.

    Raises:
        TypeError: If an argument, a name or a pattern is of the wrong type.
        ValueError: If a pattern is invalid, or two keys name the same weight.

    Example:
        >>> scheme = Scheme({"fc1": "2:4", "attn.in_proj_weight": "1:4"})
        >>> scheme["module.fc1.weight"]
        Pattern(2, 4)
    """

    __slots__ = ("_complete", "_dense", "_patterns")

    def __init__(
        self,
        patterns: Mapping[str, Pattern | str],
        *,
        dense: Mapping[str, str] | None = None,
        complete: bool = False,
    ) -> None:
        for argument, value in (("patterns", patterns), ("dense", dense or {})):
            if not isinstance(value, Mapping):
                raise TypeError(f"{argument} must be a mapping with parameter names as keys, got {value!r}")
        self._patterns: dict[str, Pattern] = {}
        self._dense: dict[str, str] = {}
        self._complete = bool(complete)
        for key, pattern in patterns.items():
            self._patterns[self._new_name(key)] = Pattern.parse(pattern, argument=f"pattern of {key!r}")
        for key, reason in (dense or {}).items():
            if not isinstance(reason, str):
                raise TypeError(f"dense[{key!r}] must be text, got {reason!r}")
            self._dense[self._new_name(key)] = reason

    def _new_name(self, key: str) -> str:
        if not isinstance(key, str):
            raise TypeError(f"scheme keys must be parameter names, got {key!r}")
        name = canonical_name(key)
        other = _key(self._patterns, name) or _key(self._dense, name)
        if other is not None:
            raise ValueError(f"scheme has {other!r} and {key!r}, which name the same weight")
        return name

    @property
    def dense(self) -> Mapping[str, str]:
        """Why weights stay dense: ``{parameter name: reason}``."""
        return MappingProxyType(self._dense)

    @property
    def complete(self) -> bool:
        """Whether every prunable weight of the model is meant to be named, in the mapping or in `dense`."""
        return self._complete

    def __getitem__(self, name: str) -> Pattern:
        key = _key(self._patterns, canonical_name(name)) if isinstance(name, str) else None
        if key is None:
            raise KeyError(name)
        return self._patterns[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._patterns)

    def __len__(self) -> int:
        return len(self._patterns)

    def __repr__(self) -> str:
        patterns = {name: str(pattern) for name, pattern in self.items()}
        return f"Scheme({patterns}, dense={self._dense}, complete={self._complete})"

    def __str__(self) -> str:
        counts: dict[Pattern, int] = {}
        for pattern in self.values():
            counts[pattern] = counts.get(pattern, 0) + 1
        parts = [f"{count} x {pattern}" for pattern, count in sorted(counts.items())]
        return ", ".join([*parts, f"{len(self._dense)} dense"])

    def __or__(self, other: Mapping[str, Pattern | str]) -> Scheme:
        if not isinstance(other, Mapping):
            return NotImplemented
        new = other if isinstance(other, Scheme) else Scheme(other)

        def kept(table: Mapping[str, V]) -> dict[str, V]:
            named = (new._patterns, new._dense)
            return {key: value for key, value in table.items() if not any(_key(t, key) for t in named)}

        return Scheme(
            {**kept(self._patterns), **new._patterns},
            dense={**kept(self._dense), **new._dense},
            complete=self._complete,
        )

    @classmethod
    def uniform(
        cls,
        model: nn.Module,
        pattern: Pattern | str,
        *,
        skip: Iterable[str] = (),
        include: Iterable[str] | None = None,
        remainder: str = "error",
    ) -> Scheme:
        """Gives every prunable weight of a model the same pattern.

        Dense stay, with the reason in `Scheme.dense`: what is skipped; weights whose group dim is no multiple
        of ``m`` (of a grouped convolution: the share of one conv group); embeddings and what is tied to one;
        and parameters that the registry does not know.

        Args:
            model: The model, wrapped or not.
            pattern: The pattern.
            skip: What to leave dense: parameter names, module names (with all that is below them), or globs
                of either.
            include: What to prune, in the same way; ``None`` means everything. An embedding, or a weight tied
                to one, is pruned only if it or its module is named here in full: ``("*", "lm_head")``.
            remainder: ``"error"``: weights whose group dim is no multiple of ``m`` stay dense. ``"pad"``:
                they get the pattern, with a short last group; see `ops`. To `resolve` such a scheme takes
                ``remainder="pad"`` too.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If the pattern is invalid, or an entry of ``skip`` or ``include`` matches nothing.

        Example:
            >>> Scheme.uniform(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), "2:4", skip=["1"]).dense
            mappingproxy({'1.weight': "skipped by '1'"})
        """
        pattern = Pattern.parse(pattern)
        check_choice("remainder", remainder, ("error", "pad"))
        listed = weights(model)
        skips = check_globs("skip", skip, model)
        includes = None if include is None else check_globs("include", include, model)
        patterns: dict[str, Pattern] = {}
        dense: dict[str, str] = {}
        for weight in listed:
            because = why_left_dense(weight, skips, includes) or weight.misfit(pattern, remainder)
            if because is None:
                patterns[weight.name] = pattern
            else:
                dense[weight.name] = because
        return cls(patterns, dense=dense, complete=True)

    def resolve(
        self, model: nn.Module, *, strict: bool | None = None, remainder: str = "error"
    ) -> dict[str, ResolvedWeight]:
        """Finds the scheme's weights in a model.

        Args:
            model: The model, wrapped or not.
            strict: Whether it is an error that the scheme does not name all prunable weights; by default it
                is if the scheme is `complete`.
            remainder: ``"pad"`` allows a short last group where the group dim is no multiple of ``m``.

        Returns:
            ``{canonical parameter name: ResolvedWeight}`` in the order of the model, without the weights that
            have a dense pattern.

        Raises:
            ValueError: If the scheme names weights that the model does not have (close matches are suggested)
                or that cannot be pruned, gives one tied weight two patterns, has a pattern that does not fit
                a weight, or (``strict``) misses some. All offenders are named.
        """
        check_choice("remainder", remainder, ("error", "pad"))
        listed = weights(model)
        by_name = {name: weight for weight in listed for name in weight.names}
        chosen: dict[str, tuple[str, Pattern]] = {}
        problems: list[str] = []
        for key, pattern in self.items():
            weight = by_name.get(key) or by_name.get(_weight_of(key))
            if weight is None:
                problems.append(unknown_name(key, model))
                continue
            if (misfit := weight.misfit(pattern, remainder)) is not None:
                problems.append(f"{key} cannot be {pattern}: {misfit}")
            other, first = chosen.setdefault(weight.name, (key, pattern))
            if first != pattern:
                problems.append(f"{other} ({first}) and {key} ({pattern}) are one tied weight")
        left = set()
        for key in self._dense:
            if (weight := by_name.get(key) or by_name.get(_weight_of(key))) is None:
                problems.append(unknown_name(key, model))
            else:
                left.add(weight.name)
        if self._complete if strict is None else strict:
            missing = [w.name for w in listed if w.dense_because is None and w.name not in left | set(chosen)]
            if missing:
                problems.append(f"the scheme does not name {', '.join(missing)}")
        if problems:
            raise ValueError("the scheme does not match the model:\n  " + "\n  ".join(problems))
        return {
            weight.name: _resolved(weight, chosen[weight.name][1])
            for weight in listed
            if weight.name in chosen and not chosen[weight.name][1].is_dense
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the scheme as JSON. A file of that name is replaced in one step, never half written."""
        from . import scheme_file  # which makes schemes, and so imports this module

        scheme_file.write(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> Scheme:
        """Reads a scheme: the JSON of `save`, or the scheme text of the DominoSearch authors' code.

        Args:
            path: The file.
            model: The model that the scheme is for; the scheme is then checked as by `resolve`. DominoSearch
                text needs it: it has the order and the shapes of the layers, but not their names.

        Raises:
            FormatError: If the file is neither, is of a version that this release does not know, or
                contradicts itself.
            ValueError: If the scheme does not match the model, or DominoSearch text comes without one.
            OSError: If the file cannot be read.
        """
        from . import scheme_file

        scheme = scheme_file.read(path, model)
        if model is not None:
            scheme.resolve(model)
        return scheme


def as_scheme(
    scheme: Scheme | Mapping[str, Pattern | str] | Pattern | str,
    model: nn.Module,
    remainder: str = "error",
) -> Scheme:
    """Returns what a caller may give for a scheme as one: a pattern stands for `Scheme.uniform`."""
    if isinstance(scheme, Scheme):
        return scheme
    if isinstance(scheme, (Pattern, str)):
        return Scheme.uniform(model, scheme, remainder=remainder)
    if isinstance(scheme, Mapping):
        return Scheme(scheme)
    raise TypeError(f"scheme must be a Scheme, a mapping of names to patterns, or a pattern, got {scheme!r}")


def _weight_of(module: str) -> str:
    return f"{module}.weight" if module else "weight"


def _key(table: Mapping[str, object], name: str) -> str | None:
    """Returns the key under which ``name`` stands: itself, or the other one of a module and its weight."""
    module, _, attr = name.rpartition(".")
    other = module if attr == "weight" else _weight_of(name)
    return next((key for key in (name, other) if key in table), None)


def _resolved(weight: Weight, pattern: Pattern) -> ResolvedWeight:
    assert weight.group_dim is not None  # misfit() refuses a pattern otherwise
    return ResolvedWeight(
        name=weight.name,
        parameter=weight.parameter,
        module=weight.module,
        attr=weight.attr,
        group_dim=weight.group_dim,
        pattern=pattern,
        places=weight.places,
    )
