"""What a run writes to its folder: the checkpoint to go on from, and the results."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import nmsparse_ext as nms
from nmsparse_ext._atomic import atomic_write
from nmsparse_ext.recipes.config import TrainConfig, plain
from nmsparse_ext.train import SadHistory

if TYPE_CHECKING:
    from nmsparse_ext.recipes.loop import Outcome

VERSION = 1


def save(config: TrainConfig, state: Mapping[str, Any]) -> Path:
    """Write ``checkpoint.pt``, so that a crash leaves the old one or the new one whole."""
    assert config.out is not None
    path = config.out / "checkpoint.pt"
    with atomic_write(path) as file:
        torch.save({"version": VERSION, "settings": config.settings(), **state}, file)
    return path


def load(config: TrainConfig) -> dict[str, Any] | None:
    """Read ``checkpoint.pt``; ``None`` if there is none.

    Raises:
        ValueError: If it is of a run with other settings, which are named.
    """
    assert config.out is not None
    path = config.out / "checkpoint.pt"
    if not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("version") != VERSION:
        raise ValueError(f"{path} has version {state.get('version')!r}, expected {VERSION}")
    now, then = config.settings(), state["settings"]
    other = sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
    if other:
        named = ", ".join(f"{key} was {then.get(key)!r}, now {now.get(key)!r}" for key in other)
        raise ValueError(f"{path} is of a run with other settings: {named}")
    return state


def write_results(config: TrainConfig, outcome: Outcome, sad: SadHistory, data: Mapping[str, Any]) -> None:
    """Write the model, SAD by step and weight, and the figures."""
    assert config.out is not None
    nms.save_file(outcome.model, config.out / "model.safetensors")
    _write_text(config.out / "sad.csv", _csv_text(sad.rows()))
    result = {
        "config": plain(config),
        "data": dict(data),
        "lambda_w": outcome.lambda_w,
        "prunable": outcome.prunable,
        "epochs": outcome.rows,
        "test": outcome.test,
        "seconds": outcome.seconds,
        "torch": torch.__version__,
        "nmsparse_ext": nms.__version__,
    }
    _write_text(config.out / "result.json", json.dumps(result, indent=1) + "\n")


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def _csv_text(rows: list[dict[str, int]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
