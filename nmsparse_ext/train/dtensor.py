"""What sharded parameters (DTensor: FSDP2, tensor parallel) need: local contents, and tensors sharded alike.

``parameter.data = other`` does not reach inside a DTensor, and kernels want plain tensors. So everything here
works on the *local* part, and only what others see (optimizer state, masks) is wrapped again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor; costs no import where nobody made one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """The part that this rank holds; a plain tensor is its own.

    Not ``to_local()``: that returns an alias, and writing its ``data`` would leave the DTensor as it was.
    """
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def check_placement(name: str, parameter: Tensor, group_dim: int) -> None:
    """Refuses a sharding that cuts through groups.

    Raises:
        ValueError: Naming the weight, if it is sharded along its group dim or only partially summed.
    """
    if not is_dtensor(parameter):
        return
    for placement in _placements(parameter):
        if placement.is_shard() and placement.dim % parameter.dim() == group_dim:
            raise ValueError(
                f"{name} is sharded along its group dim {group_dim} ({placement}), which cuts groups "
                f"apart; shard another dim, or leave this weight out of the scheme"
            )
        if placement.is_partial():
            raise ValueError(
                f"{name} has the placement {placement}: its values are not settled, only its summands"
            )


def wrap_like(local: Tensor, parameter: Tensor) -> Tensor:
    """``local`` as a tensor of the shape and sharding of ``parameter``; shares memory with ``local``."""
    if not is_dtensor(parameter):
        return local
    return _from_local(local, parameter, _placements(parameter), parameter.shape, parameter.stride())


def wrap_bits(local: Tensor, parameter: Tensor, group_dim: int) -> Tensor:
    """Packed bits of a local part as those of the whole ``parameter``: [other dims..., bytes]."""
    if not is_dtensor(parameter):
        return local
    shape = [size for dim, size in enumerate(parameter.shape) if dim != group_dim]
    shape.append(-(-parameter.shape[group_dim] // 8))
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    placements = [_moved(placement, group_dim, parameter.dim()) for placement in _placements(parameter)]
    return _from_local(local, parameter, placements, shape, strides)


def same_placement(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are split over the same ranks in the same way (plain tensors are not split)."""
    if not is_dtensor(a) or not is_dtensor(b):
        return is_dtensor(a) == is_dtensor(b)
    return a.device_mesh == b.device_mesh and a.placements == b.placements  # type: ignore[attr-defined]


def assign(target: Tensor, source: Tensor) -> None:
    """``target.copy_(source)`` where either may be a DTensor, whole or split in another way."""
    if is_dtensor(target) and not is_dtensor(source):
        from torch.distributed.tensor import distribute_tensor

        mesh = target.device_mesh  # type: ignore[attr-defined]
        source = distribute_tensor(source.to(target.device), mesh, _placements(target))
    if is_dtensor(source) and not is_dtensor(target):
        source = source.full_tensor()  # type: ignore[attr-defined]
    if same_placement(target, source):
        local_of(target).copy_(local_of(source))
    else:
        target.copy_(source)


def shard_groups(parameter: Tensor) -> list[Any]:
    """The process groups over which ``parameter`` is split; counts must be summed over each of them."""
    if not is_dtensor(parameter):
        return []
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    return [mesh.get_group(i) for i, placement in enumerate(_placements(parameter)) if placement.is_shard()]


def _placements(parameter: Tensor) -> Sequence[Any]:
    return parameter.placements  # type: ignore[attr-defined]


def _moved(placement: Any, group_dim: int, ndim: int) -> Any:
    """Where a sharded dim of a weight stands in its bits, whose group dim comes last."""
    if not placement.is_shard() or placement.dim % ndim < group_dim:
        return placement
    from torch.distributed.tensor import Shard

    return Shard(placement.dim % ndim - 1)


def _from_local(
    local: Tensor, parameter: Tensor, placements: Sequence[Any], shape: Sequence[int], stride: Sequence[int]
) -> Tensor:
    from torch.distributed.tensor import DTensor

    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )
