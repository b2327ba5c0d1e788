"""Who wants to know that a model holds packed weights now: other libraries' models carry it in a config."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

_LISTENERS: list[Callable[[nn.Module], object]] = []


def when_packed(listener: Callable[[nn.Module], object]) -> None:
    """Has ``listener(model)`` called after `convert` or `load_into` has put packed weights into a model."""
    _LISTENERS.append(listener)


def announce_packed(model: nn.Module) -> None:
    """Calls all listeners."""
    for listener in _LISTENERS:
        listener(model)
