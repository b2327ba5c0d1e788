"""Checkpoints of compressed-tensors (llm-compressor): ``sparse-24-bitmask`` and ``sparse-bitmask``.

A weight ``<module>.weight`` is stored as ``<module>.compressed`` (kept values in row order),
``<module>.bitmask`` (uint8 ``[rows, ceil(k / 8)]``, one bit a weight, low bits first) and ``<module>.shape``;
``sparse-bitmask`` is unstructured, has ``row_offsets`` too, and before 0.9 the whole name of the weight in
front. ``config.json`` has ``quantization_config.sparsity_config`` (older: ``compression_config``, or
``sparsity_config`` on top).

Releases from 0.15 on have only the names of both formats left, and refuse to load such checkpoints.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import Tensor

from ..._atomic import atomic_write
from ...errors import FormatError
from ...pattern import Pattern
from ...tensor import NMTensor
from ..format import brief
from ..shards import read_config
from ._containers import write_plain
from ._packing import as_pattern, dense, mask_of, pack_dense
from ._peer import PeerFormat, Reading, Source, Writing

FORMAT_24 = "sparse-24-bitmask"
FORMAT_ANY = "sparse-bitmask"
#: What our files say they are written by: a release that reads them.
VERSION = "0.13.0"
_PARTS = ("shape", "compressed", "bitmask", "row_offsets")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)


def sparsity_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """What ``config.json`` says of sparsity; ``None`` if nothing."""
    for place in (config.get("quantization_config"), config.get("compression_config"), config):
        if isinstance(place, dict) and isinstance(place.get("sparsity_config"), dict):
            found: dict[str, Any] = place["sparsity_config"]
            if found and found.get("format") not in (None, "dense"):
                return found
    return None


def _recognises(source: Source) -> bool:
    config = sparsity_config(source.config)
    return (config is not None and config.get("format") in (FORMAT_24, FORMAT_ANY)) or any(
        name.endswith(".bitmask") and name.removesuffix("bitmask") + "compressed" in source.tensors
        for name in source.tensors
    )


def _read(source: Source, reading: Reading) -> dict[str, Tensor]:
    config = sparsity_config(source.config)
    if config is not None and config.get("format") not in (FORMAT_24, FORMAT_ANY):
        raise FormatError(
            f"sparsity format must be {FORMAT_24} or {FORMAT_ANY}, got {brief(config['format'])}"
        )
    result = dict(source.tensors)
    known = reading.weights()
    for prefix in [n.removesuffix(".bitmask") for n in source.tensors if n.endswith(".bitmask")]:
        parts = {part: result.pop(f"{prefix}.{part}", None) for part in _PARTS}
        missing = [part for part in _PARTS[:3] if parts[part] is None]
        if missing:
            raise FormatError(f"{prefix}: has a bitmask, but no {', '.join(missing)}")
        name = prefix if prefix.endswith(".weight") else f"{prefix}.weight"
        if name in result:
            raise FormatError(f"{name!r} is stored both compressed and dense")
        shape = _shape(parts["shape"], name)
        bits = _checked_bits(parts["bitmask"], shape, name)
        values = parts["compressed"]
        if values.dim() == 2:
            result[name] = from_bitmask24(values, bits, shape, name)
        else:
            weight = _scatter(values, bits, shape, name)
            group_dim = reading.group_dim(name, weight, known)
            result[name] = pack_dense(name, weight, reading, group_dim, prune=False)
    return result


def _shape(stored: Tensor, name: str) -> tuple[int, int]:
    if (
        stored.dtype != torch.int64
        or stored.numel() != 2
        or not all(0 < n < 1 << 40 for n in stored.flatten())
    ):
        raise FormatError(f"{name}: shape must hold two sizes, got {brief(stored.flatten()[:8].tolist())}")
    rows, k = stored.flatten().tolist()
    return rows, k


def _checked_bits(bits: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    rows, k = shape
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (rows, -(-k // 8)):
        raise FormatError(
            f"{name}: bitmask must be uint8 {[rows, -(-k // 8)]} for shape {[rows, k]}, "
            f"got {bits.dtype} {list(bits.shape)}"
        )
    if k % 8 and bool((bits[:, -1] >> k % 8).any()):
        raise FormatError(f"{name}: the bitmask has bits set behind the end of a row")
    return bits


def from_bitmask24(values: Tensor, bits: Tensor, shape: tuple[int, int], name: str = "weight") -> NMTensor:
    """Reads a 2:4 weight from a bitmask; values stay as they are, only the bits become indices.

    Args:
        values: ``[rows, k / 2]``.
        bits: uint8 ``[rows, ceil(k / 8)]``.
        shape: ``(rows, k)``.
        name: What messages call it.

    Raises:
        FormatError: If sizes or dtype do not fit, or a group has not exactly two bits.
    """
    rows, k = shape
    if values.dtype not in _DTYPES or k % 4 or tuple(values.shape) != (rows, k // 2):
        raise FormatError(
            f"{name}: values must be [rows, k / 2] of a weight's dtype for shape {[rows, k]}, "
            f"got {values.dtype} {list(values.shape)}"
        )
    # Index nibbles by bit nibbles; 0 is none.
    table = torch.zeros(16, dtype=torch.uint8, device=bits.device)
    for low in range(4):
        for high in range(low + 1, 4):
            table[1 << low | 1 << high] = low | high << 2
    both = torch.stack([bits & 0xF, bits >> 4], -1).flatten(1)[:, : k // 4]
    nibbles = table[both.long()]
    if not bool(nibbles.all()):
        row, group = (nibbles == 0).nonzero()[0].tolist()
        raise FormatError(f"{name}: group {group} of row {row} has not exactly two bits of four")
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    indices = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    return NMTensor.from_packed(values.contiguous(), indices, Pattern(2, 4), group_dim=1, shape=(rows, k))


def to_bitmask24(weight: NMTensor) -> dict[str, Tensor]:
    """The inverse of `from_bitmask24`: ``compressed``, ``bitmask`` and ``shape`` of a 2:4 weight."""
    shape = torch.tensor(weight.dense_shape()).reshape(-1, 1)
    return {"shape": shape, "compressed": weight.values, "bitmask": _pack_mask(mask_of(weight))}


def _pack_mask(mask: Tensor) -> Tensor:
    mask = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8))
    return (mask << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def _scatter(values: Tensor, bits: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    """The dense weight of an unstructured bitmask."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    mask = (bits.unsqueeze(-1) >> shifts & 1).flatten(1)[:, : shape[1]].bool()
    if values.dtype not in _DTYPES or values.dim() != 1 or values.numel() != int(mask.sum()):
        raise FormatError(
            f"{name}: the bitmask has {int(mask.sum())} bits, the values are "
            f"{values.dtype} {list(values.shape)}"
        )
    raw = torch.zeros(shape, dtype=values.dtype, device=values.device).view(_INTS[values.dtype.itemsize])
    raw[mask] = values.contiguous().view(raw.dtype)  # float8 has no masked writes of its own
    return raw.view(values.dtype)


_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def _write(writing: Writing) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    ignored: list[str] = []
    kept = total = 0
    for name, tensor in writing.tensors.items():
        is_24 = isinstance(tensor, NMTensor) and tensor.dim() == 2 and tensor.group_dim == 1
        weight = as_pattern(tensor, Pattern(2, 4)) if is_24 and name.endswith(".weight") else None  # type: ignore[arg-type]
        if weight is None or weight.dtype not in _DTYPES:
            result[name] = dense(tensor)
            if name.endswith(".weight") and tensor.dim() == 2:
                ignored.append(name.removesuffix(".weight"))
            continue
        result |= {f"{name.removesuffix('.weight')}.{part}": t for part, t in to_bitmask24(weight).items()}
        kept, total = kept + weight.values.numel(), total + weight.numel()
    if writing.destination is not None:
        _write_folder(writing.destination, result, ignored, 1 - kept / total if total else 0.0)
    return result


def _write_folder(folder: str, tensors: dict[str, Tensor], ignored: list[str], sparsity: float) -> None:
    os.makedirs(folder, exist_ok=True)
    config = read_config(folder)
    config["quantization_config"] = {
        "version": VERSION,
        "quant_method": "compressed-tensors",
        "sparsity_config": {
            "format": FORMAT_24,
            "targets": ["Linear"],
            "ignore": ignored,
            "global_sparsity": sparsity,
            "sparsity_structure": "2:4",
        },
    }
    write_plain(tensors, os.path.join(folder, "model.safetensors"))
    with atomic_write(os.path.join(folder, "config.json")) as file:
        file.write(json.dumps(config, indent=2).encode())
        file.flush()


COMPRESSED_TENSORS = PeerFormat(
    name="compressed-tensors",
    title="llm-compressor's sparse-24-bitmask and sparse-bitmask folders",
    recognises=_recognises,
    read=_read,
    write=_write,
    verified=f"compressed-tensors {VERSION} and 0.14.0.1, both directions",
    lossy="writing leaves weights dense that are not 2-D or do not embed in 2:4; scales of quantized weights "
    "come through as tensors of their own",
)
