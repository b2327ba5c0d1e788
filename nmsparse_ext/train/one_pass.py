"""What a `Sparsifier` and a one-pass optimizer (`nms.optim`) have to say to each other.

For every weight that both can serve, the Sparsifier hands over a `SparseUpdate` before the step, and the
optimizer does everything in one pass over memory: the rule's term, its own update of the dense weight, the
new mask, the masked weight, and the count of what has changed. The other weights are exchanged as for any
optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .dtensor import local_of
from .rules import Rule, SrSte, Static, Ste

if TYPE_CHECKING:
    from .exchange import Member
    from .sad import SadLog
    from .weight import SparseWeight


@dataclass(slots=True)
class SparseUpdate:
    """A sparse weight, as a one-pass optimizer is to update it. Tensors are this rank's part.

    Attributes:
        grad: The gradient, as backward has left it.
        dense: The dense weight.
        sparse: The parameter's own storage, to hold the masked weight.
        bits: The packed mask.
        changes: One int64: receives the number of mask bits that changed.
        pattern: ``(n, m, dim)`` of the next mask; n = 0 keeps the one there is.
    """

    grad: Tensor
    dense: Tensor
    sparse: Tensor
    bits: Tensor
    changes: Tensor
    pattern: tuple[int, int, int]


class OnePass:
    """Mixed into optimizers that take `SparseUpdate`s.

    Attributes:
        term: What the rule does to pruned weights, as the ops have it: ``"none"``, ``"gradient"``,
            ``"decoupled"`` or ``"masked"``.
        lambda_w: The strength of the term.
        updates: ``{id(parameter in the group): update}`` for the step being made.
    """

    term: str = "none"
    lambda_w: float = 0.0
    updates: dict[int, SparseUpdate] = {}  # noqa: RUF012  (replaced, never written to)


def hand_over(optimizer: Any, members: list[Member], rule: Rule, log: SadLog) -> set[SparseWeight]:
    """Hands a step's weights over to an optimizer that can take them; returns which those are.

    Not handed over are: weights without a gradient; transposable masks and masks that fade out; rules other
    than STE, SR-STE and the static mask; and memory layouts without a stride of 1 along or across the groups.
    """
    if not isinstance(optimizer, OnePass):
        return set()
    term = _term_of(rule)
    optimizer.updates = {}
    if term is None:
        return set()
    optimizer.term, optimizer.lambda_w = term, getattr(rule, "lambda_w", 0.0)
    taken: set[SparseWeight] = set()
    rows: dict[torch.device, tuple[Tensor, dict[str, int]]] = {}
    for weight, _ in members:
        update = _update_of(weight, rule, log, rows)
        if update is not None:
            optimizer.updates[id(weight.master)] = update
            taken.add(weight)
    return taken


def _term_of(rule: Rule) -> str | None:
    """The term of a rule, if it is one that the ops know."""
    if type(rule) in (Rule, Ste):
        return "none"
    if type(rule) is SrSte:
        return rule.penalty if rule.lambda_w else "none"
    return "masked" if type(rule) is Static else None


def _update_of(
    weight: SparseWeight, rule: Rule, log: SadLog, rows: dict[torch.device, tuple[Tensor, dict[str, int]]]
) -> SparseUpdate | None:
    grad = weight.parameter.grad
    if grad is None or weight.in_tiles or weight.share or not _has_rows(weight.dense, weight.dim):
        return None
    if weight.sparse.stride() != weight.dense.stride():
        return None
    device = weight.dense.device
    if device not in rows:
        rows[device] = log.row(device)
    counts, places = rows[device]
    n = weight.pattern.n if weight.is_due(rule) else 0
    return SparseUpdate(
        grad=local_of(grad),
        dense=weight.dense,
        sparse=weight.sparse,
        bits=weight.bits,
        changes=counts[places[weight.name]],
        pattern=(n, weight.pattern.m, weight.dim),
    )


def _has_rows(tensor: Tensor, dim: int) -> bool:
    """Whether the group dim, or the one next to it in memory, has stride 1, as the kernels want it."""
    if tensor.stride(dim) == 1:
        return True
    rows = [d for d in range(tensor.dim()) if d != dim and tensor.shape[d] != 1]
    return not rows or tensor.stride(rows[-1]) == 1
