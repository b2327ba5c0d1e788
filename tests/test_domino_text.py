"""DominoSearch's own scheme text: matched against models by block order and shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published import published_scheme
from torch import nn

from nmsparse_ext.errors import FormatError
from nmsparse_ext.pattern import Pattern
from nmsparse_ext.scheme import Scheme
from nmsparse_ext.weights import prunable_weights


class Bottleneck(nn.Module):
    """A residual block whose side branch has a layer of the same shape as the main path's last one."""

    def __init__(self, channels: int, width: int, *, side_first: bool, side: bool = True) -> None:
        super().__init__()
        main = {
            "conv1": nn.Conv2d(channels, width, 1),
            "conv2": nn.Conv2d(width, width, 3),
            "conv3": nn.Conv2d(width, 4 * width, 1),
        }
        branch = {"shortcut": nn.Sequential(nn.Conv2d(channels, 4 * width, 1))} if side else {}
        for name, module in {**branch, **main}.items() if side_first else {**main, **branch}.items():
            self.add_module(name, module)


class Small(nn.Module):
    """Two bottlenecks and a head, with the side branch registered first or last."""

    def __init__(self, *, side_first: bool) -> None:
        super().__init__()
        self.head = nn.Linear(32, 10)  # registered first: the scheme lists linear layers after convolutions
        self.stem = nn.Conv2d(3, 8, 7)
        self.block1 = Bottleneck(8, 8, side_first=side_first)
        self.block2 = Bottleneck(32, 8, side_first=side_first, side=False)


# In the order of the authors' models: conv1, conv2, conv3, then the side branch, whose layer is like conv3.
SMALL_TEXT = (
    "{'SparseConv0_3-8-(7, 7)': [8, 8], 'SparseConv1_8-8-(1, 1)': [4, 8], "
    "'SparseConv2_8-8-(3, 3)': [1, 8], 'SparseConv3_8-32-(1, 1)': [2, 8], "
    "'SparseConv4_8-32-(1, 1)': [4, 8], 'SparseConv5_32-8-(1, 1)': [4, 8], "
    "'SparseConv6_8-8-(3, 3)': [2, 8], 'SparseConv7_8-32-(1, 1)': [8, 8], 'Linear0_32-10': [1, 8]}\n"
    "the rest of the file is a log\n"
)


class TestDominoSearchText:
    @pytest.mark.parametrize("side_first", [False, True])
    def test_order_within_a_block(self, tmp_path: Path, side_first: bool) -> None:
        path = tmp_path / "scheme.txt"
        path.write_text(SMALL_TEXT)
        scheme = Scheme.load(path, Small(side_first=side_first))
        assert {name: str(pattern) for name, pattern in scheme.items()} == {
            "stem.weight": "8:8",
            "block1.conv1.weight": "4:8",
            "block1.conv2.weight": "1:8",
            "block1.conv3.weight": "2:8",
            "block1.shortcut.0.weight": "4:8",
            "block2.conv1.weight": "4:8",
            "block2.conv2.weight": "2:8",
            "block2.conv3.weight": "8:8",
            "head.weight": "1:8",
        }
        assert scheme.complete
        assert not scheme.dense

    def test_other_weights_are_dense(self, tmp_path: Path) -> None:
        path = tmp_path / "scheme.txt"
        path.write_text("{'Linear0_8-4': [2, 4]}")
        model = nn.ModuleDict(
            {"fc": nn.Linear(8, 4), "embedding": nn.Embedding(4, 8), "audio": nn.Conv1d(8, 4, 3)}
        )
        scheme = Scheme.load(path, nn.DataParallel(model))
        assert scheme == {"fc.weight": Pattern(2, 4)}
        assert dict(scheme.dense) == {
            "embedding.weight": "embeddings stay dense unless named",
            "audio.weight": "of a type that DominoSearch does not prune",
        }

    def test_it_needs_a_model(self, tmp_path: Path) -> None:
        path = tmp_path / "scheme.txt"
        path.write_text(SMALL_TEXT)
        with pytest.raises(
            ValueError, match=r"scheme\.txt is DominoSearch text, .*: model= is needed"
        ) as error:
            Scheme.load(path)
        assert not isinstance(error.value, FormatError)  # the file is fine

    def test_all_that_does_not_match_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "scheme.txt"
        path.write_text(SMALL_TEXT)
        model = Small(side_first=True)
        model.head = nn.Linear(32, 20)
        model.block2 = nn.Conv2d(32, 8, (1, 3))
        with pytest.raises(ValueError, match=r"scheme\.txt does not match the model:") as error:
            Scheme.load(path, model)
        assert str(error.value).split("\n  ")[1:] == [
            "of shape (8, 8, 3, 3) the scheme has SparseConv2_8-8-(3, 3), SparseConv6_8-8-(3, 3); "
            "the model block1.conv2.weight",
            "of shape (8, 32, 1, 1) the scheme has SparseConv3_8-32-(1, 1), SparseConv4_8-32-(1, 1), "
            "SparseConv7_8-32-(1, 1); the model block1.conv3.weight, block1.shortcut.0.weight",
            "of shape (32, 8, 1, 1) the scheme has SparseConv5_32-8-(1, 1); the model none",
            "of shape (32, 10) the scheme has Linear0_32-10; the model none",
            "the scheme has no head.weight",
            "the scheme has no block2.weight",
        ]

    def test_layers_far_from_their_places_are_no_match(self, tmp_path: Path) -> None:
        """A model with the same layers in another order is another model."""
        path = tmp_path / "scheme.txt"
        others = [f"'SparseConv{i}_8-{8 + i}-(1, 1)': [2, 4]" for i in range(1, 11)]
        ends = ["'SparseConv0_8-8-(1, 1)': [1, 4]", "'SparseConv11_8-8-(1, 1)': [2, 4]"]
        convs = [nn.Conv2d(8, 8 + i, 1) for i in range(1, 11)]
        path.write_text("{" + ", ".join([ends[0], *others, ends[1]]) + "}")
        in_order = nn.Sequential(nn.Conv2d(8, 8, 1), *convs, nn.Conv2d(8, 8, 1))
        assert str(Scheme.load(path, in_order)["11"]) == "2:4"
        moved = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), *convs)
        with pytest.raises(
            ValueError, match=r"1\.weight, the match of SparseConv11_8-8.*stands 10 layers away"
        ):
            Scheme.load(path, moved)
        path.write_text(path.read_text().replace("[1, 4]", "[2, 4]"))
        assert str(Scheme.load(path, moved)["1"]) == "2:4"  # all the same, so there is nothing to mix up

    def test_patterns_must_fit(self, tmp_path: Path) -> None:
        path = tmp_path / "scheme.txt"
        path.write_text("{'Linear0_10-4': [2, 4]}")
        with pytest.raises(ValueError, match=r"0\.weight cannot be 2:4: group dim 1 has 10 weights"):
            Scheme.load(path, nn.Sequential(nn.Linear(10, 4)))


def test_published_resnet50_scheme() -> None:
    path = published_scheme()
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    with torch.device("meta"):
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
    scheme = Scheme.load(path, model)
    assert str(scheme) == "12 x 2:16, 26 x 4:16, 14 x 8:16, 2 x 16:16, 0 dense"
    stages = "resnet.encoder.stages"
    assert scheme["resnet.embedder.embedder.convolution"] == Pattern(16, 16)
    assert scheme[f"{stages}.1.layers.0.shortcut.convolution"] == Pattern(4, 16)
    assert scheme[f"{stages}.1.layers.0.layer.1.convolution"] == Pattern(2, 16)
    assert scheme[f"{stages}.3.layers.0.shortcut.convolution"] == Pattern(2, 16)
    assert scheme[f"{stages}.3.layers.0.layer.2.convolution"] == Pattern(4, 16)
    assert scheme["classifier.1"] == Pattern(4, 16)
    params = {weight.name: weight.parameter.numel() for weight in prunable_weights(model)}
    kept = sum(count * scheme[name].n // scheme[name].m for name, count in params.items())
    assert (kept, sum(params.values())) == (4_907_200, 25_502_912)
    assert 1 - kept / sum(params.values()) == pytest.approx(0.8076, abs=5e-5)
