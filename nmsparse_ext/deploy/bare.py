"""The op that a packed layer multiplies with, without what eager mode does around it.

This is what ``torch.compile`` puts into its code for a packed layer; the dense rivals of `prepacked` are
called the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Ops that are a whole layer, bias included.
PRODUCTS = ("panel_linear", "panel_conv", "panel_linear_int8")


class _Recorder(TorchDispatchMode):
    """Keeps the calls of this package's ops, with the plain tensors that they got."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        if func.namespace == "nmsparse":
            self.calls.append((func, args, keywords))
        return func(*args, **keywords)


def bare_product(call: Callable[[], object]) -> Callable[[], Tensor] | None:
    """What is left of ``call`` if nothing but its product is called.

    Args:
        call: Runs a layer with a packed weight once.

    Returns:
        The same product on the same operands; ``None`` if the layer takes more than one op of this package,
        or one that is no whole layer: it unpacks the weight, say.
    """
    with _Recorder() as recorder:
        call()
    if len(recorder.calls) != 1:
        return None
    op, args, kwargs = recorder.calls[0]
    if op.overloadpacket.__name__ not in PRODUCTS:
        return None
    return lambda: op(*args, **kwargs)
