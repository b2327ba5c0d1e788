"""cuSPARSELt's compressed weights, as ``SparseSemiStructuredTensorCUSPARSELT`` holds them.

The library does not say what its form looks like. Two 16-bit layouts are known in closed form (``"sm80"`` and
``"sm90"``, see ``_lt_layout``): with ``layout`` named, blobs are read and written on the CPU. On a GPU the
library itself is asked: reading multiplies with the unit matrix, writing calls ``torch._cslt_compress``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

from ... import _lt_layout as lt
from ...errors import FormatError
from ...tensor import NMTensor, compress
from ._containers import write_torch
from ._packing import as_hardware, in_form
from ._peer import PeerFormat, Reading, Source, Writing
from .cutlass import fits, parts_of, read_nibbles, semi_structured, split_blob

LAYOUTS = ("sm80", "sm90")


def from_cusparselt(blob: Tensor, shape: tuple[int, int], layout: str, name: str = "weight") -> NMTensor:
    """Reads a 16-bit weight from the library's form.

    Args:
        blob: Values and then metadata, of the weight's dtype and any shape.
        shape: ``(rows, k)`` of the dense weight.
        layout: ``"sm80"`` or ``"sm90"``: the GPU that it was made on.
        name: What messages call it.

    Raises:
        FormatError: If sizes or dtype do not fit, or the metadata is not of that layout.
        ValueError: If there is no such layout.
    """
    _check_layout(layout)
    rows, k = shape
    row_multiple, k_multiple = lt.layout_multiples(layout, blob.dtype)
    if not row_multiple or rows % row_multiple or k % k_multiple or not rows or not k:
        raise FormatError(
            f"{name}: layout {layout} is known for 16-bit weights with sizes in multiples of "
            f"[{row_multiple or 64}, {k_multiple or 64}], got {blob.dtype} [{rows}, {k}]"
        )
    values, metadata = rows * k // 2, rows * k // 8
    flat = blob.detach().contiguous().flatten()
    if flat.nbytes < values * 2 + metadata:
        raise FormatError(f"{name}: must have at least {values * 2 + metadata} bytes, got {flat.nbytes}")
    packed = flat[:values].view(rows, k // 2)
    return read_nibbles(packed, flat[values:].view(torch.uint8)[:metadata], layout, name)


def to_cusparselt(weight: NMTensor, layout: str) -> Tensor:
    """Writes a 16-bit 2:4 weight in the library's form; the inverse of `from_cusparselt`.

    Returns:
        ``[rows, 9 k / 16]`` of the weight's dtype: values, then metadata.

    Raises:
        ValueError: If there is no such layout, or dtype or sizes will not do.
    """
    _check_layout(layout)
    values, metadata = split_blob(weight, layout)
    flat = torch.cat([values.flatten().view(torch.uint8), metadata.flatten().view(torch.uint8)])
    return flat.view(weight.dtype).view(weight.dense_shape()[0], -1)


def _check_layout(layout: object) -> None:
    if layout not in LAYOUTS:
        raise ValueError(
            f"layout must be one of {LAYOUTS}, the GPU that the blob is of, got {layout!r}; without one the "
            "library is asked, which takes a GPU"
        )


def _read(source: Source, reading: Reading) -> dict[str, Tensor]:
    layout = reading.options.get("layout")
    result: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        if not isinstance(tensor, SparseSemiStructuredTensorCUSPARSELT):
            result[name] = tensor
            continue
        packed, _ = parts_of(tensor)
        if packed is None or tensor.dim() != 2:
            raise FormatError(f"{name}: has no packed matrix, only the transposed one if any")
        if layout is not None or not packed.is_cuda:
            rows, k = tensor.shape
            result[name] = from_cusparselt(packed, (rows, k), layout, name)  # type: ignore[arg-type]
        else:
            result[name] = compress(tensor.to_dense(), lt.hardware_pattern(tensor.dtype))
    return result


def _write(writing: Writing) -> dict[str, Tensor]:
    layout = writing.options.get("layout")

    def semi_structured_or_dense(name: str, weight: NMTensor) -> dict[str, Tensor] | None:
        hardware = as_hardware(weight)
        blob = None if hardware is None else _blob(hardware, layout)
        if hardware is None or blob is None:
            return None
        cls = SparseSemiStructuredTensorCUSPARSELT
        return {name: semi_structured(cls, hardware.dense_shape(), blob, None)}

    result = in_form(writing.tensors, semi_structured_or_dense)
    write_torch(result, writing.destination)
    return result


def _blob(weight: NMTensor, layout: str | None) -> Tensor | None:
    """The library's form of a 2:4 weight; ``None`` if it has none here."""
    on_gpu = weight.values.is_cuda
    if weight.dtype in (torch.float16, torch.bfloat16) and (layout is not None or not on_gpu):
        _check_layout(layout)
        return to_cusparselt(weight, str(layout)) if fits(weight, str(layout)) else None
    return torch._cslt_compress(weight.to_dense()) if on_gpu and layout is None else None


CUSPARSELT = PeerFormat(
    name="cusparselt",
    title="PyTorch's SparseSemiStructuredTensorCUSPARSELT",
    recognises=lambda source: any(
        isinstance(tensor, SparseSemiStructuredTensorCUSPARSELT) for tensor in source.tensors.values()
    ),
    read=_read,
    write=_write,
    options=frozenset({"layout"}),
    verified="the closed forms against each other and element by element on the CPU; against the library in "
    "tests/gpu",
    lossy="blobs are of one GPU generation; without a GPU only 16-bit weights of the two known layouts",
)
