"""The exchange: for the time of a step, an optimizer's parameter groups hold dense weights.

The optimizer is given other parameters (`SparseWeight.master`), with the state of those that they stand for.
So it works in the dense weight's dtype, whatever the parameter's, and keeps its momenta in that; and the
parameters, their gradients and the hooks that others have on them (DistributedDataParallel's) stay as they
are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from .dtensor import local_of
from .rules import Rule, Step
from .weight import SparseWeight

Member = tuple[SparseWeight, int]  # a weight, and the parameter group that it is in


class Exchange:
    """Puts dense weights into an optimizer's parameter groups, and sparse ones back.

    Args:
        optimizer: The optimizer.
        weights: ``{name: weight}``.
        rule: What to do to gradients.

    Attributes:
        members: The weights that are in a parameter group, and which one that is.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, weights: dict[str, SparseWeight], rule: Rule
    ) -> None:
        self._optimizer = optimizer
        self._weights = weights
        self._rule = rule
        self._begin()
        self.find_members()

    def _begin(self) -> None:
        self.members: list[Member] = []
        self._places: list[tuple[SparseWeight, list[Any], int]] = []
        self._census: list[int] | None = None
        self._entered = False

    def find_members(self, anew: bool = False) -> None:
        """Finds the weights in the parameter groups, again whenever a group or a parameter has been added.

        Args:
            anew: Others may have replaced the groups.
        """
        groups = self._optimizer.param_groups
        census = [len(group["params"]) for group in groups]
        if census == self._census and not anew:
            return
        for group in groups:
            self._rule.check_group(group)
        place_of = {id(p): (g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"])}
        self.members, self._places = [], []
        for weight in self._weights.values():
            place = place_of.get(id(weight.parameter))
            if place is not None:
                self.members.append((weight, place[0]))
                self._places.append((weight, groups[place[0]]["params"], place[1]))
        self._census = census

    # ----------------------------------------------------------------------------------------- in and out

    def enter(self) -> None:
        """Puts the dense weights in."""
        state = self._optimizer.state
        self._entered = True
        for weight, params, index in self._places:
            params[index] = weight.master
            entries = state.pop(weight.parameter, None)
            if entries is not None:
                weight.take_state(entries)
                params[index] = weight.master  # another one, if the state has been moved
                if entries:  # many optimizers begin their own state if it is empty
                    state[weight.master] = entries

    def leave(self, put_state: bool = True) -> None:
        """Puts the parameters back, with the optimizer's state; does nothing if they are there.

        Args:
            put_state: Whether ours goes with it, where others look for such things.
        """
        if not self._entered:
            return
        self._entered = False
        state = self._optimizer.state
        for weight, params, index in self._places:
            params[index] = weight.parameter
            weight.master.grad = None
            entries = state.pop(weight.master, None)
            if entries is not None:
                state[weight.parameter] = entries
            if put_state:
                state[weight.parameter].update(weight.state)

    def put_state(self) -> None:
        """Puts our state with the optimizer's."""
        for weight, _ in self.members:
            self._optimizer.state[weight.parameter].update(weight.state)

    def widen_state(self) -> None:
        """Brings momenta that were made for 16-bit parameters to the dtype of their dense weights."""
        for weight, _ in self.members:
            entries = self._optimizer.state.get(weight.parameter, {})
            for key, value in entries.items():
                if weight.widens and isinstance(value, Tensor) and value.dtype == weight.parameter.dtype:
                    entries[key] = value.to(weight.dense.dtype)

    def take_state(self) -> None:
        """Takes it out for good."""
        for weight, _ in self.members:
            entries = self._optimizer.state.get(weight.parameter)
            if entries is not None:
                weight.take_state(entries)

    # ------------------------------------------------------------------------------------------ gradients

    def give_grads(self, number: int, edit: bool = True, besides: Collection[SparseWeight] = ()) -> None:
        """Gives the dense weights their gradients, as the rule would have them.

        Args:
            number: The number of the step.
            edit: Whether the rule is asked.
            besides: Weights that have been handed over: the optimizer has their gradients.
        """
        rule = self._rule
        edits_dense = edit and type(rule).adjust_dense is not Rule.adjust_dense
        edit = edit and rule.edits_grad
        with_grad = [
            member
            for member in self.members
            if member[0].parameter.grad is not None and member[0] not in besides
        ]
        for device, members in by_device(with_grad):
            steps = self._steps(number, device)
            if edits_dense:
                for weight, group in members:
                    rule.adjust_dense(weight, steps[group])
            edited: list[tuple[SparseWeight, Tensor, Tensor, Step]] = []
            for weight, group in members:
                grad = weight.parameter.grad
                assert grad is not None
                if edit:
                    edited.append((weight, local_of(grad), weight.lend_grad(), steps[group]))
                elif weight.widens:
                    weight.lend_grad().copy_(local_of(grad))
                else:
                    weight.master.grad = grad
            if edited:
                rule.adjust_grads(*map(list, zip(*edited, strict=True)))
        for weight, _ in self.members:
            weight.mark()  # the gradient may stand where the parameter was

    def _steps(self, number: int, device: torch.device) -> list[Step]:
        """The step as the weights of each parameter group see it."""
        scale = getattr(self._optimizer, "grad_scale", None)
        if scale is not None and scale.device != device:  # a model may span several
            scale = scale.to(device, non_blocking=True)
        found_inf = getattr(self._optimizer, "found_inf", None)
        return [Step(number, group, scale, found_inf) for group in self._optimizer.param_groups]

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("members", "_places", "_census", "_entered")
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


def by_device(members: list[Member]) -> Iterable[tuple[torch.device, list[Member]]]:
    """Members by the device of their weights."""
    devices: dict[torch.device, list[Member]] = defaultdict(list)
    for member in members:
        devices[member[0].dense.device].append(member)
    return devices.items()
