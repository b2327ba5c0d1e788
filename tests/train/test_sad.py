"""SAD: counted right, kept, and read in every way there is."""

from __future__ import annotations

import csv
import io

import pytest
import torch
from torch import nn
from train.common import mlp, train

import nmsparse_ext as nms
from nmsparse_ext.train import Rule, Sparsifier
from nmsparse_ext.train import sad as sad_module


def set_dense(sparsifier: Sparsifier, optimizer: torch.optim.Optimizer, rows: list[list[float]]) -> None:
    """Makes a step after which the dense weight is ``rows``: SGD at lr 1 with what is missing as gradient."""
    weight = sparsifier.model.weight
    weight.grad = sparsifier.dense_weight("weight") - torch.tensor(rows)
    optimizer.step()


def test_by_hand() -> None:
    model = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, 3, 2, 1, 4, 3, 2, 1]]))  # mask 1100 1100
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparsifier = Sparsifier(model, optimizer, "2:4", method="ste")
    assert sparsifier.sad() == {"weight": 0}
    set_dense(sparsifier, optimizer, [[4.0, 3, 2, 1, 1, 2, 3, 4]])  # 1100 0011
    assert sparsifier.sad() == {"weight": 4}
    assert sparsifier.remember() == 1
    set_dense(sparsifier, optimizer, [[4.0, 1, 2, 3, 1, 2, 3, 4]])  # 1001 0011
    assert sparsifier.sad() == {"weight": 2}
    assert sparsifier.sad(since=0) == {"weight": 6}
    assert sparsifier.sad(since=1) == {"weight": 2}
    set_dense(sparsifier, optimizer, [[4.0, 3, 2, 1, 4, 3, 2, 1]])  # 1100 1100
    assert sparsifier.sad() == {"weight": 6}
    assert sparsifier.sad(since=0) == {"weight": 0}
    history = sparsifier.history
    assert (history.steps, history["weight"], history.total) == ([1, 2, 3], [4, 2, 6], [4, 2, 6])
    assert history.rates == {"weight": [0.5, 0.25, 0.75]}
    assert history.total_rate == [0.5, 0.25, 0.75]
    with pytest.raises(ValueError, match=r"one of \[0, 1\], got 2"):
        sparsifier.sad(since=2)
    sparsifier.forget(1)
    with pytest.raises(ValueError, match=r"one of \[0\], got 1"):
        sparsifier.sad(since=1)


def test_equals_the_masks_own_difference() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, {"0": "2:4", "2": "1:4"})
    start = previous = dict(sparsifier.masks)
    expected: dict[str, list[int]] = {name: [] for name in previous}
    for step in range(6):
        train(model, optimizer, 1, start=step)
        now = dict(sparsifier.masks)
        for name in now:
            expected[name].append(nms.sad(previous[name], now[name]))
        if step == 3:
            assert sparsifier.sad() == {name: counts[-1] for name, counts in expected.items()}
        assert sparsifier.sad(since=0) == {name: nms.sad(start[name], now[name]) for name in now}
        previous = now
    assert sparsifier.history.counts == expected
    assert any(expected["0.weight"])


def test_history_as_rows_reads_as_csv() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, "2:4")
    train(model, optimizer, 3)
    rows = sparsifier.history.rows()
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    lines = file.getvalue().split()
    assert lines[0] == "step,total,0.weight,2.weight"
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3"]


def test_history_goes_where_others_read_it(tmp_path) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, "2:4")
    for history in (sparsifier.history, (train(model, optimizer, 4), sparsifier.history)[1]):
        history.to_csv(tmp_path / "sad.csv")
        with open(tmp_path / "sad.csv", newline="") as file:
            rows = [{key: int(value) for key, value in row.items()} for row in csv.DictReader(file)]
        assert rows == history.rows()

        frame = history.to_pandas()
        assert list(frame.columns) == ["total", "0.weight", "2.weight"]
        assert frame.index.tolist() == history.steps
        assert frame["total"].tolist() == history.total

        scalars: dict[str, dict[int, float]] = {}

        class Writer:
            def add_scalar(self, tag: str, value: float, step: int, scalars=scalars) -> None:
                scalars.setdefault(tag, {})[step] = value

        history.to_tensorboard(Writer(), "sad of run 1")
        if len(history):
            assert sorted(scalars) == ["sad of run 1/0.weight", "sad of run 1/2.weight", "sad of run 1/total"]
            assert list(scalars["sad of run 1/total"].values()) == history.total_rate

        axes = history.plot()
        assert [line.get_label() for line in axes.lines] == ["0.weight", "2.weight", "all"]
        assert axes.lines[-1].get_ydata().tolist() == history.total_rate
        assert history.plot(axes, every_weight=False) is axes
        assert len(axes.lines) == 4
        axes.figure.savefig(tmp_path / "sad.png")


def test_many_steps_outlive_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sad_module, "_RING_ROWS", 4)
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, "2:4")
    counts = []
    for step in range(11):
        train(model, optimizer, 1, start=step)
        if step in (2, 6, 7):
            assert sparsifier.sad() == sparsifier.sad()
        counts.append(sparsifier._weights["0.weight"])
    history = sparsifier.history
    assert history.steps == list(range(1, 12))
    assert sparsifier.step == 11

    monkeypatch.undo()
    twin = mlp()
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.05)
    other = Sparsifier(twin, optimizer, "2:4")
    train(twin, optimizer, 11)
    assert other.history == history


def test_steps_that_are_skipped_on_the_device_are_dropped_when_read() -> None:
    """What a fused optimizer under a GradScaler does on a GPU, where only the kernel knows."""
    log = sad_module.SadLog(["a", "b"], [torch.device("cpu")] * 2)
    for step, skipped in enumerate([0.0, 1.0, 0.0, 1.0, 0.0]):
        log.row(torch.device("cpu"))[0][:2].fill_(step)
        log.commit(torch.tensor(skipped))
    assert log.step == 3
    history = log.history({"a": 8, "b": 8})
    assert (history.steps, history["a"]) == ([1, 2, 3], [0, 2, 4])
    log.row(torch.device("cpu"))[0][:2].fill_(9)
    log.commit(torch.tensor(1.0))
    assert log.last() == {"a": 4, "b": 4}
    assert log.next_step == 4


def test_nothing_sparse_is_no_error() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, "2:4")
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert (sparsifier.sad(), sparsifier.sad(since=0), sparsifier.step) == ({}, {}, 1)
    assert sparsifier.history.total == [0]
    assert len(sparsifier.masks) == 0


def test_counts_of_rules_that_keep_masks_for_a_while() -> None:
    class EveryThird(Rule):
        def choose(self, weight, out, bits, step):
            if step.number % 3:
                weight.keep_mask(out, bits)
            else:
                weight.new_mask(out, bits)

    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, "2:4", method=EveryThird())
    train(model, optimizer, 7)
    total = sparsifier.history.total
    assert [bool(count) for count in total] == [False, False, True, False, False, True, False]


def test_names_may_be_modules_or_wrapped() -> None:
    model = mlp()
    sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), "2:4")
    for name in ("0", "0.weight", "module.0.weight", "_orig_mod.0"):
        assert torch.equal(sparsifier.masks[name], model[0].weight != 0)
        assert sparsifier.dense_weight(name) is sparsifier.dense_weight("0")
        assert name in sparsifier.masks
    assert list(sparsifier.masks) == ["0.weight", "2.weight"]
    assert "1" not in sparsifier.masks
    with pytest.raises(KeyError, match=r"no sparse weight '0.weigth'; did you mean 0.weight"):
        sparsifier.masks["0.weigth"]
    with pytest.raises(KeyError, match=r"no sparse weight '0.bias'"):
        sparsifier.dense_weight("0.bias")
