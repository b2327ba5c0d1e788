"""apex ASP: state dicts whose weights have a bool buffer ``__weight_mma_mask`` beside them.

``ASP.init_model_for_pruning`` registers one for each parameter that it prunes, all True until
``compute_sparse_masks`` has run. With ``allow_recompute_mask`` there are also the pruned values
(``__weight_mma_pruned_p``), which inference has no use for.
"""

from __future__ import annotations

import re

from torch import Tensor

from ...errors import FormatError
from ...tensor import NMTensor
from ._containers import write_torch
from ._packing import dense, mask_of, pack_masked
from ._peer import PeerFormat, Reading, Source, Writing

_MASK = re.compile(r"(.*\.)?__([^.]+)_mma_mask")
_PRUNED = re.compile(r"(.*\.)?__([^.]+)_mma_pruned_p")


def _read(source: Source, reading: Reading) -> dict[str, Tensor]:
    known = reading.weights()
    masks: dict[str, Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        found = _MASK.fullmatch(name)
        if found is not None:
            masks[(found[1] or "") + found[2]] = tensor
        elif not _PRUNED.fullmatch(name):
            result[name] = tensor
    for name, mask in masks.items():
        if name not in result:
            raise FormatError(f"there is a mask of {name!r}, but no such weight")
        group_dim = reading.group_dim(name, result[name], known)
        result[name] = pack_masked(name, result[name], mask, reading, group_dim)
    return result


def _write(writing: Writing) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, tensor in writing.tensors.items():
        result[name] = dense(tensor)
        if isinstance(tensor, NMTensor):
            module, _, parameter = name.rpartition(".")
            result[f"{module}{'.' if module else ''}__{parameter}_mma_mask"] = mask_of(tensor)
    if writing.destination is not None:
        write_torch(result, writing.destination)
    return result


APEX_ASP = PeerFormat(
    name="apex-asp",
    title="NVIDIA apex ASP: masks in buffers __weight_mma_mask",
    recognises=lambda source: any(_MASK.fullmatch(name) for name in source.tensors),
    read=_read,
    write=_write,
    verified="names and shapes of the documented buffers (apex does not install without CUDA)",
    lossy="reading drops pruned values (__weight_mma_pruned_p)",
)
