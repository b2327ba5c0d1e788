"""Files: what comes back is what was saved, in as few bytes as promised, or a FormatError that says why."""

from __future__ import annotations

import json
import os
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES
from file_samples import Net, pruned_net
from safetensors.torch import load_file as load_plain
from safetensors.torch import save_file as save_plain
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import nmsparse_ext as nms
from nmsparse_ext.tensor import NMTensor


@pytest.fixture
def net() -> Net:
    return pruned_net()


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
        (WithState(4, 4), ValueError, "model must hold tensors only, got _extra_state of type dict"),
        ({"a": torch.zeros(2), "b": 1}, TypeError, "model must hold tensors only, got b of type int"),
        ({"a": {"b": torch.zeros(2)}}, TypeError, "model must hold tensors only, got a of type dict"),
        (dict.fromkeys("abcde"), TypeError, "a of type NoneType, b .*, c of type NoneType and 2 more"),
        ({1: torch.zeros(2)}, TypeError, r"model must have names \(str\) as keys, got 1"),
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


def test_where_nothing_can_be_written(net: Net, tmp_path: Path) -> None:
    gone = tmp_path / "no" / "such" / "model.safetensors"
    for options in ({}, {"max_shard_size": 100}):
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*such") as caught:
            nms.save_file(net, gone, **options)
        assert caught.value.filename == str(gone)
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of the file") as refused:
        nms.save_file(net, folder)
    assert refused.value.filename == str(folder)
    assert [*tmp_path.iterdir()] == [folder]


@pytest.mark.parametrize("path", [3, None, b"model.safetensors"])
def test_what_is_no_path(net: Net, path: Any) -> None:
    for call in (
        lambda: nms.save_file(net, path),
        lambda: nms.load_file(path),
        lambda: nms.load_into(net, path),
    ):
        with pytest.raises(TypeError, match=r"path must be a path \(str or os\.PathLike\), got .* of type"):
            call()


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
