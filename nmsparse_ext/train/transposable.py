"""Transposable masks: 2:4 along the group dim and across it, the exact best choice of every 4x4 tile.

With them the weight is 2:4 in the forward product and its transpose is in the backward one, so that both can
run on sparse tensor cores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .. import ops
from ..pattern import Pattern
from .dtensor import is_dtensor

if TYPE_CHECKING:
    from ..scheme import ResolvedWeight

PATTERN = Pattern(2, 4)
TILE = 4


def tile_dim(resolved: ResolvedWeight) -> int:
    """The dim that spans the tiles together with the group dim: the outputs of the layer.

    Raises:
        ValueError: Naming the weight, if it cannot have a transposable mask.
    """
    name, parameter, dim = resolved.name, resolved.parameter, resolved.group_dim
    if resolved.pattern != PATTERN:
        raise ValueError(f"transposable=True needs the pattern 2:4, but {name} has {resolved.pattern}")
    conv = isinstance(resolved.module, nn.modules.conv._ConvNd)
    if parameter.dim() != 2 and not (conv and resolved.module.groups == 1):
        raise ValueError(
            f"transposable=True takes matrices and convolutions of one group, but {name} has shape "
            f"{list(parameter.shape)} in {type(resolved.module).__name__}; leave it out of the scheme"
        )
    other = 1 if dim == 0 else 0
    for d in (dim, other):
        if parameter.shape[d] % TILE:
            raise ValueError(
                f"transposable=True needs whole {TILE}x{TILE} tiles, but {name} of shape "
                f"{list(parameter.shape)} has {parameter.shape[d]} along dim {d}, no multiple of {TILE}"
            )
    _check_shards(name, parameter, other)
    return other


def _check_shards(name: str, parameter: Any, dim: int) -> None:
    if not is_dtensor(parameter):
        return
    for index, placement in enumerate(parameter.placements):
        ranks = parameter.device_mesh.size(index)
        shard = -(-parameter.shape[dim] // ranks)
        cut = placement.is_shard() and placement.dim % parameter.dim() == dim
        if cut and ranks > 1 and shard % TILE:
            raise ValueError(
                f"transposable=True needs whole {TILE}x{TILE} tiles on every rank, but {name} is sharded "
                f"along dim {dim} into parts of {shard}, no multiple of {TILE}"
            )


def transposable_bits(weight: Tensor, dim: int, other: int) -> Tensor:
    """The packed transposable mask of ``weight``: uint8, its other dims in order, then ``ceil(K / 8)``."""
    rows = weight.movedim((other, dim), (-2, -1))
    bits = ops.transposable_mask(rows.reshape(-1, rows.shape[-1]), bits=True)
    return bits.view(*rows.shape[:-1], bits.shape[-1]).movedim(-2, other - (other > dim))


def holds(weight: Tensor, dim: int, other: int) -> bool:
    """Whether ``weight`` is 2:4 in both directions."""
    return all(ops.find_violation(weight, PATTERN, dim=d) is None for d in (dim, other))


def spread_over_tiles(flags: Tensor, dim: int, other: int) -> Tensor:
    """Spreads a flag (bool) to all weights of its tile."""
    return any_in_group(any_in_group(flags, TILE, dim), TILE, other)


def any_in_group(flags: Tensor, m: int, dim: int) -> Tensor:
    """Spreads a flag (bool) to all weights of its group of ``m`` along ``dim``."""
    last = flags.movedim(dim, -1)
    groups = last.unflatten(-1, (-1, m)) if last.numel() else last.unsqueeze(-1)
    return groups.any(-1, keepdim=True).expand(groups.shape).reshape(last.shape).movedim(-1, dim)
