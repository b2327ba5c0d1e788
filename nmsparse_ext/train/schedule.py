"""Schedules: with which pattern, how often, and how strictly weights are masked as training goes on.

Schedules add up. Phases (`DenseWarmup`, `Gradual`, `DecayingMask`) take turns in the order in which they are
written, and afterwards the scheme's own patterns hold; `RefreshEvery`, `Freeze` and `DenseTail` hold for the
whole training and count its steps::

    DenseWarmup(1_000) + Gradual(5_000) + RefreshEvery(100) + Freeze(after=50_000)

Everything follows from the step's number, so there is nothing to save: a resumed training goes on in the
middle of a phase.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, get_args

from ..pattern import Pattern

ScheduleFunction = Callable[[int, str, Pattern], Pattern | str]
Path = Literal["linear", "cubic", "halving"]


class Schedule:
    """The scheme's patterns from the start; what others are made of.

    Subclass it for another schedule, and override what it is about. A plain function ``(step, name, pattern)
    -> pattern`` serves as one too. In all methods ``step`` is the number of the step at whose end the mask is
    chosen, from 1; 0 stands for the mask that training starts with.
    """

    @property
    def steps(self) -> int | None:
        """How many steps a phase takes; ``None`` for what holds throughout."""
        return None

    def pattern(self, step: int, name: str, final: Pattern) -> Pattern | str:
        """With which pattern a weight is masked; ``n:n`` means dense.

        Args:
            step: The step's number.
            name: The weight's parameter name.
            final: The pattern that the scheme gives it.
        """
        return final

    def renews(self, step: int) -> bool:
        """Whether masks are chosen anew, or kept as they are; a mask of another pattern always is."""
        return True

    def share(self, step: int) -> float:
        """Of every pruned weight, the part that still takes part in the forward pass: 0 for a plain mask."""
        return 0.0

    def ends_dense(self, step: int) -> bool:
        """Whether training has come to where the weights are dense to its end."""
        return False

    def __add__(self, other: Schedule) -> Schedule:
        if not isinstance(other, Schedule):
            return NotImplemented
        return _Sum([*_parts(self), *_parts(other)])

    def __repr__(self) -> str:
        fields = ", ".join(f"{key.lstrip('_')}={value!r}" for key, value in vars(self).items())
        return f"{type(self).__name__}({fields})"


class DenseWarmup(Schedule):
    """Trains densely at first.

    Args:
        steps: How many steps; the first masks are chosen at the end of the last of them.

    Raises:
        TypeError: If ``steps`` is no int.
        ValueError: If it is negative.
    """

    def __init__(self, steps: int) -> None:
        self._steps = _count("steps", steps)

    @property
    def steps(self) -> int:
        """How many steps it takes."""
        return self._steps

    def pattern(self, step: int, name: str, final: Pattern) -> Pattern:
        """Dense, then what the scheme says."""
        return final if step >= self._steps else Pattern(final.m, final.m)


class Gradual(Schedule):
    """Goes from ``m:m`` to ``n:m`` by and by; every weight of a mixed scheme reaches its own n at the end.

    Args:
        steps: How many steps it takes.
        path: Which n there are on the way. ``"linear"``: every one, for equal times (4:4, 3:4, then 2:4).
            ``"cubic"``: fast at first, ``n(t) = n + ceil((m - n) * (1 - t)**3)``, as Zhu and Gupta (2017)
            do with sparsity. ``"halving"``: m, m/2, m/4, ..., for equal times (16:16, 8:16, 4:16, then
            2:16), as in "structure decay" of Kao et al. (2022).

    Raises:
        TypeError: If ``steps`` is no int.
        ValueError: If it is negative, or ``path`` is not one of the three.
    """

    def __init__(self, steps: int, path: Path = "linear") -> None:
        self._steps = _count("steps", steps)
        if path not in get_args(Path):
            raise ValueError(f"path must be one of {', '.join(map(repr, get_args(Path)))}, got {path!r}")
        self._path = path

    @property
    def steps(self) -> int:
        """How many steps it takes."""
        return self._steps

    def pattern(self, step: int, name: str, final: Pattern) -> Pattern:
        """The n of this time."""
        if step >= self._steps:
            return final
        n, m = final.n, final.m
        left = Fraction(self._steps - step, self._steps)
        if self._path == "halving":
            stages = max(1, math.ceil(math.log2(m / n)))
            return Pattern(max(n, -(-m // 2 ** math.floor((1 - left) * stages))), m)
        return Pattern(n + math.ceil((m - n) * left ** (3 if self._path == "cubic" else 1)), m)


class DecayingMask(Schedule):
    """Lets pruned weights fade out of the forward pass instead of vanishing at once.

    They are multiplied by ``(1 - t)**power`` while t goes from 0 to 1 ("mask decay", Kao et al. 2022).

    Args:
        steps: How many steps it takes.
        power: 1 for a straight line.

    Raises:
        TypeError: If ``steps`` is no int, or ``power`` no number.
        ValueError: If one of them is negative.
    """

    def __init__(self, steps: int, power: float = 1.0) -> None:
        self._steps = _count("steps", steps)
        if isinstance(power, bool) or not isinstance(power, (int, float)):
            raise TypeError(f"power must be a number, got {power!r}")
        if not 0 < power < math.inf:
            raise ValueError(f"power must be above 0 and finite, got {power}")
        self._power = power

    @property
    def steps(self) -> int:
        """How many steps it takes."""
        return self._steps

    def share(self, step: int) -> float:
        """What is left of pruned weights."""
        return (1 - step / self._steps) ** self._power if step < self._steps else 0.0


class RefreshEvery(Schedule):
    """Chooses masks anew every k steps, and keeps them in between.

    Args:
        k: At steps whose number is a multiple of it.

    Raises:
        TypeError: If it is no int.
        ValueError: If it is below 1.
    """

    def __init__(self, k: int) -> None:
        self._k = _count("k", k, least=1)

    def renews(self, step: int) -> bool:
        """Every k steps."""
        return step % self._k == 0


class Freeze(Schedule):
    """Keeps the masks from some step on, so that the end of training is that of a fixed architecture.

    Args:
        after: The step at whose end masks are chosen for the last time.

    Raises:
        TypeError: If it is no int.
        ValueError: If it is negative.
    """

    def __init__(self, after: int) -> None:
        self._after = _count("after", after)

    def renews(self, step: int) -> bool:
        """Until then."""
        return step <= self._after


class DenseTail(Schedule):
    """Trains densely to the end from some step on; `Sparsifier.finalize` then leaves the model dense.

    The dense weights come back whole: those that were pruned are what training has made of them meanwhile.

    Args:
        after: The last step with sparse weights.

    Raises:
        TypeError: If it is no int.
        ValueError: If it is negative.
    """

    def __init__(self, after: int) -> None:
        self._after = _count("after", after)

    def pattern(self, step: int, name: str, final: Pattern) -> Pattern:
        """What the scheme says, then dense."""
        return Pattern(final.m, final.m) if self.ends_dense(step) else final

    def ends_dense(self, step: int) -> bool:
        """From then on."""
        return step >= self._after


class _Sum(Schedule):
    """Phases one after the other, and what holds throughout."""

    def __init__(self, parts: list[Schedule]) -> None:
        self._parts = parts
        self._phases: list[tuple[int, int, Schedule]] = []  # first step, length, phase
        start = 0
        for part in parts:
            if part.steps is not None:
                self._phases.append((start, part.steps, part))
                start += part.steps
        self._always = [part for part in parts if part.steps is None]

    def pattern(self, step: int, name: str, final: Pattern) -> Pattern | str:
        """That of the phase, unless something else has another one throughout."""
        for part in reversed(self._always):
            pattern = Pattern.parse(part.pattern(step, name, final), argument="scheduled pattern")
            if pattern != final:
                return pattern
        phase = self._phase(step)
        return phase[1].pattern(step - phase[0], name, final) if phase else final

    def renews(self, step: int) -> bool:
        """Where nothing keeps them."""
        phase = self._phase(step)
        return all(part.renews(step) for part in self._always) and (
            phase is None or phase[1].renews(step - phase[0])
        )

    def share(self, step: int) -> float:
        """That of the phase, or what else leaves most."""
        phase = self._phase(step)
        shares = [part.share(step) for part in self._always]
        return max([phase[1].share(step - phase[0]) if phase else 0.0, *shares])

    def ends_dense(self, step: int) -> bool:
        """Where anything does."""
        return any(part.ends_dense(step) for part in self._always)

    def _phase(self, step: int) -> tuple[int, Schedule] | None:
        for start, steps, part in self._phases:
            if step < start + steps:
                return start, part
        return None

    def __repr__(self) -> str:
        return " + ".join(map(repr, self._parts))


class _Function(Schedule):
    """A schedule that is a function of the pattern alone."""

    def __init__(self, function: ScheduleFunction) -> None:
        self._function = function

    def pattern(self, step: int, name: str, final: Pattern) -> Pattern | str:
        """What the function says."""
        return self._function(step, name, final)

    def __repr__(self) -> str:
        return getattr(self._function, "__qualname__", type(self._function).__qualname__)


def as_schedule(schedule: Any) -> Schedule:
    """Returns a schedule for what a Sparsifier is given: one, a function of the pattern, or ``None``.

    Raises:
        TypeError: If it is something else.
    """
    if schedule is None:
        return Schedule()
    if isinstance(schedule, Schedule):
        return schedule
    function = getattr(schedule, "pattern", schedule)
    if callable(function):
        return _Function(function)
    raise TypeError(
        f"schedule must be a Schedule, a function (step, name, pattern) -> pattern, or an object with such a "
        f"method `pattern`, got {schedule!r}"
    )


def _parts(schedule: Schedule) -> list[Schedule]:
    return schedule._parts if isinstance(schedule, _Sum) else [schedule]


def _count(name: str, value: int, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value}")
    return value
