"""finetune-hf: the user's data file, a local model, both kinds of task."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers", reason="the train extra has no models")

import tokenizers
import transformers
from recipes.small import QUIET

import nmsparse_ext as nms
from nmsparse_ext.recipes.finetune_hf import FinetuneConfig, FinetuneHf
from nmsparse_ext.recipes.loop import train
from nmsparse_ext.recipes.task import Shard
from nmsparse_ext.recipes.text_file import Example, part_examples, read_examples

WORDS = ["good", "bad", "fine", "poor", "film", "book", "the", "a", "was", "is"]


def save_tokenizer(folder, padding=True):
    special = ["[UNK]", "[PAD]", "</s>"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]", "eos_token": "</s>"} | ({"pad_token": "[PAD]"} if padding else {})
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=16, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=2, eos_token_id=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    save_tokenizer(folder, padding=False)
    return folder


def rows(count=80):
    """Sentences whose first word gives the label away."""
    for i in range(count):
        word = WORDS[i % 4]
        rest = " ".join(WORDS[4 + (i * j) % 6] for j in range(1, 5))
        yield {"text": f"{word} {rest} {'is ' * (i // 24)}", "label": "up" if i % 2 == 0 else "down"}


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows()) + "\n\n")
    return file


def task(model, data, **settings):
    small = {"batch_size": 16, "epochs": 2, "max_length": 12, "lr": 0.01, "threads": 1}
    return FinetuneHf(FinetuneConfig(**{**QUIET, **small, "model": model, "data": data, **settings}))


# ------------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize("separator", [",", "\t"])
def test_tables(tmp_path, separator):
    file = tmp_path / ("d.csv" if separator == "," else "d.tsv")
    file.write_text(f'text{separator}label\n"one{separator} two"{separator}x\nthree{separator}y\n')
    assert read_examples(file, "text", "label") == [
        Example(f"one{separator} two", "x"),
        Example("three", "y"),
    ]
    assert read_examples(file, "text", None) == [Example(f"one{separator} two"), Example("three")]


def test_json_lines(table):
    examples = read_examples(table, "text", "label")
    assert len(examples) == 80
    assert examples[1].label == "down"


def test_plain_text(tmp_path):
    file = tmp_path / "d.txt"
    file.write_text("one\ntwo\n\n\n\nthree\n")
    assert read_examples(file, "text", None) == [Example("one\ntwo"), Example("three")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", "text,label\na,x\n", "line 2: no 'body'; there are text, label"),
        ("d.jsonl", '{"body": "a"}\n{"text": "b"}\n', "line 2: no 'body'"),
        ("d.jsonl", "{\n", "line 1: no JSON"),
        ("d.jsonl", "[1]\n", "line 1: must be an object"),
        ("d.txt", "a\n", "plain text and has no labels"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / name, "body", "label" if name == "d.txt" else None)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        read_examples(tmp_path / "none.csv", "text", None)


def test_parts_keep_equal_texts_together():
    examples = [Example(str(i % 20), str(i)) for i in range(60)]
    parts = part_examples(examples, 0.2, 0.2)
    texts = {part: {example.text for example in of_part} for part, of_part in parts.items()}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]
    assert sum(map(len, parts.values())) == 60
    assert len(parts["test"]) >= 12
    assert part_examples(examples[::-1], 0.2, 0.2) == parts
    with pytest.raises(ValueError, match="2 examples are too few"):
        part_examples(examples[:2], 0.2, 0.2)


# ------------------------------------------------------------------------------------------------------ runs


def test_classification(bert, table, tmp_path):
    made = task(bert, table, out=tmp_path / "run", epochs=6)
    outcome = train(made)
    assert outcome.rows[-1]["train_loss"] < 0.4 < outcome.rows[0]["train_loss"]
    assert outcome.test["test_accuracy"] > 0.7
    assert outcome.lambda_w == 6e-5
    scheme = made.scheme(outcome.model)
    assert "classifier.weight" not in scheme
    assert "bert.encoder.layer.0.attention.self.query.weight" in scheme
    # What is saved is an ordinary model, with names for the labels, that holds the pattern.
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert saved.config.id2label == {0: "down", 1: "up"}
    for name, weight in saved.named_parameters():
        if name in scheme:
            assert nms.find_violation(weight.detach(), "2:4") is None
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.pad_token == "[PAD]"


def test_resume(bert, table, tmp_path):
    """BERT has dropout: its draws must be the same after a break."""
    whole = train(task(bert, table))
    train(task(bert, table, out=tmp_path, stop_after=1))
    rest = train(task(bert, table, out=tmp_path, resume=True))
    assert whole.rows == rest.rows
    a, b = whole.model.state_dict(), rest.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_another_number_of_labels(bert, tmp_path):
    file = tmp_path / "d.csv"
    lines = [f"{row['text']},{'abc'[i % 3]}" for i, row in enumerate(rows())]
    file.write_text("\n".join(["text,label", *lines]) + "\n")
    made = task(bert, file, epochs=1)
    assert made.labels == ["a", "b", "c"]
    assert train(made).model.classifier.weight.shape == (3, 16)


def test_decoders_classify_without_a_padding_token(gpt2, table):
    outcome = train(task(gpt2, table, task="classification", epochs=1))
    assert outcome.model.config.pad_token_id == 2
    assert set(outcome.test) == {"test_loss", "test_accuracy"}


def test_causal_language_model(gpt2, table, tmp_path):
    file = tmp_path / "d.txt"
    file.write_text("\n\n".join(row["text"] for row in rows()))
    made = task(gpt2, file, epochs=4, batch_size=4, penalty="decoupled", lambda_w=0.1)
    outcome = train(made)
    assert outcome.rows[-1]["validation_loss"] < outcome.rows[0]["train_loss"] - 0.3
    assert "transformer.h.0.mlp.c_fc.weight" in made.scheme(outcome.model)
    # A table without labels, or with labels that are not asked for, is text too.
    assert task(gpt2, table, task="causal-lm").labels == []
    assert task(gpt2, table, label_column="none").labels == []


def test_pieces_are_whole_and_shared(gpt2, table):
    made = task(gpt2, table, task="causal-lm")
    (first,) = list(made.eval_batches("validation", Shard(0, 2)))
    (second,) = list(made.eval_batches("validation", Shard(1, 2)))
    assert torch.equal(first["input_ids"], made._pieces["validation"][0::2])
    assert torch.equal(second["input_ids"], made._pieces["validation"][1::2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 1000}, "batch_size 1000 is more than the 63 examples"),
        ({"task": "classification", "label_column": "none"}, "no 'none'"),
        ({"text_column": "none"}, "no 'none'"),
        ({"task": "causal-lm", "max_length": 1000}, "less than max_length=1000"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"test_share": 0.9, "validation_share": 0.1}, "must be above 0 and below 1 together"),
    ],
)
def test_wrong_settings(bert, table, settings, message):
    with pytest.raises(ValueError, match=message):
        task(bert, table, **settings)


def test_missing_model(table, tmp_path):
    with pytest.raises(ValueError, match="model must be a folder with a saved model"):
        task(tmp_path / "none", table)


def test_labels_must_differ(bert, tmp_path):
    file = tmp_path / "d.csv"
    file.write_text("text,label\n" + "".join(f"good {i},x\n" for i in range(40)))
    with pytest.raises(ValueError, match="one label only"):
        task(bert, file)
    (tmp_path / "d.txt").write_text("good\n\nbad")
    with pytest.raises(ValueError, match="plain text and has no labels"):
        task(bert, tmp_path / "d.txt", task="classification")
