# ruff: noqa: E501 - a table of faults
"""Models in several files: Hugging Face's names, one step from old to new, every fault named."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from file_samples import Net, pruned_net
from safetensors import safe_open
from safetensors.torch import load_file as load_plain
from safetensors.torch import save_file as save_plain
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext.deploy.format import parse_metadata
from nmsparse_ext.deploy.shards import parse_index, parse_size
from nmsparse_ext.tensor import NMTensor

INDEX = "model.safetensors.index.json"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    def bits(t: Tensor) -> Tensor:
        return (t.to_dense() if isinstance(t, NMTensor) else t).reshape(-1).view(torch.uint8)

    return a.keys() == b.keys() and all(
        type(a[name]) is type(b[name]) and torch.equal(bits(a[name]), bits(b[name])) for name in a
    )


@pytest.mark.parametrize("limit", [1, 600, "1KB", 2000])
def test_round_trip(path: Path, limit: int | str) -> None:
    net = pruned_net()
    single = path.parent / "single.safetensors"
    nms.save_file(net, single)
    nms.save_file(net, path, max_shard_size=limit)
    names = names_in(path.parent)
    count = len(names) - 2
    assert count > 1
    assert names == sorted(
        [INDEX, single.name, *(f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count))]
    )
    index = json.loads((path.parent / INDEX).read_text())
    expected = load_plain(single)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert index["weight_map"].keys() == expected.keys()
    for shard in set(index["weight_map"].values()):  # each is a model on its own, and small enough
        alone = nms.load_file(path.parent / shard)
        size = sum(t.nbytes for t in {id(t): t for t in alone.values()}.values())
        assert size <= parse_size(limit) or len({id(t) for t in alone.values()}) == 1
    single.unlink()
    for source in (path, path.parent / INDEX, path.parent):
        loaded = nms.load_file(source)
        assert same(loaded, _all(net))
        assert loaded["tied.weight"] is loaded["fc.weight"]
    target = nms.load_into(Net().eval(), path.parent)
    assert target.tied.weight is target.fc.weight
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(target(x), net(x))


def _all(net: Net) -> dict[str, Tensor]:
    tensors = dict(net.state_dict())
    for name, pattern in (("conv.weight", "1:4"), ("fc.weight", "2:4"), ("tied.weight", "2:4")):
        tensors[name] = nms.compress(tensors[name], pattern)
    return tensors


def test_a_small_model_is_one_file(path: Path) -> None:
    nms.save_file(pruned_net(), path, max_shard_size="5GB")
    assert names_in(path.parent) == [path.name]


@pytest.mark.parametrize("first", [None, 600, 1])
@pytest.mark.parametrize("second", [None, 600, 1])
def test_the_older_model_goes(path: Path, first: int | None, second: int | None) -> None:
    old, new = pruned_net(), pruned_net()
    nms.save_file(old, path, max_shard_size=first)
    mapped = nms.load_file(path)  # goes on to hold the old one
    nms.save_file(new, path, max_shard_size=second)
    assert same(nms.load_file(path), _all(new))
    assert same(nms.load_file(path.parent), _all(new))
    assert same(mapped, _all(old))
    if second is None:
        assert names_in(path.parent) == [path.name]
    else:
        used = set(json.loads((path.parent / INDEX).read_text())["weight_map"].values())
        assert set(names_in(path.parent)) == {INDEX, *used}


def test_leftovers_of_a_killed_save_go(path: Path) -> None:
    leftovers = [
        "model-00001-of-00007.safetensors",
        "model-0a1b2c3d-00002-of-00007.safetensors",
        ".model.0123456789abcdef.tmp",
    ]
    others = ["other-00001-of-00007.safetensors", "model.txt", "model-x.safetensors"]
    (path.parent / leftovers[-1]).mkdir()
    (path.parent / leftovers[-1] / ".tmpHalf").write_bytes(b"")
    for name in leftovers[:-1] + others:
        (path.parent / name).write_bytes(b"")
    nms.save_file(pruned_net(), path, max_shard_size=600)
    assert not set(names_in(path.parent)) & set(leftovers)
    assert not list(path.parent.glob(".*"))
    assert set(others) <= set(names_in(path.parent))


def test_a_failing_write_leaves_the_old_model(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = pruned_net()
    nms.save_file(net, path, max_shard_size=600)
    before = {name: (path.parent / name).read_bytes() for name in names_in(path.parent)}
    sync, calls = os.fsync, []

    def fail_late(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError("disk full")
        sync(descriptor)

    monkeypatch.setattr("os.fsync", fail_late)
    with pytest.raises(OSError, match="disk full"):
        nms.save_file(pruned_net(), path, max_shard_size=600)
    assert {name: (path.parent / name).read_bytes() for name in names_in(path.parent)} == before


def test_transformers_reads_the_dense_ones(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    model = BertModel(config).eval()
    model.config.save_pretrained(tmp_path)
    nms.save_file(model, tmp_path / "model.safetensors", {}, max_shard_size="4KB")
    assert (tmp_path / INDEX).exists()
    again = BertModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    # And the other way round.
    model.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    assert same(nms.load_file(tmp_path / "theirs"), dict(model.state_dict()))


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("200mb", 200 * 10**6), ("17B", 17), (9, 9)],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("size", "error"),
    [("5", ValueError), ("GB", ValueError), (0, ValueError), (1.5, TypeError), (True, TypeError)],
)
def test_wrong_sizes(path: Path, size: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_shard_size must"):
        nms.save_file(pruned_net(), path, max_shard_size=size)
    assert names_in(path.parent) == []
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        nms.save_file(pruned_net(), path.parent / "model.bin", max_shard_size=1)


# --------------------------------------------------------------------------------------------------- faults


def sharded(path: Path) -> dict[str, Any]:
    nms.save_file(pruned_net(), path, max_shard_size=600)
    return json.loads((path.parent / INDEX).read_text())


def _move(index: dict[str, Any], to: object) -> dict[str, Any]:
    index["weight_map"]["norm.weight"] = to
    return index


FAULTS: dict[str, tuple[Any, str]] = {
    "parent folder": (lambda i: _move(i, "../model-00001-of-00002.safetensors"), "is no name of a shard"),
    "absolute": (lambda i: _move(i, "/etc/passwd.safetensors"), "is no name of a shard"),
    "windows": (lambda i: _move(i, "..\\a.safetensors"), "is no name of a shard"),
    "drive": (lambda i: _move(i, "c:a.safetensors"), "is no name of a shard"),
    "zero byte": (lambda i: _move(i, "a\0.safetensors"), "is no name of a shard"),
    "no tensor file": (lambda i: _move(i, "model.bin"), "is no name of a shard"),
    "a number": (lambda i: _move(i, 3), "is no name of a shard"),
    "missing shard": (lambda i: i["weight_map"].update(x="gone.safetensors") or i, "names 'gone.safetensors', which does not exist"),
    "another shard": (lambda i: _move(i, i["weight_map"]["fc.weight.values"]), "the index names tensors that it lacks"),
    "tensor left out": (lambda i: i["weight_map"].pop("norm.weight") and i, "does not place there ['norm.weight']"),
    "tensor too many": (lambda i: i["weight_map"].update(x=i["weight_map"]["norm.weight"]) or i, "lacks ['x']"),
    "empty": (lambda i: {"weight_map": {}}, "must have an object 'weight_map'"),
    "list": (lambda i: [], "must have an object 'weight_map'"),
    "text": (lambda i: "{", "the index is no JSON"),
    "twice": (lambda i: '{"weight_map": {"a": "b", "a": "c"}}', "entries ['a'] appear more than once"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_index_is_checked(path: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    index = change(sharded(path))
    (path.parent / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(nms.FormatError, match=re.escape(message)):
        nms.load_file(path.parent)


@pytest.mark.parametrize("alike", [True, False])
def test_shards_may_say_the_same_but_not_contradict(path: Path, alike: bool) -> None:
    """transformers writes what there is to say of all shards into each; a weight's parts fall where they may."""
    nms.save_file(pruned_net(), path)
    whole, tensors = nms.load_file(path), load_plain(path)
    with safe_open(path, framework="pt") as file:
        contents = parse_metadata(file.metadata())
    path.unlink()
    places = {name: f"part-{number}.safetensors" for number, name in enumerate(tensors)}
    for name, shard in places.items():
        save_plain({name: tensors[name]}, path.parent / shard, contents.to_metadata())
    if not alike:
        weight = next(iter(contents.weights))
        contents.weights[weight] = dataclasses.replace(contents.weights[weight], remainder="pad")
        save_plain({name: tensors[name]}, path.parent / shard, contents.to_metadata())
    (path.parent / INDEX).write_text(json.dumps({"weight_map": places}))
    if not alike:
        with pytest.raises(nms.FormatError, match="are described by several files, not alike"):
            nms.load_file(path.parent / INDEX)
        return
    assert same(nms.load_file(path.parent / INDEX), whole)


def test_several_models_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        nms.load_file(tmp_path)
    save_plain({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert nms.load_file(tmp_path)["a"].item() == 1
    save_plain({"a": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(nms.FormatError, match="holds several models"):
        nms.load_file(tmp_path)


def test_names_that_come_twice_among_many() -> None:
    """No quadratic search for them: a file from a stranger may have a million."""
    names = [f"layer{i}" for i in range(200_000)]
    text = json.dumps(dict.fromkeys(names, "a.safetensors"))
    with pytest.raises(nms.FormatError, match=r"'layer7'.* more than once"):
        parse_index(f'{{"weight_map": {text[:-1]}, "layer7": "b.safetensors"}}}}'.encode())
