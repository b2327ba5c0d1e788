"""ONNX: a packed model exported with its zeros in place, so that TensorRT can pick its sparse kernels.

ONNX has no sparse weights that engines multiply with. TensorRT looks at dense ones: with ``kSPARSE_WEIGHTS``
it takes sparse kernels for convolutions and matrix products whose weight is 2:4 along its inputs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ..._atomic import atomic_write
from ..._checks import WEIGHT_DTYPES
from ...errors import FormatError
from ...tensor import NMTensor
from ...weights import canonical_name
from ..detect import has_nonzero
from ..example import call_arguments
from ._packing import dense, pack_dense
from ._peer import PeerFormat, Reading, Source, Writing

_SUFFIX = ".onnx"


@dataclass(frozen=True)
class OnnxWeight:
    """One weight of an exported model.

    Attributes:
        name: The initializer's name.
        op: The operator that multiplies with it: Conv, ConvTranspose, Gemm or MatMul.
        axis: The dim of its inputs, along which TensorRT wants 2:4.
        shape: Its shape in the graph, which may be the transposed one.
        is_24: Whether it is 2:4 along that axis.
        why_not: Why TensorRT will hardly run it sparse; ``None`` if nothing is known against it.
    """

    name: str
    op: str
    axis: int
    shape: tuple[int, ...]
    is_24: bool
    why_not: str | None


def export_onnx(
    model: nn.Module,
    example_input: Any,
    path: str | os.PathLike[str],
    **kwargs: Any,
) -> list[OnnxWeight]:
    """Exports a model to ONNX, its packed weights as dense ones with zeros.

    The dense weights exist only during the export; the model is not changed. Equivalent to
    ``torch.onnx.export(dense_model, args, path, dynamo=True)``, which writes the file in one step.

    Args:
        model: The model, packed or not; what it computes in eval mode is exported.
        example_input: A Tensor, a tuple of args or a mapping of kwargs.
        path: The ``*.onnx`` file; replaced if it exists.
        **kwargs: Further arguments of ``torch.onnx.export``, such as ``dynamic_shapes``, ``opset_version``.

    Returns:
        What TensorRT would find: every weight of a convolution or matrix product, in the order of the graph.

    Raises:
        TypeError: If an argument is of the wrong type.
        ImportError: If ``onnx`` or ``onnxscript`` is not installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    args, named = call_arguments(example_input)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with densified(model), torch.no_grad():
            program = torch.onnx.export(
                model, args, kwargs=named, dynamo=True, verbose=False, **{"optimize": True, **kwargs}
            )
    finally:
        for module, mode in training.items():  # frozen batch norms stay in eval mode
            module.training = mode
    assert program is not None  # so it is with dynamo=True
    proto = program.model_proto
    with atomic_write(path) as file:
        file.write(proto.SerializeToString())
        file.flush()
    return sparse_weights(proto)


@contextlib.contextmanager
def densified(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
    """Has dense weights in a model for the time of the block; tied ones stay tied.

    Args:
        model: The model.
        tensors: Weights and buffers by name, packed or not, to stand in for the model's own.

    Raises:
        ValueError: If ``tensors`` lacks one of the model's, or has it in another shape.
    """
    swapped: list[tuple[nn.Module, str, Tensor]] = []
    made: dict[int, Tensor] = {}
    try:
        for path, module in model.named_modules():
            entries = [*module.named_parameters(recurse=False)]
            if tensors is not None:
                unsaved = module._non_persistent_buffers_set
                entries += [entry for entry in module.named_buffers(recurse=False) if entry[0] not in unsaved]
            for name, own in entries:
                given = own if tensors is None else _given(f"{path}.{name}" if path else name, own, tensors)
                if given is own and not isinstance(own, NMTensor):
                    continue
                if id(given) not in made:
                    new = dense(given).to(device=own.device, dtype=own.dtype)
                    made[id(given)] = (
                        nn.Parameter(new, requires_grad=False) if isinstance(own, nn.Parameter) else new
                    )
                swapped.append((module, name, own))
                setattr(module, name, made[id(given)])
        yield model
    finally:
        for module, name, own in swapped:
            setattr(module, name, own)


def _given(path: str, own: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    name = canonical_name(path)
    if name not in tensors:
        raise ValueError(f"model has {name}, but the tensors do not")
    if tuple(tensors[name].shape) != tuple(own.shape):
        raise ValueError(
            f"{name} has shape {list(own.shape)} in the model, {list(tensors[name].shape)} in the tensors"
        )
    return tensors[name]


def sparse_weights(proto: Any) -> list[OnnxWeight]:
    """Lists the weights of convolutions and matrix products in an ONNX model, and which are 2:4.

    Args:
        proto: An ``onnx.ModelProto``.
    """
    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    found: dict[str, OnnxWeight] = {}
    for node, name, axis in _products(proto.graph):
        if name in initializers and name not in found:
            weight = _tensor(initializers[name])
            if 2 <= weight.dim() <= 5 and weight.dtype in WEIGHT_DTYPES:
                found[name] = _judged(name, node, axis % weight.dim(), weight)
    return list(found.values())


def _judged(name: str, node: Any, axis: int, weight: Tensor) -> OnnxWeight:
    group = next((a.i for a in node.attribute if a.name == "group"), 1)
    k = weight.shape[axis]
    is_24 = k % 4 == 0 and has_nonzero(weight) and ops.find_violation(weight, "2:4", dim=axis) is None
    reason = None
    if node.op_type == "ConvTranspose":
        reason = "transposed convolutions have no sparse kernels"
    elif group != 1:
        reason = f"a convolution in {group} groups has no sparse kernels"
    elif k % 4:
        reason = f"{k} inputs are no multiple of 4"
    elif not is_24:
        reason = "it is not 2:4 along its inputs"
    return OnnxWeight(name, node.op_type, axis, tuple(weight.shape), is_24, reason)


def _products(graph: Any) -> Iterator[tuple[Any, str, int]]:
    """``(node, initializer, dim of the inputs)`` of everything that multiplies with a weight."""
    # What is transposed on the way counts as the weight itself, the other way round.
    turned = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Transpose" and _last_two_swapped(node)
    }
    for node in graph.node:
        if node.op_type == "Conv" and len(node.input) > 1:
            yield node, node.input[1], 1
        elif node.op_type == "ConvTranspose" and len(node.input) > 1:
            yield node, node.input[1], 0
        elif node.op_type in ("Gemm", "MatMul") and len(node.input) > 1:
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            name = node.input[1]
            if name in turned:
                name, transposed = turned[name], not transposed
            yield node, name, -1 if transposed else -2


def _last_two_swapped(node: Any) -> bool:
    perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), [1, 0])
    rank = len(perm)
    return rank >= 2 and perm == [*range(rank - 2), rank - 1, rank - 2]


def _tensor(initializer: Any, folder: str = "") -> Tensor:
    import onnx

    array = onnx.numpy_helper.to_array(initializer, folder)
    if initializer.data_type in (onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT8E4M3FN):
        raw, dtype = ("int16", torch.bfloat16) if array.itemsize == 2 else ("int8", torch.float8_e4m3fn)
        return torch.from_numpy(array.view(raw).copy()).view(dtype)
    return torch.from_numpy(array.copy())


def _read(source: Source, reading: Reading) -> dict[str, Tensor]:
    import onnx

    try:
        proto = onnx.load(source.path)
        tensors = {tensor.name: _tensor(tensor) for tensor in proto.graph.initializer}
    except Exception as error:  # protobuf's, onnx's and NumPy's, of a file that may hold anything
        raise FormatError(f"{source.path}: no valid ONNX model: {error}") from error
    axes = {name: axis for _, name, axis in _products(proto.graph)}
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        fits = name in axes and 2 <= tensor.dim() <= 5 and tensor.dtype in WEIGHT_DTYPES
        group_dim = axes[name] % tensor.dim() if fits else None
        result[name] = pack_dense(name, tensor, reading, group_dim, prune=bool(reading.prune))
    return result


def _write(writing: Writing) -> dict[str, Tensor]:
    example = writing.options.get("example_input")
    if writing.model is None or example is None or writing.destination is None:
        raise ValueError("destination, model and example_input must be given: ONNX holds a graph")
    with densified(writing.model, writing.tensors):
        export_onnx(writing.model, example, writing.destination)
    return {name: dense(tensor) for name, tensor in writing.tensors.items()}


ONNX = PeerFormat(
    name="onnx",
    title="ONNX with zeros in place, for TensorRT",
    recognises=lambda source: source.path.endswith(_SUFFIX),
    read=_read,
    write=_write,
    options=frozenset({"example_input"}),
    verified="onnxruntime: same outputs; onnx.checker",
    lossy="packing: weights are dense in the file; names of weights that the exporter folds or transposes",
)
