"""Recipes small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nmsparse_ext.recipes.digits_resnet import DigitsConfig, DigitsResnet
from nmsparse_ext.recipes.stdlib_gpt import GptConfig, StdlibGpt

QUIET: dict[str, Any] = {"progress": False, "tensorboard": False, "threads": 1, "device": "cpu"}


def digits(**settings: Any) -> DigitsResnet:
    """One block of 16 channels, 3 epochs of 3 steps."""
    small: dict[str, Any] = {"width": 16, "blocks": 1, "epochs": 3, "batch_size": 256, "warmup": 0.0}
    return DigitsResnet(DigitsConfig(**{**QUIET, **small, **settings}))


def corpus(folder: Path) -> Path:
    """A folder of Python files, every part of which is long enough."""
    folder.mkdir(exist_ok=True)
    for i in range(120):
        (folder / f"m{i}.py").write_text(f"def f{i}(x):\n    return x * {i} + {i * i}\n" * 4)
    return folder


def gpt(folder: Path, **settings: Any) -> StdlibGpt:
    """One layer of 16 features, 2 epochs of 4 steps."""
    small: dict[str, Any] = {
        "layers": 1, "width": 16, "heads": 2, "context": 16, "batch_size": 8, "steps": 4, "epochs": 2,
    }  # fmt: skip
    return StdlibGpt(GptConfig(**{**QUIET, **small, "corpus": corpus(folder), **settings}))
