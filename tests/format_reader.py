"""A reader of the portable format, written from docs/format.md alone: NumPy, json, nothing of this project.

Returns bits: every weight as unsigned integers of its dtype's size, since NumPy has no bfloat16 or float8.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "BOOL": 1,
}


def read(path: Path) -> dict[str, np.ndarray]:
    """A file, or an index -> ``{name: dense array of raw bits}``."""
    if path.name.endswith(".index.json"):
        files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = [path.name]
    tensors: dict[str, np.ndarray] = {}
    weights: dict[str, dict] = {}
    aliases: dict[str, str] = {}
    for file in files:
        raw = (path.parent / file).read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        description = json.loads(header.pop("__metadata__", {}).get("nmsparse", '{"version": 1}'))
        assert description["version"] == 1
        weights |= description.get("weights", {})
        aliases |= description.get("aliases", {})
        for name, entry in header.items():
            begin, stop = entry["data_offsets"]
            unsigned = np.dtype(f"<u{BYTES[entry['dtype']]}")
            tensors[name] = np.frombuffer(raw[end + begin : end + stop], unsigned).reshape(entry["shape"])
    for name, entry in weights.items():
        tensors[name] = unpack(tensors.pop(name + ".values"), tensors.pop(name + ".indices"), entry)
    return tensors | {alias: tensors[name] for alias, name in aliases.items()}


def unpack(values: np.ndarray, indices: np.ndarray, entry: dict) -> np.ndarray:
    """The dense weight."""
    n, m = map(int, entry["pattern"].split(":"))
    dim, shape = entry["group_dim"], entry["shape"]
    k = shape[dim]
    groups = -(-k // m)
    b = 2 if m <= 4 else 4 if m <= 16 else 8
    width = n * b if n * b <= m else m
    rows = math.prod(shape[:dim]) * math.prod(shape[dim + 1 :])
    bits = np.unpackbits(indices.reshape(rows, -1), axis=1, bitorder="little")[:, : groups * width]
    bits = bits.reshape(rows, groups, width).astype(np.int64)
    if n * b <= m:
        assert entry["encoding"] == "index"
        places = (bits.reshape(rows, groups, n, b) << np.arange(b)).sum(-1)
    else:
        assert entry["encoding"] == "bitmask"
        places = np.nonzero(bits)[2].reshape(rows, groups, n)
    dense = np.zeros((rows, groups, m), values.dtype)
    np.put_along_axis(dense, places, values.reshape(rows, groups, n), axis=2)
    dense = dense.reshape(rows, groups * m)[:, :k].reshape(shape[:dim] + shape[dim + 1 :] + [k])
    return np.moveaxis(dense, -1, dim)
