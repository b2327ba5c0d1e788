"""How weights are trained while DominoSearch looks for their patterns: the update rule and its schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .. import foreach
from ..pattern import Pattern
from ..train import Schedule, Step
from ..train.rules import ListRule

if TYPE_CHECKING:
    from ..train import SparseWeight


class Pull(ListRule):
    """Trains the kept weights, and at times pulls them towards zero.

    Pruned weights get no gradient: they stay as they are, and come back once kept ones have become smaller.
    The gradient of the dense weight W with mask E is ``E * g``, or ``E * (g + strength * W)`` where there is
    a pull: the opposite of SR-STE's, which pulls pruned weights.

    Attributes:
        strengths: ``{parameter name: strength}`` in the next step, or empty for none.
    """

    def __init__(self) -> None:
        self.strengths: Mapping[str, float] = {}

    def adjust_grads(
        self,
        weights: Sequence[SparseWeight],
        grads: Sequence[Tensor],
        outs: Sequence[Tensor],
        steps: Sequence[Step],
    ) -> None:
        """Masks the gradients, and adds the pull, in one pass over memory."""
        bits, dims = [weight.bits for weight in weights], [weight.dim for weight in weights]
        if not self.strengths:
            foreach.apply_bits(grads, bits, dims=dims, outs=outs)
            return
        foreach.add_kept(
            grads,
            [weight.dense for weight in weights],
            bits,
            dims=dims,
            alphas=[self.strengths[weight.name] for weight in weights],
            scale=steps[0].grad_scale,
            outs=outs,
        )


class Levels(Schedule):
    """Masks with as many weights a group as the search has come to.

    Attributes:
        n: ``{parameter name: how many weights of each group are kept}``; what the search lowers.
    """

    def __init__(self, n: dict[str, int]) -> None:
        self.n = n

    def pattern(self, step: int, name: str, final: Pattern) -> Pattern:
        """As it is now, whatever the step."""
        return Pattern(self.n[name], final.m)

    def ends_dense(self, step: int) -> bool:
        """The search itself says what the weights are in the end."""
        return True
