"""The ops that take lists of weights: a training step is a few of them, however many weights there are.

What each does is stated here in terms of the ops on one weight. That is also how it runs wherever no kernel
of its own is compiled, with the compiled kernels of those ops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _list_checks as checks


def foreach_add_pruned(
    grads: Sequence[Tensor],
    ws: Sequence[Tensor],
    bits: Sequence[Tensor],
    dims: Sequence[int],
    alphas: Sequence[float],
    scale: Tensor | None,
    outs: Sequence[Tensor],
) -> None:
    """``outs[i] = grads[i] + alphas[i] * scale * where(bits[i], 0, ws[i])``.

    ``outs[i]`` may be wider than ``grads[i]``: the sum is then taken in its dtype.
    """
    checks.check_foreach_add_pruned(grads, ws, bits, dims, alphas, scale, outs)
    for grad, w, mask, dim, alpha, out in zip(grads, ws, bits, dims, alphas, outs, strict=True):
        out.copy_(grad)
        torch.ops.nmsparse.add_pruned_(out, w, mask, dim, alpha, scale)


def foreach_apply_bits(
    ws: Sequence[Tensor], bits: Sequence[Tensor], dims: Sequence[int], outs: Sequence[Tensor]
) -> None:
    """``outs[i] = where(bits[i], ws[i], 0)``, rounded to the dtype of ``outs[i]``."""
    checks.check_foreach_apply_bits(ws, bits, dims, outs)
    for w, mask, dim, out in zip(ws, bits, dims, outs, strict=True):
        out.copy_(w)
        torch.ops.nmsparse.apply_bits_(out, mask, dim)


def foreach_reselect(
    ws: Sequence[Tensor],
    ns: Sequence[int],
    ms: Sequence[int],
    dims: Sequence[int],
    outs: Sequence[Tensor],
    bits: Sequence[Tensor],
    changes: Tensor,
    places: Sequence[int],
    work: Tensor | None,
) -> None:
    """Chooses the mask of every ``ws[i]`` anew, where the old one stands in ``bits[i]``.

    ``bits[i]`` becomes the new mask, ``outs[i] = where(bits[i], ws[i], 0)`` rounded to its dtype, and
    ``changes[places[i]]`` the number of weights that are kept in one of old and new mask only.

    Args:
        ws: The dense weights.
        ns: Kept weights a group.
        ms: Group sizes.
        dims: Group dims.
        outs: The masked weights.
        bits: The masks.
        changes: int64 ``[some]``.
        places: Where in ``changes`` the counts go.
        work: Working memory, uint8 of the size of the largest mask: with it, nothing is allocated where
            ``outs[i]`` has the dtype of ``ws[i]``.
    """
    checks.check_foreach_reselect(ws, ns, ms, dims, outs, bits, changes, places, work)
    ops = torch.ops.nmsparse
    for w, n, m, dim, out, old, place in zip(ws, ns, ms, dims, outs, bits, places, strict=True):
        if out.dtype == w.dtype:
            new = torch.empty_like(old) if work is None else work[: old.numel()].view(old.shape)
            ops.prune_out(w, n, m, dim, False, out, new)
        else:
            new = ops.mask_bits(w, n, m, dim, False)
            out.copy_(w)
            ops.apply_bits_(out, new, dim)
        ops.sad_out(old, new, changes[place])
        old.copy_(new)
