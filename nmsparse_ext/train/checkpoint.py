"""The Sparsifier's part in ``optimizer.state_dict()`` and ``load_state_dict()``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .guard import STEP_KEY
from .rules import Step
from .stepping import Stepper
from .weight import BITS_KEY, DENSE_KEY, SparseWeight

StateDict = dict[str, Any]


class StateHooks:
    """Makes an optimizer's state dict whole, and takes it over bit for bit.

    ``Optimizer.load_state_dict`` casts every tensor to the dtype of its parameter, packed bits included, so
    ours are set aside before it starts and put in place when it is done. Momenta are cast like those of the
    dense weights, whose they are: these are in the parameter groups meanwhile.
    """

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._incoming: list[tuple[SparseWeight, Tensor, Tensor]] = []

    def after_state_dict(self, optimizer: torch.optim.Optimizer, state_dict: StateDict) -> None:
        """The state dict post-hook: adds what is not there before the first step, and the exact step."""
        self._stepper.catch_up()
        state = state_dict["state"]
        for key, weight in self._saved(state_dict):
            # An empty entry for parameters without state: torch.distributed.checkpoint takes state of some
            # parameters only for a damaged one.
            state[key] = {**state.get(key, {}), **(weight.state if weight is not None else {})}
        step = self._stepper.log.step
        for group in state_dict["param_groups"]:
            group[STEP_KEY] = step

    def before_load_state_dict(self, optimizer: torch.optim.Optimizer, state_dict: StateDict) -> StateDict:
        """The load pre-hook.

        Raises:
            ValueError: If the state holds a dense weight that is none of the scheme, or of another shape.
        """
        self._stepper.recover()
        self._incoming = []
        state = dict(state_dict["state"])
        for key, weight in self._saved(state_dict):
            entries = state.get(key)
            if not isinstance(entries, dict) or DENSE_KEY not in entries:
                continue
            if weight is None:
                raise ValueError(
                    f"the optimizer state has a dense weight behind parameter {key}, "
                    f"which the scheme leaves dense"
                )
            dense, bits = entries[DENSE_KEY], entries[BITS_KEY]
            weight.check_state(dense, bits)
            self._incoming.append((weight, dense, bits))
            state[key] = {name: value for name, value in entries.items() if name not in (DENSE_KEY, BITS_KEY)}
        if _same_groups(optimizer, state_dict):  # or it is refused now
            self._stepper.exchange.find_members()
            self._stepper.exchange.enter()
        return {**state_dict, "state": state}

    @torch.no_grad()
    def after_load_state_dict(self, optimizer: torch.optim.Optimizer) -> None:
        """The load post-hook."""
        stepper = self._stepper
        stepper.exchange.leave(put_state=False)
        stepper.exchange.find_members(anew=True)
        step = saved_step(optimizer)
        for weight, dense, bits in self._incoming:
            stepper.plan(weight, step)
            weight.load_state(dense, bits, stepper.rule, Step(step, {}))
        if self._incoming:
            stepper.log.load(step)
        self._incoming = []
        if optimizer.state:
            stepper.exchange.put_state()
        stepper.write_step()

    def _saved(self, state_dict: StateDict) -> Iterator[tuple[Any, SparseWeight | None]]:
        """The keys of a state dict with the weights they stand for; fewer if it is of another optimizer."""
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        groups = self._stepper.optimizer.param_groups
        weights = {id(weight.parameter): weight for weight in self._stepper.weights.values()}
        parameters = chain.from_iterable(group["params"] for group in groups)
        return ((key, weights.get(id(p))) for key, p in zip(keys, parameters, strict=False))

    def __getstate__(self) -> StateDict:
        return {**self.__dict__, "_incoming": []}


def _same_groups(optimizer: torch.optim.Optimizer, state_dict: StateDict) -> bool:
    """Whether saved parameter groups are of the sizes of the optimizer's."""
    sizes = [
        [len(group["params"]) for group in groups]
        for groups in (optimizer.param_groups, state_dict["param_groups"])
    ]
    return sizes[0] == sizes[1]


def saved_step(optimizer: torch.optim.Optimizer) -> int:
    """The number of steps made, as it stands in the parameter groups."""
    return max((int(group.get(STEP_KEY, 0)) for group in optimizer.param_groups), default=0)
