"""DominoSearch as a library call: what comes out, and what stays as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext.search import Costs


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 32, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 16),
    )


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 6, 6, generator=generator), torch.randint(0, 16, (8,), generator=generator)


def stepper(images: Tensor, labels: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: F.cross_entropy(model(images), labels)


FAST: dict[str, Any] = {"pull": 4.0, "check_every": 3, "max_steps": 2000, "progress": False}


def test_finds_a_scheme_that_meets_the_budget() -> None:
    model = cnn()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = nms.domino_search(model, stepper(*data()), budget=nms.Budget(params=0.4), **FAST)
    assert result.reached
    assert Costs(model).shares(result.scheme)["params"] <= 0.401
    assert result.shares["params"] == Costs(model).shares(result.scheme)["params"]
    assert result.scheme.complete
    assert result.scheme.dense["0.weight"].startswith("group dim 1 has 3 weights")
    result.scheme.resolve(model)
    last = {name: n for _, name, n in result.trace}
    assert {name: pattern.n for name, pattern in result.scheme.items()} == last
    assert set(result.trace) <= set(result.moves)
    assert result.trace[-1][0] == result.steps
    for name, value in model.state_dict().items():  # the dense model is back, buffers too
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in model.parameters())
    assert len(result.losses) == len(range(0, result.steps, 3))


def search(model: nn.Module, **arguments: Any) -> nms.search.DominoResult:
    return nms.domino_search(
        model, stepper(*data()), **{"budget": nms.Budget(params=0.4), **FAST, **arguments}
    )


def test_the_trained_weights_may_stay_masked_by_the_scheme() -> None:
    model = cnn()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = search(model, restore=False)
    for name, pattern in result.scheme.items():
        assert nms.find_violation(model.get_parameter(name), pattern) is None
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nms.Sparsifier(model, optimizer, result.scheme)  # nothing of the search is left on the model


def test_equal_seeds_give_equal_searches() -> None:
    assert search(cnn()) == search(cnn())


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"bytes": 0.5}, {"params": 0.6, "macs": 0.4}])
def test_budgets_of_several_kinds(budget: dict[str, float]) -> None:
    result = search(cnn(), budget=budget, example_input=data()[0])
    assert result.reached
    assert all(result.shares[metric] <= share + 0.001 for metric, share in budget.items())


def test_a_budget_of_latency_is_priced_by_the_table_given() -> None:
    def latency(name: str, pattern: nms.Pattern | None) -> float:
        return 1.0 if pattern is None else 0.4 if pattern.n <= 4 else 0.8

    result = search(cnn(), budget={"latency": 0.8}, example_input=data()[0], latency=latency)
    assert result.reached
    assert result.shares["latency"] <= 0.801


def test_macs_are_counted_in_the_first_step_or_on_the_example() -> None:
    assert search(cnn()).moves == search(cnn(), example_input=data()[0]).moves


def test_constraints_and_candidates() -> None:
    model = cnn()
    result = search(
        model,
        budget={"params": 0.5},
        candidates=[12, 8, 6, 4],
        skip=["5"],
        constraints=nms.search.Constraints(at_least={"9": "6:16"}),
    )
    assert result.scheme.dense["5.weight"] == "skipped by '5'"
    assert all(pattern.n in (12, 8, 6, 4) for pattern in result.scheme.values())
    assert all(n >= 6 for _, name, n in result.moves if name == "9.weight")


def test_without_dense_candidates_all_weights_become_sparse() -> None:
    result = search(cnn(), budget={"params": 0.9}, constraints=nms.search.Constraints(embeds_in_24=True))
    assert result.reached
    assert set(result.scheme) == {"3.weight", "5.weight", "9.weight"}
    assert all(pattern.embeds_in_24 for pattern in result.scheme.values())


def test_a_budget_that_is_met_already_takes_no_step() -> None:
    result = search(cnn(), budget={"params": 1.0})
    assert (result.steps, result.reached, dict(result.scheme)) == (0, True, {})


def test_too_few_steps_give_what_there_is_and_a_warning() -> None:
    with pytest.warns(
        RuntimeWarning, match=r"Budget\(params=0\.4\) is not reached after 30 steps: .* of params"
    ):
        result = search(cnn(), max_steps=30)
    assert not result.reached
    assert result.steps == 30
    assert result.moves


def test_one_weight_of_each_m() -> None:
    model = nn.Sequential(nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 16))
    x = torch.randn(8, 48)
    result = nms.domino_search(
        model,
        lambda model: model(x).square().mean(),
        budget={"params": 0.4},
        constraints=nms.search.Constraints(allowed={"2": ["4:8", "2:8"]}),
        **FAST,
    )
    assert result.reached
    assert {pattern.m for pattern in result.scheme.values()} == {8, 16}


def test_grouped_and_depthwise_convolutions_stay_dense() -> None:
    model = nn.Sequential(
        nn.Conv2d(16, 32, 1),
        nn.Conv2d(32, 32, 3, groups=32),
        nn.Conv2d(32, 32, 1, groups=4),
        nn.Conv2d(32, 16, 1),
    )
    x = torch.randn(2, 16, 4, 4)
    result = nms.domino_search(model, lambda model: model(x).square().mean(), budget={"params": 0.7}, **FAST)
    assert result.reached
    assert "group dim 1 has 1 weights" in result.scheme.dense["1.weight"]
    assert "group dim 1 has 8 weights" in result.scheme.dense["2.weight"]


def test_frozen_weights_stay_dense() -> None:
    model = cnn()
    model[5].requires_grad_(False)
    assert search(model, budget={"params": 0.5}).scheme.dense["5.weight"] == "requires_grad is False"


def test_a_transformers_model() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(0, 50, (2, 16))
    result = nms.domino_search(
        model, lambda model: model(input_ids=tokens, labels=tokens).loss, budget={"params": 0.5}, **FAST
    )
    assert result.reached
    assert set(result.scheme) <= {
        f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert "lm_head.weight" in result.scheme.dense or "transformer.wte.weight" in result.scheme.dense


def test_autocast_in_the_step() -> None:
    images, labels = data()

    def step(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(images), labels)

    assert nms.domino_search(cnn(), step, budget={"params": 0.4}, **FAST).reached


def test_16_bit_parameters() -> None:
    images, labels = data()
    model = cnn().bfloat16()

    def step(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(images.bfloat16()).float(), labels)

    assert nms.domino_search(model, step, budget={"params": 0.4}, **FAST).reached


def test_a_compiled_model() -> None:
    compiled = torch.compile(cnn(), backend="aot_eager")
    result = search(compiled)
    assert result.reached
    assert result.trace == search(cnn()).trace


def test_the_progress_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On terminals: a log file would fill up with it."""
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    result = search(cnn(), progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    result = search(cnn(), progress=True)
    shown = capsys.readouterr().err
    assert "DominoSearch" in shown
    assert f"last domino {result.trace[0][1].removesuffix('.weight')}" in shown


def test_the_model_is_as_it_was_after_an_error() -> None:
    model = cnn()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = iter(range(5))

    def step(model: nn.Module) -> Tensor:
        next(calls)
        return F.cross_entropy(model(data()[0]), data()[1])

    with pytest.raises(StopIteration):
        nms.domino_search(model, step, budget={"params": 0.4}, **FAST)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert search(model).reached


def test_a_loss_that_is_no_number_ends_the_search() -> None:
    with pytest.raises(RuntimeError, match=r"the loss is nan at step \d+ or before"):
        nms.domino_search(
            cnn(), lambda model: model(data()[0]).sum() * float("nan"), budget={"params": 0.4}, **FAST
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budget": {"params": 0.01}}, ValueError, r"the budget of params is"),
        ({"budget": {"macs": 0.5}}, ValueError, r"a budget of macs needs an example_input"),
        ({"vote": 1.5}, ValueError, r"vote must be more than 0 and at most 1, got 1\.5"),
        ({"lr": 0}, ValueError, r"lr must be more than 0 and finite, got 0"),
        ({"pull": -1.0}, ValueError, r"pull must be at least 0 and finite, got -1\.0"),
        ({"check_every": 0}, ValueError, r"check_every must be at least 1, got 0"),
        ({"pull_every": 2.5}, TypeError, r"pull_every must be an int, got 2\.5"),
        ({"doublings": [10, 0]}, ValueError, r"doublings\[1\] must be at least 1, got 0"),
        ({"tolerance": "1%"}, TypeError, r"tolerance must be a number, got '1%'"),
        ({"skip": ["nothing"]}, ValueError, r"skip: 'nothing' matches nothing"),
        ({"candidates": ["2:4", "2:8"]}, ValueError, r"must have one m for each weight, got 2:4, 2:8 for 3"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        search(cnn(), **change)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (None, "step must be a function"),
        (lambda model: model(data()[0]), r"one number, got a tensor of shape \[8, 16\]"),
        (lambda model: model(data()[0]).sum().item(), "one number, got "),
        (lambda model: model(data()[0]).sum().detach(), "must not call backward or detach it"),
    ],
)
def test_steps_that_are_none(step: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        nms.domino_search(cnn(), step, budget={"params": 0.4}, **FAST)


def test_macs_that_nobody_can_count() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.kernel.t()

    nms.scheme.register_module(Odd, {"kernel": 1})
    model, x = nn.Sequential(Odd()), torch.randn(4, 32)
    arguments = {"budget": {"params": 0.5}, **FAST}
    with pytest.raises(ValueError, match=r"MACs of 0\.kernel cannot be counted"):
        nms.domino_search(model, lambda model: model(x).square().mean(), **arguments)
    result = nms.domino_search(model, lambda m: m(x).square().mean(), macs_weight=0.0, **arguments)
    assert result.reached


class TestCheckpoint:
    @pytest.mark.parametrize(("stop", "momentum"), [(7, 0.0), (61, 0.0), (24, 0.9)])
    def test_goes_on_to_the_same_result(self, tmp_path: Path, stop: int, momentum: float) -> None:
        """Stopped between checks, at one, and after the pull has doubled."""
        arguments = {"momentum": momentum, "pull": 2.0 * (1 - momentum), "doublings": [20, 60]}
        torch.manual_seed(5)
        whole = search(cnn_with_dropout(), **arguments)
        assert whole.steps > 61
        torch.manual_seed(5)
        path = tmp_path / "domino.pt"
        with pytest.warns(RuntimeWarning, match="not reached"):
            search(cnn_with_dropout(), checkpoint=path, **{**arguments, "max_steps": stop})
        torch.manual_seed(9)
        rest = search(cnn_with_dropout(), checkpoint=path, **arguments)
        assert rest == whole
        assert rest.losses == whole.losses

    def test_goes_on_after_a_crash(self, tmp_path: Path) -> None:
        model, step = cnn(), Stateful()
        whole = nms.domino_search(model, step, budget={"params": 0.4}, **FAST)
        path, crashing = tmp_path / "domino.pt", Stateful(crash_at=32)
        arguments = {"budget": {"params": 0.4}, "checkpoint": path, "checkpoint_every": 10, **FAST}
        with pytest.raises(KeyboardInterrupt):
            nms.domino_search(model, crashing, **arguments)
        assert torch.load(path, weights_only=True)["steps"] == 30
        again = Stateful()
        assert nms.domino_search(model, again, **arguments) == whole
        assert again.seen[0] == 30

    def test_a_finished_search_is_read_back(self, tmp_path: Path) -> None:
        path = tmp_path / "domino.pt"
        first = search(cnn(), checkpoint=path)
        step = Stateful()
        assert nms.domino_search(cnn(), step, budget={"params": 0.4}, checkpoint=path, **FAST) == first
        assert step.seen == []
        model = cnn()
        search(model, checkpoint=path, restore=False)
        for name, pattern in first.scheme.items():
            assert nms.find_violation(model.get_parameter(name), pattern) is None

    def test_other_settings_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "domino.pt"
        search(cnn(), checkpoint=path)
        with pytest.raises(ValueError, match=r"other settings: pull was 4\.0, now 1\.0; remove the file"):
            search(cnn(), checkpoint=path, pull=1.0)
        with pytest.raises(ValueError, match=r"other settings: candidates was .*, limits was"):
            search(nn.Sequential(*cnn(), nn.Linear(16, 16)), checkpoint=path)
        torch.save({"version": 99}, path)
        with pytest.raises(ValueError, match="must be of version 1, got 99"):
            search(cnn(), checkpoint=path)

    def test_another_model_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "domino.pt"
        search(cnn(), checkpoint=path)
        other = cnn()
        other.register_buffer("more", torch.zeros(1))
        with pytest.raises(ValueError, match="of another model: it differs in more"):
            search(other, checkpoint=path)


def cnn_with_dropout() -> nn.Sequential:
    return nn.Sequential(*cnn()[:-1], nn.Dropout(0.2), cnn()[-1])


class Stateful:
    """Batches that know which comes next."""

    def __init__(self, crash_at: int | None = None) -> None:
        self.next, self.crash_at, self.seen = 0, crash_at, list[int]()

    def __call__(self, model: nn.Module) -> Tensor:
        if self.next == self.crash_at:
            raise KeyboardInterrupt
        self.seen.append(self.next)
        images, labels = data(self.next)
        self.next += 1
        return F.cross_entropy(model(images), labels)

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


@given(
    layers=st.lists(st.sampled_from([16, 32, 48]), min_size=1, max_size=3),
    m=st.sampled_from([4, 8, 16]),
    share=st.floats(0.3, 1.0),
    vote=st.floats(0.3, 1.0),
    seed=st.integers(0, 10),
)
@settings(max_examples=10)
def test_any_model_and_budget(layers: list[int], m: int, share: float, vote: float, seed: int) -> None:
    torch.manual_seed(seed)
    sizes = [16, *layers]
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))
    x = torch.randn(4, 16)
    before = [p.clone() for p in model.parameters()]
    result = nms.domino_search(
        model,
        lambda model: model(x).square().mean(),
        budget={"params": share},
        m=m,
        vote=vote,
        pull=8.0,
        check_every=1,
        max_steps=3000,
        progress=False,
    )
    assert result.reached
    assert Costs(model).shares(result.scheme)["params"] <= share + 0.001
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))
    levels = dict.fromkeys(sorted({name for _, name, _ in result.moves}), m)
    for _, name, n in result.moves:  # one level at a time
        assert n == levels[name] - 1
        levels[name] = n
