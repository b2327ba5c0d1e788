"""``Sparsifier``: N:M training hooked onto an ordinary optimizer."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..pattern import Pattern
from ..scheme import Scheme, as_scheme
from ..weights import canonical_name
from ..weights import weights as list_weights
from .accelerate import Accelerate, Accelerator
from .checkpoint import StateHooks, saved_step
from .dtensor import is_dtensor, local_of, shard_groups
from .guard import (
    STEP_KEY,
    check_model,
    check_not_packed,
    check_optimizer,
    claim,
    release,
    set_sparsifier,
)
from .mask_mapping import MaskMapping
from .ranks import check_ranks_equal
from .rules import Rule, Step, make_rule
from .sad import SadHistory, SadLog
from .schedule import Schedule, ScheduleFunction, as_schedule
from .stepping import Stepper
from .transposable import PATTERN as TRANSPOSABLE
from .transposable import transposable_bits
from .weight import BITS_KEY, DENSE_KEY, SparseWeight

_STATE_VERSION = 1


class Sparsifier:
    """Trains a model under an N:M scheme, through the step hooks of its optimizer.

    The parameters *are* the sparse weights: forward, backward, ``state_dict`` and whatever else reads the
    model see them and nothing unusual. The dense weight behind each of them lives with the optimizer. At
    every ``optimizer.step()`` the dense weight is swapped in by pointer, the rule adjusts its gradient (a
    copy of it: ``p.grad`` is what it was before), the optimizer does its work, the mask is chosen anew, and
    the masked weight is written to the parameter's own storage.

    Equivalent, for ``method="sr-ste"`` and a loop without tricks, to::

        loss(sparse weights).backward()
        grad += lambda_w * ~mask * dense
        optimizer.step()                       # updates the dense weights
        mask = nm_mask(dense, pattern)
        sparse = where(mask, dense, 0)

    As the term is added to what the optimizer is about to use, ``lambda_w`` means the same under gradient
    accumulation, loss scaling, clipping, weight tying, DistributedDataParallel and ``fully_shard``.

    What others write to the parameters between steps is taken into the dense weights, with a warning. Such
    writes are told by the parameters' version counters, which ``p.data.copy_(...)`` goes around: write with
    ``p.copy_(...)`` under ``torch.no_grad()`` instead, or the next step undoes it.

    Behind a 16-bit parameter the dense weight is float32, and so are the optimizer's momenta: they are what
    it would make for a float32 parameter. That takes 4 bytes a weight for a float32 gradient too.

    After the first step the hooks allocate no tensors and never wait for a GPU: a step can be captured in a
    CUDA graph. Replays train as they should, but move neither `step` nor `history`.

    Args:
        model: The model, wrapped (DDP, ``torch.compile``, ``fully_shard``) or not.
        optimizer: Any ``torch.optim`` optimizer that takes one gradient a step. Weights of the scheme that
            are in none of its parameter groups are masked, and trained once they are added.
        scheme: A `Scheme`, a mapping ``{name: pattern}``, or one pattern for everything that can be pruned.
        method: ``"sr-ste"``, ``"ste"``, ``"static"`` (the mask is chosen once) or a `Rule`.
        lambda_w: The strength of SR-STE's pull on pruned weights; the other methods do not use it.
        schedule: A `Schedule`, such as ``DenseWarmup(1_000) + Gradual(5_000) + Freeze(after=50_000)``, or a
            function ``(step, name, pattern) -> pattern``; ``None`` for the scheme's patterns from the start.
        penalty: For ``"sr-ste"``: ``"gradient"``, as published, or ``"decoupled"``, beside the optimizer.
        transposable: Masks that are 2:4 along the group dim and across it, the exact best of every 4x4 tile;
            for any method, on matrices and convolutions with the pattern 2:4.
        process_group: The ranks that train the same model, which are compared at the first step: ``None`` for
            all of them, ``False`` for no comparison.
        accelerate: ``"cusparselt"`` or an `Accelerate`: the products of ``nn.Linear`` layers run on sparse
            tensor cores, the forward ones and with ``transposable`` the gradients of inputs too, from a copy
            of the weight that is packed once a step; see `accelerated`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the scheme does not fit the model, or model or optimizer cannot be trained this way:
            FSDP1, parametrized weights, weights sharded along their group dim, LBFGS, and the like.

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
        transposable: bool = False,
        process_group: Any = None,
        accelerate: str | Accelerate | None = None,
    ) -> None:
        optimizer = check_optimizer(optimizer)
        check_model(model, scheme)
        self._scheme = as_scheme(scheme, model)
        self._model = model
        self._process_group = process_group
        rule = make_rule(method, lambda_w, penalty)
        settings = Accelerate.of(accelerate)

        resolved = self._scheme.resolve(model)
        parameters = {name: weight.parameter for name, weight in resolved.items()}
        check_not_packed(parameters)
        listed = list_weights(model)
        spans = {weight.name: weight.span for weight in listed}
        self._aliases = {alias: weight.name for weight in listed for alias in weight.names}
        self._places = {weight.name: (weight.module, weight.attr) for weight in resolved.values()}
        self._transposable = bool(transposable)
        self._weights = {
            name: SparseWeight(weight, spans[name], self._transposable) for name, weight in resolved.items()
        }

        claim(self, parameters)
        devices = [weight.dense.device for weight in self._weights.values()]
        log = SadLog(list(self._weights), devices, saved_step(optimizer), self._sum_over_ranks)
        self._stepper = Stepper(
            optimizer, self._weights, rule, as_schedule(schedule), log, at_first_step=self._check_first_step
        )
        self._first_masks()
        self._remembered: dict[int, dict[str, Tensor]] = {}
        self.remember()
        self._accelerator = None if settings is None else Accelerator(settings, self._weights, self._places)
        self._attach()

    # --------------------------------------------------------------------------------------------- reading

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer."""
        return self._stepper.optimizer

    @property
    def scheme(self) -> Scheme:
        """The scheme."""
        return self._scheme

    @property
    def rule(self) -> Rule:
        """The update rule."""
        return self._stepper.rule

    @property
    def step(self) -> int:
        """Number of optimizer steps made; those that a GradScaler made the optimizer skip do not count."""
        return self._stepper.log.step

    @property
    def weights(self) -> Mapping[str, SparseWeight]:
        """``{parameter name: weight}``, as rules see them."""
        self._stepper.catch_up()
        return MappingProxyType(self._weights)

    @property
    def patterns(self) -> dict[str, Pattern]:
        """The patterns of the masks as they are now; the scheme's, unless there is a schedule."""
        return {name: weight.mask_pattern or weight.pattern for name, weight in self._weights.items()}

    @property
    def accelerated(self) -> dict[str, str | None]:
        """For each weight: ``None`` if its products run on sparse tensor cores, or why they are dense ones.

        A weight that a schedule or a rule lets more take part of than its mask keeps, or that somebody has
        written to since the last step, is multiplied dense until that is over.
        """
        if self._accelerator is None:
            return dict.fromkeys(self._weights, "accelerate was not asked for")
        return dict(self._accelerator.reasons)

    def sad(self, since: int | None = None) -> dict[str, int]:
        """Sparse Architecture Divergence: how many weights are kept in one mask and pruned in another.

        Waits for the device. Sharded weights are summed over their ranks, so every rank must call this.

        Args:
            since: Compare the masks as they are now with those of this step: 0, the start, or one for which
                `remember` was called. ``None``: compare the last step with the one before.

        Returns:
            ``{parameter name: count}``.

        Raises:
            ValueError: If the masks of that step are not remembered.
        """
        self._stepper.catch_up()
        if since is None:
            return self._stepper.log.last()
        if since not in self._remembered:
            raise ValueError(
                f"since must be a remembered step, one of {sorted(self._remembered)}, got {since!r}"
            )
        then = self._remembered[since]
        counts = [int(ops.sad(weight.bits, then[name])) for name, weight in self._weights.items()]
        total = self._sum_over_ranks(torch.tensor([counts]))[0].tolist()
        return dict(zip(self._weights, map(int, total), strict=True))

    def remember(self) -> int:
        """Keeps a copy of the masks as they are now, one bit a weight, for `sad`.

        Returns:
            The number of the step, to be given as ``since``.
        """
        self._stepper.catch_up()
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
        return self._stepper.log.history(sizes)

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """``{parameter name: mask}``: bool, the weight's shape, True = kept; unpacked when looked up."""
        self._stepper.catch_up()
        return MaskMapping(self)

    def dense_weight(self, name: str) -> Tensor:
        """The dense weight behind a sparse parameter: the live tensor, not a copy.

        Args:
            name: The parameter's name, or its module's.

        Raises:
            KeyError: If the scheme has no such weight.
        """
        self._stepper.catch_up()
        return self._find(name).whole_dense

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for weight in self._weights.values():
            counts[str(weight.final_pattern)] = counts.get(str(weight.final_pattern), 0) + 1
        parts = ", ".join(f"{count} x {pattern}" for pattern, count in counts.items())
        step = self._stepper.last_step.number
        return f"Sparsifier({parts or 'nothing sparse'}; {self.rule!r}, step {step})"

    # --------------------------------------------------------------------------------------------- the end

    @torch.no_grad()
    def finalize(self) -> nn.Module:
        """Detaches from the optimizer. The model keeps the sparse weights, which satisfy the scheme.

        If a schedule has not come to its end, the scheme's own patterns are applied. History and masks can
        still be read; the dense weights go when this object does.

        Returns:
            The model.
        """
        stepper = self._stepper
        if stepper.finished:
            return self._model
        stepper.catch_up()
        for weight in self._weights.values():
            if stepper.schedule.ends_dense(self.step):
                continue
            weight.pattern, weight.share = weight.final_pattern, 0.0
            if weight.mask_pattern == weight.pattern:
                weight.write_back(
                    Rule(), stepper.last_step
                )  # without what a rule may have left of pruned weights
            else:
                weight.choose(Rule(), stepper.last_step)
        stepper.finished = True
        for handle in self._handles:
            handle.remove()
        if self._accelerator is not None:
            self._accelerator.detach()
        release(self._parameters)
        stepper.exchange.take_state()
        for group in self.optimizer.param_groups:
            group.pop(STEP_KEY, None)
        set_sparsifier(self.optimizer, None)
        return self._model

    @torch.no_grad()
    def prune_(self, model: nn.Module) -> nn.Module:
        """Makes another model of the same architecture satisfy the scheme: an average, above all.

        An average of sparse weights (EMA, SWA, a soup) is as dense as the union of their masks. This keeps
        the largest ``|w|`` of each group of the averaged weight, under the patterns that hold at present.

        Args:
            model: The model, wrapped (``AveragedModel``, DDP) or not; its weights are changed in place.

        Returns:
            The model.

        Raises:
            ValueError: If it has not the weights of the scheme.
        """
        self._stepper.catch_up()
        for name, resolved in self._scheme.resolve(model).items():
            own = self._weights[name]
            local = local_of(resolved.parameter.detach())
            if own.tile_dim is not None and own.pattern == TRANSPOSABLE:
                bits = transposable_bits(local, own.dim, own.tile_dim).contiguous()
                ops.apply_bits_(local, bits, dim=own.dim)
            else:
                ops.nm_prune_(local, own.pattern, dim=own.dim)
        return model

    # ----------------------------------------------------------------------------------------------- hooks

    def _attach(self) -> None:
        optimizer, stepper, state = self.optimizer, self._stepper, StateHooks(self._stepper)
        self._handles = [
            optimizer.register_step_pre_hook(torch.compiler.disable(stepper.before_step)),
            optimizer.register_step_post_hook(torch.compiler.disable(stepper.after_step)),
            optimizer.register_state_dict_post_hook(state.after_state_dict),
            optimizer.register_load_state_dict_pre_hook(state.before_load_state_dict),
            optimizer.register_load_state_dict_post_hook(state.after_load_state_dict),
        ]
        if self._accelerator is not None:
            self._handles.append(optimizer.register_step_post_hook(torch.compiler.disable(self._vouch)))
            self._vouch()
        set_sparsifier(optimizer, self)
        stepper.write_step()

    def _vouch(self, *_: object) -> None:
        if self._accelerator is not None:
            self._accelerator.vouch(self._stepper.rule)

    @torch.no_grad()
    def _first_masks(self) -> None:
        """Chooses the masks to start with, or takes over those of an optimizer that was copied or loaded."""
        stepper, rounded = self._stepper, list[str]()
        for weight in self._weights.values():
            stepper.plan(weight, stepper.last_step.number)
            entries = self.optimizer.state.get(weight.parameter, {})
            if DENSE_KEY in entries:
                dense, bits = entries.pop(DENSE_KEY), entries.pop(BITS_KEY)
                if dense.dtype != weight.dense.dtype:
                    rounded.append(weight.name)
                weight.load_state(dense, bits.to(torch.uint8), stepper.rule, stepper.last_step)
            else:
                weight.choose(stepper.rule, stepper.last_step)
                weight.release()
        stepper.exchange.widen_state()
        if self.optimizer.state:
            stepper.exchange.put_state()
        if rounded:
            warnings.warn(
                f"the optimizer's state was loaded without a Sparsifier, which has rounded the dense weights "
                f"and momenta of {', '.join(rounded[:3])}{' and others' * (len(rounded) > 3)} to the "
                f"parameters' dtype; make the Sparsifier first, then load",
                stacklevel=4,
            )

    def _check_first_step(self) -> None:
        """Checks what can only be known once training starts."""
        for name, (module, attr) in self._places.items():
            parameter = self._weights[name].parameter
            # FSDP2 may hold the gathered parameter there, between forward and backward and also after.
            if module._parameters.get(attr) is not parameter and not is_dtensor(parameter):
                raise RuntimeError(
                    f"{name} is another parameter than when the Sparsifier was made, and the optimizer does "
                    f"not know it either; apply fully_shard and the like first, then make the two"
                )
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and self._process_group is not False:
            settings = f"{self.rule!r}, {self._stepper.schedule!r}, transposable={self._transposable}"
            check_ranks_equal(list(self._weights.values()), settings, self._process_group)

    # ----------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything that must be saved: dense weights, masks, step, SAD history and remembered masks.

        ``optimizer.state_dict()`` holds the first three too, so a checkpoint of model and optimizer is enough
        to go on bit for bit; this one adds the history. As in any state dict, the tensors are live ones.
        """
        self._stepper.catch_up()
        first, table = self._stepper.log.table()
        return {
            "version": _STATE_VERSION,
            "step": self.step,
            "patterns": {name: str(pattern) for name, pattern in self.patterns.items()},
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
        stepper, step = self._stepper, Step(state["step"], {})
        stepper.recover()
        for name, weight in self._weights.items():
            stepper.plan(weight, step.number)
            weight.load_state(saved[name][DENSE_KEY], saved[name][BITS_KEY], stepper.rule, step)
        stepper.log.load(state["step"], state["sad"]["first"], state["sad"]["table"])
        self._remembered = {
            step: {name: bits.to(self._weights[name].bits.device) for name, bits in masks.items()}
            for step, masks in state["remembered"].items()
        }
        self._vouch()
        stepper.write_step()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self._stepper.finished:
            self._stepper.reset()
            claim(self, self._parameters)
            self._attach()

    # ------------------------------------------------------------------------------------------- internals

    @property
    def _parameters(self) -> dict[str, Tensor]:
        return {name: weight.parameter for name, weight in self._weights.items()}

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
        total = table.clone()
        for column, weight in enumerate(self._weights.values()):
            for group in shard_groups(weight.parameter):
                counts = total[:, column].to(weight.dense.device, copy=True)
                torch.distributed.all_reduce(counts, group=group)
                total[:, column] = counts.to(total.device)
        return total
