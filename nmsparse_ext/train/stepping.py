"""What happens at ``optimizer.step()``: the hooks that swap dense weights in and sparse ones back."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ..pattern import Pattern
from .guard import STEP_KEY
from .rules import Rule, Step
from .sad import SadLog
from .schedule import ScheduleFunction
from .weight import DENSE_KEY, SparseWeight

# Every hooked step() runs in a frame of this code, whose local `self` is the optimizer.
_STEP_CODE = torch.optim.Optimizer.profile_hook_step(lambda self: None).__code__

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Stepper:
    """Makes each step of an optimizer one of N:M training.

    Args:
        optimizer: The optimizer.
        weights: ``{name: weight}``.
        rule: What to do to each of them.
        schedule: With which pattern, if not its own.
        log: Where SAD is counted, and with it the steps.
        at_first_step: Called once, before the first step changes anything.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weights: dict[str, SparseWeight],
        rule: Rule,
        schedule: ScheduleFunction | None,
        log: SadLog,
        at_first_step: Callable[[], None],
    ) -> None:
        self.optimizer = optimizer
        self.weights = weights
        self.rule = rule
        self.schedule = schedule
        self.log = log
        self._at_first_step: Callable[[], None] | None = at_first_step
        self.finished = False
        self._warned = False
        self._begin()
        self.find_members()

    def _begin(self) -> None:
        """The part of the state that lives no longer than a step."""
        self._members: list[tuple[SparseWeight, int]] = []
        self._census: list[int] | None = None
        self._step: Step | None = None  # set: the parameters point at the dense weights
        self._awaits_closure = False
        self._idle = False  # the step being made is none
        self._depth = 0  # of hooked step() calls within the one being made

    @property
    def last_step(self) -> Step:
        """The last step made, for rules that are asked between steps."""
        return Step(self.log.next_step - 1, {})

    # ------------------------------------------------------------------------------------------- the hooks

    @torch.no_grad()
    def before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        """The step pre-hook."""
        if self._is_nested():
            self._depth += 1
            return None
        self.recover()
        self.take_state()
        self._idle = self._is_no_step(kwargs)
        if self._idle:
            self.catch_up()
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            self._enter()
            return None
        self._awaits_closure = True
        wrapped = self._wrap(closure)
        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    @torch.no_grad()
    def after_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """The step post-hook."""
        if self._depth:
            self._depth -= 1
            return
        if self._awaits_closure:
            self._awaits_closure = False
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() did not evaluate its closure, so it has updated the "
                f"sparse weights instead of the dense ones"
            )
        if self._idle:
            for weight in self.weights.values():
                weight.mark()
        else:
            self._leave()
        self.put_state()

    def _wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Forward and backward see the sparse weights; the swap comes right after them."""

        def closure_then_swap() -> Any:
            if self._step is not None:
                self.recover()
                raise RuntimeError(
                    f"{type(self.optimizer).__name__} evaluates its closure several times a step, which N:M "
                    f"training does not support: all but the first would see dense weights"
                )
            with torch.enable_grad():
                loss = closure()
            with torch.no_grad():
                self._awaits_closure = False
                self._enter()
            return loss

        return closure_then_swap

    def _is_nested(self) -> bool:
        """Whether this ``step()`` is within the one being made: a subclass that calls its base.

        Otherwise a step that has not ended is one that an exception has cut short; only the stack can tell.
        """
        return self._is_in_step and _steps_on_stack(self.optimizer) > 1

    def _is_no_step(self, kwargs: dict[str, Any]) -> bool:
        """Whether this ``step()`` is going to change nothing."""
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf.item():
            return True  # a fused optimizer under a GradScaler; on a GPU only the kernel knows
        # torch.distributed.checkpoint has an optimizer create its state by a step of zero gradients at lr 0.
        return (
            "closure" in kwargs
            and kwargs["closure"] is None
            and not self.optimizer.state
            and self.log.next_step == 1
            and all(_is_zero(group.get("lr")) for group in self.optimizer.param_groups)
        )

    # ---------------------------------------------------------------------------------------- the exchange

    def _enter(self) -> None:
        """Swaps the dense weights in and lets the rule have its say."""
        self.find_members()
        if self._at_first_step is not None:
            self._at_first_step()
            self._at_first_step = None
        self.catch_up()
        optimizer, rule = self.optimizer, self.rule
        scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        step = Step(self.log.next_step, {}, scale, found_inf)
        patterns = [self.pattern_at(weight, step.number) for weight, _ in self._members]
        for weight, _ in self._members:
            weight.check_grad()
        for (weight, _), pattern in zip(self._members, patterns, strict=True):
            weight.pattern = pattern
        self._step = step
        try:
            for weight, group in self._members:
                step.group = optimizer.param_groups[group]
                if weight.parameter.grad is not None:
                    rule.adjust_dense(weight, step)
                weight.enter()
                grad = weight.lend_grad() if rule.edits_grad else None
                if grad is not None:
                    step.grad_scale = _on(scale, grad.device)
                    rule.adjust_grad(weight, grad, step)
        except BaseException:
            self.recover()
            raise

    def _leave(self) -> None:
        """Writes the new masked weights to the parameters, and counts."""
        step = self._step
        assert step is not None
        counters = dict(zip(self.weights, self.log.counters(), strict=True))
        for weight, group in self._members:
            step.group = self.optimizer.param_groups[group]
            weight.leave(self.rule, step, counters[weight.name])
        self._step = None
        on_device = step.found_inf is not None and step.found_inf.device.type != "cpu"
        self.log.commit(step.found_inf if on_device else None)
        self.write_step()

    @property
    def _is_in_step(self) -> bool:
        return self._step is not None or self._awaits_closure

    def recover(self) -> None:
        """Ends a step that an exception has cut short: no parameter is left pointing at its dense weight."""
        entered, self._step = self._step is not None, None
        self._awaits_closure, self._depth = False, 0
        if entered:
            with torch.no_grad():
                for weight, _ in self._members:
                    weight.cancel(self.rule, self.last_step)

    # --------------------------------------------------------------------------------------- between steps

    def find_members(self) -> None:
        """Finds the weights in the parameter groups, again whenever a group or a parameter has been added."""
        groups = self.optimizer.param_groups
        census = [len(group["params"]) for group in groups]
        if census == self._census:
            return
        for group in groups:
            self.rule.check_group(group)
        group_of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        by_group = ((weight, group_of.get(id(weight.parameter))) for weight in self.weights.values())
        self._members = [(weight, group) for weight, group in by_group if group is not None]
        self._census = census

    @torch.no_grad()
    def catch_up(self) -> None:
        """Brings everything up to date with what others have done since the last step.

        Ends a step that was cut short, and adopts what was written to parameters from outside.
        """
        if self.finished:
            return
        if self._is_in_step:
            if _steps_on_stack(self.optimizer):
                return
            self.recover()
        touched = [weight for weight in self.weights.values() if weight.touched()]
        if not touched:
            return
        changed = [weight.name for weight in touched if weight.adopt(self.rule, self.last_step)]
        self.log.move([weight.dense.device for weight in self.weights.values()])
        if any(DENSE_KEY in entries for entries in self.optimizer.state.values()):
            self.put_state()
        if changed and not self._warned:
            self._warned = True
            warnings.warn(
                f"{', '.join(changed[:3])}{' and others' * (len(changed) > 3)} changed outside the "
                f"optimizer's step; the new values are taken into the dense weights. This is said once",
                stacklevel=_callers_stacklevel(),
            )

    def pattern_at(self, weight: SparseWeight, step: int) -> Pattern:
        """The pattern of the mask that is chosen at the end of ``step``.

        Raises:
            ValueError: If the schedule's does not fit the weight.
        """
        if self.schedule is None:
            return weight.final_pattern
        pattern = Pattern.parse(
            self.schedule(step, weight.name, weight.final_pattern), argument="scheduled pattern"
        )
        if pattern != weight.pattern:
            weight.check_pattern(pattern, step)
        return pattern

    # ----------------------------------------------------------------------------------------------- state

    def put_state(self) -> None:
        """Puts dense weights and masks into the optimizer's state, where others look for such things."""
        for weight, _ in self._members:
            self.optimizer.state[weight.parameter].update(weight.state)

    def take_state(self) -> None:
        """Takes them out for the time of a step: many optimizers begin their own state if it is empty."""
        state = self.optimizer.state
        for weight, _ in self._members:
            entries = state.get(weight.parameter)
            if entries is not None:
                weight.take_state(entries)

    def write_step(self) -> None:
        """Notes the number of steps made in the parameter groups."""
        for group in self.optimizer.param_groups:
            group[STEP_KEY] = self.log.next_step - 1

    def reset(self) -> None:
        """Starts over with parameter groups that others have replaced."""
        self._census = None
        self.find_members()

    def __getstate__(self) -> dict[str, Any]:
        self.catch_up()
        dropped = ("_members", "_census", "_step", "_awaits_closure", "_idle", "_depth")
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


def _steps_on_stack(optimizer: torch.optim.Optimizer) -> int:
    """How many hooked ``step()`` calls of ``optimizer`` are running."""
    count, frame = 0, sys._getframe(1)
    while frame is not None:
        count += frame.f_code is _STEP_CODE and frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return count


def _callers_stacklevel() -> int:
    """The ``stacklevel`` at which the caller's ``warnings.warn`` points at the user's code."""
    level, frame = 1, sys._getframe(1)
    while frame is not None and _package(frame) in ("nmsparse_ext", "torch"):
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    return level


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_zero(lr: Any) -> bool:
    """Whether a learning rate is 0, without waiting for a GPU."""
    if isinstance(lr, Tensor):
        return lr.device.type == "cpu" and not lr.any()
    return lr is None or lr == 0


def _on(scale: Tensor | None, device: torch.device) -> Tensor | None:
    """A gradient scale on ``device``: a model may span several."""
    return scale if scale is None or scale.device == device else scale.to(device, non_blocking=True)
