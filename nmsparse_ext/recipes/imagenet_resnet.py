"""``imagenet-resnet``: ResNets on ImageNet, or any other folder of images, by the published recipe.

The recipe of "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch" and its code: SGD,
momentum 0.9, learning rate 0.1 for a batch of 256, five epochs of warm-up and a cosine over 120, weight decay
5e-5, lambda 2e-4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from nmsparse_ext.recipes.config import TrainConfig
from nmsparse_ext.recipes.image_folder import (
    Augmentation,
    ImageFolder,
    Sample,
    find_images,
    hold_out,
    read_batches,
)
from nmsparse_ext.recipes.task import Shard, Task, classification_sums, shuffled_batches
from nmsparse_ext.registry import register_module

# name -> (kind of block, blocks a stage, channels a stage)
NARROW, WIDE = [64, 128, 256, 512], [256, 512, 1024, 2048]
ARCHITECTURES = {
    "resnet18": ("basic", [2, 2, 2, 2], NARROW),
    "resnet34": ("basic", [3, 4, 6, 3], NARROW),
    "resnet50": ("bottleneck", [3, 4, 6, 3], WIDE),
    "resnet101": ("bottleneck", [3, 4, 23, 3], WIDE),
    "resnet152": ("bottleneck", [3, 8, 36, 3], WIDE),
}


@dataclass(kw_only=True)
class ImagenetConfig(TrainConfig):
    """Train a ResNet on a folder of images.

    Attributes:
        lr: Peak learning rate for a batch of 256; in proportion for others.
        data: Folder with `train` and `val`, each with a folder of images for every class, as ImageNet comes.
            `val` is the test data; validation data are held out from `train`.
        validation_share: Share of every class's training images that are held out.
        architecture: Which ResNet.
        library: Whose: torchvision, transformers, or auto for the first of these that is installed.
        reference_layers: Prune the first convolution too, grouped as the paper's code does (the weight laid
            out as output, height, width, input channel, and cut through filters), which no hardware runs.
        momentum: Momentum of SGD.
        image_size: Height and width of what the model sees.
        resize: Of evaluation: what the shorter side becomes before the middle is cut out.
        colour: How far brightness, contrast and saturation are varied; 0 for not.
        workers: Processes that read images.
    """

    epochs: int = 120
    batch_size: int = 256
    lr: float = 0.1
    weight_decay: float = 5e-5
    warmup: float = 5 / 120
    data: Path = Path("imagenet")
    validation_share: float = 0.01
    architecture: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet50"
    library: Literal["auto", "torchvision", "transformers"] = "auto"
    reference_layers: bool = False
    momentum: float = 0.9
    image_size: int = 224
    resize: int = 256
    colour: float = 0.2
    workers: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must lie between 0 and 1, got {self.validation_share}")
        if not 0 < self.image_size <= self.resize:
            raise ValueError(f"image_size must be at most resize={self.resize}, got {self.image_size}")


class ImagenetResnet(Task):
    """The recipe. Batches are images float32 [count, 3, size, size] and labels int64 [count]."""

    name = "imagenet-resnet"
    config: ImagenetConfig

    def __init__(self, config: ImagenetConfig) -> None:
        super().__init__(config)
        self.classes, samples = find_images(config.data / "train")
        train, validation = hold_out(samples, config.validation_share)
        _, test = find_images(config.data / "val", self.classes)
        self._parts: dict[str, list[Sample]] = {"train": train, "validation": validation, "test": test}
        if len(train) < config.batch_size:
            raise ValueError(f"batch_size {config.batch_size} is more than the {len(train)} training images")

    @override
    def build_model(self) -> nn.Module:
        c = self.config
        model = build_resnet(c.architecture, len(self.classes), c.library)
        if c.reference_layers:
            group_across_filters(model)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @override
    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        c = self.config
        lr = c.lr * c.batch_size / 256
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=c.momentum, weight_decay=c.weight_decay)

    @override
    def dense_layers(self, model: nn.Module) -> Sequence[str]:
        first, last = first_convolution(model), last_linear(model)
        return (last,) if self.config.reference_layers else (first, last)

    @property
    @override
    def steps_per_epoch(self) -> int:
        return len(self._parts["train"]) // self.config.batch_size

    @override
    def train_batches(self, epoch: int, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        c, samples = self.config, self._parts["train"]
        augmentation = Augmentation(c.image_size, colour=c.colour)
        images = ImageFolder(samples, c.image_size, c.resize, augmentation, c.seed, epoch)
        order = shuffled_batches(len(samples), c.batch_size, c.accumulate, c.seed, epoch)
        return self._read(images, [shard.of(batch).tolist() for batch in order])

    @override
    def eval_batches(self, part: str, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        c, samples = self.config, self._parts[part]
        mine = shard.of(torch.arange(len(samples)))
        size = max(1, c.batch_size // shard.world)
        images = ImageFolder(samples, c.image_size, c.resize)
        return self._read(images, [batch.tolist() for batch in mine.split(size) if len(batch)])

    def _read(self, images: ImageFolder, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        return read_batches(images, batches, self.config.workers, pinned=torch.cuda.is_available())

    @override
    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(logits_of(model(batch[0])), batch[1])

    @override
    def measure(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        logits, labels = logits_of(model(batch[0])), batch[1]
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        return classification_sums(logits, labels) | {"top5": (best == labels.unsqueeze(1)).sum()}

    @override
    def describe(self) -> dict[str, Any]:
        return {"data": self.config.data.name, "classes": len(self.classes)} | {
            part: len(samples) for part, samples in self._parts.items()
        }


# ---------------------------------------------------------------------------------------------------- models


def build_resnet(architecture: str, classes: int, library: str = "auto") -> nn.Module:
    """Makes a ResNet with random weights.

    Raises:
        ValueError: If neither library is installed, or not the one that was asked for.
    """
    installed = [name for name in ("torchvision", "transformers") if find_spec(name) is not None]
    if library == "auto" and installed:
        library = installed[0]
    if library not in installed:
        raise ValueError(
            f"library {library!r} is not installed; a ResNet needs torchvision or transformers "
            f"(installed: {', '.join(installed) or 'neither'})"
        )
    if library == "torchvision":
        from torchvision import models

        return models.get_model(architecture, num_classes=classes)
    from transformers import ResNetConfig, ResNetForImageClassification

    kind, depths, channels = ARCHITECTURES[architecture]
    config = ResNetConfig(
        layer_type=kind,
        depths=depths,
        hidden_sizes=channels,
        embedding_size=64,
        num_labels=classes,  # type: ignore[call-arg]
    )
    return ResNetForImageClassification(config)


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returns: of `transformers` an object, of others a tensor."""
    return output if isinstance(output, Tensor) else output.logits


def first_convolution(model: nn.Module) -> str:
    """The name of the first convolution."""
    return next(name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, FlatConv2d)))


def last_linear(model: nn.Module) -> str:
    """The name of the last linear layer."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear)][-1]


class FlatConv2d(nn.Module):
    """A convolution whose weight is kept as one row, so that groups run on through its filters.

    The row is the weight laid out as output channel, height, width, input channel, which is how the paper's
    code groups it.

    Args:
        conv: The convolution to take the place of.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = (conv.stride, conv.padding, conv.dilation)
        out, channels, height, width = conv.weight.shape
        self.shape = (out, height, width, channels)
        self.weight = nn.Parameter(conv.weight.detach().permute(0, 2, 3, 1).reshape(1, -1).clone())
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution's."""
        weight = self.weight.view(self.shape).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, self.bias, *self.conv)  # type: ignore[arg-type]


register_module(FlatConv2d, {"weight": 1})


def group_across_filters(model: nn.Module) -> None:
    """Puts a `FlatConv2d` in the place of the first convolution."""
    name = first_convolution(model)
    conv = model.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    model.set_submodule(name, FlatConv2d(conv))
