"""Data of others that tests compare with where it is at hand, but which this repository does not hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def published_scheme() -> Path:
    """The ResNet-50 scheme of the DominoSearch authors; skips the test where it is not at hand."""
    folder = os.environ.get("NMSPARSE_SHARED") or Path(__file__).parents[2] / "shared" / "data"
    path = Path(folder) / "domino_resnet50_M16_0.80.txt"
    if not path.exists():
        pytest.skip(f"{path.name} is not there: set NMSPARSE_SHARED to the folder that has it")
    return path
