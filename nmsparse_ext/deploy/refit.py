"""Holding on GPUs what the table of measured times says is worth holding, and no more."""

from __future__ import annotations

import dataclasses

from torch import nn

from .. import engines_cuda, engines_cuda_8bit
from ..tensor import NMTensor
from ..weights import canonical_name
from .convert import ignore_in_ddp
from .listeners import announce_packed
from .plan import why
from .report import attach, report


def refit(model: nn.Module) -> int:
    """Frees the forms of packed weights on GPUs that never win, and makes those that do, in place.

    A weight gets its forms when it is packed, by what is known then: of the engine ``cuda`` up to three, the
    packed form, cuSPARSELt's and the dense weight. When more has been measured since (``nmsparse tune``,
    another `convert`), or inputs may be rounded now, this has every weight hold what is wanted now. Weights
    of engines that hold the same in any case stay as they are. CUDA graphs that were captured before must not
    be replayed any more.

    Args:
        model: The model; weights that change are replaced by new parameters, and its `report` tells so.

    Returns:
        How many bytes fewer the weights hold now; negative if they hold more.
    """
    freed = 0
    fitted: dict[int, tuple[NMTensor, nn.Parameter]] = {}  # the old ones too: tied weights stay tied
    changed: dict[str, NMTensor] = {}
    for prefix, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if not isinstance(parameter, NMTensor):
                continue
            if id(parameter) not in fitted:
                fitting = _fitting(parameter)
                if fitting is parameter:
                    continue
                freed += parameter.held_nbytes - fitting.held_nbytes
                fitted[id(parameter)] = parameter, nn.Parameter(fitting, requires_grad=False)
                changed[canonical_name(f"{prefix}.{name}" if prefix else name)] = fitting
            setattr(module, name, fitted[id(parameter)][1])
    if fitted:
        ignore_in_ddp(model)
        announce_packed(model)
        _tell(model, changed)
    return freed


def _fitting(weight: NMTensor) -> NMTensor:
    eight_bits = weight.engine in engines_cuda_8bit.ROUNDED
    return engines_cuda_8bit.refit(weight) if eight_bits else engines_cuda.refit(weight)


def _tell(model: nn.Module, changed: dict[str, NMTensor]) -> None:
    try:
        told = report(model)
    except ValueError:  # it was packed in another way
        return
    rows = []
    for row in told:
        weight = changed.get(row.name)
        if weight is not None:
            reason = f"{row.reason}; fitted anew: {why(weight)}"
            row = dataclasses.replace(row, packed_bytes=weight.held_nbytes, reason=reason)
        rows.append(row)
    attach(getattr(model, "_orig_mod", model), dataclasses.replace(told, rows=tuple(rows)))
