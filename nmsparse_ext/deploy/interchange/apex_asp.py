"""apex ASP: state dicts whose weights have a bool buffer ``__weight_mma_mask`` beside them.

``ASP.init_model_for_pruning`` registers one for each parameter that it prunes, all True until
``compute_sparse_masks`` has run. With ``allow_recompute_mask`` there are also the pruned values
(``__weight_mma_pruned_p``), which inference has no use for.
"""

from __future__ import annotations

import re

from torch import Tensor

from ...tensor import NMTensor
from ._containers import write_torch
from ._packing import in_form, mask_of, pack_all_masked, split_name
from ._peer import PeerFormat, Reading, Source, Writing

_MASK = re.compile(r"(.*\.)?__([^.]+)_mma_mask")
_PRUNED = re.compile(r"(.*\.)?__([^.]+)_mma_pruned_p")


def _read(source: Source, reading: Reading) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        found = _MASK.fullmatch(name)
        if found is not None:
            masks[(found[1] or "") + found[2]] = tensor
        elif not _PRUNED.fullmatch(name):
            tensors[name] = tensor
    return pack_all_masked(tensors, masks, reading)


def _with_mask(name: str, weight: NMTensor) -> dict[str, Tensor]:
    module, parameter = split_name(name)
    return {name: weight.to_dense(), f"{module}__{parameter}_mma_mask": mask_of(weight)}


def _write(writing: Writing) -> dict[str, Tensor]:
    result = in_form(writing.tensors, _with_mask)
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
