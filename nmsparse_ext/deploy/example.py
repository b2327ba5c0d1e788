"""Running a model once on an example input, to see what reaches each module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ExampleInput = Tensor | tuple | Mapping[str, Any]

#: Calls a model on the example input.
ModelCall = Callable[[nn.Module], object]

#: ``(module, args, kwargs)`` before its forward.
Before = Callable[[nn.Module, tuple, dict[str, Any]], None]


def run_example(
    model: nn.Module,
    example_input: ExampleInput,
    before: Mapping[nn.Module, Before],
) -> None:
    """Calls the model once, in eval mode and without gradients; nothing of it stays behind.

    Args:
        model: The model.
        example_input: A tensor, a tuple of arguments or a mapping of keyword arguments.
        before: What to call before the forward of some modules.

    Raises:
        TypeError: If ``example_input`` is none of these.
    """
    args, kwargs = call_arguments(example_input)
    hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in before.items()]
    try:
        with _evaluating(model), without_fast_path():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def example_call(
    model: nn.Module, example_input: ExampleInput, dtype: torch.dtype | None, *, compiled: bool = False
) -> Iterator[ModelCall]:
    """What calls the model, or a copy, on an example input again and again, in eval mode, without gradients.

    Args:
        model: The model.
        example_input: A tensor, a tuple of arguments or a mapping of keyword arguments.
        dtype: Dtype of autocast, or ``None``.
        compiled: Whether compiled code may run.
    """
    args, kwargs = call_arguments(example_input)
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    stance = "default" if compiled else "force_eager"
    with (
        _evaluating(model, stance),
        contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype),
    ):
        yield lambda callee: callee(*args, **kwargs)


def caller_of(model: nn.Module, module: nn.Module) -> nn.Module:
    """The module whose forward uses ``module``'s weight.

    That is ``module`` itself, but attention multiplies with the weight of its out_proj without calling it.
    """
    for parent in model.modules():
        if isinstance(parent, nn.MultiheadAttention) and parent.out_proj is module:
            return parent
    return module


def tokens(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Rows of input that meet ``module``'s weight: tokens of a linear layer, positions of a convolution."""
    input = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if input is None or not input.numel():
        return 0
    channels = module.in_channels if isinstance(module, nn.modules.conv._ConvNd) else input.shape[-1]
    return input.numel() // channels


def call_arguments(example_input: ExampleInput) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments of the call that an example input stands for."""
    if isinstance(example_input, Tensor):
        return (example_input,), {}
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    if isinstance(example_input, (tuple, list)):
        return tuple(example_input), {}
    raise TypeError(
        "example_input must be a Tensor, a tuple of arguments or a mapping of keyword arguments, "
        f"got {type(example_input).__name__}"
    )


@contextlib.contextmanager
def _evaluating(model: nn.Module, stance: str = "force_eager") -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        # Compiled code would not run the hooks of the modules in it.
        with torch.no_grad(), torch.random.fork_rng(), torch.compiler.set_stance(stance):
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """The fused transformer layer takes weights without calling the modules that hold them."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
