"""``Sparsifier``: N:M training hooked onto an ordinary optimizer."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..pattern import Pattern
from ..weights import canonical_name
from ..scheme import weights as list_weights
from ..scheme import Scheme, as_scheme
from .dtensor import is_dtensor, shard_groups
from .guard import STEP_KEY, check_model, check_optimizer, set_sparsifier, sparsifier_of
from .ranks import check_ranks_equal
from .rules import Rule, Step, make_rule
from .sad import SadHistory, SadLog
from .schedule import Schedule, ScheduleFunction, as_function
from .weight import BITS_KEY, DENSE_KEY, SparseWeight, parameter_of, requires_plain_grad

_STATE_VERSION = 1


class Sparsifier:
    """Trains a model under an N:M scheme, through the step hooks of its optimizer.

    The parameters *are* the sparse weights: forward, backward, ``state_dict`` and whatever else reads the model see
    them and nothing unusual. The dense weight behind each of them lives with the optimizer. At every
    ``optimizer.step()`` the dense weight is swapped in by pointer, the rule adjusts its gradient (a copy of it:
    ``p.grad`` is what it was before), the optimizer does its work, the mask is chosen anew, and the masked weight is
    written to the parameter's own storage. A step takes two passes over memory more than the optimizer's own.

    Equivalent, for ``method="sr-ste"`` and a loop without tricks, to::

        loss(sparse weights).backward()
        grad += lambda_w * ~mask * dense
        optimizer.step()                       # updates the dense weights
        mask = nm_mask(dense, pattern)
        sparse = where(mask, dense, 0)

    As the term is added to what the optimizer is about to use, ``lambda_w`` means the same under gradient
    accumulation, loss scaling, clipping, weight tying, DistributedDataParallel and ``fully_shard``.

    Args:
        model: The model, wrapped (DDP, ``torch.compile``, ``fully_shard``) or not.
        optimizer: Any ``torch.optim`` optimizer that takes one gradient a step. Weights of the scheme that are in none
            of its parameter groups are masked, and trained once they are added.
        scheme: A `Scheme`, a mapping ``{name: pattern}``, or one pattern for everything that can be pruned.
        method: ``"sr-ste"``, ``"ste"``, ``"static"`` (the mask is chosen once) or a `Rule`.
        lambda_w: The strength of SR-STE's pull on pruned weights; the other methods do not use it.
        schedule: ``(step, name, pattern) -> pattern`` with which each mask is chosen, or an object with such a method
            ``pattern``; ``None`` for the scheme's own patterns from the start.
        penalty: For ``"sr-ste"``: ``"gradient"``, as published, or ``"decoupled"``, beside the optimizer.
        process_group: The ranks that train the same model, which are compared at the first step: ``None`` for all of
            them, ``False`` for no comparison.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the scheme does not fit the model, or model or optimizer cannot be trained this way: FSDP1,
            parametrized weights, weights sharded along their group dim, LBFGS, ``differentiable=True``.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> sparsifier = Sparsifier(model, optimizer, "2:4")
        >>> model(torch.randn(2, 16)).sum().backward()
        >>> optimizer.step()
        >>> sorted(sparsifier.sad())
        ['0.weight', '2.weight']
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheme: Scheme | Mapping[str, Pattern | str] | Pattern | str,
        *,
        method: str | Rule = "sr-ste",
        lambda_w: float = 2e-4,
        schedule: Schedule | ScheduleFunction | None = None,
        penalty: str = "gradient",
        process_group: Any = None,
    ) -> None:
        check_optimizer(optimizer)
        check_model(model, scheme)
        self._rule = make_rule(method, lambda_w, penalty)
        self._schedule = as_function(schedule)
        self._scheme = as_scheme(scheme, model)
        self._model = model
        self._optimizer = optimizer
        self._process_group = process_group

        resolved = self._scheme.resolve(model)
        self._places = [(weight.module, weight.attr) for weight in resolved.values()]
        self._spans = {weight.name: weight.span for weight in list_weights(model)}
        self._aliases = {alias: weight.name for weight in list_weights(model) for alias in weight.names}
        self._weights = {name: SparseWeight(weight) for name, weight in resolved.items()}

        self._warned = False
        self._ranks_checked = False
        self._start()
        step = max((int(group.get(STEP_KEY, 0)) for group in optimizer.param_groups), default=0)
        self._log = SadLog(list(self._weights), self._devices(), step, self._sum_over_ranks)
        self._remembered: dict[int, dict[str, Tensor]] = {}
        self._find_members()
        self._first_masks()
        self.remember()
        self._attach()

    # ------------------------------------------------------------------------------------------------- reading

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer."""
        return self._optimizer

    @property
    def scheme(self) -> Scheme:
        """The scheme."""
        return self._scheme

    @property
    def rule(self) -> Rule:
        """The update rule."""
        return self._rule

    @property
    def step(self) -> int:
        """Number of optimizer steps made; those that a GradScaler made the optimizer skip do not count."""
        return self._log.step

    @property
    def patterns(self) -> dict[str, Pattern]:
        """The patterns of the masks as they are now; the scheme's, unless there is a schedule."""
        return {name: weight.mask_pattern for name, weight in self._weights.items()}

    def sad(self, since: int | None = None) -> dict[str, int]:
        """Sparse Architecture Divergence: how many weights are kept now and were pruned then, or the other way round.

        Waits for the device. Sharded weights are summed over their ranks, so every rank must call this.

        Args:
            since: The number of a remembered step (`remember`; 0, the start, always is). ``None``: the step before the
                last one.

        Returns:
            ``{parameter name: count}``.

        Raises:
            ValueError: If the masks of that step are not remembered.
        """
        self._catch_up()
        if since is None:
            return self._log.last()
        if since not in self._remembered:
            raise ValueError(f"since must be a remembered step, one of {sorted(self._remembered)}, got {since!r}")
        then = self._remembered[since]
        counts = [int(ops.sad(weight.bits, then[name])) for name, weight in self._weights.items()]
        return dict(zip(self._weights, map(int, self._sum_over_ranks(torch.tensor([counts]))[0]), strict=True))

    def remember(self) -> int:
        """Keeps a copy of the masks as they are now (one bit a weight), for `sad`; returns the step's number."""
        self._catch_up()
        step = self.step
        self._remembered[step] = {name: weight.bits.clone() for name, weight in self._weights.items()}
        return step

    def forget(self, step: int) -> None:
        """Drops the masks that were remembered at a step.

        Raises:
            KeyError: If there are none.
        """
        del self._remembered[step]

    @property
    def history(self) -> SadHistory:
        """SAD of every step so far. Waits and sums as `sad` does."""
        sizes = {name: weight.parameter.numel() for name, weight in self._weights.items()}
        return self._log.history(sizes)

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """``{parameter name: mask}``, bool and of the weight's shape, True = kept; unpacked when it is looked up."""
        self._catch_up()
        return _Masks(self)

    def dense_weight(self, name: str) -> Tensor:
        """The dense weight behind a sparse parameter: the live tensor, not a copy.

        Args:
            name: The parameter's name, or its module's.

        Raises:
            KeyError: If the scheme has no such weight.
        """
        self._catch_up()
        return self._find(name).dense_weight()

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for weight in self._weights.values():
            counts[str(weight.final_pattern)] = counts.get(str(weight.final_pattern), 0) + 1
        parts = ", ".join(f"{count} x {pattern}" for pattern, count in counts.items())
        return f"Sparsifier({parts or 'nothing sparse'}; {self._rule!r}, step {self._log.next_step - 1})"

    # ------------------------------------------------------------------------------------------------- the end

    @torch.no_grad()
    def finalize(self) -> nn.Module:
        """Detaches from the optimizer. The model keeps the sparse weights and is returned; dense weights are dropped.

        If a schedule has not come to its end, the scheme's own patterns are applied.
        """
        if sparsifier_of(self._optimizer) is not self:
            return self._model
        self._recover()
        self._catch_up()
        for weight in self._weights.values():
            if weight.mask_pattern != weight.final_pattern:
                weight.pattern = weight.final_pattern
                weight.choose_initial()
        for handle in self._handles:
            handle.remove()
        self._take_keys()
        for group in self._optimizer.param_groups:
            group.pop(STEP_KEY, None)
        set_sparsifier(self._optimizer, None)
        return self._model

    # ------------------------------------------------------------------------------------------------- hooks

    def _attach(self) -> None:
        optimizer = self._optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._after_state_dict),
            optimizer.register_load_state_dict_pre_hook(self._before_load_state_dict),
            optimizer.register_load_state_dict_post_hook(self._after_load_state_dict),
        ]
        set_sparsifier(optimizer, self)
        self._write_step()

    @torch.compiler.disable
    @torch.no_grad()
    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._recover()
        self._take_keys()
        self._idle = self._is_no_step(kwargs)
        if self._idle:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            self._enter()
            return None
        self._awaits_closure = True
        wrapped = self._wrap(closure)
        return ((args[0], wrapped, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": wrapped})

    @torch.compiler.disable
    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._awaits_closure:
            self._awaits_closure = False
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() did not evaluate its closure, so it has updated the sparse weights "
                f"instead of the dense ones"
            )
        if self._idle:
            for weight in self._weights.values():
                weight.mark()
        else:
            self._leave()
        self._put_keys()

    def _wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Forward and backward see the sparse weights; the swap comes right after them."""

        def closure_then_swap() -> Any:
            if self._entered:
                self._recover()
                raise RuntimeError(
                    f"{type(self._optimizer).__name__} evaluates its closure several times a step, which N:M training "
                    f"does not support: the weights would be dense ones"
                )
            with torch.enable_grad():
                loss = closure()
            with torch.no_grad():
                self._awaits_closure = False
                self._enter()
            return loss

        return closure_then_swap

    def _is_no_step(self, kwargs: dict[str, Any]) -> bool:
        """Whether this ``step()`` is going to change nothing."""
        found_inf = getattr(self._optimizer, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf.item():
            return True  # a fused optimizer under a GradScaler; on a GPU only the kernel knows
        # torch.distributed.checkpoint makes an optimizer create its state by a step with zero gradients at lr 0.
        return (
            "closure" in kwargs
            and kwargs["closure"] is None
            and not self._optimizer.state
            and self._log.next_step == 1
            and all(_is_zero(group.get("lr")) for group in self._optimizer.param_groups)
        )

    def _enter(self) -> None:
        """Swaps the dense weights in and lets the rule have its say."""
        self._find_members()
        if not self._ranks_checked:
            self._first_step()
        self._catch_up()
        optimizer, rule = self._optimizer, self._rule
        step = Step(
            self._log.next_step, {}, getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        )
        for weight, _ in self._members:
            requires_plain_grad(weight)
        for weight, group in self._members:
            if weight.parameter.grad is not None:
                step.group = optimizer.param_groups[group]
                rule.adjust_dense(weight, step)
        self._entered, self._step = True, step
        try:
            for weight, group in self._members:
                weight.enter()
                grad = weight.lend_grad() if rule.edits_grad else None
                if grad is not None:
                    step.group = optimizer.param_groups[group]
                    rule.adjust_grad(weight, grad, _on(step, grad.device))
        except BaseException:
            self._recover()
            raise

    def _leave(self) -> None:
        """Writes the new masked weights to the parameters, and counts."""
        step = self._step
        assert step is not None
        counters = dict(zip(self._weights, self._log.counters(), strict=True))
        for weight, group in self._members:
            step.group = self._optimizer.param_groups[group]
            weight.pattern = self._pattern(weight, step.number)
            weight.leave(self._rule, step)
            weight.count_changes(counters[weight.name])
        self._entered = False
        found_inf = step.found_inf
        self._log.commit(None if found_inf is None or found_inf.device.type == "cpu" else found_inf)
        self._write_step()

    def _recover(self) -> None:
        """Ends a step that an exception has cut short: the parameters must not be left pointing at dense weights."""
        self._awaits_closure = False
        if not self._entered:
            return
        self._entered = False
        with torch.no_grad():
            for weight, _ in self._members:
                weight.cancel()

    # ------------------------------------------------------------------------------------------------- per step

    def _find_members(self) -> None:
        """Finds the weights in the parameter groups, again whenever a group or a parameter has been added."""
        groups = self._optimizer.param_groups
        census = [len(group["params"]) for group in groups]
        if census == self._census:
            return
        for group in groups:
            self._rule.check_group(group)
        group_of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        self._members = [
            (weight, group_of[id(weight.parameter)])
            for weight in self._weights.values()
            if id(weight.parameter) in group_of
        ]
        self._census = census

    def _first_step(self) -> None:
        """Checks what can only be known once training starts."""
        for weight, (module, attr) in zip(self._weights.values(), self._places, strict=True):
            now = parameter_of(module, attr)
            # Between forward and backward FSDP2 may hold the gathered parameter there.
            if now is not weight.parameter and not is_dtensor(weight.parameter):
                raise RuntimeError(
                    f"{weight.name} is another parameter than when the Sparsifier was made, and the optimizer does "
                    f"not know it either; apply fully_shard and the like first, then make optimizer and Sparsifier"
                )
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and self._process_group is not False:
            check_ranks_equal(list(self._weights.values()), repr(self._rule), self._process_group)
        self._ranks_checked = True

    @torch.no_grad()
    def _catch_up(self) -> None:
        """Adopts what has been written to parameters from outside."""
        if self._entered:
            return
        changed = [weight.name for weight in self._weights.values() if weight.touched() and weight.adopt()]
        self._log.move(self._devices())
        if changed and not self._warned:
            self._warned = True
            warnings.warn(
                f"{', '.join(changed[:3])}{' and others' * (len(changed) > 3)} changed outside the optimizer's step; "
                f"the new values are taken into the dense weights. This warning is given once",
                stacklevel=4,
            )

    def _pattern(self, weight: SparseWeight, step: int) -> Pattern:
        """The pattern of the mask that is chosen at the end of ``step``."""
        if self._schedule is None:
            return weight.final_pattern
        pattern = Pattern.parse(self._schedule(step, weight.name, weight.final_pattern), argument="scheduled pattern")
        if pattern != weight.pattern and self._spans[weight.name] % pattern.m:
            raise ValueError(
                f"the schedule gives {weight.name} the pattern {pattern} at step {step}, but its groups run over "
                f"{self._spans[weight.name]} weights, which is no multiple of {pattern.m}"
            )
        return pattern

    # ------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything that must be saved: dense weights, masks, step, SAD history and remembered masks.

        ``optimizer.state_dict()`` holds the first three too, so a checkpoint of model and optimizer is enough to go on
        bit for bit; this one adds the history. As in any state dict, the tensors are live ones.
        """
        self._catch_up()
        first, table = self._log.table()
        return {
            "version": _STATE_VERSION,
            "step": self.step,
            "patterns": {name: str(weight.mask_pattern) for name, weight in self._weights.items()},
            "weights": {name: dict(weight.state) for name, weight in self._weights.items()},
            "remembered": {step: dict(bits) for step, bits in self._remembered.items()},
            "sad": {"first": first, "table": table},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` has returned, and makes the parameters hold the masked weights.

        Raises:
            ValueError: If it is of an unknown version, or of other weights; nothing is changed then.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"state has version {state.get('version')!r}, expected {_STATE_VERSION}")
        saved = state["weights"]
        if saved.keys() != self._weights.keys():
            raise ValueError(
                f"state is of other weights: missing {sorted(self._weights.keys() - saved.keys())}, "
                f"unexpected {sorted(saved.keys() - self._weights.keys())}"
            )
        for name, weight in self._weights.items():
            weight.check_state(saved[name][DENSE_KEY], saved[name][BITS_KEY])
        for name, weight in self._weights.items():
            weight.pattern = weight.mask_pattern = Pattern.parse(state["patterns"][name])
            weight.load_state(saved[name][DENSE_KEY], saved[name][BITS_KEY])
        self._log.load(state["step"], state["sad"]["first"], state["sad"]["table"])
        self._remembered = {
            step: {name: bits.to(self._weights[name].bits.device) for name, bits in masks.items()}
            for step, masks in state["remembered"].items()
        }
        self._write_step()

    def _put_keys(self) -> None:
        for weight, _ in self._members:
            self._optimizer.state[weight.parameter].update(weight.state)

    def _take_keys(self) -> None:
        """Takes our entries out of the optimizer's state: many optimizers start theirs when they find it empty."""
        state = self._optimizer.state
        for weight, _ in self._members:
            entries = state.get(weight.parameter)
            if entries is not None and DENSE_KEY in entries:
                weight.share_state(entries)
                del entries[DENSE_KEY], entries[BITS_KEY]

    def _write_step(self) -> None:
        for group in self._optimizer.param_groups:
            group[STEP_KEY] = self._log.next_step - 1

    def _after_state_dict(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Completes ``optimizer.state_dict()``: before the first step our entries are not there yet."""
        self._catch_up()
        step = self.step
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        by_parameter = {id(weight.parameter): weight for weight in self._weights.values()}
        for key, parameter in zip(ids, parameters, strict=True):
            weight = by_parameter.get(id(parameter))
            if weight is not None:
                state_dict["state"][key] = {**state_dict["state"].get(key, {}), **weight.state}
        for group in state_dict["param_groups"]:
            group[STEP_KEY] = step

    def _before_load_state_dict(
        self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Sets our entries aside: ``load_state_dict`` would cast them, bits included, to the parameter's dtype."""
        ids = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        parameters = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
        self._incoming = []
        if len(ids) != len(parameters):
            return None  # which load_state_dict refuses
        by_parameter = {id(weight.parameter): weight for weight in self._weights.values()}
        state = dict(state_dict["state"])
        for key, parameter in zip(ids, parameters, strict=True):
            entries = state.get(key)
            if not isinstance(entries, dict) or DENSE_KEY not in entries:
                continue
            weight = by_parameter.get(id(parameter))
            if weight is None:
                raise ValueError(
                    f"the optimizer state holds the dense weight behind parameter {key}, which is none of this "
                    f"Sparsifier's scheme"
                )
            weight.check_state(entries[DENSE_KEY], entries[BITS_KEY])
            self._incoming.append((weight, entries[DENSE_KEY], entries[BITS_KEY]))
            state[key] = {name: value for name, value in entries.items() if name not in (DENSE_KEY, BITS_KEY)}
        return {**state_dict, "state": state}

    @torch.no_grad()
    def _after_load_state_dict(self, optimizer: torch.optim.Optimizer) -> None:
        self._census = None
        self._find_members()
        step = max((int(group.get(STEP_KEY, 0)) for group in optimizer.param_groups), default=0)
        for weight, dense, bits in self._incoming:
            weight.pattern = self._pattern(weight, step)
            weight.load_state(dense, bits)
        if self._incoming:
            self._log.load(step)
        self._incoming = []
        if optimizer.state:
            self._put_keys()
        self._write_step()

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_handles", "_members", "_census", "_incoming", "_step", "_entered", "_awaits_closure", "_idle")
        state = {key: value for key, value in self.__dict__.items() if key not in dropped}
        state["_attached"] = sparsifier_of(self._optimizer) is self
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("_attached")
        self.__dict__.update(state)
        self._start()
        if attached:
            self._attach()

    # ------------------------------------------------------------------------------------------------- internals

    def _start(self) -> None:
        """The part of the state that lives no longer than a step."""
        self._members: list[tuple[SparseWeight, int]] = []
        self._census: list[int] | None = None
        self._incoming: list[tuple[SparseWeight, Tensor, Tensor]] = []
        self._step: Step | None = None
        self._entered = False  # the parameters point at the dense weights
        self._awaits_closure = False
        self._idle = False  # the step being made is none

    @torch.no_grad()
    def _first_masks(self) -> None:
        """Chooses the masks to start with, or takes over what an optimizer that was copied or loaded brings along."""
        step = self._log.step
        for weight in self._weights.values():
            weight.pattern = self._pattern(weight, step)
            entries = self._optimizer.state.get(weight.parameter, {})
            if DENSE_KEY in entries:
                weight.load_state(entries.pop(DENSE_KEY), entries.pop(BITS_KEY))
            else:
                weight.choose_initial()

    def _devices(self) -> list[torch.device]:
        return [weight.dense.device for weight in self._weights.values()]

    def _find(self, name: str) -> SparseWeight:
        known = self._resolve(name)
        if known is None:
            close = difflib.get_close_matches(str(name), self._weights, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise KeyError(f"no sparse weight {name!r}{hint}")
        return self._weights[known]

    def _resolve(self, name: object) -> str | None:
        if not isinstance(name, str):
            return None
        plain = canonical_name(name)
        found = (self._aliases.get(key) for key in (plain, f"{plain}.weight" if plain else "weight"))
        return next((key for key in found if key in self._weights), None)

    def _sum_over_ranks(self, table: Tensor) -> Tensor:
        """Sums the columns of sharded weights over their ranks. A collective if there are any."""
        for column, weight in enumerate(self._weights.values()):
            for group in shard_groups(weight.parameter):
                counts = table[:, column].to(weight.dense.device)
                torch.distributed.all_reduce(counts, group=group)
                table = table.clone()
                table[:, column] = counts.to(table.device)
        return table


class _Masks(Mapping[str, Tensor]):
    """The masks of a Sparsifier, by parameter or module name."""

    def __init__(self, sparsifier: Sparsifier) -> None:
        self._sparsifier = sparsifier

    def __getitem__(self, name: str) -> Tensor:
        return self._sparsifier._find(name).masks()

    def __contains__(self, name: object) -> bool:
        return self._sparsifier._resolve(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._sparsifier._weights)

    def __len__(self) -> int:
        return len(self._sparsifier._weights)

    def __repr__(self) -> str:
        return f"masks of {list(self)}"


def _is_zero(lr: Any) -> bool:
    """Whether a learning rate is 0, without waiting for a GPU."""
    if isinstance(lr, Tensor):
        return lr.device.type == "cpu" and not lr.any()
    return lr is None or lr == 0


def _on(step: Step, device: torch.device) -> Step:
    """``step`` with its gradient scale on ``device``: a model may span several."""
    if step.grad_scale is not None and step.grad_scale.device != device:
        return Step(step.number, step.group, step.grad_scale.to(device, non_blocking=True), step.found_inf)
    return step
