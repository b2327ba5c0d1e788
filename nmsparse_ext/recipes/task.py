"""What a recipe brings to the training loop: its data, its model, its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nmsparse_ext as nms
from nmsparse_ext.recipes.config import TrainConfig

PARTS = ("validation", "test")


class Shard(NamedTuple):
    """Which of `world` equal parts of the work is this process's."""

    rank: int = 0
    world: int = 1

    def of(self, batch: Tensor) -> Tensor:
        """This process's examples of a batch: every `world`-th."""
        return batch[self.rank :: self.world]


class Place(IntEnum):
    """What a run needs random numbers for; each has a stream of its own."""

    WEIGHTS = 0
    EPOCH = 1  # dropout and whatever else draws from the global generators
    ORDER = 2
    AUGMENTATION = 3
    SPLIT = 4


class Task(ABC):
    """A recipe. The loop calls these methods and knows nothing else about data or model.

    Data comes in three parts: training data, validation data for every choice that is made by looking, and
    test data, which is read once, at the end.

    Args:
        config: The run's settings.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Makes the model; the loop has seeded the generators and moves it to the device."""

    @abstractmethod
    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Makes the optimizer; the loop scales its learning rates by warm-up and cosine."""

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; not a matter of how many processes share them."""

    @abstractmethod
    def train_batches(self, epoch: int, shard: Shard) -> Iterator[Any]:
        """This process's part of one epoch: ``steps_per_epoch * accumulate`` batches, on the CPU."""

    @abstractmethod
    def eval_batches(self, part: str, shard: Shard) -> Iterator[Any]:
        """This process's part of the "validation" or "test" data."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch, with gradient."""

    @abstractmethod
    def measure(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Sums over a batch, without gradient: "count", and what is to be divided by it ("loss", ...)."""

    def model_input(self, batch: Any) -> Any:
        """What the model is called with for a batch: a tensor, or a mapping of keyword arguments."""
        return batch[0] if isinstance(batch, tuple) else batch

    def dense_layers(self, model: nn.Module) -> Sequence[str]:
        """Layers that stay dense unless the config says otherwise."""
        return ()

    def default_lambda(self, model: nn.Module) -> float:
        """SR-STE's lambda unless the config says otherwise."""
        return 2e-4

    def scheme(self, model: nn.Module) -> nms.Scheme:
        """The pattern of every weight that becomes sparse."""
        if self.config.scheme is not None:
            return nms.Scheme.load(self.config.scheme, model)
        skip = self.config.skip if self.config.skip is not None else list(self.dense_layers(model))
        return nms.Scheme.uniform(model, self.config.pattern, skip=skip)

    def save(self, model: nn.Module, folder: Path) -> None:  # noqa: B027 - most recipes need nothing more
        """Writes the trained model in a form of the recipe's own, beside the packed ``model.safetensors``."""

    def describe(self) -> dict[str, Any]:
        """What identifies the data, as plain JSON types."""
        return {}


def check_batch(batch_size: int, accumulate: int, world: int) -> None:
    """Refuses a batch that cannot be split.

    Raises:
        ValueError: Naming the setting.
    """
    if batch_size % (accumulate * world):
        raise ValueError(
            f"batch_size must be divisible by accumulate x processes = {accumulate} x {world}, "
            f"got {batch_size}"
        )


def shuffled_batches(count: int, batch_size: int, accumulate: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Indices of one epoch in random order, in batches; what fills no optimizer step is left out.

    Args:
        count: Number of examples.
        batch_size: Examples per optimizer step, over all processes.
        accumulate: Parts that each step's examples are split into.
        seed: Seed of the run.
        epoch: The epoch's number: every epoch has an order of its own, known without those before it.
    """
    order = torch.randperm(count, generator=generator_for(seed, Place.ORDER, epoch))
    yield from order[: count // batch_size * batch_size].split(batch_size // accumulate)


def classification_sums(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Sums over a batch of cross-entropy and of right answers.

    Args:
        logits: [count, classes], any float dtype.
        labels: int64 [count].
    """
    return {
        "count": torch.tensor(len(labels), device=labels.device),
        "loss": F.cross_entropy(logits.float(), labels, reduction="sum"),
        "accuracy": (logits.argmax(1) == labels).sum(),
    }


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of AdamW: weight decay for matrices, none for biases and norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def generator_for(seed: int, *place: int) -> torch.Generator:
    """A CPU generator for one place of a run (epoch, rank), independent of those of other places."""
    return torch.Generator().manual_seed(seed_for(seed, *place))


def seed_for(seed: int, *place: int) -> int:
    """A seed for one place of a run."""
    import numpy

    low, high = numpy.random.SeedSequence([seed, *place]).generate_state(2)
    return (int(high) << 31) ^ int(low)
