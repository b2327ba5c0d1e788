"""The specification is enough: a reader written from it alone reads what we write, bit for bit."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import format_reader
import numpy as np
import pytest
import torch
from cases import DTYPES
from file_samples import pruned_net
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext.tensor import NMTensor

PATTERNS = [
    nms.Pattern(n, m)
    for m in (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 32, 63, 64)
    for n in {1, 2, 3, m // 2, m}
    if 1 <= n <= m
]


def bits(tensor: Tensor) -> np.ndarray:
    dense = (tensor.to_dense() if isinstance(tensor, NMTensor) else tensor).contiguous()
    raw = dense.reshape(-1).view(torch.uint8).numpy().tobytes()
    return np.frombuffer(raw, f"<u{dense.itemsize}").reshape(tuple(dense.shape))


def check(path: Path, tensors: dict[str, Tensor]) -> None:
    found = format_reader.read(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert np.array_equal(found[name], bits(tensor)), name


def test_it_knows_nothing_of_us() -> None:
    tree = ast.parse(Path(format_reader.__file__).read_text(encoding="utf-8"))
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert modules <= set(sys.stdlib_module_names) | {"numpy"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_patterns(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors: dict[str, Tensor] = {}
    for pattern in PATTERNS:
        for k in (3 * pattern.m, 2 * pattern.m + 1):
            w = torch.randn(3, k, 2).mul(9).to(dtype)
            w = nms.nm_prune(w, pattern, remainder="pad")
            tensors[f"{pattern} of {k}"] = nms.compress(w, pattern, remainder="pad")
            turned = w.movedim(1, 0)
            tensors[f"{pattern} of {k} first"] = nms.compress(turned, pattern, dim=0, remainder="pad")
    tensors["line"] = nms.compress(torch.ones(4).to(dtype), "4:4", dim=0)
    tensors["dense"] = torch.arange(4)
    nms.save_file(tensors, tmp_path / "m.safetensors")
    check(tmp_path / "m.safetensors", tensors)


@pytest.mark.parametrize("size", [None, 600])
def test_models_and_shards(tmp_path: Path, size: int | None) -> None:
    path = tmp_path / "m.safetensors"
    nms.save_file(pruned_net(), path, max_shard_size=size)
    check(path if size is None else tmp_path / "m.safetensors.index.json", nms.load_file(path))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_bytes_are_what_the_formula_says(pattern: nms.Pattern) -> None:
    for k in (3 * pattern.m, 2 * pattern.m + 1):
        w = nms.nm_prune(torch.randn(3, k, dtype=torch.float16), pattern, remainder="pad")
        weight = nms.compress(w, pattern, remainder="pad")
        b = 2 if pattern.m <= 4 else 4 if pattern.m <= 16 else 8
        groups = -(-k // pattern.m)
        row = groups * pattern.n * 2 + -(-groups * min(pattern.n * b, pattern.m) // 8)
        assert weight.nbytes == 3 * row == pattern.packed_bytes((3, k), 1, 2)
