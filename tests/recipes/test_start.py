"""Fine-tuning: from the weights of a run before, with a pattern per layer."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn", reason="the train extra is not installed")

from recipes.small import digits

import nmsparse_ext as nms
from nmsparse_ext.recipes.loop import out_folder, train

MIXED = {"block1.conv1.weight": "2:16", "block1.conv2.weight": "16:16"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A short dense run's model and its file."""
    out = tmp_path_factory.mktemp("dense")
    return train(digits(method="dense", epochs=1, out=out)).model, out / "model.safetensors"


@pytest.fixture
def scheme(tmp_path):
    path = tmp_path / "mixed.json"
    nms.Scheme(MIXED).save(path)
    return path


def test_starts_from_the_file(dense):
    model, path = dense
    outcome = train(digits(method="dense", start=path, epochs=1, lr=0.0))
    batch_norm = [name for name in model.state_dict() if "running" in name or "num_batches" in name]
    for name, tensor in model.state_dict().items():
        if name not in batch_norm:
            assert torch.equal(outcome.model.state_dict()[name], tensor), name


def test_packed_weights_are_trained_on(tmp_path):
    train(digits(epochs=1, pattern="4:16", out=tmp_path))
    assert nms.load_file(tmp_path / "model.safetensors")["block1.conv1.weight"].pattern == nms.Pattern(4, 16)
    outcome = train(digits(start=tmp_path / "model.safetensors", pattern="2:16", epochs=1, lr=0.01))
    weight = outcome.model.get_parameter("block1.conv1.weight")
    assert nms.find_violation(weight, "2:16") is None
    assert weight.requires_grad


def test_trains_with_a_scheme(dense, scheme):
    outcome = train(digits(start=dense[1], scheme=scheme, epochs=1, lr=0.01))
    assert nms.find_violation(outcome.model.get_parameter("block1.conv1.weight"), "2:16") is None
    assert outcome.model.get_parameter("block1.conv2.weight").count_nonzero() == 16 * 16 * 9
    assert outcome.prunable == 16 * 16 * 9  # what stays dense is not under a pattern
    assert outcome.model.get_parameter("fc.weight").count_nonzero() == 160


def test_folder_is_named_by_the_scheme(scheme):
    assert out_folder(digits(scheme=scheme).config, "digits").name == "digits-sr-ste-mixed-0"


def test_refusals(tmp_path, scheme):
    with pytest.raises(ValueError, match=r"start: there is no file .*none.safetensors"):
        digits(start=tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="scheme says which weights stay dense: skip cannot"):
        digits(scheme=scheme, skip=["fc"])
    nms.save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"start: .*other.safetensors does not match the model"):
        train(digits(start=tmp_path / "other.safetensors"))
    all_dense = tmp_path / "dense.json"
    nms.Scheme({"block1.conv1.weight": "16:16"}).save(all_dense)
    with pytest.raises(ValueError, match=r"no weight of the model can be sparse by .*dense.json"):
        train(digits(scheme=all_dense))
