"""The last check of `convert`: a model that would be slower with its packed weights gets dense ones back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .example import ExampleInput, example_call
from .measure import alternate
from .plan import Plan
from .report import WholeModel

_ROUNDS = 5


def undo_slower(
    model: nn.Module, plans: Sequence[Plan], example_input: ExampleInput, dtype: torch.dtype | None
) -> WholeModel | None:
    """Times the whole model with dense and with packed weights, and undoes what makes it slower.

    Layers are timed alone; what they do to each other (caches, memory, threads) shows here. While the model
    is slower packed than dense, the half of the packed weights that gained least becomes dense again.

    Args:
        model: The model, with dense weights, as it has again when this returns.
        plans: Weights that `convert` decided for.
        example_input: As for `convert`.
        dtype: What autocast casts to, or ``None``.

    Returns:
        The times; ``None`` if nothing is to be packed.
    """
    chosen = [plan for plan in plans if plan.choice == "packed"]
    chosen.sort(key=lambda plan: plan.seconds.dense / plan.seconds.packed, reverse=True)
    if not chosen:
        return None
    device = chosen[0].weight.parameter.device

    def with_packed(count: int) -> object:
        for i, plan in enumerate(chosen):
            plan.place(packed=i < count)
        return call()

    count = len(chosen)
    try:
        with example_call(model, example_input, dtype) as call:
            times = _times(with_packed, count, device)
            while times["packed"] > times["dense"]:
                for plan in chosen[count // 2 : count]:
                    plan.choose("dense", f"{plan.reason}; undone: {_comparison(times)}")
                count //= 2
                if count == 0:
                    return WholeModel(times["dense"] * 1e3, times["dense"] * 1e3)
                times = _times(with_packed, count, device)
    finally:
        for plan in chosen:
            plan.place(packed=False)
    return WholeModel(times["dense"] * 1e3, times["packed"] * 1e3)


def _times(with_packed: Callable[[int], object], count: int, device: torch.device) -> dict[str, float]:
    calls = {"dense": lambda: with_packed(0), "packed": lambda: with_packed(count)}
    return alternate(calls, device, rounds=_ROUNDS)


def _comparison(times: dict[str, float]) -> str:
    return f"the whole model took {times['packed'] * 1e3:.3f} ms packed, {times['dense'] * 1e3:.3f} ms dense"
