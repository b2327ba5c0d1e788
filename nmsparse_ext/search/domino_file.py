"""The checkpoint of a DominoSearch: what it takes to go on to the same result, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .._atomic import atomic_write

VERSION = 1


def save(path: str | os.PathLike[str], settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint, so that a crash leaves the old one or the new one whole."""
    with atomic_write(path) as file:
        torch.save({"version": VERSION, "settings": dict(settings), **state}, file)


def load(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Reads a checkpoint; ``None`` if there is none.

    Raises:
        ValueError: If it is of another version, or of a search with other settings, which are named.
    """
    if not Path(path).exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("version") != VERSION:
        found = state.get("version") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"checkpoint {os.fspath(path)} must be of version {VERSION}, got {found!r}")
    then = state["settings"]
    other = sorted(key for key in settings.keys() | then.keys() if settings.get(key) != then.get(key))
    if other:
        named = ", ".join(f"{key} was {then.get(key)!r}, now {settings.get(key)!r}" for key in other)
        raise ValueError(
            f"checkpoint {os.fspath(path)} is of a search with other settings: {named}; "
            f"remove the file to start anew"
        )
    return state


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's random number generators of the CPU and of a device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Sets what `random_state` has returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
