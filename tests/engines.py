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
        name: "reference", an instruction set of the CPU, or "cuda".
        ops: Namespace with the functions of ``torch.ops.nmsparse``.
    """

    name: str
    ops: Any


CPU_ISAS: list[str] = extension.cpu_isas() if extension else []
CUDA = pytest.param("cuda", marks=pytest.mark.needs_cuda)


def use_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Makes the ops, and the public functions with them, run on one engine until it is resumed.

    For "cuda" the tensors that a test makes are on the GPU, unless it says otherwise.
    """
    if name == "reference":
        monkeypatch.setattr(ops, "_nms", reference)
        yield Engine(name, reference)
    elif name == "cuda":
        torch.set_default_device("cuda")
        try:
            yield Engine(name, torch.ops.nmsparse)
        finally:
            torch.set_default_device(None)
    else:
        assert extension is not None
        before = extension.cpu_isa()
        extension.set_cpu_isa(name)
        try:
            yield Engine(name, torch.ops.nmsparse)
        finally:
            extension.set_cpu_isa(before)
