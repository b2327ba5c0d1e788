"""The order of magnitude inside every group, found once and kept in a byte a weight.

Which weights a pattern prunes follows from the magnitudes alone. Scores that come later, such as one for each
batch of gradients, only have to be summed in that order; see `lost_scores` for what the sums by rank give.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scores import groups_of, sorting_network

#: Weights handled at a time, in groups: what that takes fits the cache.
_CHUNK = 1 << 18

#: Elements of one operation: too few for PyTorch to start threads for, which cost more than they bring here.
_PIECE = 1 << 15

#: Floats whose magnitudes compare like their bits without the sign, as integers with room for an index.
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Ranking:
    """Which weight of each group has which rank: the largest magnitude first, of equal ones the lower index.

    Args:
        weight: Float, of any dtype. Its size along ``dim`` is a multiple of ``m``.
        m: The size of a group.
        dim: The dim that groups run along.

    Attributes:
        order: ``[m, groups]`` of uint8 (int32 for m above 256): entry [r, g] is the index in group g of the
            weight with the (r + 1)-th largest magnitude.
    """

    def __init__(self, weight: Tensor, m: int, *, dim: int) -> None:
        self._m, self._dim = m, dim
        rows = groups_of(weight.detach(), m, dim)
        dtype = torch.uint8 if m <= 256 else torch.int32
        self.order = torch.empty(m, len(rows), dtype=dtype, device=weight.device)
        for chunk, order in zip(rows.split(self._size), self.order.split(self._size, dim=1), strict=True):
            _sort(chunk, order)

    @property
    def _size(self) -> int:
        """Groups handled at a time."""
        return max(1, min(_CHUNK // self._m, _PIECE))

    def squares(self, *factors: Tensor) -> Tensor:
        """Sums the square of a product by rank.

        Args:
            factors: Of the weight's shape. They are multiplied in float32, or float64 if one of them is.

        Returns:
            float64 [m]: entry r is the sum, over all groups, of the squares at the (r + 1)-th largest weight.

        Equivalent to:
            ``math.prod(factors).square()`` as ``[groups, m]``, gathered by `order`, summed over the groups.
        """
        m, size = self._m, self._size
        wide = torch.float64 if any(f.dtype == torch.float64 for f in factors) else torch.float32
        rows = [groups_of(f.detach(), m, self._dim).split(size) for f in factors]
        device = self.order.device
        starts = torch.arange(size, dtype=torch.int32, device=device).mul_(m)
        product = torch.empty(size * m, dtype=wide, device=device)
        sums = torch.zeros(m, dtype=torch.float64, device=device)
        for order, *chunks in zip(self.order.split(size, dim=1), *rows, strict=True):
            flat = product[: order.numel()]
            for to, *pieces in zip(
                flat.split(_PIECE), *(chunk.flatten().split(_PIECE) for chunk in chunks), strict=True
            ):
                to.copy_(pieces[0])
                for piece in pieces[1:]:
                    to.mul_(piece)
            for rank, indices in enumerate(order):
                # The norm squares in float64: no gradient is so small or large that its square is 0 or inf.
                chosen = flat.index_select(0, starts[: len(indices)] + indices)
                sums[rank] += torch.linalg.vector_norm(chosen, dtype=torch.float64).square()
        return sums


def _sort(groups: Tensor, out: Tensor) -> None:
    """Writes the order of ``groups`` [G, m] to ``out`` [m, G]."""
    m = groups.shape[1]
    as_bits = _BITS.get(groups.dtype)
    if as_bits is None:
        out.copy_(torch.argsort(groups.double().abs(), stable=True, dim=-1, descending=True).t())
        return
    index_bits = (m - 1).bit_length()
    value_bits = 8 * groups.element_size() - 1
    keys = torch.int32 if value_bits + index_bits < 32 else torch.int64
    # Magnitude above, index from the end below: no two keys of a group are equal; of equal weights the first
    # has the largest.
    columns = [
        column.to(keys, copy=True)
        .bitwise_and_((1 << value_bits) - 1)
        .bitwise_left_shift_(index_bits)
        .bitwise_or_(m - 1 - index)
        for index, column in enumerate(groups.view(as_bits).unbind(1))
    ]
    spare = torch.empty_like(columns[0])
    for high, low in sorting_network(m):
        torch.maximum(columns[high], columns[low], out=spare)
        torch.minimum(columns[high], columns[low], out=columns[low])
        columns[high], spare = spare, columns[high]
    for rank, column in enumerate(columns):
        out[rank] = column.bitwise_and_((1 << index_bits) - 1).neg_().add_(m - 1)
