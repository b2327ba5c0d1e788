"""``digits-resnet``: a small residual network on scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from nmsparse_ext.recipes.config import TrainConfig
from nmsparse_ext.recipes.digits import DENSE_LAYERS, DigitsNet, load_images, shift_images
from nmsparse_ext.recipes.task import Place, Shard, Task, classification_sums, generator_for, shuffled_batches

# The test images are the same in every run, so that nothing chosen on other runs has seen them.
TEST_SEED = 20260101


@dataclass(kw_only=True)
class DigitsConfig(TrainConfig):
    """Train a small residual network on scikit-learn's digits.

    Attributes:
        width: Channels of the first block, doubled by each later one; a multiple of 16.
        blocks: Residual blocks, 1 to 3.
        momentum: Momentum of SGD.
        test_share: Share of the images that are test data, the same ones whatever the seed.
        validation_share: Share of the other images that are validation data, drawn by the seed.
    """

    epochs: int = 40
    batch_size: int = 64
    lr: float = 0.1
    weight_decay: float = 5e-4
    width: int = 32
    blocks: int = 3
    momentum: float = 0.9
    test_share: float = 0.25
    validation_share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("test_share", "validation_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")


class DigitsResnet(Task):
    """The recipe. Batches are images float32 [count, 1, 8, 8] and labels int64 [count]."""

    name = "digits-resnet"
    config: DigitsConfig

    def __init__(self, config: DigitsConfig) -> None:
        super().__init__(config)
        self._parts = split(config.seed, config.test_share, config.validation_share)

    @override
    def build_model(self) -> nn.Module:
        model = DigitsNet(self.config.width, self.config.blocks)
        # channels_last is the faster layout for small convolutions, and lays the groups out in a row.
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @override
    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        c = self.config
        return torch.optim.SGD(model.parameters(), lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay)

    @override
    def dense_layers(self, model: nn.Module) -> Sequence[str]:
        return DENSE_LAYERS

    @override
    def default_lambda(self, model: nn.Module) -> float:
        return 2e-4

    @property
    @override
    def steps_per_epoch(self) -> int:
        return len(self._parts["train"][0]) // self.config.batch_size

    @override
    def train_batches(self, epoch: int, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self._parts["train"]
        c = self.config
        shifts = generator_for(c.seed, Place.AUGMENTATION, epoch)
        for chosen in shuffled_batches(len(x), c.batch_size, c.accumulate, c.seed, epoch):
            # Shifted before it is shared out: how many processes there are makes no difference.
            yield shard.of(shift_images(x[chosen], shifts)), shard.of(y[chosen])

    @override
    def eval_batches(self, part: str, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self._parts[part]
        yield shard.of(x), shard.of(y)

    @override
    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y)

    @override
    def measure(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = batch
        return classification_sums(model(x), y)

    @override
    def describe(self) -> dict[str, Any]:
        return {"data": "scikit-learn digits"} | {part: len(y) for part, (_, y) in self._parts.items()}


Part = tuple[Tensor, Tensor]


def split(seed: int, test_share: float, validation_share: float) -> dict[str, Part]:
    """The digits in three parts: "train", "validation" and "test", each images and labels.

    Args:
        seed: Draws the validation data from what is not test data.
        test_share: Share of all images that are test data, the same for every seed.
        validation_share: Share of the others that are validation data.
    """
    x, y = load_images()
    count = round(len(x) * test_share)
    order = torch.randperm(len(x), generator=generator_for(TEST_SEED, Place.SPLIT))
    test, rest = order[:count], order[count:]
    rest = rest[torch.randperm(len(rest), generator=generator_for(seed, Place.SPLIT))]
    count = round(len(rest) * validation_share)
    chosen = {"train": rest[count:], "validation": rest[:count], "test": test}
    return {part: (x[indices], y[indices]) for part, indices in chosen.items()}
