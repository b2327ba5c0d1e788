"""NVIDIA ModelOpt: what ``mto.save`` writes after ``mts.sparsify``.

A torch checkpoint with ``modelopt_state`` (which modes were applied) and ``model_state_dict``, in which a
sparse module has its dense weight and a bool buffer ``_weight_mask``; the mask is applied whenever the weight
is used. After ``mts.export`` there are only weights with zeros, which are a dense checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...tensor import NMTensor
from ...weights import canonical_name
from ._containers import write_torch
from ._packing import dense, mask_of, pack_all_masked
from ._peer import PeerFormat, Reading, Source, Writing

_MASK = "_weight_mask"
#: The version whose ``mto.restore`` our files are tested with; restoring says so where another one runs.
VERSION = "0.47.0"
# What `mts.sparsify(model, "sparse_magnitude")` notes down as its rules, by registered module type.
_RULES: dict[str, dict[str, dict | None]] = {
    "nn.Linear": {"*": {}, "*lm_head*": None},
    "nn.Conv2d": {"*": {}, "*lm_head*": None},
}


def _is_mask(name: str) -> bool:
    return name == _MASK or name.endswith("." + _MASK)


def _read(source: Source, reading: Reading) -> dict[str, Tensor]:
    tensors = {name: tensor for name, tensor in source.tensors.items() if not _is_mask(name)}
    masks = {
        name.removesuffix(_MASK) + "weight": mask for name, mask in source.tensors.items() if _is_mask(name)
    }
    return pack_all_masked(tensors, masks, reading)


def _write(writing: Writing) -> dict[str, Any]:
    model = writing.model
    if model is None:
        raise ValueError("model must be given: ModelOpt's file lists all modules that it could have pruned")
    result: dict[str, Tensor] = {name: dense(tensor) for name, tensor in writing.tensors.items()}
    config: dict[str, int] = {}
    for path, module in model.named_modules():
        if type(module) not in (nn.Linear, nn.Conv2d):
            continue
        prefix = f"{canonical_name(path)}." if path else ""
        weight = writing.tensors.get(prefix + "weight")
        if weight is None or "lm_head" in path:
            continue
        # Restoring makes a mask for each of these modules, and wants it filled; -1 says that it is in use.
        config[f"{prefix}is_sparse"] = -1
        full = torch.ones(tuple(weight.shape), dtype=torch.bool, device=weight.device)
        result[prefix + _MASK] = mask_of(weight) if isinstance(weight, NMTensor) else full
    checkpoint = {
        "modelopt_state": {
            "modelopt_state_dict": [
                ("sparse_magnitude", {"config": _RULES, "metadata": {"subnet_config": config}})
            ],
            "modelopt_version": VERSION,
        },
        "model_state_dict": result,
    }
    write_torch(checkpoint, writing.destination)
    return checkpoint


MODELOPT = PeerFormat(
    name="modelopt",
    title="NVIDIA ModelOpt: what mto.save writes",
    recognises=lambda source: "modelopt_state" in source.entries or any(map(_is_mask, source.tensors)),
    read=_read,
    write=_write,
    verified=f"nvidia-modelopt {VERSION}: mts.sparsify, mto.save, mto.restore, both directions",
    lossy="reading drops dense weights under the mask and quantizer states; weights of modules other than "
    "Linear and Conv2d are written dense",
)
