"""The last check of `convert`: a model that would be slower with its packed weights gets dense ones back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from .example import ExampleInput, ModelCall, example_call
from .measure import alternate
from .plan import Plan
from .report import WholeModel

_ROUNDS = 5


def undo_slower(
    model: nn.Module,
    plans: Sequence[Plan],
    example_input: ExampleInput,
    dtype: torch.dtype | None,
    *,
    compiled: bool = False,
) -> WholeModel | None:
    """Times the whole model with dense and with packed weights, and undoes what makes it slower.

    Layers are timed alone; what they do to each other (caches, memory, threads) shows here. While the model
    is slower packed than dense, the half of the packed weights that gained least becomes dense again.

    Args:
        model: The model, with dense weights, as it has again when this returns.
        plans: Weights that `convert` decided for.
        example_input: As for `convert`.
        dtype: What autocast casts to, or ``None``.
        compiled: Whether the model is timed compiled, with its dense weights as constants of the graph.

    Returns:
        The times; ``None`` if nothing is to be packed.
    """
    chosen = [plan for plan in plans if plan.choice == "packed"]
    chosen.sort(key=lambda plan: plan.seconds.over_eager, reverse=True)
    if not chosen:
        return None
    device = chosen[0].weight.parameter.device
    variants = _compiled if compiled else _eager

    def place(count: int) -> None:
        for i, plan in enumerate(chosen):
            plan.place(packed=i < count)

    count = len(chosen)
    try:
        with example_call(model, example_input, dtype, compiled=compiled) as call:
            variant = variants(model, place, call)
            dense = variant(0)
            times = _times(dense, variant(count), device)
            while times["packed"] > times["dense"]:
                for plan in chosen[count // 2 : count]:
                    plan.choose("dense", f"{plan.reason}; undone: {_comparison(times)}")
                count //= 2
                if count == 0:
                    return WholeModel(times["dense"] * 1e3, times["dense"] * 1e3, compiled)
                times = _times(dense, variant(count), device)
    finally:
        place(0)
    return WholeModel(times["dense"] * 1e3, times["packed"] * 1e3, compiled)


#: ``count -> what calls the model with so many packed weights``.
_Variant = Callable[[int], Callable[[], object]]


def _eager(model: nn.Module, place: Callable[[int], None], call: ModelCall) -> _Variant:
    def variant(count: int) -> Callable[[], object]:
        def run() -> object:
            place(count)
            return call(model)

        return run

    return variant


def _compiled(model: nn.Module, place: Callable[[int], None], call: ModelCall) -> _Variant:
    """Copies, because frozen code holds the weights of the model that it was made for."""
    from .inductor import inductor_options

    plain = getattr(model, "_orig_mod", model)

    def variant(count: int) -> Callable[[], object]:
        place(count)
        frozen: nn.Module = torch.compile(copy.deepcopy(plain), options=inductor_options() if count else None)  # type: ignore[assignment]

        def run() -> object:
            # That weights are constants is decided when the code is made, and code of all copies is kept
            # under the one forward function that they share.
            with torch._inductor.config.patch(freezing=True), torch._dynamo.config.patch(recompile_limit=64):
                return call(frozen)

        return run

    return variant


def _times(
    dense: Callable[[], object], packed: Callable[[], object], device: torch.device
) -> dict[str, float]:
    return alternate({"dense": dense, "packed": packed}, device, rounds=_ROUNDS)


def _comparison(times: dict[str, float]) -> str:
    return f"the whole model took {times['packed'] * 1e3:.3f} ms packed, {times['dense'] * 1e3:.3f} ms dense"
