"""Choosing which implementation of the ops runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from nmsparse_ext import ops, reference
from nmsparse_ext._build import extension


class Engine(NamedTuple):
    """One implementation of the ops.

    Attributes:
        name: "reference" or an instruction set.
        ops: Namespace with the functions of ``torch.ops.nmsparse``.
    """

    name: str
    ops: Any


COMPILED_ENGINES: list[str] = extension.cpu_isas() if extension else []


def use_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Makes the ops, and the public functions with them, run on one engine."""
    if name == "reference":
        monkeypatch.setattr(ops, "_nms", reference)
        yield Engine(name, reference)
        return
    assert extension is not None
    before = extension.cpu_isa()
    extension.set_cpu_isa(name)
    yield Engine(name, torch.ops.nmsparse)
    extension.set_cpu_isa(before)
