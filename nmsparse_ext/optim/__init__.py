"""Optimizers that make a whole step of N:M training in one pass over memory.

`SGD` and `AdamW` take the arguments of their namesakes in ``torch.optim`` and compute the same to rounding.
With a `Sparsifier` (or ``scheme=``, which makes one) they also add the penalty, choose the new masks, write
the masked weights and count what has changed, while each piece of a weight is in the cache: one pass instead
of three.
"""

from __future__ import annotations

from .adamw import AdamW
from .sgd import SGD

__all__ = ["SGD", "AdamW"]
