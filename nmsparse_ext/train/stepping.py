"""What happens at ``optimizer.step()``: the hooks that put dense weights in and write sparse ones back."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ..pattern import Pattern
from .exchange import Exchange
from .guard import STEP_KEY
from .masks import MaskChooser
from .one_pass import hand_over
from .rules import Rule, Step
from .sad import SadLog
from .schedule import Schedule
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
        schedule: With which patterns, how often, how strictly.
        log: Where SAD is counted, and with it the steps.
        at_first_step: Called once, before the first step changes anything.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weights: dict[str, SparseWeight],
        rule: Rule,
        schedule: Schedule,
        log: SadLog,
        at_first_step: Callable[[], None],
    ) -> None:
        self.optimizer = optimizer
        self.weights = weights
        self.rule = rule
        self.schedule = schedule
        self.log = log
        self.exchange = Exchange(optimizer, weights, rule)
        self._masks = MaskChooser(rule, log)
        self._at_first_step: Callable[[], None] | None = at_first_step
        self.finished = False
        self._warned = False
        self._begin()

    def _begin(self) -> None:
        """The part of the state that lives no longer than a step."""
        self._step: int | None = None  # set: the optimizer has the dense weights
        self._awaits_closure = False
        self._idle = False  # the step being made is none
        self._depth = 0  # of hooked step() calls within the one being made
        self._handed_over: set[SparseWeight] = set()  # to an optimizer that masks them itself

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
        self._idle = self._is_no_step(kwargs)
        if self._idle:
            self.catch_up()
            self.exchange.enter()
            self.exchange.give_grads(self.log.next_step, edit=False)
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
            self.exchange.leave()
            for weight, _ in self.exchange.members:
                weight.mark()
        else:
            self._leave()

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

    # ------------------------------------------------------------------------------------ before and after

    def _enter(self) -> None:
        """Gives the optimizer the dense weights, and gradients in which the rule has had its say."""
        exchange = self.exchange
        exchange.find_members()
        if self._at_first_step is not None:
            self._at_first_step()
            self._at_first_step = None
        self.catch_up()
        number = self.log.next_step
        plans = [self.plan_at(weight, number) for weight, _ in exchange.members]
        for weight, _ in exchange.members:
            weight.check_grad()
        for (weight, _), plan in zip(exchange.members, plans, strict=True):
            weight.pattern, weight.renews, weight.share = plan
        self._step = number
        try:
            exchange.enter()
            self._handed_over = hand_over(self.optimizer, exchange.members, self.rule, self.log)
            exchange.give_grads(number, besides=self._handed_over)
        except BaseException:
            self.recover()
            raise

    def _leave(self) -> None:
        """Writes the new masked weights to the parameters, and counts."""
        number = self._step
        assert number is not None
        exchange = self.exchange
        handed_over, self._handed_over = self._handed_over, set()
        for weight in handed_over:
            weight.mask_pattern = weight.pattern
            weight.mark()
        written = [weight.name for weight, _ in exchange.members if weight.touched()]
        if written:
            self.recover()
            raise RuntimeError(
                f"{type(self.optimizer).__name__}.step() has updated {written[0]} itself, which is sparse, "
                f"instead of what is in its param_groups: it keeps a list of parameters of its own"
            )
        exchange.leave()
        found_inf = getattr(self.optimizer, "found_inf", None)
        left = [member for member in exchange.members if member[0] not in handed_over]
        self._masks.choose(left, self.optimizer.param_groups, number)
        self._step = None
        on_device = found_inf is not None and found_inf.device.type != "cpu"
        self.log.commit(found_inf if on_device else None)
        self.write_step()

    @property
    def _is_in_step(self) -> bool:
        return self._step is not None or self._awaits_closure

    def recover(self) -> None:
        """Ends a step that an exception has cut short: the optimizer is left with no dense weight."""
        entered, self._step = self._step is not None, None
        self._awaits_closure, self._depth = False, 0
        self.exchange.leave()
        if entered:
            self.log.clear()
            with torch.no_grad():
                for weight, _ in self.exchange.members:
                    weight.cancel(self.rule, self.last_step)

    # --------------------------------------------------------------------------------------- between steps

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
            self.exchange.put_state()
        if changed and not self._warned:
            self._warned = True
            warnings.warn(
                f"{', '.join(changed[:3])}{' and others' * (len(changed) > 3)} changed outside the "
                f"optimizer's step; the new values are taken into the dense weights. This is said once",
                stacklevel=_callers_stacklevel(),
            )

    def plan_at(self, weight: SparseWeight, step: int) -> tuple[Pattern, bool, float]:
        """What the schedule has for the end of ``step``: pattern, whether masks are chosen anew, share.

        Raises:
            ValueError: If the pattern does not fit the weight.
        """
        final, schedule = weight.final_pattern, self.schedule
        pattern = Pattern.parse(schedule.pattern(step, weight.name, final), argument="scheduled pattern")
        if pattern != weight.pattern:
            weight.check_pattern(pattern, step)
        return pattern, schedule.renews(step), schedule.share(step)

    def plan(self, weight: SparseWeight, step: int) -> None:
        """Gives a weight what the schedule has for the end of ``step``."""
        weight.pattern, weight.renews, weight.share = self.plan_at(weight, step)

    # ----------------------------------------------------------------------------------------------- state

    def write_step(self) -> None:
        """Notes the number of steps made in the parameter groups."""
        for group in self.optimizer.param_groups:
            group[STEP_KEY] = self.log.next_step - 1

    def reset(self) -> None:
        """Starts over with parameter groups that others have replaced."""
        self.exchange.find_members(anew=True)

    def __getstate__(self) -> dict[str, Any]:
        self.catch_up()
        dropped = ("_step", "_awaits_closure", "_idle", "_depth", "_handed_over")
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
