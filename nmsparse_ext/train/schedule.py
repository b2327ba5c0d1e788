"""Schedules: which pattern a weight has at which step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from ..pattern import Pattern


@runtime_checkable
class Schedule(Protocol):
    """Says which pattern each mask is chosen with.

    A plain function of the same arguments serves as well. A pattern ``n:n`` means dense.
    """

    def pattern(self, step: int, name: str, final: Pattern) -> Pattern | str:
        """Returns the pattern of the mask that is chosen at the end of a step.

        Args:
            step: The step's number, from 1; 0 is the mask that training starts with.
            name: The weight's parameter name.
            final: The pattern that the scheme gives it.
        """
        ...


ScheduleFunction = Callable[[int, str, Pattern], Pattern | str]


def as_function(schedule: Schedule | ScheduleFunction | None) -> ScheduleFunction | None:
    """Returns a schedule as a function of ``(step, name, final pattern)``; ``None`` stays ``None``.

    Raises:
        TypeError: If it is neither.
    """
    if schedule is None:
        return None
    if isinstance(schedule, Schedule):
        return schedule.pattern
    if callable(schedule):
        return schedule
    raise TypeError(
        f"schedule must be a function (step, name, pattern) -> pattern, or an object with such a method "
        f"`pattern`, got {schedule!r}"
    )
