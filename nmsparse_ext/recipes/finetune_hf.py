"""``finetune-hf``: a `transformers` model from a local folder, made sparse on the user's own data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from nmsparse_ext.recipes.config import TrainConfig, lambda_for_size
from nmsparse_ext.recipes.task import Shard, Task, classification_sums, decay_groups, shuffled_batches
from nmsparse_ext.recipes.text_file import Example, part_examples, read_examples

# Layers on top of a model, which are small or new, by the names that transformers gives them.
HEADS = ("classifier", "pre_classifier", "score", "lm_head", "embed_out", "cls", "qa_outputs")

Batch = dict[str, Tensor]


@dataclass(kw_only=True)
class FinetuneConfig(TrainConfig):
    """Fine-tune a transformers model under a pattern.

    Attributes:
        model: Folder with the model and its tokenizer, as `save_pretrained` writes them. Nothing is fetched.
        data: The data: .csv, .tsv, .jsonl, or for causal language models also plain text.
        task: What to train: classification, causal-lm, or auto, which is classification if the data have
            the column of labels.
        text_column: Column of the texts.
        label_column: Column of the labels.
        max_length: Tokens of a text that are read; for causal language models the length of a training piece.
        validation_share: Share of the examples that are validation data, the same ones whatever the seed.
        test_share: Share of the examples that are test data, the same ones whatever the seed.
        beta2: AdamW's second beta.
    """

    epochs: int = 3
    batch_size: int = 32
    lr: float = 2e-5
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float | None = 1.0
    model: Path = Path("model")
    data: Path = Path("data.csv")
    task: Literal["auto", "classification", "causal-lm"] = "auto"
    text_column: str = "text"
    label_column: str = "label"
    max_length: int = 128
    validation_share: float = 0.1
    test_share: float = 0.1
    beta2: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")
        if min(self.validation_share, self.test_share) <= 0 or self.validation_share + self.test_share >= 1:
            raise ValueError(
                f"validation_share and test_share must be above 0 and below 1 together, "
                f"got {self.validation_share} and {self.test_share}"
            )


class FinetuneHf(Task):
    """The recipe.

    Batches are what the tokenizer makes, and "labels": int64 [count]; or, for causal language models, the
    tokens alone: int64 [count, max_length].
    """

    name = "finetune-hf"
    config: FinetuneConfig

    def __init__(self, config: FinetuneConfig) -> None:
        from transformers import AutoTokenizer

        super().__init__(config)
        if not (config.model / "config.json").is_file():
            raise ValueError(f"model must be a folder with a saved model, got {config.model}")
        self._tokenizer = AutoTokenizer.from_pretrained(config.model, local_files_only=True)
        self.labels: list[str] = []
        examples = self._read()
        parts = part_examples(examples, config.validation_share, config.test_share)
        if self.labels:
            self._check_padding()
            self._labelled = parts
            self._pieces: dict[str, Tensor] = {}
        else:
            self._labelled = {}
            self._pieces = {part: self._pack(part, of_part) for part, of_part in parts.items()}
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch_size {config.batch_size} is more than the {self._size('train')} examples"
            )

    def _read(self) -> list[Example]:
        """The data, with their labels if these are what is trained."""
        c = self.config
        if c.task != "causal-lm" and c.data.suffix.lower() in (".csv", ".tsv", ".jsonl", ".json"):
            try:
                examples = read_examples(c.data, c.text_column, c.label_column)
            except ValueError as error:
                if c.task == "classification" or repr(c.label_column) not in str(error):
                    raise
            else:
                self.labels = sorted({example.label or "" for example in examples})
                if len(self.labels) < 2:
                    raise ValueError(f"data: {c.data} has one label only, {self.labels}")
                return examples
        elif c.task == "classification":
            return read_examples(c.data, c.text_column, c.label_column)  # says what is wrong
        return read_examples(c.data, c.text_column, None)

    def _check_padding(self) -> None:
        """Decoders often come without a padding token; the end of a text serves as one."""
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._tokenizer.pad_token is None:
            raise ValueError(
                f"model {self.config.model}: its tokenizer has no padding token and no end of text"
            )

    def _pack(self, part: str, examples: Sequence[Example]) -> Tensor:
        """The texts of a part one after the other, cut into pieces: int64 [pieces, max_length]."""
        end, length = self._tokenizer.eos_token_id, self.config.max_length
        tokens: list[int] = []
        for example in examples:
            tokens += self._tokenizer(example.text, add_special_tokens=False)["input_ids"]
            tokens += [] if end is None else [end]
        pieces = len(tokens) // length
        if not pieces:
            raise ValueError(f"data: {len(tokens)} tokens of {part} data are less than max_length={length}")
        return torch.tensor(tokens[: pieces * length], dtype=torch.int64).view(pieces, length)

    def _size(self, part: str) -> int:
        return len(self._labelled[part]) if self.labels else len(self._pieces[part])

    # ------------------------------------------------------------------------------------------ model

    @override
    def build_model(self) -> nn.Module:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        where: dict[str, Any] = {
            "pretrained_model_name_or_path": self.config.model,
            "local_files_only": True,
            "dtype": torch.float32,
        }
        if not self.labels:
            return AutoModelForCausalLM.from_pretrained(**where)
        model = AutoModelForSequenceClassification.from_pretrained(
            **where,
            num_labels=len(self.labels),
            id2label=dict(enumerate(self.labels)),
            label2id={label: i for i, label in enumerate(self.labels)},
            ignore_mismatched_sizes=True,  # the head of another task gives way to a new one
        )
        model.config.pad_token_id = self._tokenizer.pad_token_id
        return model

    @override
    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        c = self.config
        return torch.optim.AdamW(decay_groups(model, c.weight_decay), lr=c.lr, betas=(0.9, c.beta2))

    @override
    def dense_layers(self, model: nn.Module) -> Sequence[str]:
        return [name for name, _ in model.named_children() if name in HEADS]

    @override
    def default_lambda(self, model: nn.Module) -> float:
        return lambda_for_size(sum(p.numel() for p in model.parameters()))

    # ------------------------------------------------------------------------------------------- data

    @property
    @override
    def steps_per_epoch(self) -> int:
        return self._size("train") // self.config.batch_size

    @override
    def train_batches(self, epoch: int, shard: Shard) -> Iterator[Batch]:
        c = self.config
        for chosen in shuffled_batches(self._size("train"), c.batch_size, c.accumulate, c.seed, epoch):
            yield self._batch("train", shard.of(chosen))

    @override
    def eval_batches(self, part: str, shard: Shard) -> Iterator[Batch]:
        for chosen in shard.of(torch.arange(self._size(part))).split(self.config.batch_size):
            if len(chosen):
                yield self._batch(part, chosen)

    def _batch(self, part: str, chosen: Tensor) -> Batch:
        if not self.labels:
            return {"input_ids": self._pieces[part][chosen]}
        examples = [self._labelled[part][i] for i in chosen.tolist()]
        texts = [example.text for example in examples]
        batch = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self.config.max_length, return_tensors="pt"
        )
        labels = torch.tensor([self.labels.index(example.label or "") for example in examples])
        return {**batch, "labels": labels}

    # ------------------------------------------------------------------------------------------- loss

    @override
    def model_input(self, batch: Batch) -> Batch:
        return {key: value for key, value in batch.items() if key != "labels"}

    @override
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.labels:
            return F.cross_entropy(model(**self.model_input(batch)).logits, batch["labels"])
        logits, target = next_tokens(model, batch)
        return F.cross_entropy(logits, target)

    @override
    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if self.labels:
            return classification_sums(model(**self.model_input(batch)).logits, batch["labels"])
        logits, target = next_tokens(model, batch)
        return classification_sums(logits, target)

    @override
    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes a folder that `from_pretrained` reads, dense with zeros, beside the packed file."""
        model.save_pretrained(folder / "model")  # type: ignore[operator]
        self._tokenizer.save_pretrained(folder / "model")

    @override
    def describe(self) -> dict[str, Any]:
        kind = {"labels": len(self.labels)} if self.labels else {"max_length": self.config.max_length}
        sizes = {part: self._size(part) for part in ("train", "validation", "test")}
        return {"data": self.config.data.name, "model": self.config.model.name, **kind, **sizes}


def next_tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [tokens, vocabulary] of every token but the first of a piece, and those tokens."""
    tokens = batch["input_ids"]
    return model(input_ids=tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
