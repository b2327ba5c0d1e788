"""Files from strangers: every damage is refused with a FormatError, or harmless."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from file_samples import Net, pruned_net
from safetensors.torch import save_file as save_plain
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext.tensor import NMTensor


@pytest.fixture
def net() -> Net:
    return pruned_net()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def write(path: Path, tensors: dict[str, Tensor], content: Any, key: str = "nmsparse") -> None:
    save_plain(tensors, path, {key: content if isinstance(content, str) else json.dumps(content)})


GOOD_ENTRY = {
    "pattern": "2:4",
    "group_dim": 1,
    "shape": [2, 8],
    "remainder": "error",
    "dtype": "float32",
    "encoding": "index",
}


def entry(**changes: Any) -> dict[str, Any]:
    return {"version": 1, "weights": {"w": {**GOOD_ENTRY, **changes}}, "aliases": {}}


FAULTS: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "no JSON"),
    "NaN": ('{"version": NaN}', "no JSON"),
    "deep": ("[" * 100_000, "no JSON"),
    "a list": ([], "must be a JSON object"),
    "no version": ({"weights": {}, "aliases": {}}, "missing entries ['version']"),
    "another version": ({"version": 2, "weights": {}, "aliases": {}}, "version 2 is not known"),
    "a version that is no number": (
        {"version": True, "weights": {}, "aliases": {}},
        "version True is not known",
    ),
    "weights of a type": ({"version": 1, "weights": [], "aliases": {}}, "'weights' must be"),
    "weight of a type": (
        {"version": 1, "weights": {"w": 3}, "aliases": {}},
        "weight 'w' must be a JSON object",
    ),
    "an unknown entry": (entry(extra=1), "unknown entries ['extra']"),
    "no tensors": (
        {"version": 1, "weights": {"v": GOOD_ENTRY}, "aliases": {}},
        "weight 'v' has no tensor 'v.values'",
    ),
    "pattern text": (entry(pattern="2-4"), "must look like"),
    "pattern type": (entry(pattern=[2, 4]), "pattern must be text"),
    "pattern range": (entry(pattern="5:4"), "weight 'w'"),
    "pattern too large": (entry(pattern="2:128"), "weight 'w'"),
    "another pattern": (entry(pattern="1:4"), "weight 'w': values must have shape [2, 2]"),
    "group_dim": (entry(group_dim=2), "group_dim must be in [0, 2)"),
    "negative group_dim": (entry(group_dim=-1), "group_dim must be in [0, 2)"),
    "group_dim true": (entry(group_dim=True), "group_dim must be in [0, 2)"),
    "another group_dim": (entry(group_dim=0), "no multiple of m"),
    "shape": (entry(shape=[2, 12]), "weight 'w': values must have shape [2, 6]"),
    "no shape": (entry(shape=[]), "shape must be a list of 1 to 5 sizes"),
    "many dims": (entry(shape=[1] * 6), "shape must be a list of 1 to 5 sizes"),
    "huge shape": (entry(shape=[2, 1 << 62]), "sizes must be integers from 0"),
    "large shape": (entry(shape=[1 << 40, 1 << 40]), "weight 'w': values must have shape"),
    "huge, but without elements": (entry(shape=[1 << 40, 0]), "too large"),
    "negative shape": (entry(shape=[-2, 8]), "sizes must be integers from 0"),
    "shape of floats": (entry(shape=[2.0, 8]), "sizes must be integers from 0"),
    "remainder": (entry(remainder="cut"), "remainder must be"),
    "remainder list": (entry(remainder=["pad"]), "remainder must be"),
    "no multiple": (entry(shape=[2, 7]), "no multiple of m = 4"),
    "dtype": (entry(dtype="float16"), "values are torch.float32, but the metadata says torch.float16"),
    "unknown dtype": (entry(dtype="int64"), "dtype must be one of"),
    "dtype type": (entry(dtype={}), "dtype must be one of"),
    "encoding": (entry(encoding="bitmask"), "encoding of 2:4 is 'index'"),
    "alias of nothing": (
        {**entry(), "aliases": {"a": "b"}},
        "alias 'a' points to 'b', which the file does not have",
    ),
    "alias of an alias": ({**entry(), "aliases": {"a": "b", "b": "w"}}, "which is an alias itself"),
    "alias of itself": ({**entry(), "aliases": {"a": "a"}}, "which is an alias itself"),
    "alias and tensor": ({**entry(), "aliases": {"dense": "w"}}, "'dense' is both a tensor and an alias"),
    "alias of a type": ({**entry(), "aliases": {"a": 3}}, "must name a tensor"),
    "aliases of a type": ({**entry(), "aliases": 3}, "'aliases' must be"),
    "dense and packed": (
        {"version": 1, "weights": {"w": GOOD_ENTRY, "dense": GOOD_ENTRY}, "aliases": {}},
        "weight 'dense' has no tensor",
    ),
}


def good_tensors() -> dict[str, Tensor]:
    weight = nms.compress(nms.nm_prune(torch.randn(2, 8), "2:4"), "2:4")
    return {"w.values": weight.values, "w.indices": weight.indices, "dense": torch.zeros(2)}


def test_the_good_file_is_good(path: Path) -> None:
    write(path, good_tensors(), entry())
    assert nms.load_file(path)["w"].shape == (2, 8)


@pytest.mark.parametrize("fault", FAULTS)
def test_metadata_is_checked(path: Path, fault: str) -> None:
    content, message = FAULTS[fault]
    write(path, good_tensors(), content)
    with pytest.raises(nms.FormatError) as caught:
        nms.load_file(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


TENSOR_FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "descending": (lambda t: t["w.indices"].fill_(0x11), "indices of group [0, 0]"),
    "same twice": (lambda t: t["w.indices"].fill_(0x44).view(-1)[3:].fill_(0x40), "indices of group [1, 1]"),
    "one byte short": (
        lambda t: t.update({"w.indices": t["w.indices"][:, :0].contiguous()}),
        "indices must have shape",
    ),
    "indices of a dtype": (
        lambda t: t.update({"w.indices": t["w.indices"].view(torch.int8)}),
        "indices must be torch.uint8",
    ),
    "values of a dtype": (
        lambda t: t.update({"w.values": t["w.values"].double()}),
        "values are torch.float64",
    ),
    "values of a shape": (
        lambda t: t.update({"w.values": t["w.values"].t().contiguous()}),
        "values must have shape",
    ),
    "no indices": (lambda t: t.pop("w.indices"), "has no tensor 'w.indices'"),
    "dense too": (lambda t: t.update({"w": torch.zeros(2)}), "'w' is stored both packed and dense"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensors_are_checked(path: Path, fault: str) -> None:
    change, message = TENSOR_FAULTS[fault]
    tensors = good_tensors()
    if fault == "same twice":
        tensors["w.indices"] = torch.full((2, 1), 0x44, dtype=torch.uint8)
        tensors["w.indices"][1] = 0x04
    else:
        change(tensors)
    write(path, tensors, entry())
    with pytest.raises(nms.FormatError) as caught:
        nms.load_file(path)
    assert message in str(caught.value)


def same_content(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        type(a[name]) is type(b[name]) and a[name].shape == b[name].shape and a[name].dtype == b[name].dtype
        for name in a
    )


def load_or_refuse(path: Path) -> dict[str, Tensor] | None:
    try:
        return nms.load_file(path)
    except nms.FormatError:
        return None


@pytest.mark.parametrize("shift", [1, 2, 4, 7])
def test_tensors_at_odd_offsets_are_aligned(net: Net, path: Path, shift: int) -> None:
    """A header of any length is legal: what lies behind it then starts at any address of the mapped file."""
    nms.save_file(net, path)
    expected = nms.load_file(path)
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    end = 8 + size
    odd = path.with_name("odd.safetensors")
    odd.write_bytes(struct.pack("<Q", size + shift) + raw[8:end] + b" " * shift + raw[end:])
    loaded = nms.load_file(odd)
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        parts = (tensor.values, tensor.indices) if isinstance(tensor, NMTensor) else (tensor,)
        assert all(part.data_ptr() % part.itemsize == 0 for part in parts), name
        dense, other = (t.to_dense() if isinstance(t, NMTensor) else t for t in (tensor, expected[name]))
        assert torch.equal(dense, other), name


def test_mutations_are_refused_or_harmless(net: Net, path: Path) -> None:
    nms.save_file(net, path)
    raw, original = path.read_bytes(), nms.load_file(path)
    header_end = 8 + struct.unpack("<Q", raw[:8])[0]
    generator = random.Random(0)
    outcomes = {"refused": 0, "loaded": 0}
    for number in range(500):
        damaged = bytearray(raw)
        kind = number % 5
        if kind == 0:  # a flipped bit in the header
            damaged[generator.randrange(header_end)] ^= 1 << generator.randrange(8)
        elif kind == 1:  # a flipped bit in the data
            damaged[generator.randrange(header_end, len(raw))] ^= 1 << generator.randrange(8)
        elif kind == 2:  # truncated
            del damaged[generator.randrange(len(raw)) :]
        elif kind == 3:  # a digit of the header becomes another one: sizes, offsets, patterns
            digits = [i for i in range(8, header_end) if chr(raw[i]).isdigit()]
            damaged[generator.choice(digits)] = ord(generator.choice("0123456789"))
        else:  # some bytes of noise
            start = generator.randrange(len(raw))
            damaged[start : start + 8] = generator.randbytes(8)
        path.write_bytes(damaged)
        loaded = load_or_refuse(path)
        if loaded is None:
            outcomes["refused"] += 1
            continue
        # What loads is a legal file: every packed weight unpacks to its shape with at most n of m kept.
        outcomes["loaded"] += 1
        for tensor in loaded.values():
            if isinstance(tensor, NMTensor):
                dense = tensor.to_dense()
                assert dense.shape == tensor.shape
                remainder = tensor.remainder
                assert (
                    nms.find_violation(dense, tensor.pattern, dim=tensor.group_dim, remainder=remainder)
                    is None
                )
        if kind == 1:
            assert same_content(loaded, original)
    assert outcomes["refused"] > 150
    assert outcomes["loaded"] > 50


def test_random_bytes_are_refused(path: Path) -> None:
    generator = random.Random(1)
    for size in (0, 1, 7, 8, 9, 64, 1000):
        for _ in range(5):
            path.write_bytes(generator.randbytes(size))
            with pytest.raises(nms.FormatError):
                nms.load_file(path)
