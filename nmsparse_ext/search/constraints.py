"""What each weight may become: candidates per weight, and why the others stay dense."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias, TypeVar

from torch import nn

from .._naming import check_globs, first_match, why_left_dense
from ..pattern import Pattern
from ..weights import Weight, weights

#: A pattern, text such as ``"2:4"``, or an int: n of the search's m.
Candidate: TypeAlias = "Pattern | str | int"

T = TypeVar("T")


@dataclass(frozen=True)
class Constraints:
    """What a search must respect, per weight. Globs are names as in ``Scheme.uniform(skip=...)``.

    Args:
        include: What to search, ``None`` for every prunable weight. An embedding, or a weight tied to one, is
            searched only if it is named here in full.
        allowed: ``{glob: candidates}`` in place of the search's own; the first glob that matches counts.
            Dense is among them only if they have it (``"4:4"``).
        at_least: ``{glob: pattern}``: no sparser than this pattern; an int is the least n of the search's m.
        embeds_in_24: Only patterns that always satisfy 2:4, and no dense ones, so that all searched weights
            run on sparse tensor cores. A search without candidates of its own then takes `embedded_in_24`.
    """

    include: Iterable[str] | None = None
    allowed: Mapping[str, Iterable[Candidate]] = field(default_factory=dict)
    at_least: Mapping[str, Candidate] = field(default_factory=dict)
    embeds_in_24: bool = False


class Candidates(Mapping[str, tuple[Pattern, ...]]):
    """``{parameter name: patterns it may get}``, densest first, in the order of the model.

    Every entry has at least one pattern that is not dense. Leaving a weight dense is a candidate like the
    others: a pattern with ``n == m``, at most one for each weight.

    Attributes:
        weights: ``{parameter name: Weight}`` of the same weights.
        dense: ``{parameter name: reason}`` of the other weights of two or more dims.
    """

    def __init__(
        self,
        patterns: Mapping[str, tuple[Pattern, ...]],
        found: Mapping[str, Weight],
        dense: Mapping[str, str],
    ) -> None:
        self._patterns = dict(patterns)
        self.weights: Mapping[str, Weight] = MappingProxyType(dict(found))
        self.dense: Mapping[str, str] = MappingProxyType(dict(dense))

    def __getitem__(self, name: str) -> tuple[Pattern, ...]:
        return self._patterns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._patterns)

    def __len__(self) -> int:
        return len(self._patterns)

    def without(self, reasons: Mapping[str, str]) -> Candidates:
        """The same without some weights, which stay dense for the reasons given."""
        kept = [name for name in self if name not in reasons]
        return Candidates(
            {name: self[name] for name in kept},
            {name: self.weights[name] for name in kept},
            {**self.dense, **reasons},
        )


def powers_of_two(m: int) -> tuple[Pattern, ...]:
    """DominoSearch's candidates: n a power of two below ``m``, and ``m:m`` for dense; densest first."""
    full = Pattern(m, m)
    return (full, *(Pattern(1 << e, m) for e in reversed(range(m.bit_length())) if 1 << e < m))


def embedded_in_24(m: int) -> tuple[Pattern, ...]:
    """What satisfies 2:4 in groups of up to ``m``: 2 and 1 of 4, 8, 16 and so on; densest first."""
    sizes = [1 << e for e in range(2, m.bit_length()) if 1 << e <= m]
    patterns = [Pattern(n, size) for size in sizes for n in (2, 1)]
    return tuple(sorted(patterns, key=lambda p: (-p.density, p.m)))


def find_candidates(
    model: nn.Module,
    *,
    m: int = 16,
    candidates: Iterable[Candidate] | None = None,
    skip: Iterable[str] = (),
    constraints: Constraints | None = None,
) -> Candidates:
    """Lists what a search may choose from.

    Dense stay, with a reason, the weights that ``Scheme.uniform`` leaves dense: what is skipped or not
    included, embeddings and what is tied to one, parameters that the registry does not know, and weights
    whose group dim (of a grouped convolution: the share of one conv group) fits none of the patterns.

    Args:
        model: The model, wrapped or not.
        m: The group size that ints in ``candidates`` and ``constraints`` refer to.
        candidates: What a weight may become; ``None`` for `powers_of_two`, or `embedded_in_24` where the
            constraints ask for that. Several m may be mixed. A weight takes those that fit it. Dense is among
            them only if a pattern with ``n == m`` is.
        skip: What stays dense: parameter names, module names, or globs of either.
        constraints: Further constraints.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a pattern is invalid, a glob matches nothing, no weight is left to search, or the
            constraints leave nothing for a weight that there are fitting candidates for.
    """
    constraints = constraints or Constraints()
    if candidates is None:
        everything = (constraints.embeds_in_24 and embedded_in_24(m)) or powers_of_two(m)
    else:
        everything = _patterns("candidates", candidates, m)
    skips = check_globs("skip", skip, model)
    include = None if constraints.include is None else check_globs("include", constraints.include, model)
    allowed = {
        glob: _patterns(f"allowed[{glob!r}]", listed, m)
        for glob, listed in _by_glob("allowed", constraints.allowed, model).items()
    }
    at_least = {
        glob: _patterns(f"at_least[{glob!r}]", [pattern], m)[0]
        for glob, pattern in _by_glob("at_least", constraints.at_least, model).items()
    }
    patterns: dict[str, tuple[Pattern, ...]] = {}
    found: dict[str, Weight] = {}
    dense: dict[str, str] = {}
    for weight in weights(model):
        because = why_left_dense(weight, skips, include)
        fitting: list[Pattern] = []
        if because is None:
            listed = allowed.get(first_match(allowed, weight) or "", everything)
            fitting = [pattern for pattern in listed if weight.misfit(pattern) is None]
            if all(pattern.is_dense for pattern in fitting):
                because = next(filter(None, map(weight.misfit, listed)), "only dense is allowed")
        if because is None:
            least = at_least.get(first_match(at_least, weight) or "")
            chosen = tuple(p for p in fitting if _respects(p, least, constraints.embeds_in_24))
            if not chosen:
                raise ValueError(
                    f"the constraints leave no pattern for {weight.name}: of "
                    f"{', '.join(map(str, fitting))} none is {_wanted(least, constraints.embeds_in_24)}"
                )
            if all(pattern.is_dense for pattern in chosen):
                because = f"at_least allows only {chosen[0]}"
            else:
                patterns[weight.name], found[weight.name] = chosen, weight
        if because is not None:
            dense[weight.name] = because
    if not patterns:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in list(dense.items())[:10])
        raise ValueError(f"the model has no weight to search:{reasons}")
    return Candidates(patterns, found, dense)


def _respects(pattern: Pattern, least: Pattern | None, embeds_in_24: bool) -> bool:
    # Fractions, exactly: n / m >= n' / m'.
    dense_enough = least is None or pattern.n * least.m >= least.n * pattern.m
    return dense_enough and (pattern.embeds_in_24 or not embeds_in_24)


def _wanted(least: Pattern | None, embeds_in_24: bool) -> str:
    wanted = ([] if least is None else [f"at least as dense as {least}"]) + ["embedded in 2:4"] * embeds_in_24
    return " and ".join(wanted)


def _patterns(argument: str, given: Iterable[Candidate], m: int) -> tuple[Pattern, ...]:
    """Checks a list of candidates: patterns, each once, densest first, one dense one at most."""
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise TypeError(f"{argument} must be a list of patterns, got {given!r}")
    found: dict[Pattern | None, Pattern] = {}
    for item in given:
        is_n = isinstance(item, int) and not isinstance(item, bool)
        pattern = Pattern(item, m) if is_n else Pattern.parse(item, argument=argument)  # type: ignore[arg-type]
        found.setdefault(None if pattern.is_dense else pattern, pattern)
    if not found:
        raise ValueError(f"{argument} must name at least one pattern")
    return tuple(sorted(found.values(), key=lambda p: (-p.density, p.m)))


def _by_glob(argument: str, given: Mapping[str, T], model: nn.Module) -> dict[str, T]:
    if not isinstance(given, Mapping):
        raise TypeError(f"{argument} must be a mapping with names or globs as keys, got {given!r}")
    return dict(zip(check_globs(argument, given, model), given.values(), strict=True))
