"""What the one-pass optimizers share: how a step is put together, and where the Sparsifier comes from."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import GRAD_DTYPES
from ..train import Rule, Schedule, Sparsifier
from ..train.dtensor import local_of
from ..train.guard import sparsifier_of
from ..train.one_pass import OnePass, SparseUpdate
from ..train.schedule import ScheduleFunction


class Entry(NamedTuple):
    """A parameter of a group that has a gradient.

    Attributes:
        parameter: The parameter in the group; the dense weight's stand-in where there is a Sparsifier.
        weight: What is updated: this rank's part of it.
        grad: Its gradient, in the same memory layout.
        update: What else there is to do, for a sparse weight.
    """

    parameter: Tensor
    weight: Tensor
    grad: Tensor
    update: SparseUpdate | None


class Lists(NamedTuple):
    """The lists that the ops take: sparse weights first."""

    entries: list[Entry]
    sparse: list[Tensor]
    bits: list[Tensor]
    changes: list[Tensor]
    patterns: list[int]

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> Lists:
        """The lists of some parameters."""
        ordered = sorted(entries, key=lambda entry: entry.update is None)
        updates = [entry.update for entry in ordered if entry.update is not None]
        return cls(
            ordered,
            [update.sparse for update in updates],
            [update.bits for update in updates],
            [update.changes for update in updates],
            [number for update in updates for number in update.pattern],
        )

    @property
    def weights(self) -> list[Tensor]:
        """What is updated."""
        return [entry.weight for entry in self.entries]

    @property
    def grads(self) -> list[Tensor]:
        """Their gradients."""
        return [entry.grad for entry in self.entries]


class OnePassOptimizer(OnePass, torch.optim.Optimizer):
    """A ``torch.optim`` optimizer whose step is one pass over memory."""

    # GradScalers leave gradients scaled, and set `grad_scale` and `found_inf`. A class attribute, as copies
    # of optimizers lose others.
    _step_supports_amp_scaling = True

    @property
    def sparsifier(self) -> Sparsifier | None:
        """The Sparsifier whose hooks are on this optimizer."""
        return sparsifier_of(self)

    def _make_sparsifier(self, model: nn.Module | None, scheme: Any, **arguments: Any) -> None:
        """Makes the Sparsifier that the constructor's arguments ask for, if they do."""
        if scheme is None:
            return
        if model is None:
            raise ValueError(
                "scheme needs the model, whose modules say along which dim the groups of a weight run: give "
                "model.named_parameters() itself as params, or model="
            )
        Sparsifier(model, self, scheme, **arguments)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group.

        Raises:
            ValueError: If it asks for what one pass cannot do: ``differentiable`` or ``capturable``.
        """
        kind = type(self).__name__
        for option in ("differentiable", "capturable"):
            if param_group.get(option, self.defaults.get(option)):
                raise ValueError(
                    f"{option}=True is not supported by nmsparse_ext.optim.{kind}; use torch.optim.{kind} "
                    f"with a Sparsifier"
                )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Makes one step.

        Gradients stay as they are, also where a GradScaler leaves them scaled.

        Args:
            closure: Evaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf.item():
            return loss
        try:
            for group in self.param_groups:
                whole, others = self._entries(group)
                for device, entries in whole.items():
                    scale, inf = self._scaling_on(device)
                    self._update(group, entries, scale, inf)
                if others:
                    self._update_otherwise(group, others)
        finally:
            self.updates = {}
        return loss

    def _entries(self, group: dict[str, Any]) -> tuple[dict[torch.device, list[Entry]], list[Tensor]]:
        """The group's parameters with a gradient, by device; and those that the kernels do not take."""
        whole: dict[torch.device, list[Entry]] = {}
        others: list[Tensor] = []
        for parameter in group["params"]:
            update = self.updates.get(id(parameter))
            grad = parameter.grad if update is None else update.grad
            if grad is None:
                continue
            weight = local_of(parameter) if update is None else update.dense
            if grad.layout is not torch.strided or weight.dtype not in GRAD_DTYPES:
                others.append(parameter)
                continue
            if update is None:
                grad = local_of(grad)
                if not _fills_memory(weight):
                    others.append(parameter)
                    continue
            if grad.stride() != weight.stride():
                grad = torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
            whole.setdefault(weight.device, []).append(Entry(parameter, weight, grad, update))
        return whole, others

    def _scaling_on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """A GradScaler's scale and verdict, where a model's parameters are: it may span several devices."""
        scale, inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if device.type == "cpu":
            inf = None  # dealt with
        return tuple(
            tensor if tensor is None or tensor.device == device else tensor.to(device, non_blocking=True)
            for tensor in (scale, inf)
        )  # type: ignore[return-value]

    def _unscaled(self, parameters: list[Tensor]) -> list[Tensor] | None:
        """Gradients for PyTorch's own code; ``None`` if the step is to be skipped."""
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and found_inf.item():
            return None
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return grads if scale is None else [grad / scale.to(grad.device) for grad in grads]

    def _state_of(self, entry: Entry, key: str) -> Tensor:
        """A tensor of the parameter's state, begun with zeros; this rank's part of it."""
        state = self.state[entry.parameter]
        tensor = state.get(key)
        if tensor is None:
            tensor = torch.zeros_like(entry.parameter, memory_format=torch.preserve_format)
        elif tensor.dtype != entry.weight.dtype or local_of(tensor).stride() != entry.weight.stride():
            tensor = torch.empty_like(entry.parameter).copy_(tensor)  # loaded from elsewhere
        state[key] = tensor
        return local_of(tensor)

    def _update(
        self, group: dict[str, Any], entries: list[Entry], scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        raise NotImplementedError

    def _update_otherwise(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        raise NotImplementedError


def model_of(params: Any) -> nn.Module | None:
    """The model whose ``named_parameters()`` or ``parameters()`` were given, before they are used up."""
    codes = (nn.Module.named_parameters.__code__, nn.Module.parameters.__code__)
    if not inspect.isgenerator(params) or params.gi_code not in codes or params.gi_frame is None:
        return None
    model = params.gi_frame.f_locals.get("self")
    return model if isinstance(model, nn.Module) else None


def split_lr(lr: float | Tensor) -> tuple[float, Tensor | None]:
    """A learning rate as a number, and a factor that lives on a device."""
    if not isinstance(lr, Tensor):
        return lr, None
    if lr.device.type == "cpu":
        return lr.item(), None
    return 1.0, lr.to(torch.float32)


def _fills_memory(weight: Tensor) -> bool:
    """Whether elements lie next to each other without gaps, in whatever order of dims."""
    if weight.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(weight.stride(), weight.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


SchemeLike = Any  # what Sparsifier takes: Scheme | Mapping[str, Pattern | str] | Pattern | str
Method = str | Rule
ScheduleLike = Schedule | ScheduleFunction | None
ParamsLike = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
