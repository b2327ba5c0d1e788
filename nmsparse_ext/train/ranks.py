"""The check, at the first step, that all ranks train the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dtensor import is_dtensor
from .weight import SparseWeight

_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_ranks_equal(weights: Sequence[SparseWeight], settings: str, group: Any = None) -> None:
    """Compares settings, and the dense weights of unsharded parameters, over the ranks. A collective.

    Replicas that start from different dense weights look alike at first, as DDP broadcasts the parameters,
    which are the sparse ones. They would drift apart for good with the first mask that differs.

    Args:
        weights: The weights.
        settings: Whatever else must be equal.
        group: The process group; ``None`` means all ranks.

    Raises:
        RuntimeError: Naming what differs, and between which ranks. All ranks raise.
    """
    mine = {"the method": settings} | {weight.name: _digest(weight) for weight in weights}
    everyone: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(everyone, mine, group=group)
    for rank, theirs in enumerate(everyone):
        for name in {**everyone[0], **theirs}:
            first, other = everyone[0].get(name), theirs.get(name)
            if first != other:
                raise RuntimeError(
                    f"ranks 0 and {rank} do not train the same sparse model: {name} differs ({first} and "
                    f"{other}). Make the Sparsifier when the replicas are equal: after "
                    f"DistributedDataParallel, or with the same seed and checkpoint on every rank. If the "
                    f"ranks are meant to train different models, give it their process_group, or "
                    f"process_group=False"
                )


def _digest(weight: SparseWeight) -> str:
    parts = [f"shape {list(weight.parameter.shape)}", f"{weight.pattern} along dim {weight.dim}"]
    if not is_dtensor(weight.parameter):
        parts.append(f"checksums {_checksum(weight.dense):x} {_checksum(weight.bits):x}")
    return ", ".join(parts)


def _checksum(tensor: Tensor) -> int:
    """The sum of the bits taken as integers: independent of the order of summation."""
    return int(tensor.contiguous().view(_INT_OF_SIZE[tensor.element_size()]).sum(dtype=torch.int64)) & (
        2**64 - 1
    )
