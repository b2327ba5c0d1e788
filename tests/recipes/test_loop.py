"""The training loop: what it computes, logs, saves, and goes on from."""

from __future__ import annotations

import csv
import json

import pytest
import torch

pytest.importorskip("sklearn", reason="the train extra is not installed")

from recipes.small import digits, gpt

import nmsparse_ext as nms
from nmsparse_ext.recipes import checkpoint
from nmsparse_ext.recipes.config import TrainConfig
from nmsparse_ext.recipes.logs import Logs
from nmsparse_ext.recipes.loop import out_folder, train
from nmsparse_ext.recipes.lr import warmup_cosine
from nmsparse_ext.recipes.runtime import find_device
from nmsparse_ext.recipes.task import Shard


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("method", ["sr-ste", "ste", "static"])
def test_sparse_methods_satisfy_the_pattern(method):
    task = digits(method=method, pattern="1:4", epochs=1, test=False)
    outcome = train(task)
    weights = dict(outcome.model.named_parameters())
    scheme = task.scheme(outcome.model)
    assert scheme
    assert not {"conv1.weight", "fc.weight"} & set(scheme)
    for name in scheme:
        assert nms.find_violation(weights[name].detach(), "1:4") is None
    assert outcome.prunable == sum(weights[name].numel() for name in scheme)
    assert len(outcome.sad) == task.steps_per_epoch
    assert (sum(outcome.sad) == 0) == (method == "static")
    assert outcome.test == {}


def test_dense_is_plain_training():
    """The Sparsifier that counts mask changes leaves no trace in the weights."""
    task = digits(method="dense", epochs=1)
    outcome = train(task)

    from nmsparse_ext.recipes.runtime import seed_everything
    from nmsparse_ext.recipes.task import Place

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    seed_everything(0, Place.WEIGHTS)
    model = task.build_model().train()
    optimizer = task.build_optimizer(model)
    factor = warmup_cosine(task.steps_per_epoch, 0)
    for step, batch in enumerate(task.train_batches(0, Shard())):
        optimizer.param_groups[0]["lr"] = task.config.lr * factor(step)
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    torch.set_num_threads(before)
    assert same_state(model, outcome.model)
    assert sum(outcome.sad) > 0
    assert 0 < outcome.sad_from_start <= sum(outcome.sad)


def test_equal_seeds_give_equal_runs_and_others_do_not():
    first, second, other = (train(digits(seed=seed, epochs=1)) for seed in (0, 0, 1))
    assert same_state(first.model, second.model)
    assert first.rows == second.rows
    assert first.test == second.test
    assert not same_state(first.model, other.model)


@pytest.mark.parametrize(("method", "amp"), [("sr-ste", "none"), ("dense", "none"), ("sr-ste", "bf16")])
def test_resume_is_bit_for_bit(tmp_path, method, amp):
    whole = train(digits(out=tmp_path / "whole", method=method, lambda_w=0.02, amp=amp))
    broken = {"out": tmp_path / "broken", "method": method, "lambda_w": 0.02, "amp": amp}
    first = train(digits(**broken, stop_after=1))
    assert not first.finished
    assert len(first.rows) == 1
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    rest = train(digits(**broken, resume=True))
    assert same_state(whole.model, rest.model)
    assert whole.rows == rest.rows
    assert whole.sad == rest.sad
    assert whole.sad_from_start == rest.sad_from_start
    assert whole.test == rest.test
    for name in ("log.csv", "sad.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_resume_with_dropout_and_adamw(tmp_path, amp):
    settings = {"dropout": 0.2, "lambda_w": 0.1, "penalty": "decoupled", "lr": 0.01, "amp": amp}
    whole = train(gpt(tmp_path / "c", **settings))
    settings["out"] = tmp_path / "broken"
    train(gpt(tmp_path / "c", **settings, stop_after=1))
    rest = train(gpt(tmp_path / "c", **settings, resume=True))
    assert same_state(whole.model, rest.model)
    assert whole.rows == rest.rows


def test_resume_without_a_checkpoint_starts(tmp_path):
    assert train(digits(out=tmp_path, resume=True, epochs=1)).finished


def test_resume_after_the_end_trains_no_more(tmp_path):
    first = train(digits(out=tmp_path, epochs=1))
    again = train(digits(out=tmp_path, epochs=1, resume=True))
    assert same_state(first.model, again.model)
    assert first.test == again.test


def test_resume_refuses_other_settings(tmp_path):
    train(digits(out=tmp_path, epochs=1))
    with pytest.raises(ValueError, match=r"other settings: lr was 0\.1, now 0\.2"):
        train(digits(out=tmp_path, epochs=1, resume=True, lr=0.2))


def test_checkpoint_of_another_version_is_refused(tmp_path):
    config = digits(out=tmp_path).config
    torch.save({"version": 0, "settings": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="version 0, expected 1"):
        checkpoint.load(config)


def test_a_crash_while_saving_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    config = digits(out=tmp_path).config
    path = checkpoint.save(config, {"rows": [1]})
    before = path.read_bytes()

    def dies(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(config, {"rows": [2]})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_files_of_a_run(tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("tqdm")
    outcome = train(digits(out=tmp_path, epochs=2, tensorboard=True, progress=True, checkpoint_every=0))
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [int(row["epoch"]) for row in rows] == [1, 2]
    assert float(rows[1]["validation_loss"]) == outcome.rows[1]["validation_loss"]
    sad = list(csv.DictReader((tmp_path / "sad.csv").open()))
    assert [int(row["total"]) for row in sad] == outcome.sad
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["test"] == outcome.test
    assert result["config"]["method"] == "sr-ste"
    assert not (tmp_path / "checkpoint.pt").exists()
    loaded = nms.load_file(tmp_path / "model.safetensors")
    assert torch.equal(loaded["fc.weight"], outcome.model.fc.weight)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = events.Scalars("validation/loss")
    assert [event.step for event in logged] == [row["step"] for row in outcome.rows]


def test_log_of_a_broken_off_run_is_cut_back(tmp_path):
    config = TrainConfig(out=tmp_path, progress=False, tensorboard=False)
    rows = [{"epoch": 1, "step": 4, "train_loss": 0.5}]
    with Logs(config, [], 8, main=True) as logs:
        logs.epoch(rows[0])
        logs.epoch({"epoch": 2, "step": 8, "train_loss": 0.4})
    with Logs(config, rows, 8, main=True):
        pass
    assert [row["epoch"] for row in csv.DictReader((tmp_path / "log.csv").open())] == ["1"]
    with Logs(config, rows, 8, main=False) as logs:
        logs.epoch(rows[0])
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 2


def test_accumulation_gives_the_same_training(tmp_path):
    """No batch norm in this one: its statistics are of the parts."""
    whole = train(gpt(tmp_path / "c", lambda_w=0.01))
    parts = train(gpt(tmp_path / "c", lambda_w=0.01, accumulate=4))
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_test_data_do_not_matter_before_the_end(monkeypatch):
    """Training and validation figures are the same if the test data are others."""
    first, second = digits(epochs=1), digits(epochs=1)
    x, y = second._parts["test"]
    second._parts["test"] = (torch.zeros_like(x), y)
    first, second = train(first), train(second)
    assert first.rows == second.rows
    assert first.test != second.test


def test_nothing_to_prune_is_refused():
    with pytest.raises(ValueError, match="no weight of the model can be 1:64"):
        train(digits(pattern="1:64"))


def test_batch_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="accumulate x processes = 3 x 1, got 256"):
        train(digits(accumulate=3))


def test_devices():
    assert find_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:N, got 'tpu'"):
        find_device("tpu")
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda or cuda:N, got 'meta'"):
        find_device("meta")
    with pytest.raises(ValueError, match="device 'cuda:99' is not there"):
        find_device("cuda:99")


def test_learning_rate():
    factor = warmup_cosine(10, 2)
    assert [factor(step) for step in (0, 1, 2, 6, 10)] == pytest.approx([1 / 3, 2 / 3, 1, 0.5, 0])


def test_folder_by_default():
    assert str(out_folder(TrainConfig(), "x")) == "runs/x-sr-ste-2-4-0"
