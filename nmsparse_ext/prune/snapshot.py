"""What a model was, to put it back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def as_before_on_error(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Puts tensors back to what they held if the block raises anything, such as KeyboardInterrupt.

    Copies are kept in the memory of the CPU.
    """
    kept = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, copy in kept:
                tensor.copy_(copy)
        raise
