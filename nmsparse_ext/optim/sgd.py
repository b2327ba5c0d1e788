"""``nms.optim.SGD``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd as torch_sgd

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


class SGD(OnePassOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` in one pass over memory, with all of N:M training in it.

    Equivalent, to rounding, to `torch.optim.SGD` with a `Sparsifier` on it; state dicts of one can be loaded
    into the other. On CPUs all instruction sets give the same bits.

    Of a sparse float32 weight, memory holds per element: parameter 4 bytes, gradient 4, dense weight 4,
    momentum 4 (if there is any), mask 1/8. Of a bfloat16 or float16 one: 2 + 2 + 4 + 4 + 1/8, as dense weight
    and momentum are float32. Other parameters take what they take in ``torch.optim``. Nothing else is
    allocated, but for gradients that lie in memory in another order than their parameter.

    Strided weights (convolutions in OIHW, matrices grouped along dim 0) are taken where they lie. Complex
    parameters, sparse gradients and parameters with gaps in memory are updated by PyTorch's own code.
    Transposable masks, fading ones (`DecayingMask`) and rules of one's own take two more passes, which the
    Sparsifier makes around the step, as with any optimizer.

    Args:
        params: As for `torch.optim.SGD`.
        lr: As for `torch.optim.SGD`; a tensor may live on any device.
        momentum: As for `torch.optim.SGD`.
        dampening: As for `torch.optim.SGD`.
        weight_decay: As for `torch.optim.SGD`; of sparse weights the dense weight decays.
        nesterov: As for `torch.optim.SGD`.
        maximize: As for `torch.optim.SGD`.
        foreach: Taken for compatibility; there is one way only.
        differentiable: Must be False.
        fused: Taken for compatibility. GradScalers find this optimizer to be fused in any case.
        scheme: What to train sparsely, as for `Sparsifier`; ``None`` for nothing. Makes `sparsifier`.
        model: The model, which a scheme needs unless ``params`` is ``model.named_parameters()`` itself.
        lambda_w: As for `Sparsifier`.
        method: As for `Sparsifier`.
        schedule: As for `Sparsifier`.
        penalty: As for `Sparsifier`.
        **sparsifier_arguments: Others of `Sparsifier`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If one is out of range, ``differentiable`` is set, or a scheme comes without a model.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> optimizer = SGD(model.named_parameters(), lr=0.1, momentum=0.9, scheme="2:4")
        >>> model(torch.randn(2, 16)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.sparsifier.sad())
        ['0.weight', '2.weight']
    """

    def __init__(
        self,
        params: ParamsLike,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
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
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
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
        momentum = group["momentum"]
        lr, lr_tensor = split_lr(group["lr"])
        begun = [entry for entry in entries if not momentum or self._has_momentum(entry)]
        fresh = [entry for entry in entries if momentum and not self._has_momentum(entry)]
        for part, first in ((begun, False), (fresh, True)):
            if not part:
                continue
            lists = Lists.of(part)
            foreach.sgd_(
                lists.weights,
                lists.grads,
                [self._state_of(entry, "momentum_buffer") for entry in lists.entries] if momentum else [],
                *lists[1:],
                self.term,
                self.lambda_w,
                lr,
                lr_tensor,
                float(momentum),
                float(group["dampening"]),
                float(group["weight_decay"]),
                group["nesterov"],
                group["maximize"],
                first,
                scale,
                found_inf,
            )

    def _has_momentum(self, entry: Entry) -> bool:
        return self.state[entry.parameter].get("momentum_buffer") is not None

    def _update_otherwise(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        grads = self._unscaled(parameters)
        if grads is None:
            return
        momenta = [self.state[p].get("momentum_buffer") for p in parameters] if group["momentum"] else []
        torch_sgd(
            parameters,
            grads,
            momenta,
            has_sparse_grad=any(grad.is_sparse for grad in grads),
            foreach=False,
            fused=False,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        for parameter, momentum in zip(parameters, momenta, strict=False):
            self.state[parameter]["momentum_buffer"] = momentum
