"""imagenet-resnet: images read with Pillow, the published recipe, a run on generated JPEGs."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("PIL", reason="the train extra is not installed")
pytest.importorskip("transformers", reason="no library with ResNets is installed")

from PIL import Image
from recipes.small import QUIET

import nmsparse_ext as nms
from nmsparse_ext.recipes import imagenet_resnet
from nmsparse_ext.recipes.image_folder import (
    MEAN,
    STD,
    Augmentation,
    ImageFolder,
    centre_crop,
    find_images,
    hold_out,
    to_tensor,
)
from nmsparse_ext.recipes.imagenet_resnet import FlatConv2d, ImagenetConfig, ImagenetResnet, build_resnet
from nmsparse_ext.recipes.loop import train
from nmsparse_ext.recipes.task import Shard

COLOURS = {"blue": (30, 60, 220), "red": (220, 40, 30), "yellow": (230, 220, 40)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of JPEGs, each of a colour, of various sizes; one grey, one with transparency."""
    root = tmp_path_factory.mktemp("images")
    draw = random.Random(0)
    for part, count in (("train", 8), ("val", 3)):
        for name, colour in COLOURS.items():
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                size = draw.randint(40, 80), draw.randint(40, 80)
                image = Image.new("RGB", size, tuple(min(255, c + draw.randint(0, 25)) for c in colour))
                image.save(root / part / name / f"{i}.JPEG")
    Image.new("L", (50, 50), 128).save(root / "train" / "red" / "grey.jpg")
    Image.new("RGBA", (50, 50), (255, 0, 0, 128)).save(root / "train" / "red" / "clear.png")
    (root / "train" / "red" / "notes.txt").write_text("no image")
    return root


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    """ResNet-18 with an eighth of its channels: a run in seconds."""
    monkeypatch.setitem(
        imagenet_resnet.ARCHITECTURES, "resnet18", ("basic", [1, 1, 1, 1], [16, 16, 32, 32])
    )  # fmt: skip


def task(folder, **settings):
    small = {
        "data": folder, "architecture": "resnet18", "library": "transformers", "image_size": 32, "resize": 36,
        "batch_size": 8, "epochs": 2, "workers": 0, "validation_share": 0.2,
    }  # fmt: skip
    return ImagenetResnet(ImagenetConfig(**{**QUIET, **small, **settings}))


def test_published_recipe():
    c = ImagenetConfig()
    assert (c.epochs, c.batch_size, c.lr, c.momentum, c.weight_decay) == (120, 256, 0.1, 0.9, 5e-5)
    assert c.warmup * c.epochs == 5
    assert c.lambda_w is None
    assert c.method == "sr-ste"


def test_learning_rate_follows_the_batch(folder):
    made = task(folder, batch_size=16)
    optimizer = made.build_optimizer(torch.nn.Linear(2, 2))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 16 / 256)
    assert made.default_lambda(torch.nn.Linear(2, 2)) == 2e-4


def test_find_images(folder):
    classes, samples = find_images(folder / "train")
    assert classes == ["blue", "red", "yellow"]
    assert len(samples) == 3 * 8 + 2
    assert {path.parent.name for path, label in samples if label == 1} == {"red"}


def test_wrong_folders_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        find_images(tmp_path / "none")
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        find_images(tmp_path)
    with pytest.raises(ValueError, match="classes that the training data lack: yellow"):
        find_images(folder / "val", ["blue", "red"])
    with pytest.raises(ValueError, match="batch_size 100 is more than"):
        task(folder, batch_size=100)


def test_validation_images_are_held_out_by_class(folder):
    _, samples = find_images(folder / "train")
    left, held = hold_out(samples, 0.2)
    assert not set(left) & set(held)
    assert sorted(left + held) == sorted(samples)
    assert [sum(label == c for _, label in held) for c in range(3)] == [2, 2, 2]
    assert hold_out(list(reversed(samples)), 0.2) == (left, held)


def test_tensor_is_normalised():
    image = Image.new("RGB", (2, 3), tuple(round(255 * m) for m in MEAN))
    tensor = to_tensor(image)
    assert tensor.shape == (3, 3, 2)
    assert tensor.abs().max() < 0.01
    white = to_tensor(Image.new("RGB", (1, 1), (255, 255, 255))).flatten()
    assert white.tolist() == pytest.approx([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)])


def test_centre_crop_takes_the_middle():
    image = Image.new("RGB", (80, 40), (255, 0, 0))
    image.paste((0, 255, 0), (25, 5, 55, 35))
    cropped = centre_crop(image, 24, 32)  # 24/32 of the shorter side: 30 x 30 pixels
    assert cropped.size == (24, 24)
    assert cropped.getpixel((1, 1)) == (0, 255, 0)  # the filter mixes pixels at the edge
    assert cropped.getpixel((22, 22)) == (0, 255, 0)
    assert cropped.getpixel((0, 0))[0] < 100


def test_augmentation_is_a_matter_of_its_draws():
    image = Image.effect_noise((60, 50), 80).convert("RGB")
    vary = Augmentation(32)
    assert vary(image, random.Random(1)).tobytes() == vary(image, random.Random(1)).tobytes()
    assert vary(image, random.Random(1)).tobytes() != vary(image, random.Random(2)).tobytes()
    assert vary(image, random.Random(1)).size == (32, 32)


@pytest.mark.parametrize("size", [(60, 50), (300, 10), (10, 300)])
def test_crops_lie_within_the_image(size):
    vary = Augmentation(8)
    for seed in range(50):
        left, top, right, bottom = vary._crop(*size, random.Random(seed))
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


def test_an_epoch_s_images_are_the_same_whoever_reads_them(folder):
    _, samples = find_images(folder / "train")
    first = ImageFolder(samples, 32, 36, Augmentation(32), seed=3, epoch=1)
    again = ImageFolder(samples, 32, 36, Augmentation(32), seed=3, epoch=1)
    later = ImageFolder(samples, 32, 36, Augmentation(32), seed=3, epoch=2)
    [again[i] for i in (5, 0)]
    assert torch.equal(first[2][0], again[2][0])
    assert not torch.equal(first[2][0], later[2][0])


def test_processes_and_workers_share_an_epoch(folder):
    whole = [y for _, y in task(folder).train_batches(0, Shard())]
    halves = [[y for _, y in task(folder, workers=1).train_batches(0, Shard(rank, 2))] for rank in range(2)]
    for one, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(one[0::2], first)
        assert torch.equal(one[1::2], second)
    count = [sum(len(y) for _, y in task(folder).eval_batches("test", Shard(rank, 2))) for rank in range(2)]
    assert sum(count) == 9


def test_which_layers_are_sparse(folder):
    made = task(folder)
    model = made.build_model()
    scheme = made.scheme(model)
    dense = {name for name, p in model.named_parameters() if p.dim() > 1} - set(scheme)
    assert dense == {"resnet.embedder.embedder.convolution.weight", "classifier.1.weight"}


def test_reference_layers(folder):
    """The first convolution is sparse too, in groups of the weight laid out as the paper's code does."""
    made = task(folder, reference_layers=True, pattern="1:4", epochs=1)
    torch.manual_seed(0)
    plain = build_resnet("resnet18", 3, "transformers").eval()
    torch.manual_seed(0)
    model = made.build_model().eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x).logits, plain(x).logits)
    outcome = train(made)
    first = outcome.model.get_submodule("resnet.embedder.embedder.convolution")
    assert isinstance(first, FlatConv2d)
    assert nms.find_violation(first.weight.detach(), "1:4") is None
    as_published = first.weight.detach().reshape(-1, 4)
    assert (as_published != 0).sum(1).max() == 1
    dense = {n for n, p in outcome.model.named_parameters() if p.dim() > 1} - set(made.scheme(outcome.model))
    assert dense == {"classifier.1.weight"}


def test_run_and_resume(folder, tmp_path):
    whole = train(task(folder, out=tmp_path / "whole"))
    broken = {"out": tmp_path / "broken", "workers": 1}
    train(task(folder, **broken, stop_after=1))
    rest = train(task(folder, **broken, resume=True))
    assert whole.rows == rest.rows
    assert whole.test == rest.test
    a, b = whole.model.state_dict(), rest.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert set(whole.test) == {"test_loss", "test_accuracy", "test_top5"}
    assert whole.test["test_top5"] == 1  # of three classes
    assert nms.load_file(tmp_path / "whole" / "model.safetensors").keys() == a.keys()


def test_it_learns_colours(folder):
    outcome = train(task(folder, epochs=6, lr=1.6, colour=0.0, amp="bf16", accumulate=2))
    assert outcome.rows[-1]["train_loss"] < outcome.rows[0]["train_loss"] - 0.2


def test_libraries(monkeypatch):
    with pytest.raises(ValueError, match="library 'keras' is not installed"):
        build_resnet("resnet18", 3, "keras")
    monkeypatch.setattr(imagenet_resnet, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs torchvision or transformers"):
        build_resnet("resnet18", 3)


def test_torchvision_is_asked_for_its_model(monkeypatch):
    """torchvision need not be there: what is called, and which layers are found in a model like its own."""
    import sys
    import types

    made = torch.nn.Sequential()
    made.conv1, made.fc = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 5)
    models = types.SimpleNamespace(get_model=lambda name, num_classes: (made, name, num_classes))
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(models=models))
    monkeypatch.setattr(imagenet_resnet, "find_spec", lambda name: object())
    assert build_resnet("resnet50", 5) == (made, "resnet50", 5)
    assert (imagenet_resnet.first_convolution(made), imagenet_resnet.last_linear(made)) == ("conv1", "fc")
    logits = torch.ones(2, 5)
    assert imagenet_resnet.logits_of(logits) is logits


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_share": 0.0}, "validation_share must lie between 0 and 1"),
        ({"image_size": 300}, "image_size must be at most resize=256, got 300"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ImagenetConfig(**settings)
