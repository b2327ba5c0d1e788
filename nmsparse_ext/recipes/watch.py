"""Dense training under the eyes of a Sparsifier: what the mask would be, and how it changes."""

from __future__ import annotations

import torch
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext.train import Rule, SparseWeight, Step


class Watched(Rule):
    """Trains dense: masks are chosen and compared at every step, but the forward pass sees all weights."""

    def soften(self, weight: SparseWeight, out: Tensor, step: Step) -> None:
        """Puts the pruned weights back."""
        out.copy_(weight.dense)


@torch.no_grad()
def release(sparsifier: nms.Sparsifier) -> None:
    """Finalizes the Sparsifier of a watched model, which stays dense."""
    weights = dict(sparsifier.model.named_parameters())
    dense = {name: sparsifier.dense_weight(name).clone() for name in sparsifier.masks}
    sparsifier.finalize()
    for name, weight in weights.items():
        plain = name.removeprefix("module.")
        if plain in dense:
            weight.copy_(dense[plain])
