"""Checkpoints of the official SR-STE code (NM-sparsity): dense weights, masks exist only in its forward.

What its layers multiply with is made here, once: of each group of M the N largest are kept. Its convolutions
group along input channels (``Sparse_NHWC``; older checkpoints along the flattened weight, ``Sparse``); where
the input channels are no multiple of M, as in a first convolution, the groups run on into the next position
or filter. Such weights cannot be packed; they come back dense with their zeros. Linear layers were dense in
the published models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from ...pattern import Pattern
from ._containers import write_torch
from ._packing import dense, pack_dense
from ._peer import PeerFormat, Reading, Source, Writing


def _read(source: Source, reading: Reading) -> dict[str, Tensor]:
    if not reading.patterns:
        raise ValueError(
            "pattern must be given: the checkpoint has dense weights and does not say what its model keeps"
        )
    flat = reading.options.get("grouping", "channel") == "flat"
    known = reading.weights()
    result: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        pattern = reading.pattern(name)
        is_weight = tensor.is_floating_point() and (tensor.dim() == 4 or name in reading.patterns)
        if pattern is None or pattern.is_dense or not is_weight or tensor.numel() % pattern.m:
            result[name] = tensor
        elif tensor.dim() == 4 and (tensor.shape[1] % pattern.m or (flat and tensor[0, 0].numel() > 1)):
            result[name] = _across_filters(tensor, pattern, flat)
        else:
            group_dim = reading.group_dim(name, tensor, known)
            result[name] = pack_dense(name, tensor, reading, group_dim, prune=reading.prune is not False)
    return result


def _across_filters(weight: Tensor, pattern: Pattern, flat: bool) -> Tensor:
    """Pruned along the flattened weight, ``[O, I, kh, kw]`` or ``[O, kh, kw, I]``."""
    rows = weight if flat else weight.permute(0, 2, 3, 1)
    pruned = ops.nm_prune(rows.reshape(1, -1), pattern).view(rows.shape)
    return (pruned if flat else pruned.permute(0, 3, 1, 2)).contiguous(memory_format=torch.contiguous_format)


def _write(writing: Writing) -> dict[str, Tensor]:
    """Dense weights with their zeros: masks chosen among them keep what was kept."""
    # Its models are wrapped for several GPUs when they are saved, and when they are loaded.
    result = {f"module.{name}": dense(tensor) for name, tensor in writing.tensors.items()}
    write_torch({"state_dict": result}, writing.destination)
    return result


NM_SPARSITY = PeerFormat(
    name="nm-sparsity",
    title="checkpoints of the official SR-STE code (dense weights, masks in the forward)",
    recognises=lambda source: False,  # they look like any dense checkpoint
    read=_read,
    write=_write,
    options=frozenset({"grouping"}),
    verified="the published rule, restated in the test",
    lossy="the dense weights that training could have gone on from; its choice among equal magnitudes, which "
    "differs between devices",
)
