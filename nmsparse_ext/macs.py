"""Counts multiply-accumulates (the papers' "FLOPs") per weight, by running the model once on an example."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .registry import TypeTable
from .weights import weights


class Call(NamedTuple):
    """One call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def input(self) -> Tensor:
        """The first tensor that went in."""
        values = (*self.args, *self.kwargs.values())
        first = next(value for value in values if isinstance(value, (Tensor, PackedSequence)))
        return first.data if isinstance(first, PackedSequence) else first

    @property
    def rows(self) -> int:
        """How many vectors of features went in."""
        return math.prod(self.input.shape[:-1])


# (module, call) -> {parameter path below the module: MACs of this call}
Counter: TypeAlias = "Callable[[Any, Call], dict[str, int]]"


def count_macs(model: nn.Module, example_input: object) -> dict[str, int | None]:
    """Counts the multiply-accumulates of every weight for one call of the model.

    What the dense weight costs is counted; a pattern ``n:m`` leaves ``n / m`` of it. Biases, activations and
    attention scores are no products with a weight, and are not counted. The model runs in eval mode without
    gradients, and is left as it was.

    Args:
        model: The model, wrapped or not.
        example_input: A tensor, a tuple of arguments, or a mapping of keyword arguments. The result is for
            the whole batch.

    Returns:
        ``{canonical parameter name: MACs}`` for every parameter of two or more dims, in the order of the
        model; 0 if its module was not called, ``None`` if nobody has said how to count for its module type.

    Raises:
        TypeError: If ``example_input`` is none of the three.
    """
    args, kwargs = _arguments(example_input)
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), counting_macs(model) as macs:
            model(*args, **kwargs)
    finally:
        for module, mode in training.items():
            module.training = mode
    return macs


@contextlib.contextmanager
def counting_macs(model: nn.Module) -> Iterator[dict[str, int | None]]:
    """Counts the multiply-accumulates of whatever is called of a model in the block, as `count_macs` does.

    Args:
        model: The model, wrapped or not; compiled code runs eagerly meanwhile.

    Yields:
        The counts, which grow with every call.
    """
    listed = weights(model)
    names = {(id(module), attr): weight.name for weight in listed for module, attr in weight.places}
    owners = {id(module): module for weight in listed for module, _ in weight.places}
    known = {key: module for key, module in owners.items() if _COUNTERS.find(module) is not None}
    macs: dict[str, int | None] = {
        weight.name: 0 if all(id(module) in known for module, _ in weight.places) else None
        for weight in listed
    }

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        counter = _COUNTERS.find(module)
        assert counter is not None  # only such modules have the hook
        for path, number in counter(module, Call(args, kwargs, output)).items():
            owner, _, attr = path.rpartition(".")
            name = names.get((id(module.get_submodule(owner)), attr))
            so_far = None if name is None else macs[name]
            if name is not None and so_far is not None:
                macs[name] = so_far + number

    handles = [module.register_forward_hook(count, with_kwargs=True) for module in known.values()]
    try:
        # Compiled code would not run the hooks of the modules in it.
        with torch.compiler.set_stance("force_eager"):
            yield macs
    finally:
        for handle in handles:
            handle.remove()


def _arguments(example_input: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_input, Tensor):
        return (example_input,), {}
    if isinstance(example_input, tuple):
        return example_input, {}
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    raise TypeError(
        "example_input must be a Tensor, a tuple of arguments or a mapping of keyword arguments, "
        f"got {type(example_input).__name__}"
    )


def _linear(module: Any, call: Call) -> dict[str, int]:
    return {"weight": call.rows * module.weight.shape.numel()}


def _conv(module: Any, call: Call) -> dict[str, int]:
    # Every output sums over one filter [in / groups, kernel...]; padding counts like input.
    return {"weight": call.output.numel() * math.prod(module.weight.shape[1:])}


def _conv_transpose(module: Any, call: Call) -> dict[str, int]:
    # Every input spreads over [out / groups, kernel...]; what is cropped off counts too.
    return {"weight": call.input.numel() * math.prod(module.weight.shape[1:])}


def _attention(module: Any, call: Call) -> dict[str, int]:
    given = dict(zip(("query", "key", "value"), call.args, strict=False)) | call.kwargs
    sizes = {name: given[name].numel() for name in ("query", "key", "value")}
    counts = {f"{name[0]}_proj_weight": size * module.embed_dim for name, size in sizes.items()}
    counts["in_proj_weight"] = sum(counts.values())
    # out_proj's weight is used without calling out_proj, so no hook of its own counts it.
    counts["out_proj.weight"] = sizes["query"] * module.embed_dim
    return counts


def _recurrent(module: Any, call: Call) -> dict[str, int]:
    # Every weight of every layer and direction meets every time step once.
    return {name: call.rows * p.numel() for name, p in _own_parameters(module) if p.dim() == 2}


def _routed_experts(module: Any, call: Call) -> dict[str, int]:
    # forward(hidden_states, top_k_index, top_k_weights): every entry of the index is one token through one
    # expert. Where there is no index, the input already has a row for each of these.
    values = (*call.args, *call.kwargs.values())
    tensors = [value for value in values if isinstance(value, Tensor)]
    index = next((t for t in tensors if t.dim() >= 2 and not t.is_floating_point()), None)
    calls = call.rows if index is None else index.numel()
    return {name: calls * math.prod(p.shape[1:]) for name, p in _own_parameters(module) if p.dim() == 3}


def _shared_experts(module: Any, call: Call) -> dict[str, int]:
    # Every token goes through all of them.
    return {name: call.rows * p.numel() for name, p in _own_parameters(module) if p.dim() == 3}


def _nothing(module: Any, call: Call) -> dict[str, int]:
    return {}


def _own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False, remove_duplicate=False))


_COUNTERS: TypeTable[Counter] = TypeTable()
_COUNTERS[nn.Linear] = _linear
for _type in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    _COUNTERS[_type] = _conv
for _transposed in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    _COUNTERS[_transposed] = _conv_transpose
_COUNTERS[nn.MultiheadAttention] = _attention
_COUNTERS[nn.RNNBase] = _recurrent
_COUNTERS[nn.RNNCellBase] = _recurrent
for _embedding in (nn.Embedding, nn.EmbeddingBag):
    _COUNTERS[_embedding] = _nothing  # a look-up
_COUNTERS["transformers.pytorch_utils.Conv1D"] = _linear
_COUNTERS["transformers.models.inkling*.*SharedExperts"] = _shared_experts
_COUNTERS["transformers.models.*Experts"] = _routed_experts
_COUNTERS["transformers.models.aria.*ExpertsGemm"] = _routed_experts
