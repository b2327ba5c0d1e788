"""Update rules: what sets one way of N:M training apart from another. A new one takes about 20 lines.

A rule says up to four things about a sparse weight at an optimizer step, in this order:

1. `Rule.adjust_dense`: a change to the dense weight beside the optimizer (none by default);
2. `Rule.adjust_grad`: a change to the gradient that the optimizer sees (none by default);
3. `Rule.choose`: the new mask and the masked weight (by default the largest ``|w|`` of each group), unless
   the mask is kept (`Rule.renews`, a schedule);
4. `Rule.soften`: what pruned weights contribute to the forward pass all the same (by default nothing).

Everything else (when a step is one, what the gradient's scale is, where the dense weight lives, with which
pattern and how often masks are chosen) is settled before a rule is asked, so a rule is the formula in the
paper and nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import foreach, ops

if TYPE_CHECKING:
    from .weight import SparseWeight


@dataclass(slots=True)
class Step:
    """What a rule may know of the step being made.

    Attributes:
        number: Its number, from 1; 0 for the start.
        group: The optimizer's parameter group of the weight (``lr`` and so on); empty if it is in none yet.
        grad_scale: What the gradients are still multiplied by (one float32), ``None`` for 1. Only a fused
            optimizer
            under a GradScaler sees scaled gradients; what a rule adds to them must be scaled alike.
        found_inf: For such an optimizer, nonzero if it is going to skip this step; ``None`` if it will not.
    """

    number: int
    group: dict[str, Any]
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Rule:
    """Straight-through estimation: the gradient of the sparse weight updates the whole dense weight.

    Subclass it to make another rule. Methods work in place, on this rank's part of sharded weights, without
    gradient recording; they should neither allocate nor wait for a GPU.

    Example:
        SR-STE whose strength grows over the first steps:

        >>> class WarmedUpSrSte(Rule):
        ...     def __init__(self, lambda_w, steps):
        ...         self.lambda_w, self.steps = lambda_w, steps
        ...
        ...     def adjust_grad(self, weight, grad, step):
        ...         alpha = self.lambda_w * min(step.number / self.steps, 1)
        ...         ops.add_pruned_(
        ...             grad, weight.dense, weight.bits, dim=weight.dim, alpha=alpha, scale=step.grad_scale
        ...         )
    """

    renews = True
    """Whether masks are chosen anew at every step, as the schedule has it; else only for a new pattern."""

    @property
    def edits_grad(self) -> bool:
        """Whether `adjust_grad` does anything; if not, the gradient needs no copy."""
        return type(self).adjust_grad is not Rule.adjust_grad

    def check_group(self, group: dict[str, Any]) -> None:
        """Refuses a parameter group of the optimizer that the rule cannot work with, by a ``ValueError``."""

    def adjust_dense(self, weight: SparseWeight, step: Step) -> None:
        """Changes ``weight.dense`` in place, right before an optimizer's step that has a gradient for it."""

    def adjust_grad(self, weight: SparseWeight, grad: Tensor, step: Step) -> None:
        """Changes ``grad`` in place: a copy for the optimizer. The gradient itself is back afterwards.

        Args:
            weight: The weight; ``weight.dense`` and ``weight.bits`` are what the forward pass was made with.
            grad: The dense weight's shape and dtype; multiplied by ``step.grad_scale`` if that is set.
            step: The step being made.
        """

    def adjust_grads(
        self,
        weights: Sequence[SparseWeight],
        grads: Sequence[Tensor],
        outs: Sequence[Tensor],
        steps: Sequence[Step],
    ) -> None:
        """`adjust_grad` for all weights of a device at once: a rule may have a faster way.

        Args:
            weights: The weights.
            grads: Their gradients, not to be changed.
            outs: Receive what the optimizer is to see; hold nothing of use.
            steps: The step being made, as each of them sees it.
        """
        for weight, grad, out, step in zip(weights, grads, outs, steps, strict=True):
            out.copy_(grad)
            self.adjust_grad(weight, out, step)

    def choose(self, weight: SparseWeight, out: Tensor, bits: Tensor, step: Step) -> None:
        """Chooses the next mask. Called after the optimizer's step, gradient or not, and once at the start.

        Not called where the mask is kept.

        Args:
            weight: The weight; ``weight.dense`` is the new one, ``weight.bits`` still the old mask.
            out: To write the masked weight to; the parameter's shape and dtype.
            bits: To write the packed mask to; holds nothing of use.
            step: The step being made.
        """
        weight.new_mask(out, bits)

    def soften(self, weight: SparseWeight, out: Tensor, step: Step) -> None:
        """Changes the masked weight in place, for rules in which pruned weights fade out.

        Also called when a checkpoint is loaded: it must depend on its arguments alone.

        Args:
            weight: The weight; ``weight.dense`` and ``weight.bits`` are the new ones.
            out: The masked weight, which the model is going to compute with.
            step: The step that was made last; its number is 0 before the first.
        """

    def __repr__(self) -> str:
        fields = ", ".join(f"{key}={value!r}" for key, value in vars(self).items() if not key.startswith("_"))
        return f"{type(self).__name__}({fields})"


class ListRule(Rule):
    """A rule that has only `adjust_grads`: it does all weights of a device at once, in place where asked."""

    def adjust_grad(self, weight: SparseWeight, grad: Tensor, step: Step) -> None:
        """`adjust_grads` for one weight."""
        self.adjust_grads([weight], [grad], [grad], [step])


class Ste(Rule):
    """Plain straight-through estimation (STE): SR-STE with λ = 0."""


class SrSte(ListRule):
    """SR-STE: STE plus a pull of the pruned weights towards zero, so that masks settle.

    The update of the dense weight W with mask E is ``W -= lr * (g + lambda_w * (1 - E) * W)``, g being the
    gradient of the sparse weight. The term is added once per optimizer step, after unscaling and clipping.

    Args:
        lambda_w: The strength. May be negative, which the authors use to show that masks then flip more.
        penalty: ``"gradient"``: the term is part of the gradient, as published (and goes through momentum and
            an
            adaptive optimizer's normalisation). ``"decoupled"``: ``W -= lr * lambda_w * (1 - E) * W`` beside
            the optimizer, as AdamW does with weight decay.

    Raises:
        TypeError: If ``lambda_w`` is no number.
        ValueError: If ``lambda_w`` is not finite, or ``penalty`` is not one of the two.
    """

    def __init__(self, lambda_w: float = 2e-4, penalty: str = "gradient") -> None:
        if isinstance(lambda_w, bool) or not isinstance(lambda_w, (int, float)):
            raise TypeError(f"lambda_w must be a number, got {lambda_w!r}")
        if not math.isfinite(lambda_w):
            raise ValueError(f"lambda_w must be finite, got {lambda_w}")
        if penalty not in ("gradient", "decoupled"):
            raise ValueError(f'penalty must be "gradient" or "decoupled", got {penalty!r}')
        self.lambda_w = float(lambda_w)
        self.penalty = penalty
        self._factors: dict[torch.device, Tensor] = {}

    @property
    def edits_grad(self) -> bool:
        """Whether the term goes into the gradient."""
        return self.penalty == "gradient" and self.lambda_w != 0

    def check_group(self, group: dict[str, Any]) -> None:
        """The decoupled penalty follows the learning rate."""
        if self.penalty == "decoupled" and "lr" not in group:
            raise ValueError('penalty="decoupled" needs a learning rate, but a parameter group has no "lr"')

    def adjust_grads(
        self,
        weights: Sequence[SparseWeight],
        grads: Sequence[Tensor],
        outs: Sequence[Tensor],
        steps: Sequence[Step],
    ) -> None:
        """Adds ``lambda_w * (1 - E) * W`` to each."""
        foreach.add_pruned(
            grads,
            [weight.dense for weight in weights],
            [weight.bits for weight in weights],
            dims=[weight.dim for weight in weights],
            alphas=[self._alpha(step) for step in steps],
            scale=steps[0].grad_scale,
            outs=outs,
        )

    def _alpha(self, step: Step) -> float:
        # An optimizer that maximizes negates what it is given, but the pull is towards zero either way.
        return -self.lambda_w if step.group.get("maximize") else self.lambda_w

    def adjust_dense(self, weight: SparseWeight, step: Step) -> None:
        """Subtracts ``lr * lambda_w * (1 - E) * W``."""
        if self.penalty != "decoupled" or self.lambda_w == 0:
            return
        alpha, scale = self._decay(step, weight.dense.device)
        ops.add_pruned_(weight.dense, weight.dense, weight.bits, dim=weight.dim, alpha=alpha, scale=scale)

    def _decay(self, step: Step, device: torch.device) -> tuple[float, Tensor | None]:
        """``-lr * lambda_w`` as a number and a factor on ``device``, where reading it would mean to wait."""
        lr = step.group["lr"]
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
        if not on_device and step.found_inf is None:
            return -self.lambda_w * float(lr), None
        factor = self._factors.get(device)
        if factor is None:
            factor = self._factors[device] = torch.empty((), dtype=torch.float32, device=device)
        if step.found_inf is None:
            factor.fill_(1)
        else:
            torch.eq(step.found_inf.to(device, non_blocking=True).view(()), 0, out=factor)
        if on_device:
            factor.mul_(lr.to(device, non_blocking=True))
            return -self.lambda_w, factor
        return -self.lambda_w * float(lr), factor


class Static(ListRule):
    """A fixed mask: chosen once, then only the kept weights are trained (as NVIDIA's ASP does).

    Gradients are masked too, so that pruned weights leave no trace in momenta or in norms over a whole
    weight. What was pruned stays available as `Sparsifier.dense_weight`.
    """

    renews = False

    def adjust_grads(
        self,
        weights: Sequence[SparseWeight],
        grads: Sequence[Tensor],
        outs: Sequence[Tensor],
        steps: Sequence[Step],
    ) -> None:
        """Copies the gradients of kept weights, and zeros for the others."""
        foreach.apply_bits(
            grads, [weight.bits for weight in weights], dims=[weight.dim for weight in weights], outs=outs
        )


def make_rule(method: str | Rule, lambda_w: float, penalty: str) -> Rule:
    """Returns the rule that a Sparsifier's arguments mean.

    Raises:
        TypeError: If ``method`` is neither text nor a rule.
        ValueError: If the name is unknown, or an argument of SR-STE is not allowed.
    """
    if isinstance(method, Rule):
        return method
    sr_ste = SrSte(lambda_w, penalty)  # checks the arguments, whatever the method
    rules = {"sr-ste": sr_ste, "ste": Ste(), "static": Static()}
    if not isinstance(method, str):
        raise TypeError(f"method must be one of {', '.join(map(repr, rules))} or a Rule, got {method!r}")
    if method not in rules:
        raise ValueError(f"method must be one of {', '.join(map(repr, rules))} or a Rule, got {method!r}")
    return rules[method]
