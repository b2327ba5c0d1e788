"""``torch.ao.pruning``: masks in parametrizations, as ``WeightNormSparsifier.prepare`` puts them there.

A pruned weight is ``<module>.parametrizations.<name>.original``. Its mask, of ones and zeros in the weight's
dtype, is a buffer ``<module>.parametrizations.<name>.<i>.mask``, which state dicts leave out: it is read from
the model itself, or from the sparsifier's state (``sparsifier.state_dict()``) in the same checkpoint. That
holds a ``defaultdict``, which ``torch.load(weights_only=True)`` refuses: save its ``"state"`` as a dict, or
load the file yourself and hand the mapping over. What is written has masks in the state dict, which a
prepared model loads.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ...errors import FormatError
from ...tensor import NMTensor
from ._containers import write_torch
from ._packing import in_form, mask_of, pack_all_masked, split_name
from ._peer import PeerFormat, Reading, Source, Writing

_ORIGINAL = re.compile(r"(.*\.)?parametrizations\.([^.]+)\.original")
_MASK = re.compile(r"(.*\.)?parametrizations\.([^.]+)\.([0-9]{1,4})\.mask")


def _read(source: Source, reading: Reading) -> dict[str, Tensor]:
    originals: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        original, found = _ORIGINAL.fullmatch(name), _MASK.fullmatch(name)
        if original is not None:
            originals[(original[1] or "") + original[2]] = tensor
        elif found is not None:
            of = (found[1] or "") + found[2]
            ones = tensor.ne(0)
            if of in masks and masks[of].shape != ones.shape:
                raise FormatError(f"{of}: masks of shapes {list(masks[of].shape)} and {list(ones.shape)}")
            masks[of] = masks[of] & ones if of in masks else ones
        elif ".parametrizations." in f".{name}":
            raise FormatError(f"{name!r} is of a parametrization that is no mask; remove it first")
        else:
            result[name] = tensor
    for name, mask in source.masks.items():
        if name in originals:
            masks.setdefault(name, mask.ne(0))
    for name in masks:
        if name not in originals:
            raise FormatError(f"there is a mask of {name!r}, but no original")
    for name in originals:
        if name in result:
            raise FormatError(f"{name!r} has an original, but is there too")
        if name not in masks:
            raise FormatError(
                f"{name!r} has an original, but no mask: state dicts do not have it. Save the sparsifier's "
                "state_dict() in the same checkpoint, or call its squash_mask() before saving"
            )
    return result | pack_all_masked(originals, masks, reading)


def _parametrized(name: str, weight: NMTensor) -> dict[str, Tensor]:
    module, parameter = split_name(name)
    mask = mask_of(weight).to(weight.dtype if weight.is_floating_point() else torch.float32)
    prefix = f"{module}parametrizations.{parameter}."
    return {prefix + "original": weight.to_dense(), prefix + "0.mask": mask}


def _write(writing: Writing) -> dict[str, Tensor]:
    result = in_form(writing.tensors, _parametrized)
    write_torch(result, writing.destination)
    return result


TORCH_PRUNING = PeerFormat(
    name="torch-pruning",
    title="torch.ao.pruning: masks in parametrizations",
    recognises=lambda source: any(_ORIGINAL.fullmatch(name) for name in source.tensors),
    read=_read,
    write=_write,
    verified="torch.ao.pruning.WeightNormSparsifier, both directions",
    lossy="reading drops what the original holds under the mask",
)
