"""What `prune_model` refuses before it changes anything."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping

import torch

from .._arguments import check_writable
from ..tensor import NMTensor
from ..train.dtensor import is_dtensor
from ..weights import Weight
from .criteria import NEED_CALIBRATION


def check_numbers(dampening: object, memory: object) -> None:
    """Refuses numbers that are none, or negative."""
    if isinstance(dampening, bool) or not isinstance(dampening, numbers.Real):
        raise TypeError(f"dampening must be a number, got {dampening!r}")
    if not 0 <= float(dampening) < math.inf:
        raise ValueError(f"dampening must be 0 or more, got {dampening}")
    if isinstance(memory, bool) or not isinstance(memory, numbers.Integral):
        raise TypeError(f"memory must be an int, a number of bytes, got {memory!r}")
    if int(memory) < 0:
        raise ValueError(f"memory must be 0 or more bytes, got {memory}")


def check_weights(weights: Mapping[str, Weight], criterion: str) -> None:
    """Refuses weights that cannot be pruned by a criterion, all in one error."""
    problems = [f"{name} {why}" for name, weight in weights.items() if (why := _why_not(weight, criterion))]
    if problems:
        raise ValueError("some weights cannot be pruned:\n  " + "\n  ".join(problems))


def _why_not(weight: Weight, criterion: str) -> str | None:
    parameter = weight.parameter
    values = parameter.detach()
    if isinstance(parameter.data, NMTensor) or isinstance(parameter, NMTensor):
        return "is packed already: unpack it with to_dense()"
    if is_dtensor(parameter):
        return "is sharded: gather it before, or prune before fully_shard"
    if values.is_meta:
        return "is on the meta device, without values"
    if values.layout != torch.strided:
        return f"has the layout {values.layout}"
    if criterion in NEED_CALIBRATION and not values.is_floating_point():
        return f"is {values.dtype}: {criterion} is for floating point, use magnitude"
    if values.is_floating_point() and not torch.isfinite(values.to(torch.float32)).all():
        return "has NaN or infinite values"
    try:
        check_writable(weight.name, values)
    except ValueError:
        return "has elements that share memory"
    return None
