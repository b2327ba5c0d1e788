"""``nms.optim.AdamW``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as torch_adamw

from .. import foreach
from .base import (
    Entry,
    Lists,
    Method,
    OnePassOptimizer,
    ParamsLike,
    ScheduleLike,
    SchemeLike,
    model_of,
    split_lr,
)


class AdamW(OnePassOptimizer, torch.optim.AdamW):
    """``torch.optim.AdamW`` in one pass over memory, with all of N:M training in it.

    As `SGD`, which says what is taken how. Of a sparse float32 weight, memory holds per element: parameter
    4 bytes, gradient 4, dense weight 4, moments 8 (with ``amsgrad`` 12), mask 1/8. Of a bfloat16 or float16
    one: 2 + 2 + 4 + 8 + 1/8.

    Args:
        params: As for `torch.optim.AdamW`.
        lr: As for `torch.optim.AdamW`; a tensor may live on any device.
        betas: As for `torch.optim.AdamW`.
        eps: As for `torch.optim.AdamW`.
        weight_decay: As for `torch.optim.AdamW`; of sparse weights the dense weight decays.
        amsgrad: As for `torch.optim.AdamW`.
        maximize: As for `torch.optim.AdamW`.
        foreach: Taken for compatibility; there is one way only.
        capturable: Must be False.
        differentiable: Must be False.
        fused: Taken for compatibility. GradScalers find this optimizer to be fused in any case.
        scheme: What to train sparsely, as for `Sparsifier`; ``None`` for nothing. Makes `sparsifier`.
        model: The model, which a scheme needs unless ``params`` is ``model.named_parameters()`` itself.
        lambda_w: As for `Sparsifier`.
        method: As for `Sparsifier`.
        schedule: As for `Sparsifier`.
        penalty: As for `Sparsifier`; ``"decoupled"`` keeps the pull out of the moments.
        **sparsifier_arguments: Others of `Sparsifier`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If one is out of range, ``differentiable`` or ``capturable`` is set, or a scheme comes
            without a model.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> optimizer = AdamW(model.named_parameters(), lr=1e-3, scheme="2:4", penalty="decoupled")
        >>> model(torch.randn(2, 16)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsLike,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        scheme: SchemeLike = None,
        model: nn.Module | None = None,
        lambda_w: float = 2e-4,
        method: Method = "sr-ste",
        schedule: ScheduleLike = None,
        penalty: str = "gradient",
        **sparsifier_arguments: Any,
    ) -> None:
        model = model or model_of(params)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._make_sparsifier(
            model,
            scheme,
            lambda_w=lambda_w,
            method=method,
            schedule=schedule,
            penalty=penalty,
            **sparsifier_arguments,
        )

    def _update(
        self, group: dict[str, Any], entries: list[Entry], scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        lr, lr_tensor = split_lr(group["lr"])
        lists = Lists.of(entries)
        states = [
            [self._state_of(entry, key) for entry in lists.entries] for key in ("exp_avg", "exp_avg_sq")
        ]
        amsgrad = group["amsgrad"]
        largest = [self._state_of(entry, "max_exp_avg_sq") for entry in lists.entries] if amsgrad else []
        steps = [self._step_of(entry.parameter, entry.weight.device) for entry in lists.entries]
        torch._foreach_add_(steps, 1)
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf.view(())] * len(steps))
        beta1, beta2 = group["betas"]
        foreach.adamw_(
            lists.weights,
            lists.grads,
            *states,
            largest,
            steps,
            *lists[1:],
            self.term,
            self.lambda_w,
            lr,
            lr_tensor,
            float(beta1),
            float(beta2),
            float(group["eps"]),
            float(group["weight_decay"]),
            amsgrad,
            group["maximize"],
            scale,
            found_inf,
        )

    def _step_of(self, parameter: Tensor, device: torch.device) -> Tensor:
        """The number of steps that the parameter has made: one float32 on its device."""
        state = self.state[parameter]
        step = state.get("step")
        if not isinstance(step, Tensor):
            step = torch.full((), 0.0 if step is None else float(step), dtype=torch.float32, device=device)
        elif step.device != device or step.dtype != torch.float32:
            step = step.to(device, torch.float32)
        state["step"] = step
        return step

    def _update_otherwise(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        grads = self._unscaled(parameters)
        if grads is None:
            return
        if any(grad.is_sparse for grad in grads):
            raise RuntimeError("AdamW does not support sparse gradients, please consider SparseAdam instead")
        amsgrad = group["amsgrad"]
        keys = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])]
        for parameter in parameters:
            self._step_of(parameter, torch.device("cpu"))
            for key in keys:
                self.state[parameter].setdefault(key, torch.zeros_like(parameter))
        states = [[self.state[parameter][key] for parameter in parameters] for key in keys]
        beta1, beta2 = map(float, group["betas"])
        torch_adamw(
            parameters,
            grads,
            states[0],
            states[1],
            states[2] if amsgrad else [],
            [self.state[parameter]["step"] for parameter in parameters],
            foreach=False,
            fused=False,
            has_complex=any(torch.is_complex(parameter) for parameter in parameters),
            amsgrad=amsgrad,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
