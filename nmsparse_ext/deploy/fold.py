"""Folding batch normalisations into the convolutions before them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..tensor import NMTensor
from .example import ExampleInput, run_example

_Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

#: What a tensor may be asked without anything of it being computed with.
_QUESTIONS: frozenset[Any] = frozenset(
    {
        Tensor.dim,
        Tensor.size,
        Tensor.stride,
        Tensor.is_floating_point,
        Tensor.is_contiguous,
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda")),
    }
)


def fold_batch_norm(model: nn.Module, example_input: ExampleInput) -> list[str]:
    """Folds batch normalisations in eval mode into the convolutions before them; do so before `convert`.

    A packed convolution then does the work of both. Kernels are scaled one output channel at a time, so zeros
    stay zeros and patterns hold. The folded norms become ``nn.Identity`` and the convolutions get a bias: the
    model is for inference from then on, and its state dict has other keys.

    Which norm follows which convolution is seen on one run of the model, in eval mode: a norm is folded where
    all it ever gets is the output of one convolution, which nothing else uses. Code that takes other ways on
    other inputs cannot be seen; neither can uses from inside of C++.

    Args:
        model: The model; changed in place.
        example_input: A tensor, a tuple of arguments or a mapping of keyword arguments.

    Returns:
        Names of the norms that were folded.

    Raises:
        TypeError: If an argument is of the wrong type.

    Equivalent to ``torch.nn.utils.fusion.fuse_conv_bn_weights`` for each of these pairs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    folded = []
    for conv, norm in _pairs(model, example_input):
        weight: Tensor
        bias: Tensor
        weight, bias = torch.nn.utils.fusion.fuse_conv_bn_weights(
            conv.weight,
            conv.bias,
            _present(norm.running_mean),
            _present(norm.running_var),
            norm.eps,
            norm.weight,
            norm.bias,
        )
        trained = conv.weight.requires_grad
        if conv.weight.dim() == 4 and conv.weight.is_contiguous(memory_format=torch.channels_last):
            weight = weight.contiguous(memory_format=torch.channels_last)
        conv.weight = nn.Parameter(weight.detach(), trained)
        conv.bias = nn.Parameter(bias.detach().to(weight.dtype), trained)
        for name in names[norm]:
            parent, _, attr = name.rpartition(".")
            setattr(model.get_submodule(parent), attr, nn.Identity().train(norm.training))
        folded.append(names[norm][0])
    return folded


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # checked by _may_fold
    return tensor


def _may_fold(conv: nn.Module, norm: nn.Module, users: dict[int, int]) -> bool:
    """Whether the parameters of the two allow it. Hooks of others would see something else afterwards."""
    if not isinstance(conv, _CONVS) or not isinstance(norm, _NORMS):
        return False
    if norm.running_mean is None or norm.running_var is None or isinstance(conv.weight, NMTensor):
        return False
    if "weight" not in conv._parameters:  # computed from other parameters
        return False
    parameters = [p for module in (conv, norm) for p in module.parameters()]
    shared = any(users[id(parameter)] > 1 for parameter in parameters)
    hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in (conv, norm))
    return not shared and not hooked


def _pairs(model: nn.Module, example_input: ExampleInput) -> list[tuple[_Conv, Any]]:
    """All ``(convolution, norm)`` of which the norm can be folded."""
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    watched = [module for module in model.modules() if isinstance(module, (*_CONVS, *_NORMS))]
    free = {module for module in watched if not (module._forward_hooks or module._forward_pre_hooks)}
    with _Watch(watched) as watch:
        # The model's own outputs are uses too.
        handle = model.register_forward_hook(lambda _module, _args, output: watch.use(output))
        try:
            run_example(model, example_input, {})
        finally:
            handle.remove()
    return [pair for pair in watch.pairs() if set(pair) <= free and _may_fold(*pair, users)]


class _Watch(TorchFunctionMode):
    """Follows the outputs of convolutions to whoever uses them."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self._modules = modules
        self._handles: list[Any] = []
        self._running: list[nn.Module] = []  # the norm whose forward runs
        self._alive: list[Tensor] = []  # so that no id is given out twice
        self._producer: dict[int, nn.Module] = {}  # id of an output -> its convolution
        self._uses: dict[int, list[nn.Module | None]] = {}  # id of an output -> norms; None: anybody else
        self._inputs: dict[nn.Module, list[int]] = {}  # norm -> ids of what it got

    def __enter__(self) -> _Watch:
        for module in self._modules:
            if isinstance(module, _CONVS):
                self._handles.append(module.register_forward_hook(self._produced))
            else:
                self._handles.append(module.register_forward_pre_hook(self._norm_begins))
                self._handles.append(module.register_forward_hook(self._norm_ends))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _QUESTIONS:
            self.use((args, kwargs))
        return func(*args, **(kwargs or {}))

    def use(self, values: Any) -> None:
        """Notes a use of every output of a convolution among ``values``."""
        for value in pytree.tree_leaves(values):
            if isinstance(value, Tensor) and id(value) in self._producer:
                self._uses[id(value)].append(self._running[-1] if self._running else None)

    def pairs(self) -> list[tuple[Any, Any]]:
        """Convolutions and norms that have nobody but each other."""
        found: dict[nn.Module, nn.Module] = {}
        outputs: dict[nn.Module, list[int]] = {}
        for output, producer in self._producer.items():
            outputs.setdefault(producer, []).append(output)
        for norm, inputs in self._inputs.items():
            convs = {self._producer.get(id_) for id_ in inputs}
            conv = convs.pop()
            if convs or conv is None:
                continue
            if set(outputs[conv]) == set(inputs) and all(self._uses[output] == [norm] for output in inputs):
                found[norm] = conv
        return [(conv, norm) for norm, conv in found.items()]

    def _produced(self, conv: nn.Module, args: tuple, output: Tensor) -> None:
        self._alive.append(output)
        self._producer[id(output)] = conv
        self._uses[id(output)] = []

    def _norm_begins(self, norm: nn.Module, args: tuple) -> None:
        self._inputs.setdefault(norm, []).append(id(args[0]) if args else 0)
        self._running.append(norm)

    def _norm_ends(self, norm: nn.Module, args: tuple, output: Tensor) -> None:
        self._running.pop()
