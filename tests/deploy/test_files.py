"""Files: what comes back is what was saved, in as few bytes as promised, or a FormatError that says why."""

from __future__ import annotations

import json
import os
import random
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES
from safetensors.torch import load_file as load_plain
from safetensors.torch import save_file as save_plain
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import nmsparse_ext as nms
from nmsparse_ext.tensor import NMTensor


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16, bias=False)
        self.tied.weight = self.fc.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("temporary", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(self.stem(x))).mean((2, 3))
        return self.tied(self.fc(h)) * self.scale


@pytest.fixture
def net() -> Net:
    model = Net().eval()
    nms.nm_prune_(model.conv.weight.data, "1:4")
    nms.nm_prune_(model.fc.weight.data, "2:4")
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def header_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])


# ------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("packed", [False, True], ids=["dense model", "packed model"])
@pytest.mark.parametrize("into", ["dense", "packed", "meta"])
def test_round_trip_of_a_model(net: Net, x: Tensor, path: Path, packed: bool, into: str) -> None:
    expected = net(x)
    nms.save_file(nms.convert(net, policy="always") if packed else net, path)
    if into == "meta":
        with torch.device("meta"):
            target = Net().eval()
        target.temporary = torch.zeros(3)
    else:
        target = Net().eval()
    if into == "packed":
        for layer in (target.conv, target.fc):
            nms.nm_prune_(layer.weight.data, "4:8")
        target = nms.convert(target, policy="always")
    assert nms.load_into(target, path) is target
    torch.testing.assert_close(target(x), expected)
    assert isinstance(target.fc.weight, NMTensor)
    assert isinstance(target.fc.weight, nn.Parameter)
    assert not target.fc.weight.requires_grad
    assert target.fc.weight is target.tied.weight
    assert str(target.conv.weight.pattern) == "1:4"
    assert not isinstance(target.stem.weight, NMTensor)
    assert target.stem.weight.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "1:16", "4:8", "3:5", "8:32"])
def test_round_trip_of_tensors(path: Path, dtype: torch.dtype, pattern: str) -> None:
    m = nms.Pattern.parse(pattern).m
    w = nms.nm_prune(torch.randn(3, 2 * m, 2).mul(9).to(dtype), pattern)
    padded = nms.nm_prune(torch.randn(2, m + 1).to(dtype), pattern, remainder="pad")
    tensors = {
        "w": nms.compress(w, pattern),
        "padded": nms.compress(padded, pattern, remainder="pad"),
        "transposed": nms.compress(w.transpose(0, 1), pattern, dim=0),
        "none": nms.compress(w[:0], pattern),
        "dense": torch.randn(3, 3),
        "number": torch.tensor(3),
        "flag": torch.tensor([True, False]),
    }
    nms.save_file(tensors, path)
    loaded = nms.load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert type(loaded[name]) is type(tensor)
        mine, theirs = (t.to_dense() if isinstance(t, NMTensor) else t for t in (loaded[name], tensor))
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert torch.equal(mine.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))
    assert loaded["padded"].remainder == "pad"
    assert loaded["transposed"].group_dim == 0


def test_bytes_are_what_the_formula_says(path: Path) -> None:
    w = nms.nm_prune(torch.randn(64, 256, dtype=torch.bfloat16), "2:8")
    nms.save_file({"w": nms.compress(w, "2:8")}, path)
    header = header_of(path)
    sizes = {
        name: e["data_offsets"][1] - e["data_offsets"][0]
        for name, e in header.items()
        if name != "__metadata__"
    }
    assert sizes == {"w.values": 64 * (256 // 8) * 2 * 2, "w.indices": 64 * (256 // 8 * 8 // 8)}
    assert path.stat().st_size == 8 + struct.unpack("<Q", path.read_bytes()[:8])[0] + sum(sizes.values())


def test_layout_of_the_file(net: Net, path: Path) -> None:
    nms.save_file(net, path)
    plain = load_plain(path)  # any safetensors reader can read it
    assert {
        "conv.weight.values",
        "conv.weight.indices",
        "fc.weight.values",
        "stem.weight",
        "scale",
    } <= plain.keys()
    assert not {"conv.weight", "tied.weight", "tied.weight.values", "temporary"} & plain.keys()
    metadata = header_of(path)["__metadata__"]
    assert metadata["format"] == "pt"
    content = json.loads(metadata["nmsparse"])
    assert content == {
        "version": 1,
        "weights": {
            "conv.weight": {
                "pattern": "1:4",
                "group_dim": 1,
                "shape": [16, 8, 3, 3],
                "remainder": "error",
                "dtype": "float32",
                "encoding": "index",
            },
            "fc.weight": {
                "pattern": "2:4",
                "group_dim": 1,
                "shape": [16, 16],
                "remainder": "error",
                "dtype": "float32",
                "encoding": "index",
            },
        },
        "aliases": {"tied.weight": "fc.weight"},
    }


def test_wrapped_models_have_plain_names(net: Net, x: Tensor, path: Path) -> None:
    nms.save_file(torch.compile(net, backend="eager"), path)
    target = torch.compile(Net().eval(), backend="eager")
    nms.load_into(target, path)
    torch.testing.assert_close(nms.load_into(Net().eval(), path)(x), net(x))
    torch.testing.assert_close(target._orig_mod(x), net(x))


def test_saving_leaves_the_model_alone(net: Net, path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    weight = net.fc.weight
    nms.save_file(net, path)
    assert net.fc.weight is weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_plain_files_load(path: Path) -> None:
    save_plain({"a": torch.ones(2)}, path)
    assert nms.load_file(path)["a"].tolist() == [1, 1]


def test_dtype_and_device_are_the_models(net: Net, path: Path) -> None:
    nms.save_file(net, path)
    target = nms.load_into(Net().to(torch.bfloat16), path)
    assert target.fc.weight.dtype == target.stem.weight.dtype == torch.bfloat16
    assert torch.equal(target.fc.weight.to_dense(), net.fc.weight.to(torch.bfloat16))


def test_layouts_and_views_are_stored_as_values(path: Path) -> None:
    base = torch.randn(4, 8)
    tensors = {
        "all": base,
        "half": base[:, :4],
        "turned": base.t(),
        "again": base,
        "row": base[0].expand(3, 8),
    }
    nms.save_file(tensors, path)
    loaded = nms.load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert loaded["all"] is loaded["again"]


def test_modules_that_cannot_multiply_packed_get_dense_weights(path: Path) -> None:
    model = nn.LSTM(8, 4)
    nms.nm_prune_(model.weight_ih_l0.data, "2:4")
    nms.save_file(model, path)
    assert isinstance(nms.load_file(path)["weight_ih_l0"], NMTensor)
    x = torch.randn(3, 2, 8)
    assert torch.equal(nms.load_into(nn.LSTM(8, 4), path)(x)[0], model(x)[0])


def test_a_scheme_decides(net: Net, path: Path) -> None:
    nms.save_file(net, path, {"fc": "4:8"})
    loaded = nms.load_file(path)
    assert str(loaded["fc.weight"].pattern) == "4:8"
    assert not isinstance(loaded["conv.weight"], NMTensor)
    with pytest.raises(ValueError, match="stem cannot be 2:4"):
        nms.save_file(net, path, {"stem": "2:4"})
    with pytest.raises(ValueError, match=r"conv\.weight: w does not satisfy 1:8"):
        nms.save_file(net, path, {"conv": "1:8"})
    with pytest.raises(TypeError, match="scheme needs a model"):
        nms.save_file(dict(net.state_dict()), path, "2:4")


# --------------------------------------------------------------------------------------------- what cannot be


class WithState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (3, TypeError, "model must be an nn.Module or a mapping"),
        (WithState(4, 4), ValueError, "_extra_state is of type dict"),
        ({"a": torch.zeros(2, 2).to_sparse()}, ValueError, "a cannot be saved"),
        ({"a": torch.zeros(2, 2, device="meta")}, ValueError, "a cannot be saved"),
        (
            {"a": TwoTensor(torch.zeros(2), torch.zeros(2))},
            ValueError,
            "a cannot be saved: it is a TwoTensor",
        ),
        (
            {"a": nms.compress(torch.zeros(2, 4), "2:4"), "a.values": torch.zeros(1)},
            ValueError,
            r"stored as a\.values; rename one",
        ),
    ],
)
def test_what_cannot_be_saved(path: Path, model: Any, error: type[Exception], message: str) -> None:
    path.write_bytes(b"old")
    with pytest.raises(error, match=message):
        nms.save_file(model, path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_failing_write_leaves_the_old_file(net: Net, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nms.save_file(net, path)
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        nms.save_file(net, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_others_may_read_the_file_as_far_as_the_umask_lets_them(net: Net, path: Path) -> None:
    old = os.umask(0o027)
    try:
        nms.save_file(net, path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_what_is_synced_is_what_was_written(net: Net, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    sync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr("os.fsync", watched)
    nms.save_file(net, path)
    assert synced[0] == path.stat().st_ino


def test_lazy_conjugates_are_stored_as_values(path: Path) -> None:
    z = torch.randn(3, dtype=torch.complex64)
    nms.save_file({"z": z, "conjugate": z.conj(), "negated": z.conj().imag}, path)
    loaded = nms.load_file(path)
    assert torch.equal(loaded["z"], z)
    assert torch.equal(loaded["conjugate"], z.conj().resolve_conj())
    assert torch.equal(loaded["negated"], -z.imag)


class Pair(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        nms.nm_prune_(self.a.weight.data, "2:4")
        if tied:
            self.b.weight = self.a.weight


@pytest.mark.parametrize("packed", [False, True])
def test_tied_names_may_be_stored_twice_if_they_agree(path: Path, packed: bool) -> None:
    weight = Pair(tied=True).a.weight.detach()
    tensor = nms.compress(weight, "2:4") if packed else weight
    nms.save_file({"a.weight": tensor, "b.weight": tensor.clone()}, path)
    model = nms.load_into(Pair(tied=True), path)
    assert model.a.weight is model.b.weight
    assert torch.equal(model.a.weight.to_dense() if packed else model.a.weight, weight)


def test_tied_names_that_differ_are_refused(path: Path) -> None:
    nms.save_file(Pair(tied=False), path)
    model = Pair(tied=True)
    before = model.a.weight.detach().clone()
    with pytest.raises(ValueError, match=r"a\.weight and b\.weight are one tensor in the model, but differ"):
        nms.load_into(model, path)
    assert torch.equal(model.a.weight, before)


def test_load_into_names_what_collides_without_wrapper_parts(path: Path) -> None:
    save_plain({"fc.weight": torch.zeros(4, 4)}, path)
    model = nn.ModuleDict({"fc": nn.Linear(4, 4, bias=False)})
    model["module"] = nn.ModuleDict({"fc": nn.Linear(4, 4, bias=False)})
    with pytest.raises(ValueError, match=r"module\.fc\.weight has the same name as another"):
        nms.load_into(model, path)


def test_load_into_names_what_does_not_match(net: Net, path: Path) -> None:
    nms.save_file(net, path)
    other = Net()
    other.fc = nn.Linear(16, 8)
    other.extra = nn.Linear(2, 2)
    del other.norm
    before = other.stem.weight.clone()
    with pytest.raises(ValueError, match="does not match the model") as caught:
        nms.load_into(other, path)
    for part in (
        "no extra.weight",
        "no norm.weight",
        "fc.weight has shape [8, 16] in the model, [16, 16] in the file",
    ):
        assert part in str(caught.value)
    assert torch.equal(other.stem.weight, before)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        nms.load_into({}, path)


def test_missing_files_are_os_errors(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        nms.load_file(path)


# ---------------------------------------------------------------------------------------------- hostile files


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
