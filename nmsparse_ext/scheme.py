"""``Scheme``: a pattern per weight. Made from a model, by hand, by a search, or read from a file."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from torch import nn

from ._atomic import atomic_write
from .errors import FormatError
from .pattern import Pattern
from .registry import Weight, canonical_name, prunable_weights, register_module, weights

__all__ = ["ResolvedWeight", "Scheme", "as_scheme", "canonical_name", "prunable_weights", "register_module", "weights"]

_FORMAT = "nmsparse_ext.scheme"
_VERSION = 1
_MAX_FILE_BYTES = 64 << 20  # a scheme is some lines per layer; what is larger is some other file


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedWeight:
    """A weight of a model with the pattern that a scheme gives it.

    Attributes:
        name: Canonical parameter name.
        parameter: The parameter.
        module: The module that owns it.
        attr: Its attribute name there.
        group_dim: The dim that groups run along, ``>= 0``.
        pattern: Its pattern; never dense.
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
    """An immutable mapping ``{parameter name: Pattern}``, with the reasons for the weights that stay dense.

    A module's name is shorthand for its ``.weight``, and what wrappers add to names (``module.``, ``_orig_mod.``,
    ``_checkpoint_wrapped_module.``) is ignored, in the scheme's own keys and in lookups.

    Args:
        patterns: ``{parameter or module name: Pattern or text}``.
        dense: ``{parameter name: why it stays dense}``.
        complete: Whether every prunable weight of the model is meant to be named in either. If so, `resolve` refuses
            a model that has others; if not, they stay dense.

    Raises:
        TypeError: If an argument, a name or a pattern is of the wrong type.
        ValueError: If a pattern is invalid, or two keys are the same name.

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
        if not isinstance(patterns, Mapping):
            raise TypeError(f"patterns must map names to patterns, got {type(patterns).__name__}")
        self._patterns: dict[str, Pattern] = {}
        self._dense: dict[str, str] = {}
        self._complete = bool(complete)
        for key, value in patterns.items():
            self._patterns[self._new_name(key)] = Pattern.parse(value, argument=f"pattern of {key!r}")
        for key, reason in (dense or {}).items():
            if not isinstance(reason, str):
                raise TypeError(f"dense[{key!r}] must be text, got {reason!r}")
            self._dense[self._new_name(key)] = reason

    def _new_name(self, key: str) -> str:
        if not isinstance(key, str):
            raise TypeError(f"scheme keys must be parameter names, got {key!r}")
        name = canonical_name(key)
        for table in (self._patterns, self._dense):
            if (known := _find(table, name)) is not None:
                raise ValueError(f"scheme names {known!r} and {key!r}, which are the same weight")
        return name

    @property
    def dense(self) -> Mapping[str, str]:
        """Why the weights that are not in the mapping stay dense: ``{parameter name: reason}``."""
        return MappingProxyType(self._dense)

    @property
    def complete(self) -> bool:
        """Whether every prunable weight of the model is meant to be named, in the mapping or in `dense`."""
        return self._complete

    def __getitem__(self, name: str) -> Pattern:
        known = _find(self._patterns, canonical_name(name)) if isinstance(name, str) else None
        if known is None:
            raise KeyError(name)
        return self._patterns[known]

    def __iter__(self) -> Iterator[str]:
        return iter(self._patterns)

    def __len__(self) -> int:
        return len(self._patterns)

    def __repr__(self) -> str:
        return f"Scheme({ {name: str(pattern) for name, pattern in self.items()} }, dense={self._dense})"

    def __str__(self) -> str:
        counts: dict[Pattern, int] = {}
        for pattern in self.values():
            counts[pattern] = counts.get(pattern, 0) + 1
        parts = [f"{count} x {pattern}" for pattern, count in sorted(counts.items())]
        return f"Scheme: {', '.join(parts) or 'nothing sparse'}; {len(self._dense)} dense"

    def __or__(self, other: Mapping[str, Pattern | str]) -> Scheme:
        """Returns a copy in which the entries of ``other`` are added or replace those of the same weight."""
        if not isinstance(other, Mapping):
            return NotImplemented
        added = other if isinstance(other, Scheme) else Scheme(other)
        patterns = {name: pattern for name, pattern in self.items() if _find(added._patterns, name) is None}
        dense = {name: reason for name, reason in self._dense.items() if _find(added._patterns, name) is None}
        dense |= {name: reason for name, reason in added._dense.items() if _find(dense, name) is None}
        patterns = {name: pattern for name, pattern in patterns.items() if _find(added._dense, name) is None}
        return Scheme({**patterns, **added}, dense=dense, complete=self._complete)

    @classmethod
    def uniform(
        cls,
        model: nn.Module,
        pattern: Pattern | str,
        *,
        skip: Iterable[str] = (),
        include: Iterable[str] | None = None,
    ) -> Scheme:
        """Gives every prunable weight of a model the same pattern.

        Dense stay, with the reason in `Scheme.dense`: skipped weights; weights whose group dim is no multiple of ``m``
        (for grouped convolutions that is one conv group's share); embeddings and what is tied to one; weights of
        module types that the registry does not know.

        Args:
            model: The model, wrapped or not.
            pattern: The pattern of all of them.
            skip: Parameter names, module names (with everything below them) or globs of either to leave dense.
            include: The same for what to prune; ``None`` means everything. An embedding, or a weight tied to one, is
                pruned only if one of its names or its module stands here literally: ``include=("*", "lm_head")``.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If the pattern is invalid, or an entry of ``skip`` or ``include`` matches nothing in the model.

        Example:
            >>> Scheme.uniform(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), "2:4", skip=["1"])
            Scheme({'0.weight': '2:4'}, dense={'1.weight': "skipped ('1')"})
        """
        pattern = Pattern.parse(pattern)
        skips = _globs("skip", skip, model)
        includes = None if include is None else _globs("include", include, model)
        patterns: dict[str, Pattern] = {}
        dense: dict[str, str] = {}
        for weight in weights(model):
            named = includes is not None and any(_names(glob, weight) for glob in includes)
            if (glob := _first_match(skips, weight)) is not None:
                dense[weight.name] = f"skipped ({glob!r})"
            elif includes is not None and _first_match(includes, weight) is None:
                dense[weight.name] = "not included"
            elif weight.group_dim is None or (weight.dense_because is not None and not named):
                dense[weight.name] = str(weight.dense_because)
            elif (misfit := weight.misfit(pattern)) is not None:
                dense[weight.name] = misfit
            else:
                patterns[weight.name] = pattern
        return cls(patterns, dense=dense, complete=True)

    def resolve(self, model: nn.Module, *, strict: bool | None = None) -> dict[str, ResolvedWeight]:
        """Finds the scheme's weights in a model.

        Args:
            model: The model, wrapped or not.
            strict: Whether prunable weights that the scheme does not name at all are an error; by default they are
                if the scheme is `complete`.

        Returns:
            ``{canonical parameter name: ResolvedWeight}`` in the model's order, without the weights whose pattern is
            dense.

        Raises:
            ValueError: If the scheme names weights that the model does not have or that cannot be pruned (close
                matches are suggested), gives one tied weight two patterns, has a pattern that does not fit a weight,
                or (``strict``) misses some. All offenders are named.
        """
        everything = weights(model)
        by_name = {name: weight for weight in everything for name in weight.names}
        chosen: dict[str, tuple[str, Pattern]] = {}
        problems: list[str] = []
        for key, pattern in self.items():
            known = _find(by_name, key)
            if known is None:
                problems.append(_unknown(key, model, by_name))
                continue
            weight = by_name[known]
            if (misfit := weight.misfit(pattern)) is not None:
                problems.append(f"{key} cannot be {pattern}: {misfit}")
            other = chosen.setdefault(weight.name, (key, pattern))
            if other[1] != pattern:
                problems.append(f"{other[0]} ({other[1]}) and {key} ({pattern}) are one tied weight")
        for key in self._dense:
            if _find(by_name, key) is None and _unregistered(key, model) is None:
                problems.append(_unknown(key, model, by_name))
        if self._complete if strict is None else strict:
            listed = {by_name[known].name for key in self._dense if (known := _find(by_name, key)) is not None}
            missing = [w.name for w in everything if w.dense_because is None and w.name not in listed | chosen.keys()]
            if missing:
                problems.append(f"the scheme does not say what to do with {', '.join(missing)}")
        if problems:
            raise ValueError("scheme does not match the model:\n  " + "\n  ".join(problems))
        return {
            weight.name: _resolved(weight, chosen[weight.name][1])
            for weight in everything
            if weight.name in chosen and not chosen[weight.name][1].is_dense
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the scheme as JSON. The file is replaced in one step, never left half written."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "complete": self._complete,
            "patterns": {name: str(pattern) for name, pattern in self.items()},
            "dense": self._dense,
        }
        with atomic_write(path) as file:
            file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> Scheme:
        """Reads a scheme: the JSON that `save` writes, or the scheme text of the DominoSearch authors' code.

        Args:
            path: The file.
            model: The model that the scheme is for. With it the scheme is checked as `resolve` does. The DominoSearch
                text needs it, since its keys say where a layer comes in order and what shape it has, but not its name.

        Raises:
            FormatError: If the file is neither, is of a version that this release does not know, or contradicts itself.
            ValueError: If the scheme does not match the model, or DominoSearch text comes without one.
            OSError: If the file cannot be read.
        """
        # Imported here: that module builds schemes, and so imports this one.
        from . import domino_text

        text = _read_text(path)
        content = _parse_json(text)
        if content is None or domino_text.looks_like(content):
            return domino_text.read(text if content is None else content, model, source=os.fspath(path))
        scheme = cls._from_json(content, os.fspath(path))
        if model is not None:
            scheme.resolve(model)
        return scheme

    @classmethod
    def _from_json(cls, content: Any, source: str) -> Scheme:
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise FormatError(f'{source}: not a scheme: it must be a JSON object with "format": "{_FORMAT}"')
        if content.get("version") != _VERSION:
            raise FormatError(
                f"{source}: scheme version {content.get('version')!r} is not known to this release, "
                f"which reads version {_VERSION}"
            )
        expected = {"format": str, "version": int, "complete": bool, "patterns": dict, "dense": dict}
        for key, kind in expected.items():
            if type(content.get(key)) is not kind:
                raise FormatError(f"{source}: {key!r} must be of type {kind.__name__}, got {content.get(key)!r}")
        if extra := content.keys() - expected.keys():
            raise FormatError(f"{source}: unknown entries {sorted(extra)}")
        for name, pattern in content["patterns"].items():
            if not isinstance(pattern, str):
                raise FormatError(f'{source}: the pattern of {name!r} must be text such as "2:4", got {pattern!r}')
        try:
            return cls(content["patterns"], dense=content["dense"], complete=content["complete"])
        except (TypeError, ValueError) as error:
            raise FormatError(f"{source}: {error}") from error


def as_scheme(scheme: Scheme | Mapping[str, Pattern | str] | Pattern | str, model: nn.Module) -> Scheme:
    """Returns what callers may give as a scheme as one: a pattern means `Scheme.uniform`, a plain mapping a scheme."""
    if isinstance(scheme, Scheme):
        return scheme
    if isinstance(scheme, (Pattern, str)):
        return Scheme.uniform(model, scheme)
    if isinstance(scheme, Mapping):
        return Scheme(scheme)
    raise TypeError(f"scheme must be a Scheme, a mapping of names to patterns, or a pattern, got {scheme!r}")


def _find(table: Mapping[str, Any], name: str) -> str | None:
    """The key under which ``name`` stands: itself, or the other one of a module and its weight."""
    stem = name.removesuffix("weight").removesuffix(".") if name == "weight" or name.endswith(".weight") else name
    full = f"{stem}.weight" if stem else "weight"
    return next((key for key in (name, full, stem) if key in table), None)


def _resolved(weight: Weight, pattern: Pattern) -> ResolvedWeight:
    assert weight.group_dim is not None  # misfit() has seen to it
    return ResolvedWeight(
        weight.name, weight.parameter, weight.module, weight.attr, weight.group_dim, pattern, weight.places
    )


def _unregistered(key: str, model: nn.Module) -> str | None:
    """What the model has under ``key`` if that is no weight of two or more dims."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if canonical_name(name) in (key, f"{key}.weight"):
            return f"a parameter of shape {tuple(parameter.shape)}"
    if any(canonical_name(name) == key for name, _ in model.named_modules(remove_duplicate=False)):
        return "a module without a weight"
    return None


def _unknown(key: str, model: nn.Module, by_name: Mapping[str, Weight]) -> str:
    if (found := _unregistered(key, model)) is not None:
        return f"{key} is {found}, which cannot be pruned"
    stems = [name.removesuffix(".weight") for name in by_name]
    close = dict.fromkeys(difflib.get_close_matches(key, [*by_name, *stems], n=3))
    return f"the model has no {key}" + (f" (did you mean {' or '.join(close)}?)" if close else "")


def _paths(weight: Weight) -> Iterator[str]:
    """All names of a weight, and of the modules above it."""
    for name in weight.names:
        yield name
        while "." in name:
            name = name.rpartition(".")[0]
            yield name


def _first_match(globs: Iterable[str], weight: Weight) -> str | None:
    return next((glob for glob in globs if any(fnmatchcase(path, glob) for path in _paths(weight))), None)


def _names(glob: str, weight: Weight) -> bool:
    """Whether ``glob`` is literally one of the weight's names or modules."""
    return any(glob in (name, name.rpartition(".")[0]) for name in weight.names)


def _globs(argument: str, globs: Iterable[str], model: nn.Module) -> tuple[str, ...]:
    """Checks ``skip`` or ``include``: an entry that matches nothing is a typing error that would go unnoticed."""
    if isinstance(globs, str) or not isinstance(globs, Iterable):
        raise TypeError(f"{argument} must be a list or tuple of names, got {globs!r}")
    result = []
    known = [canonical_name(name) for name, _ in model.named_modules(remove_duplicate=False)]
    known += [canonical_name(name) for name, _ in model.named_parameters(remove_duplicate=False)]
    for glob in globs:
        if not isinstance(glob, str):
            raise TypeError(f"{argument} must hold names, got {glob!r}")
        name = canonical_name(glob)
        if not any(fnmatchcase(path, name) for path in known):
            close = difflib.get_close_matches(name, known, n=3)
            hint = f" (did you mean {' or '.join(close)}?)" if close else ""
            raise ValueError(f"{argument}: {glob!r} matches nothing in the model{hint}")
        result.append(name)
    return tuple(result)


def _read_text(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        raw = file.read(_MAX_FILE_BYTES + 1)
    if len(raw) > _MAX_FILE_BYTES:
        raise FormatError(f"{os.fspath(path)}: not a scheme: larger than {_MAX_FILE_BYTES >> 20} MiB")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{os.fspath(path)}: not a scheme: not UTF-8 text ({error})") from None


def _parse_json(text: str) -> Any:
    """Returns the JSON content, or ``None`` if it is no JSON."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FormatError(f"{twice!r} stands there twice")
        return result

    try:
        return json.loads(text, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError:
        return None
    except RecursionError:
        raise FormatError("not a scheme: nested too deeply") from None
