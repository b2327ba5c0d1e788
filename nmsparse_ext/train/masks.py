"""New masks for all weights, after the optimizer's step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import foreach
from .exchange import Member, by_device
from .rules import Rule, Step
from .sad import SadLog
from .weight import SparseWeight


class MaskChooser:
    """Chooses the next masks, writes the sparse weights to the parameters, and counts what has changed.

    Args:
        rule: The rule.
        log: Where changes are counted.
    """

    def __init__(self, rule: Rule, log: SadLog) -> None:
        self._rule = rule
        self._log = log
        self._work: dict[torch.device, Tensor] = {}

    def choose(self, members: list[Member], groups: list[dict[str, Any]], number: int) -> None:
        """Does so for all weights, in as few calls as there can be.

        Args:
            members: The weights, and the parameter group of each.
            groups: The parameter groups.
            number: The number of the step.
        """
        rule = self._rule
        own_choice = type(rule).choose is not Rule.choose
        softens = type(rule).soften is not Rule.soften
        for device, of_device in by_device(members):
            counts, places = self._log.row(device)
            fresh: list[SparseWeight] = []
            kept: list[SparseWeight] = []
            for weight, group in of_device:
                if not weight.is_due(rule):
                    kept.append(weight)
                elif own_choice or weight.in_tiles:
                    weight.choose(rule, Step(number, groups[group]), counts[places[weight.name]])
                    continue
                else:
                    fresh.append(weight)
            if kept:
                self._keep(kept)
            if fresh:
                self._renew(fresh, counts, places)
            if softens or any(weight.share for weight, _ in of_device):
                together = {id(weight) for weight in (*kept, *fresh)}
                for weight, group in of_device:
                    if id(weight) in together:
                        weight.soften(weight.sparse, rule, Step(number, groups[group]))
            for weight, _ in of_device:
                weight.mark()

    def _keep(self, weights: list[SparseWeight]) -> None:
        foreach.apply_bits(
            [weight.dense for weight in weights],
            [weight.bits for weight in weights],
            dims=[weight.dim for weight in weights],
            outs=[weight.sparse for weight in weights],
        )

    def _renew(self, weights: list[SparseWeight], counts: Tensor, places: dict[str, int]) -> None:
        foreach.reselect(
            [weight.dense for weight in weights],
            ns=[weight.pattern.n for weight in weights],
            ms=[weight.pattern.m for weight in weights],
            dims=[weight.dim for weight in weights],
            outs=[weight.sparse for weight in weights],
            bits=[weight.bits for weight in weights],
            changes=counts,
            places=[places[weight.name] for weight in weights],
            work=self._work_for(weights, counts.device),
        )
        for weight in weights:
            weight.mask_pattern = weight.pattern

    def _work_for(self, weights: list[SparseWeight], device: torch.device) -> Tensor | None:
        """Memory for the largest mask, where kernels need it."""
        if device.type == "cpu":
            return None
        size = max(weight.bits.numel() for weight in weights)
        work = self._work.get(device)
        if work is None or work.numel() < size:
            work = self._work[device] = torch.empty(size, dtype=torch.uint8, device=device)
        return work

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_work": {}}
