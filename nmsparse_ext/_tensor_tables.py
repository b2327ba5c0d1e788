"""What PyTorch does with an `NMTensor`: two tables, which the modules at the end of ``tensor.py`` fill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Public functions, above autograd.
FUNCTIONS: dict[Callable, Callable] = {}
#: ATen ops, below autograd, for whoever does not come through those.
OPS: dict[Any, Callable] = {}


def implements(*funcs: Any) -> Callable[[Callable], Callable]:
    """Enters a function into the table of ATen ops, under one or more of them."""

    def register(handler: Callable) -> Callable:
        OPS.update(dict.fromkeys(funcs, handler))
        return handler

    return register


def unsupported(func: Any, why: str) -> NotImplementedError:
    """The error for what an op cannot do."""
    return NotImplementedError(f"NMTensor does not support {func} {why}; work on .to_dense()")
