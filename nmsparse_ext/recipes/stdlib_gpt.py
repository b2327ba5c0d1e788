"""``stdlib-gpt``: a small GPT on the source code of Python's own standard library, which is always there."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from nmsparse_ext.recipes.config import TrainConfig, lambda_for_size
from nmsparse_ext.recipes.gpt import Gpt
from nmsparse_ext.recipes.task import Place, Shard, Task, decay_groups, generator_for

# Tests of the library and what others installed into it are left out.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

# Characters of the character-level model: printable ASCII and line breaks. Others are all read as the last.
ALPHABET = "\n" + "".join(map(chr, range(32, 127))) + "\N{REPLACEMENT CHARACTER}"


@dataclass(kw_only=True)
class GptConfig(TrainConfig):
    """Train a small GPT on the Python standard library's source.

    Attributes:
        layers: Transformer layers.
        width: Features of the residual stream.
        heads: Attention heads.
        context: Tokens that a prediction may look back at, at most.
        dropout: Dropout.
        steps: Optimizer steps of an epoch; the data are drawn at random and know no end.
        tokenizer: char: one token a character; bpe: byte-pair encoding learned on the training files (needs
            the tokenizers package).
        vocabulary: Number of BPE tokens.
        corpus_bytes: How much of the library to read, from files taken in a fixed random order; 0 for all.
        corpus: Another folder with Python files.
        eval_tokens: Tokens of validation and test data that are used, from the start; 0 for all.
        beta2: AdamW's second beta.
    """

    epochs: int = 20
    batch_size: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.1
    clip: float | None = 1.0
    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 128
    dropout: float = 0.0
    steps: int = 100
    tokenizer: Literal["char", "bpe"] = "char"
    vocabulary: int = 1024
    corpus_bytes: int = 0
    corpus: Path | None = None
    eval_tokens: int = 65536
    beta2: float = 0.95


class StdlibGpt(Task):
    """The recipe. Batches are tokens int64 [count, context + 1]: each but the last predicts the next."""

    name = "stdlib-gpt"
    config: GptConfig

    def __init__(self, config: GptConfig) -> None:
        super().__init__(config)
        folder = config.corpus or Path(sysconfig.get_paths()["stdlib"])
        texts = read_corpus(folder, config.corpus_bytes)
        self._digest = hashlib.sha256("".join(texts.values()).encode()).hexdigest()
        if config.tokenizer == "char":
            self.vocabulary = len(ALPHABET)
            self._tokens = {part: encode_characters(text) for part, text in texts.items()}
        else:
            self.vocabulary, self._tokens = encode_bpe(texts, config.vocabulary)
        for part, tokens in self._tokens.items():
            if len(tokens) <= config.context + 1:
                raise ValueError(
                    f"corpus has {len(tokens)} tokens of {part} data in {folder}, too few for context="
                    f"{config.context}"
                )

    @override
    def build_model(self) -> nn.Module:
        c = self.config
        return Gpt(self.vocabulary, c.context, c.layers, c.width, c.heads, c.dropout)

    @override
    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        c = self.config
        return torch.optim.AdamW(decay_groups(model, c.weight_decay), lr=c.lr, betas=(0.9, c.beta2))

    @override
    def default_lambda(self, model: nn.Module) -> float:
        return lambda_for_size(sum(p.numel() for p in model.parameters()))

    @property
    @override
    def steps_per_epoch(self) -> int:
        return self.config.steps

    @override
    def train_batches(self, epoch: int, shard: Shard) -> Iterator[Tensor]:
        c, tokens = self.config, self._tokens["train"]
        places = generator_for(c.seed, Place.ORDER, epoch)
        window = torch.arange(c.context + 1)
        for _ in range(c.steps):
            starts = torch.randint(len(tokens) - c.context, (c.batch_size, 1), generator=places)
            for part in starts.split(c.batch_size // c.accumulate):
                yield tokens[shard.of(part) + window].long()

    @override
    def eval_batches(self, part: str, shard: Shard) -> Iterator[Tensor]:
        c, tokens = self.config, self._tokens[part]
        limit = min(c.eval_tokens or len(tokens), len(tokens) - 1) // c.context * c.context
        # Windows share the token between them: it is the last that one predicts and the first the next reads.
        windows = tokens[: limit + 1].unfold(0, c.context + 1, c.context)
        for batch in windows.split(c.batch_size):
            if len(mine := shard.of(batch)):
                yield mine.long()

    @override
    def model_input(self, batch: Tensor) -> Tensor:
        return batch[:, :-1]

    @override
    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(self.model_input(batch)).flatten(0, 1), batch[:, 1:].flatten())

    @override
    def measure(self, model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        logits, target = model(self.model_input(batch)).float().flatten(0, 1), batch[:, 1:].flatten()
        count = torch.tensor(len(target), device=target.device)
        return {"count": count, "loss": F.cross_entropy(logits, target, reduction="sum")}

    @override
    def describe(self) -> dict[str, Any]:
        return {
            "data": "Python standard library",
            "python": platform.python_version(),
            "sha256": self._digest,
            **{part: len(tokens) for part, tokens in self._tokens.items()},
        }


# ------------------------------------------------------------------------------------------------------ data


@lru_cache(maxsize=2)
def read_corpus(folder: Path, limit: int) -> dict[str, str]:
    """The text of a folder's Python files in three parts, "train", "validation" and "test".

    A file belongs to one part as a whole, told by a hash of its name: 90 %, 5 %, 5 %. So a part does not hold
    the continuation of another's file, and what is test data depends on no seed.

    Args:
        folder: Where the files are.
        limit: Bytes to read, about, over all parts; 0 for everything.

    Raises:
        ValueError: If there are no Python files.
    """
    names = (path.relative_to(folder) for path in folder.rglob("*.py"))
    hashed = sorted((name_hash(name), name) for name in names if not LEFT_OUT & set(name.parts))
    if not hashed:
        raise ValueError(f"corpus {folder} holds no Python files")
    texts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    room = {"train": 0.9 * limit, "validation": 0.05 * limit, "test": 0.05 * limit}
    for number, name in hashed:
        share = number % 100
        part = "train" if share < 90 else "validation" if share < 95 else "test"
        if limit and room[part] <= 0:
            continue
        text = (folder / name).read_text(encoding="utf-8", errors="replace")
        if limit:
            text = text[: int(room[part])]
            room[part] -= len(text)
        texts[part].append(text)
    return {part: "\n".join(pieces) for part, pieces in texts.items()}


def name_hash(name: Path) -> int:
    """A number that depends on a relative path alone."""
    return int.from_bytes(hashlib.sha256(name.as_posix().encode()).digest()[:8], "big")


def encode_characters(text: str) -> Tensor:
    """Characters as their places in `ALPHABET`: uint8 [characters]."""
    other = len(ALPHABET) - 1
    table = numpy.full(0x110000, other, dtype=numpy.uint8)
    table[[ord(character) for character in ALPHABET]] = range(len(ALPHABET))
    return torch.from_numpy(table[numpy.frombuffer(text.encode("utf-32-le"), dtype=numpy.uint32)])


def encode_bpe(texts: dict[str, str], vocabulary: int) -> tuple[int, dict[str, Tensor]]:
    """Learns byte-level BPE on the training text and encodes all parts.

    Returns:
        The number of tokens, and ``{part: int32 [tokens]}``.
    """
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([texts["train"]], vocab_size=vocabulary, show_progress=False)
    encoded = {
        part: torch.tensor(tokenizer.encode(text).ids, dtype=torch.int32) for part, text in texts.items()
    }
    return tokenizer.get_vocab_size(), encoded
