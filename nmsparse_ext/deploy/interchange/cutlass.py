"""PyTorch's 2:4 tensors in CUTLASS's layout, as ``SparseSemiStructuredTensorCUTLASS`` holds them.

Values are ``[rows, k / 2]`` in group order, as in our packed form. Metadata has our four bits a group too,
but in an order of its own (``_lt_layout.nibble_places``); float32 is 1:2, with 0x4 and 0xE for the first and
the second of two. So both directions move bits and never ask which values are zero: a kept -0.0 stays where
it is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from ... import _lt_layout as lt
from ...errors import FormatError
from ...tensor import NMTensor, compress
from ._containers import write_torch
from ._packing import as_hardware, in_form
from ._peer import PeerFormat, Reading, Source, Writing

_META_DTYPES = {
    torch.int8: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int16,
}
# Which nibbles are two different indices in ascending order.
_LEGAL = (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)


def from_cutlass(packed: Tensor, meta: Tensor, name: str = "weight") -> NMTensor:
    """Reads a weight in CUTLASS's layout.

    Args:
        packed: ``[rows, k / 2]``, int8, float16, bfloat16 or float32.
        meta: Reordered metadata, int32 for int8 weights, else int16, of any shape: four bits for each group.
        name: What messages call it.

    Returns:
        The weight ``[rows, k]``, 2:4 (float32: 1:2).

    Raises:
        FormatError: If sizes or dtypes do not fit, or the metadata places two values at one position.
    """
    if packed.dtype not in _META_DTYPES or packed.dim() != 2:
        raise FormatError(f"{name}: {packed.dtype} {list(packed.shape)} is no weight that CUTLASS packs")
    rows, k = packed.shape[0], packed.shape[1] * 2
    pattern = lt.hardware_pattern(packed.dtype)
    row_multiple, k_multiple = lt.layout_multiples("cutlass", packed.dtype)
    if rows % row_multiple or k % k_multiple:
        raise FormatError(
            f"{name}: sizes of {packed.dtype} must be multiples of [{row_multiple}, {k_multiple}], "
            f"got [{rows}, {k}]"
        )
    groups = k // pattern.m
    if meta.dtype != _META_DTYPES[packed.dtype] or meta.nbytes * 2 != rows * groups:
        raise FormatError(
            f"{name}: metadata must be {rows * groups // 2} bytes of {_META_DTYPES[packed.dtype]}, "
            f"got {meta.nbytes} of {meta.dtype}"
        )
    return read_nibbles(packed, meta.contiguous().view(torch.uint8), "cutlass", name)


def read_nibbles(packed: Tensor, metadata: Tensor, layout: str, name: str) -> NMTensor:
    """Puts a weight together from values and four bits a group in the order of ``layout``.

    Args:
        packed: ``[rows, k / 2]``.
        metadata: uint8, half a byte a group.
        layout: One of ``_lt_layout.LAYOUTS``.
        name: What messages call it.

    Raises:
        FormatError: If a nibble is no choice of two (float32: one).
    """
    rows, k = packed.shape[0], packed.shape[1] * 2
    pattern = lt.hardware_pattern(packed.dtype)
    groups = k // pattern.m
    metadata = metadata.flatten().to(packed.device)
    nibbles = torch.stack([metadata & 0xF, metadata >> 4], -1).flatten()
    nibbles = nibbles[lt.nibble_places(layout, packed.dtype, rows, groups, packed.device)]
    packed = packed.contiguous()
    if pattern.m == 2:
        bad = (nibbles != 0x4) & (nibbles != 0xE)
        _refuse(bad, name)
        indices = _pack_bits((nibbles == 0xE).to(torch.uint8), 2)
    else:
        if not torch.isin(nibbles, torch.tensor(_LEGAL, dtype=torch.uint8, device=nibbles.device)).all():
            return _unordered(packed, nibbles, name)
        indices = _pack_bits(nibbles, 4)
    return NMTensor.from_packed(packed, indices, pattern, group_dim=1, shape=(rows, k))


def _unordered(packed: Tensor, nibbles: Tensor, name: str) -> NMTensor:
    """What kernels that prune on the fly write: equal or descending indices, one of the values then zero."""
    rows, groups = nibbles.shape
    place = torch.stack([nibbles & 3, nibbles >> 2], -1).long()
    values = packed.view(rows, groups, 2)
    # A value of zero gives way; float8 does not come here.
    first = torch.tensor([0, 1], device=packed.device)
    order = torch.where(values[..., :1] != 0, 1 - first, first)
    _refuse((place[..., 0] == place[..., 1]) & (values != 0).all(-1), name)
    dense = torch.zeros(rows, groups, 4, dtype=packed.dtype, device=packed.device)
    for i in range(2):  # the one that counts comes last
        slot = order[..., i : i + 1]
        dense.scatter_(-1, place.gather(-1, slot), values.gather(-1, slot))
    return compress(dense.view(rows, groups * 4), "2:4")


def _refuse(bad: Tensor, name: str) -> None:
    if bad.any():
        row, group = bad.nonzero()[0].tolist()
        raise FormatError(f"{name}: the metadata of group {group} of row {row} is no choice within the group")


def _pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 ``[rows, groups]`` of that many bits each -> ``[rows, bytes]``, low bits first."""
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each)).unflatten(1, (-1, each))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes << shifts).sum(-1, dtype=torch.uint8)


def to_cutlass(weight: NMTensor) -> tuple[Tensor, Tensor]:
    """Writes a weight in CUTLASS's layout; the inverse of `from_cutlass`.

    Args:
        weight: ``[rows, k]``, grouped along k, 2:4 (float32: 1:2).

    Returns:
        ``packed [rows, k / 2]`` and ``meta [rows, groups / 4]`` (int8: ``[rows, groups / 8]``).

    Raises:
        ValueError: If dtype or sizes will not do.
    """
    return split_blob(weight, "cutlass")


def split_blob(weight: NMTensor, layout: str) -> tuple[Tensor, Tensor]:
    """The values of a weight, and its metadata in the order of ``layout``."""
    rows = weight.dense_shape()[0]
    try:
        blob = torch.ops.nmsparse.lt_pack(
            weight.values.contiguous(), weight.indices.contiguous(), weight.k, layout
        )
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    metadata = blob[weight.values.nbytes :]
    dtype = _META_DTYPES.get(weight.dtype, torch.int16)
    # Memory of their own: torch.save refuses two dtypes in one.
    return weight.values.contiguous().view(rows, -1), metadata.clone().view(dtype).view(rows, -1)


def fits(weight: NMTensor, layout: str) -> bool:
    """Whether the sizes of a weight are such that it can have that layout."""
    row_multiple, k_multiple = lt.layout_multiples(layout, weight.dtype)
    rows, k = weight.dense_shape()
    return bool(row_multiple) and rows % row_multiple == 0 and k % k_multiple == 0


def parts_of(tensor: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """``packed`` and ``meta`` of a semi-structured tensor, of which a damaged file may lack any."""
    packed, meta = getattr(tensor, "packed", None), getattr(tensor, "meta", None)
    return (
        packed.detach() if isinstance(packed, Tensor) else None,
        meta.detach() if isinstance(meta, Tensor) else None,
    )


def semi_structured(cls: type, shape: tuple[int, ...], packed: Tensor, meta: Tensor | None) -> Tensor:
    """A semi-structured tensor of PyTorch from its parts; unlike its own constructors also on the CPU."""
    parts = dict.fromkeys(("packed_t", "meta_t", "compressed_swizzled_bitmask"))
    tensor: Tensor = cls(torch.Size(shape), packed=packed, meta=meta, **parts)
    return tensor


def _read(source: Source, reading: Reading) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        if not isinstance(tensor, SparseSemiStructuredTensorCUTLASS):
            result[name] = tensor
            continue
        packed, meta = parts_of(tensor)
        if packed is None or meta is None:
            raise FormatError(f"{name}: has no packed values and metadata, only the transposed ones if any")
        weight = from_cutlass(packed, meta, name)
        if tuple(tensor.shape) != weight.dense_shape():
            raise FormatError(f"{name}: has shape {list(tensor.shape)}, but values of {weight.dense_shape()}")
        result[name] = weight
    return result


def _semi_structured(name: str, weight: NMTensor) -> dict[str, Tensor] | None:
    hardware = as_hardware(weight) if weight.dtype in _META_DTYPES else None
    if hardware is None or not fits(hardware, "cutlass"):
        return None
    packed, meta = to_cutlass(hardware)
    return {name: semi_structured(SparseSemiStructuredTensorCUTLASS, hardware.dense_shape(), packed, meta)}


def _write(writing: Writing) -> dict[str, Tensor]:
    result = in_form(writing.tensors, _semi_structured)
    write_torch(result, writing.destination)
    return result


CUTLASS = PeerFormat(
    name="pytorch-cutlass",
    title="PyTorch's SparseSemiStructuredTensorCUTLASS",
    recognises=lambda source: any(
        isinstance(tensor, SparseSemiStructuredTensorCUTLASS) for tensor in source.tensors.values()
    ),
    read=_read,
    write=_write,
    verified="torch.sparse._semi_structured_conversions and SparseSemiStructuredTensorCUTLASS, every element",
    lossy="packed transposes of training; writing leaves weights dense that are not 2-D, do not embed in 2:4 "
    "(float32: 1:2), or whose sizes do not fit",
)
