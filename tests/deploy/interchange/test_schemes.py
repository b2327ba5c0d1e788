"""The official SR-STE and DominoSearch code: dense checkpoints, and patterns that stand elsewhere."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from published import published_scheme
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext import domino_text
from nmsparse_ext.deploy import detect_format, from_peer, to_peer
from nmsparse_ext.tensor import NMTensor


def official_forward(weight: Tensor, n: int, m: int, *, nhwc: bool) -> Tensor:
    """The published rule: along the flattened weight, the m - n smallest of every m are zeroed."""
    w = weight.permute(0, 2, 3, 1) if nhwc and weight.dim() == 4 else weight
    groups = w.reshape(-1, m).clone()
    groups[torch.arange(len(groups)).unsqueeze(1), groups.abs().argsort(dim=1)[:, : m - n]] = 0
    pruned = groups.view(w.shape)
    return pruned.permute(0, 3, 1, 2) if nhwc and weight.dim() == 4 else pruned


def checkpoint() -> tuple[nn.Module, dict[str, object]]:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 1), nn.Linear(8, 4))
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    return model, {"step": 9, "state_dict": state, "best_prec1": 0.7, "optimizer": {}}


@pytest.mark.parametrize("grouping", ["channel", "flat"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (2, 8)])
def test_nm_sparsity(tmp_path: Path, grouping: str, n: int, m: int) -> None:
    model, saved = checkpoint()
    torch.save(saved, tmp_path / "checkpoint.pth.tar")
    assert detect_format(tmp_path / "checkpoint.pth.tar") == "dense"
    tensors = from_peer(
        tmp_path / "checkpoint.pth.tar",
        format="nm-sparsity",
        pattern=f"{n}:{m}",
        counts="kept",
        grouping=grouping,
    )
    for name, weight in model.state_dict().items():
        found = tensors[name].to_dense() if isinstance(tensors[name], NMTensor) else tensors[name]
        if weight.dim() == 4:
            assert torch.equal(found, official_forward(weight, n, m, nhwc=grouping == "channel")), name
        else:
            assert torch.equal(found, weight)  # biases, and linear layers, which were dense
    packed = {name for name, tensor in tensors.items() if isinstance(tensor, NMTensor)}
    # Groups of the first convolution run across filters; flattened 3x3 ones do not run along channels.
    assert packed == ({"1.weight", "2.weight"} if grouping == "channel" else {"2.weight"})
    nms.save_file(tensors, tmp_path / "ours.safetensors")
    nms.load_into(model, tmp_path / "ours.safetensors")


def test_nm_sparsity_by_name() -> None:
    model, saved = checkpoint()
    tensors = from_peer(
        saved, format="nm-sparsity", pattern={"1.weight": "2:4", "3": "2:4"}, counts="kept", model=model
    )
    assert {n for n, t in tensors.items() if isinstance(t, NMTensor)} == {"1.weight", "3.weight"}
    assert torch.equal(tensors["0.weight"], model[0].weight)


def test_nm_sparsity_written(tmp_path: Path) -> None:
    """The published forward, which chooses anew, makes of the file's weights what was packed."""
    model, saved = checkpoint()
    tensors = from_peer(saved, format="nm-sparsity", pattern="2:4", counts="kept")
    to_peer(tensors, tmp_path / "checkpoint.pth.tar", format="nm-sparsity")
    written = torch.load(tmp_path / "checkpoint.pth.tar")["state_dict"]
    assert written.keys() == saved["state_dict"].keys()
    for name in ("1.weight", "2.weight"):
        weight = written[f"module.{name}"]
        assert torch.equal(weight, tensors[name].to_dense())
        assert torch.equal(weight, official_forward(weight, 2, 4, nhwc=True))
    again = from_peer(
        tmp_path / "checkpoint.pth.tar", format="nm-sparsity", pattern="2:4", counts="kept", model=model
    )
    for name, tensor in tensors.items():
        assert type(again[name]) is type(tensor)
        dense, expected = (t.to_dense() if isinstance(t, NMTensor) else t for t in (again[name], tensor))
        assert torch.equal(dense, expected)


def test_dominosearch(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 4))
    (tmp_path / "scheme.txt").write_text(
        "{'SparseConv0_3-16-(3, 3)': [16, 16], 'SparseConv1_16-16-(3, 3)': [2, 16], "
        "'SparseConv2_16-16-(3, 3)': [8, 16], 'Linear0_16-4': [4, 16]}\n"
    )
    assert detect_format(tmp_path / "scheme.txt") == "dominosearch"
    tensors = from_peer(tmp_path / "scheme.txt", model=model)
    patterns = {name: str(t.pattern) for name, t in tensors.items() if isinstance(t, NMTensor)}
    assert patterns == {"1.weight": "2:16", "2.weight": "8:16", "3.weight": "4:16"}
    assert torch.equal(tensors["1.weight"].to_dense(), nms.nm_prune(model[1].weight, "2:16"))
    with pytest.raises(ValueError, match=r"1\.weight: w does not satisfy 2:16"):
        from_peer(tmp_path / "scheme.txt", model=model, prune=False)
    to_peer(tensors, tmp_path / "again.txt", format="dominosearch", model=model)
    assert (tmp_path / "again.txt").read_text() == (tmp_path / "scheme.txt").read_text()


def test_the_published_scheme_comes_back_as_it_was() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    text = published_scheme().read_text()
    with torch.device("meta"):
        model = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    scheme = nms.Scheme.load(published_scheme(), model)
    patterns = {name: pattern for name, pattern in scheme.items() if not pattern.is_dense}
    again = domino_text.dump(patterns, model, dense=nms.Pattern(16, 16))
    assert ast.literal_eval(again) == ast.literal_eval(text.splitlines()[0])


def test_what_the_text_has_no_line_for() -> None:
    with pytest.raises(ValueError, match=r"2-D convolutions and linear layers only, not 0\.weight"):
        domino_text.dump(
            {"0.weight": nms.Pattern(2, 4)}, nn.Sequential(nn.Conv1d(4, 4, 1)), dense=nms.Pattern(4, 4)
        )
