"""The trained models that bench_prune.py prunes, and what they are calibrated and tested on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmsparse_ext.recipes.digits_resnet import DigitsConfig, DigitsResnet
from nmsparse_ext.recipes.gpt import Gpt
from nmsparse_ext.recipes.loop import train
from nmsparse_ext.recipes.stdlib_gpt import GptConfig, StdlibGpt
from nmsparse_ext.recipes.task import Shard, Task


@dataclass(frozen=True)
class Subject:
    """A trained model, and its data.

    Attributes:
        name: What it is called.
        seed: What it was trained with.
        model: The model, dense, in eval mode.
        skip: Names of layers that stay dense.
        calibration: What it is called with, from training data.
        test: ``test(model)``: loss and accuracy on test data.
        permuted: Its model with channels reordered, for patterns that this was done for.
    """

    name: str
    seed: int
    model: nn.Module
    skip: Sequence[str]
    calibration: list[Tensor]
    test: Callable[[nn.Module], dict[str, float]]
    permuted: dict[str, nn.Module] = field(default_factory=dict)


class Block(nn.Module):
    """What nn.TransformerEncoderLayer computes (pre-norm, causal), in linear layers that every tool knows."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        attention = layer.self_attn
        self.heads = attention.num_heads
        self.norm1, self.norm2 = layer.norm1, layer.norm2
        self.qkv = linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out = linear(attention.out_proj.weight, attention.out_proj.bias)
        self.linear1, self.linear2 = layer.linear1, layer.linear2

    def forward(self, x: Tensor) -> Tensor:
        """``[count, length, width]``, in and out."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


class PlainGpt(nn.Module):
    """The recipe's `Gpt` in plain linear layers: the same function of the same numbers."""

    def __init__(self, gpt: Gpt) -> None:
        super().__init__()
        self.token, self.place, self.norm = gpt.token, gpt.place, gpt.norm
        self.layers = nn.ModuleList(map(Block, gpt.layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [count, length] -> logits [count, length, vocabulary]."""
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.token.weight)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    return layer


def digits(seed: int, dry: bool, folder: Path | None) -> Subject:
    """The digits-resnet recipe, trained dense."""
    size: dict[str, Any] = {"width": 16, "blocks": 1, "epochs": 1} if dry else {"epochs": 20}
    task = DigitsResnet(DigitsConfig(seed=seed, method="dense", **QUIET, **size))
    # ModelOpt takes no channels_last models.
    model = trained(task, folder).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    images = next(iter(task.eval_batches("validation", Shard())))[0]
    calibration = list(images.split(64 if dry else 128))[: 2 if dry else None]
    return Subject("digits-resnet", seed, model, task.dense_layers(model), calibration, tester(task))


def gpt(seed: int, dry: bool, folder: Path | None) -> Subject:
    """The stdlib-gpt recipe, trained dense, as a `PlainGpt`."""
    size: dict[str, Any] = {"layers": 3, "width": 96, "context": 64, "epochs": 4, "steps": 100}
    if dry:
        size = {"layers": 1, "width": 32, "context": 16, "epochs": 1, "steps": 2, "corpus_bytes": 200_000}
    size["eval_tokens"] = 1024 if dry else 16384
    task = StdlibGpt(GptConfig(seed=seed, method="dense", **QUIET, **size))
    model = PlainGpt(trained(task, folder))  # type: ignore[arg-type]
    # Batches of an epoch that training does not reach, of the same files.
    batches = map(task.model_input, task.train_batches(10_000, Shard()))
    calibration = list(itertools.islice(batches, 2 if dry else 8))
    return Subject("stdlib-gpt", seed, model.eval(), (), calibration, tester(task))


MODELS = {"digits-resnet": digits, "stdlib-gpt": gpt}
QUIET: dict[str, Any] = {"progress": False, "tensorboard": False, "test": False, "device": "cpu"}


def trained(task: Task, folder: Path | None) -> nn.Module:
    """The task's model, trained; kept in ``folder`` and taken from there the next time."""
    name = f"{task.name}-{task.config.seed}.pt"
    if folder is not None and (folder / name).exists():
        model = task.build_model()
        model.load_state_dict(torch.load(folder / name, weights_only=True))
        return model.eval()
    model = train(task).model.eval()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), folder / name)
    return model


def tester(task: Task) -> Callable[[nn.Module], dict[str, float]]:
    """Loss and accuracy over the task's test data."""

    @torch.no_grad()
    def test(model: nn.Module) -> dict[str, float]:
        model.eval()
        loss = hits = count = 0.0
        for batch in task.eval_batches("test", Shard()):
            x, y = batch if isinstance(batch, tuple) else (batch[:, :-1], batch[:, 1:])
            logits, y = model(x).flatten(0, -2), y.flatten()
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            hits += float((logits.argmax(-1) == y).sum())
            count += len(y)
        return {"loss": loss / count, "accuracy": hits / count}

    return test
