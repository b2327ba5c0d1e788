"""What a model is run on: its own example input, in the size that was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nmsparse_ext.recipes.searched import Searched

BatchOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="How many inputs at a time. By default what the model's example has; of a file 1.",
        show_default=False,
    ),
]
TokensOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens of each input, for models of text and for files. By default 128 for transformers' "
        "models, of a file 1.",
        show_default=False,
    ),
]


def example_for(found: Searched, batch: int | None, tokens: int | None, argument: str) -> Any:
    """The model's example input, repeated or cut to ``batch`` inputs of ``tokens`` tokens.

    Args:
        found: The model.
        batch: Size of dim 0 of its tensors; ``None`` leaves it.
        tokens: Size of dim 1 of its tensors of token ids; ``None`` leaves it.
        argument: What the user called the model, for errors.

    Raises:
        ValueError: If nothing is known that the model could be called with, or it takes no tokens.
    """
    import torch

    from nmsparse_ext.cli.tensor_model import TensorModel

    if isinstance(found.model, TensorModel):
        if not any(found.model.linear_layers()):
            raise ValueError(
                f"{argument} holds no linear layers, and of others a file does not say how large their "
                "inputs are: give the model, as pkg.mod:factory or transformers folder"
            )
        return torch.empty((batch or 1) * (tokens or 1), 0)
    example = found.example_input
    if example is None:
        raise ValueError(
            f"{argument}: nothing is known that this model could be called with; a factory may return "
            "(model, example_input)"
        )
    if tokens is not None and not any(map(_is_ids, _tensors(example))):
        raise ValueError(f"--tokens: {argument} is called with no token ids [batch, tokens]")
    return _map(example, lambda t: _sized(t, batch, tokens))


@contextmanager
def running(argument: str) -> Iterator[None]:
    """Turns what a model raises when it is run into an error that names it.

    Raises:
        ValueError: In place of it.
    """
    try:
        yield
    except (RuntimeError, IndexError, AttributeError, KeyError, AssertionError, TypeError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{argument} does not run on its example input: {type(error).__name__}: "
            f"{reason[0] if reason else ''}"
        ) from error


def unpack(model: nn.Module) -> nn.Module:
    """Replaces packed weights by dense ones, which others are to be compared with; in place."""
    from torch import nn

    from nmsparse_ext import NMTensor
    from nmsparse_ext.weights import weights

    for weight in weights(model):
        if isinstance(weight.parameter, NMTensor):
            dense = nn.Parameter(weight.parameter.detach().to_dense(), requires_grad=False)
            for module, attr in weight.places:
                setattr(module, attr, dense)
    return model


def _is_ids(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_floating_point()


def _sized(tensor: Tensor, batch: int | None, tokens: int | None) -> Tensor:
    sizes = [batch if tensor.dim() else None, tokens if _is_ids(tensor) else None]
    for dim, size in enumerate(sizes):
        if size is not None:
            import torch

            tensor = tensor.index_select(dim, torch.arange(size) % tensor.shape[dim])
    return tensor


def _tensors(example: Any) -> Iterator[Tensor]:
    import torch

    if isinstance(example, torch.Tensor):
        yield example
    elif isinstance(example, (Mapping, tuple, list)):
        for item in example.values() if isinstance(example, Mapping) else example:
            yield from _tensors(item)


def _map(example: Any, change: Any) -> Any:
    import torch

    if isinstance(example, torch.Tensor):
        return change(example)
    if isinstance(example, Mapping):
        return {key: _map(item, change) for key, item in example.items()}
    if isinstance(example, (tuple, list)):
        return type(example)(_map(item, change) for item in example)
    return example
