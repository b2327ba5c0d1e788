"""A weight as the linear maps that it is, with the groups of a pattern along the last dim.

A weight holds one or more matrices ``[outputs, inputs]``: one for each group of a convolution, one for each
expert of a stack, one for query, key and value. Inputs are ordered such that a group of a pattern is
consecutive: of a convolution the input channels of one place of the kernel, then those of the next.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..weights import Weight


def matrices_of(weight: Weight) -> int:
    """How many matrices with inputs of their own a weight holds at most."""
    shape = weight.parameter.shape
    if isinstance(weight.module, _ConvNd):
        return weight.module.groups
    if isinstance(weight.module, nn.MultiheadAttention) and weight.attr == "in_proj_weight":
        return 3
    if len(shape) == 3:
        return shape[0]
    # Matrices that lie below each other: along the group dim its span tells how many. Across it only the
    # module knows, and it says so with the number of its experts.
    if weight.group_dim == 0 and weight.span != shape[0]:
        return shape[0] // weight.span
    experts = getattr(weight.module, "moe_num_experts", 1)
    return experts if isinstance(experts, int) and shape[0] % max(1, experts) == 0 else 1


def as_matrices(weight: Weight, values: Tensor, count: int | None = None) -> Tensor:
    """Views or copies values as matrices.

    Args:
        weight: Says how.
        values: Of the weight's shape.
        count: How many matrices; 1 takes those whose inputs are the same as one. By default `matrices_of`.

    Returns:
        ``[matrices, outputs, inputs]``, in the dtype of ``values``.
    """
    count = matrices_of(weight) if count is None else count
    if isinstance(weight.module, _ConvNd):
        groups = weight.module.groups
        if weight.module.transposed:  # [in, out / groups, kernel...]
            return values.unflatten(0, (groups, -1)).flatten(2).mT
        return values.movedim(1, -1).flatten(1).unflatten(0, (groups, -1))
    if values.dim() == 3:
        return values if weight.group_dim == 2 else values.mT
    split = values.unflatten(0, (count, -1))
    return split.mT if weight.group_dim == 0 else split


def from_matrices(weight: Weight, matrices: Tensor) -> Tensor:
    """What `as_matrices` made, in the weight's shape again."""
    shape = weight.parameter.shape
    if isinstance(weight.module, _ConvNd):
        if weight.module.transposed:
            return matrices.mT.reshape(shape)
        last = [shape[0], *shape[2:], shape[1]]
        return matrices.reshape(last).movedim(-1, 1)
    if len(shape) == 3:
        return matrices if weight.group_dim == 2 else matrices.mT
    return (matrices.mT if weight.group_dim == 0 else matrices).reshape(shape)
