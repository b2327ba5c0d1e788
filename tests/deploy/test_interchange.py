"""Checkpoints of other tools: what all formats have in common. Each has its own file beside this one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext.deploy import FORMATS, detect_format, from_peer, to_peer
from nmsparse_ext.tensor import NMTensor

# Those that say what they are: of nm-sparsity, which does not, there is a test of its own.
RECOGNISED = [name for name in FORMATS if name != "nm-sparsity"]


class Small(nn.Module):
    """Sizes that every layout takes; a tied weight, a convolution, a pattern that only embeds in 2:4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 4, 3)
        self.a = nn.Linear(64, 64)
        self.b = nn.Linear(64, 128)
        self.c = nn.Linear(64, 4)
        for layer, pattern in ((self.conv, "2:4"), (self.a, "2:4"), (self.b, "1:4"), (self.c, "2:4")):
            nms.nm_prune_(layer.weight.data, pattern)
        self.c.weight.data = torch.randn(4, 64)  # dense

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x))[:, :64])


def dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if isinstance(tensor, NMTensor) else tensor


def arguments(name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """File name, and arguments of writing and reading."""
    layout = {"layout": "sm90"} if name == "cusparselt" else {}
    written = {"example_input": torch.randn(2, 64)} if name == "onnx" else layout
    suffix = {"dense": ".safetensors", "nmsparse": ".safetensors", "onnx": ".onnx", "dominosearch": ".txt"}
    return f"out{suffix.get(name, '' if name == 'compressed-tensors' else '.pt')}", written, layout


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, d) for n in RECOGNISED for d in (torch.float32, torch.float16) if (n, d) != ("onnx", torch.float16)],
)
def test_there_and_back(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = Small().to(dtype).eval()
    if name == "onnx":
        model = nn.Sequential(model.a, model.b)
    tensors = from_peer(model)
    file, written, read = arguments(name)
    to_peer(tensors, tmp_path / file, format=name, model=model, **written)
    fits = not (name == "cusparselt" and dtype == torch.float32)  # of which no layout is known
    if fits:
        assert detect_format(tmp_path / file) == name
    again = from_peer(tmp_path / file, format=name, model=model if name == "dominosearch" else None, **read)
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(dense(again[key]), dense(tensor)), key
    packed = {key for key, tensor in again.items() if isinstance(tensor, NMTensor)}
    if name != "onnx" and fits:
        # Sparse tensor cores' float32 is 1:2, in which 1:4 embeds and 2:4 does not.
        least = {"b.weight"} if (name, dtype) == ("pytorch-cutlass", torch.float32) else {"a.weight"}
        assert least <= packed <= {"a.weight", "b.weight", "conv.weight"}
    nms.save_file(again, tmp_path / "ours.safetensors")
    if name != "onnx":
        loaded = nms.load_into(Small().to(dtype).eval(), tmp_path / "ours.safetensors")
        x = torch.randn(2, 64, dtype=dtype)
        torch.testing.assert_close(loaded(x), model(x), rtol=2e-3, atol=2e-3)


def test_a_format_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "apex-asp", replace(FORMATS["apex-asp"], write=None))
    with pytest.raises(ValueError, match="'apex-asp' can be read only"):
        to_peer(Small(), format="apex-asp")


def test_models_and_their_files_are_the_same_source(tmp_path: Path) -> None:
    model = Small()
    nms.save_file(model, tmp_path / "m.safetensors", max_shard_size="20KB")
    for source in (tmp_path, tmp_path / "m.safetensors", dict(model.state_dict()), model):
        tensors = from_peer(source)
        assert str(tensors["conv.weight"].pattern) == "2:4"
        assert str(tensors["b.weight"].pattern) == "1:4"
        assert not isinstance(tensors["c.weight"], NMTensor)
    assert detect_format(tmp_path) == "nmsparse"
    assert detect_format(model) == detect_format({"state_dict": model.state_dict(), "epoch": 3}) == "dense"


def test_models_are_packed_on_the_way_out_and_ties_stay() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64, bias=False), "b": nn.Linear(64, 64, bias=False)})
    nms.nm_prune_(model["a"].weight.data, "2:4")
    model["b"].weight = model["a"].weight
    assert set(to_peer(model, format="apex-asp")) == {
        "a.weight", "b.weight", "a.__weight_mma_mask", "b.__weight_mma_mask"
    }  # fmt: skip
    tensors = from_peer(model)
    assert tensors["a.weight"] is tensors["b.weight"]
    packed = nms.convert(model, policy="always")
    again = from_peer(packed)
    assert again["a.weight"].values.data_ptr() == packed["a"].weight.values.data_ptr()
    assert "b.bitmask" in to_peer(packed, format="compressed-tensors")


def test_counts_are_asked_for() -> None:
    w = torch.randn(8, 16)
    for pattern in ("1:4", {"w": "1:4"}):
        with pytest.raises(ValueError, match=r'counts must be "kept" or "pruned": does \'1:4\' keep 1'):
            from_peer({"w": w}, pattern=pattern, prune=True)
    kept = from_peer({"w": w}, pattern="1:4", counts="kept", prune=True)["w"]
    pruned = from_peer({"w": w}, pattern="1:4", counts="pruned", prune=True)["w"]
    assert (str(kept.pattern), str(pruned.pattern)) == ("1:4", "3:4")
    assert torch.equal(dense(pruned), nms.nm_prune(w, "3:4"))
    same = from_peer({"w": w}, pattern=nms.Pattern(1, 4), prune=True)["w"]
    assert torch.equal(dense(same), dense(kept))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pattern": "2:4", "counts": "both"}, ValueError, 'counts must be "kept" or "pruned"'),
        ({"counts": "kept"}, ValueError, "counts goes with a pattern"),
        ({"pattern": nms.Pattern(1, 4), "counts": "pruned"}, ValueError, "counts what is kept"),
        ({"pattern": "4:4", "counts": "pruned"}, ValueError, "would keep nothing"),
        ({"pattern": "1:4", "counts": "kept"}, ValueError, "w: w does not satisfy 1:4"),
        ({"format": "keras"}, ValueError, "format must be one of nmsparse"),
        ({"layout": "sm80"}, TypeError, "format 'dense' takes none, got layout"),
        ({"format": "nm-sparsity"}, ValueError, "pattern must be given"),
        ({"format": "dominosearch"}, ValueError, "source must be the scheme's file"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        from_peer({"w": torch.randn(4, 8)}, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"format": "modelopt"}, ValueError, "model must be given"),
        ({"format": "onnx"}, ValueError, "destination, model and example_input must be given"),
        ({"format": "dense", "layout": "sm80"}, TypeError, "takes none, got layout"),
        ({"format": "cusparselt"}, ValueError, "layout must be one of"),
        ({"format": "cusparselt", "layout": "sm70"}, ValueError, "layout must be one of"),
    ],
)
def test_wrong_arguments_of_writing(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    weight = nms.compress(torch.zeros(64, 64, dtype=torch.float16), "2:4")
    with pytest.raises(error, match=message):
        to_peer({"w": weight}, **arguments)
    with pytest.raises(TypeError, match="tensors must be an"):
        to_peer(3, format="dense")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tensors must hold tensors only, got w of type int"):
        to_peer({"w": 3}, format="dense")  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="destination must be a path"):
        to_peer({"w": weight}, 3, format="dense")  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["nmsparse", "dense", "apex-asp", "torch-pruning", "nm-sparsity"])
def test_writing_into_a_folder_that_is_not_there(tmp_path: Path, format: str) -> None:
    for name in ("w.pt", "w.safetensors"):
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*gone"):
            to_peer({"w": torch.zeros(4, 8)}, tmp_path / "gone" / name, format=format)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04 no zip")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({"w": torch.zeros(1), "lr": 3}, tmp_path / "mixed.pt")
    for name, message in (
        ("a.txt", "is of none of the formats"),
        ("a.pt", "no torch checkpoint"),
        ("list.pt", "must be a mapping"),
        ("mixed.pt", "are no tensors"),
    ):
        with pytest.raises(nms.FormatError, match=message):
            detect_format(tmp_path / name)
    for state in ({0: torch.zeros(1)}, {"state_dict": {0: torch.zeros(1)}}):
        with pytest.raises(nms.FormatError, match="must have names"):
            detect_format(state)
    with pytest.raises(
        nms.FormatError, match="state_dict of a checkpoint must hold tensors only, got b of type"
    ):
        from_peer({"state_dict": {"w": torch.zeros(1), "b": 3}})
    with pytest.raises(FileNotFoundError):
        detect_format(tmp_path / "gone.pt")
    with pytest.raises(TypeError, match="source must be"):
        detect_format(3)  # type: ignore[arg-type]


class Counting(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}


def test_extra_state_of_a_model_is_refused_by_name() -> None:
    model = nn.Sequential(Counting(8, 8))
    for argument, call in (
        ("tensors", lambda: to_peer(model, format="dense")),
        ("source", lambda: from_peer(model)),
    ):
        with pytest.raises(
            ValueError, match=rf"{argument} must hold tensors only, got 0\._extra_state of type"
        ):
            call()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('ran')",)


def test_nothing_in_a_checkpoint_runs(tmp_path: Path) -> None:
    torch.save({"w": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(nms.FormatError, match="no torch checkpoint of plain tensors"):
        from_peer(tmp_path / "evil.pt")


def test_a_model_says_which_dims_are_grouped() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"turned": Conv1D(8, 16), "words": nn.Embedding(4, 16)})
    model["turned"].weight.data = nms.nm_prune(torch.randn(16, 8), "2:4", dim=0)
    nms.nm_prune_(model["words"].weight.data, "2:4")
    state = dict(model.state_dict())
    found = from_peer(state, model=model)
    assert found["turned.weight"].group_dim == 0
    assert not isinstance(found["words.weight"], NMTensor)
    assert isinstance(from_peer(state)["words.weight"], NMTensor)  # nobody said what it is
    found = from_peer(state, model=model, pattern={"turned": "2:4"}, counts="kept")
    assert str(found["turned.weight"].pattern) == "2:4"
