"""Data and models of digits-resnet and stdlib-gpt."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn", reason="the train extra is not installed")

from recipes.small import corpus, digits, gpt

from nmsparse_ext.recipes.digits_resnet import split
from nmsparse_ext.recipes.gpt import Gpt
from nmsparse_ext.recipes.loop import train
from nmsparse_ext.recipes.stdlib_gpt import ALPHABET, encode_characters, read_corpus
from nmsparse_ext.recipes.task import Place, Shard, generator_for, shuffled_batches


def images(part):
    return {tuple(image.flatten().tolist()) for image in part[0]}


def test_parts_of_the_digits_do_not_overlap():
    parts = split(0, 0.25, 0.2)
    assert {part: len(y) for part, (_, y) in parts.items()} == {"train": 1078, "validation": 270, "test": 449}
    assert not images(parts["train"]) & images(parts["test"])
    assert not images(parts["validation"]) & images(parts["test"])


def test_test_images_are_the_same_for_every_seed():
    first, second = split(0, 0.25, 0.2), split(1, 0.25, 0.2)
    assert torch.equal(first["test"][0], second["test"][0])
    assert not torch.equal(first["validation"][0], second["validation"][0])


def test_shuffled_batches_cover_an_epoch_once():
    batches = list(shuffled_batches(21, 6, 2, seed=0, epoch=0))
    assert [len(batch) for batch in batches] == [3] * 6
    assert len(set(torch.cat(batches).tolist())) == 18
    other = torch.cat(list(shuffled_batches(21, 6, 2, seed=0, epoch=1)))
    assert not torch.equal(torch.cat(batches), other)


def test_streams_are_independent():
    draws = {
        tuple(torch.rand(3, generator=generator_for(*place)).tolist())
        for place in [(0, Place.ORDER, 0), (0, Place.ORDER, 1), (1, Place.ORDER, 0), (0, Place.SPLIT, 0)]
    }
    assert len(draws) == 4


@pytest.mark.parametrize("make", ["digits", "gpt"])
def test_processes_share_the_batches_of_one(make, tmp_path):
    task = digits() if make == "digits" else gpt(tmp_path / "c")
    whole = list(task.train_batches(1, Shard()))
    halves = [list(task.train_batches(1, Shard(rank, 2))) for rank in range(2)]
    assert len(whole) == task.steps_per_epoch
    for one, first, second in zip(whole, *halves, strict=True):
        tensors = zip(*([x] if torch.is_tensor(x) else x for x in (one, first, second)), strict=True)
        for a, b, c in tensors:
            assert torch.equal(a[0::2], b)
            assert torch.equal(a[1::2], c)


def test_corpus_parts(tmp_path):
    folder = corpus(tmp_path / "c")
    (folder / "test").mkdir()
    (folder / "test" / "left_out.py").write_text("SECRET\n")
    read_corpus.cache_clear()
    texts = read_corpus(folder, 0)
    lines = {part: set(text.splitlines()) for part, text in texts.items()}
    assert all(lines.values())
    assert "SECRET" not in "".join(texts.values())
    defined = [{line for line in lines[part] if line.startswith("def")} for part in texts]
    assert sum(map(len, defined)) == len(set().union(*defined)) == 120
    limited = read_corpus(folder, 2000)
    assert len(limited["train"]) <= 1800 + len(limited["train"].splitlines())
    assert all(text.startswith(limited[part][:50]) for part, text in texts.items())


def test_empty_corpus_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no Python files"):
        read_corpus(tmp_path, 0)


def test_short_corpus_is_refused(tmp_path):
    with pytest.raises(ValueError, match="too few for context=100000"):
        gpt(tmp_path / "c", context=100000)


def test_characters():
    assert encode_characters("\n ~é漢").tolist() == [0, 1, 95, 96, 96]
    assert len(ALPHABET) == 97


def test_eval_windows_predict_every_token_once(tmp_path):
    task = gpt(tmp_path / "c")
    tokens = task._tokens["validation"]
    windows = torch.cat(list(task.eval_batches("validation", Shard())))
    assert torch.equal(windows[:, 1:].flatten(), tokens[1 : 1 + windows[:, 1:].numel()].long())
    assert len(tokens) - 1 - windows[:, 1:].numel() < task.config.context


def test_gpt_does_not_see_ahead():
    torch.manual_seed(0)
    model = Gpt(11, 8, 2, 16, 2).eval()
    tokens = torch.randint(11, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])
    with pytest.raises(ValueError, match="heads must divide width=16, got 3"):
        Gpt(11, 8, 2, 16, 3)


def test_gpt_learns_and_keeps_its_embedding_dense(tmp_path):
    task = gpt(tmp_path / "c", lr=0.02, steps=30, method="sr-ste", pattern="1:4")
    outcome = train(task)
    assert outcome.rows[-1]["validation_loss"] < outcome.rows[0]["train_loss"] - 0.3
    assert outcome.lambda_w == 6e-5
    assert "token.weight" not in task.scheme(outcome.model)
    assert set(outcome.test) == {"test_loss"}


def test_bpe(tmp_path):
    pytest.importorskip("tokenizers")
    task = gpt(tmp_path / "c", tokenizer="bpe", vocabulary=280, epochs=1, context=8)
    assert 256 < task.vocabulary <= 280
    assert train(task).finished
