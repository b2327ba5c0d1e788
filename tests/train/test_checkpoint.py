"""Saving, loading, copying: what goes on does so bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from train.common import Make, Tied, assert_same, assert_satisfies, batch, loss_of, mlp, train

from nmsparse_ext.train import Sparsifier

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
}


@pytest.fixture(params=OPTIMIZERS)
def make(request: pytest.FixtureRequest) -> Make:
    return OPTIMIZERS[request.param]


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def everything(model: nn.Module, sparsifier: Sparsifier) -> dict[str, torch.Tensor]:
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    state |= {f"dense {name}": sparsifier.dense_weight(name).clone() for name in sparsifier.masks}
    return state | {f"mask {name}": mask for name, mask in sparsifier.masks.items()}


def build(
    make: Make, dtype: torch.dtype, seed: int = 0
) -> tuple[nn.Sequential, torch.optim.Optimizer, Sparsifier]:
    model = mlp(dtype, seed)
    optimizer = make(model.parameters())
    return model, optimizer, Sparsifier(model, optimizer, "2:4", lambda_w=0.05)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("model_first", [True, False])
def test_resume_from_model_and_optimizer(
    make: Make, dtype: torch.dtype, steps: int, model_first: bool
) -> None:
    model, optimizer, sparsifier = build(make, dtype)
    train(model, optimizer, steps, dtype=dtype)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    losses = train(model, optimizer, 4, start=steps, dtype=dtype)

    other, resumed, again = build(make, dtype, seed=7)
    train(other, resumed, 1, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for part in (other, resumed) if model_first else (resumed, other):
            part.load_state_dict(saved["model" if part is other else "optimizer"])
        assert again.step == steps
        assert train(other, resumed, 4, start=steps, dtype=dtype) == losses
    assert_same(everything(other, again), everything(model, sparsifier))
    assert again.history.steps == [steps + i for i in range(1, 5)]
    assert again.history["0.weight"] == sparsifier.history["0.weight"][steps:]


def test_resume_before_the_sparsifier_is_made(make: Make) -> None:
    model, optimizer, sparsifier = build(make, torch.float64)
    train(model, optimizer, 3)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    losses = train(model, optimizer, 4, start=3)

    other = mlp(seed=7)
    resumed = make(other.parameters())
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    again = Sparsifier(other, resumed, "2:4", lambda_w=0.05)
    assert again.step == 3
    assert train(other, resumed, 4, start=3) == losses
    assert_same(everything(other, again), everything(model, sparsifier))


def test_loading_without_a_sparsifier_rounds_what_is_behind_16_bits(make: Make) -> None:
    model, optimizer, _ = build(make, torch.bfloat16)
    train(model, optimizer, 3, dtype=torch.bfloat16)
    other = mlp(torch.bfloat16, seed=7)
    resumed = make(other.parameters())
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning, match=r"rounded .* of 0.weight, 2.weight .* make the Sparsifier first"):
        again = Sparsifier(other, resumed, "2:4", lambda_w=0.05)
    train(other, resumed, 1, start=3, dtype=torch.bfloat16)
    assert_satisfies(other, again.scheme)


def test_resume_from_its_own_state(make: Make, dtype: torch.dtype) -> None:
    """Brings history and remembered masks too."""
    model, optimizer, sparsifier = build(make, dtype)
    train(model, optimizer, 3, dtype=dtype)
    sparsifier.remember()
    saved = through_a_file(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "sparsifier": sparsifier.state_dict(),
        }
    )
    losses = train(model, optimizer, 4, start=3, dtype=dtype)

    other, resumed, again = build(make, dtype, seed=7)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    again.load_state_dict(saved["sparsifier"])
    assert train(other, resumed, 4, start=3, dtype=dtype) == losses
    assert_same(everything(other, again), everything(model, sparsifier))
    assert again.history == sparsifier.history
    for since in (None, 0, 3):
        assert again.sad(since=since) == sparsifier.sad(since=since)


def test_the_optimizer_state_has_what_a_step_needs_and_nothing_of_another_type() -> None:
    model, optimizer, _ = build(OPTIMIZERS["adam"], torch.bfloat16)
    for steps in (0, 2):
        train(model, optimizer, steps, dtype=torch.bfloat16)
        state = optimizer.state_dict()["state"]
        assert sorted(state) == [0, 1, 2, 3]
        assert state[0]["nm_dense"].dtype == torch.float32
        assert not steps or state[0]["exp_avg"].dtype == torch.float32
        assert not steps or state[1]["exp_avg"].dtype == torch.bfloat16
        assert state[0]["nm_bits"].dtype == torch.uint8
        assert state[0]["nm_bits"].shape == (8, 2)
        assert ("exp_avg" in state[0]) == bool(steps)
        assert not any(key.startswith("nm_") for key in state[1])
    assert [group["nm_step"] for group in optimizer.state_dict()["param_groups"]] == [2]


def test_loading_keeps_the_live_tensors_in_place() -> None:
    """Addresses are what CUDA graphs hold on to."""
    model, optimizer, sparsifier = build(OPTIMIZERS["adam"], torch.float32)
    train(model, optimizer, 2, dtype=torch.float32)
    saved = copy.deepcopy(optimizer.state_dict())
    before = sparsifier.dense_weight("0"), model[0].weight.data_ptr()
    optimizer.load_state_dict(saved)
    assert sparsifier.dense_weight("0") is before[0]
    assert model[0].weight.data_ptr() == before[1]
    assert optimizer.state[model[0].weight]["nm_dense"] is before[0]
    train(model, optimizer, 1, dtype=torch.float32)
    assert not torch.equal(saved["state"][0]["nm_dense"], before[0])


def test_state_of_dense_training_is_a_start_like_any_other(make: Make) -> None:
    model = mlp()
    optimizer = make(model.parameters())
    train(model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, resumed, sparsifier = build(make, torch.float64, seed=7)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    with pytest.warns(UserWarning, match="changed outside"):
        train(other, resumed, 1)
    assert sparsifier.step == 1
    assert_satisfies(other, sparsifier.scheme)


class TestRefusals:
    def test_of_state_under_a_scheme_that_leaves_the_weight_dense(self) -> None:
        model, optimizer, _ = build(OPTIMIZERS["adam"], torch.float64)
        train(model, optimizer, 1)
        other = mlp()
        resumed = OPTIMIZERS["adam"](other.parameters())
        Sparsifier(other, resumed, {"0": "2:4"})
        with pytest.raises(
            ValueError, match="dense weight behind parameter 2, which the scheme leaves dense"
        ):
            resumed.load_state_dict(optimizer.state_dict())

    def test_of_state_of_other_shapes(self) -> None:
        model, optimizer, sparsifier = build(OPTIMIZERS["adam"], torch.float64)
        train(model, optimizer, 1)
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0]["nm_bits"] = saved["state"][0]["nm_bits"][:, :1]
        with pytest.raises(
            ValueError, match=r"the saved packed mask of 0.weight has shape \[8, 1\], expected \[8, 2\]"
        ):
            optimizer.load_state_dict(saved)
        state = copy.deepcopy(sparsifier.state_dict())
        state["weights"]["2.weight"]["nm_dense"] = torch.zeros(3, 8)
        before = sparsifier.dense_weight("0").clone()
        state["weights"]["0.weight"]["nm_dense"].zero_()
        with pytest.raises(
            ValueError, match=r"the saved dense weight of 2.weight has shape \[3, 8\], expected \[4, 8\]"
        ):
            sparsifier.load_state_dict(state)
        assert torch.equal(sparsifier.dense_weight("0"), before)

    def test_of_other_weights_or_versions(self) -> None:
        _, _, sparsifier = build(OPTIMIZERS["adam"], torch.float64)
        state = sparsifier.state_dict()
        state["weights"]["3.weight"] = state["weights"].pop("2.weight")
        with pytest.raises(ValueError, match=r"missing \['2.weight'\], unexpected \['3.weight'\]"):
            sparsifier.load_state_dict(state)
        with pytest.raises(ValueError, match="state has version 99, expected 1"):
            sparsifier.load_state_dict({"version": 99})

    def test_of_an_optimizer_with_other_groups_is_left_to_torch(self) -> None:
        _, optimizer, _ = build(OPTIMIZERS["adam"], torch.float64)
        saved = optimizer.state_dict()
        saved["param_groups"] = []
        with pytest.raises(ValueError, match="different number of parameter groups"):
            optimizer.load_state_dict(saved)


def test_state_saved_under_another_pattern_is_pruned_anew(make: Make) -> None:
    model, optimizer, sparsifier = build(make, torch.float64)
    train(model, optimizer, 3)
    other = mlp(seed=7)
    resumed = make(other.parameters())
    again = Sparsifier(other, resumed, "1:4")
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.dense_weight("0"), sparsifier.dense_weight("0"))
    assert_satisfies(other, again.scheme)


class TestCopies:
    @pytest.mark.parametrize("steps", [0, 3])
    @pytest.mark.parametrize("how", [copy.deepcopy, lambda three: pickle.loads(pickle.dumps(three))])
    def test_of_the_three_together_go_their_own_way(self, make: Make, steps: int, how: Any) -> None:
        model, optimizer, sparsifier = build(make, torch.float64)
        train(model, optimizer, steps)
        other, resumed, again = how((model, optimizer, sparsifier))
        assert again.model is other
        assert again.optimizer is resumed
        before = everything(model, sparsifier)
        losses = train(other, resumed, 4, start=steps)
        assert_same(everything(model, sparsifier), before)
        assert train(model, optimizer, 4, start=steps) == losses
        assert_same(everything(other, again), everything(model, sparsifier))
        assert again.history == sparsifier.history
        assert again.sad(since=0) == sparsifier.sad(since=0)

    def test_of_the_sparsifier_bring_the_other_two(self) -> None:
        model, optimizer, sparsifier = build(OPTIMIZERS["adam"], torch.float64)
        again = copy.deepcopy(sparsifier)
        assert again.model is not model
        assert train(again.model, again.optimizer, 3) == train(model, optimizer, 3)

    def test_with_a_tied_weight(self) -> None:
        model = Tied()
        optimizer = torch.optim.Adam(model.parameters())
        sparsifier = Sparsifier(model, optimizer, "2:4")
        other, resumed, _ = copy.deepcopy((model, optimizer, sparsifier))
        assert other.a.weight is other.b.weight
        assert train(other, resumed, 3) == train(model, optimizer, 3)

    @pytest.mark.parametrize("steps", [0, 2])
    @pytest.mark.parametrize("how", [copy.deepcopy, lambda two: pickle.loads(pickle.dumps(two))])
    def test_of_model_and_optimizer_alone_refuse_to_step(self, make: Make, steps: int, how: Any) -> None:
        model, optimizer, sparsifier = build(make, torch.float64)
        train(model, optimizer, steps)
        other, alone = how((model, optimizer))
        with pytest.raises(RuntimeError, match="state belongs to a Sparsifier, but it has none"):
            train(other, alone, 1)
        train(model, optimizer, 1)

        again = Sparsifier(other, alone, "2:4", lambda_w=0.05)
        if steps:
            train(other, alone, 1, start=0)
            assert_same(everything(other, again), everything(model, sparsifier))
        again.finalize()
        train(other, alone, 1)

    def test_of_optimizer_state_refuse_to_step_too(self) -> None:
        model, optimizer, _ = build(OPTIMIZERS["adam"], torch.float64)
        train(model, optimizer, 1)
        other = mlp()
        alone = OPTIMIZERS["adam"](other.parameters())
        alone.load_state_dict(optimizer.state_dict())
        with pytest.raises(RuntimeError, match="it has none"):
            train(other, alone, 1)

    def test_of_a_finalized_one_stay_detached(self) -> None:
        model, optimizer, sparsifier = build(OPTIMIZERS["adam"], torch.float64)
        train(model, optimizer, 2)
        sparsifier.finalize()
        other, alone, again = copy.deepcopy((model, optimizer, sparsifier))
        assert again.history == sparsifier.history
        assert train(other, alone, 2) == train(model, optimizer, 2)

    def test_in_an_averaged_model_are_of_the_sparse_weights(self) -> None:
        model, optimizer, sparsifier = build(OPTIMIZERS["adam"], torch.float64)
        average = torch.optim.swa_utils.AveragedModel(model)
        for step in range(3):
            train(model, optimizer, 1, start=step)
            average.update_parameters(model)
        average.module.load_state_dict(model.state_dict())
        assert_satisfies(average.module, sparsifier.scheme)


def test_distributed_checkpoint_of_one_process(make: Make) -> None:
    """It makes an optimizer create its state by a step at lr 0, and loads in place."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer, sparsifier = build(make, torch.float64)
    train(model, optimizer, 3)
    saved = through_a_file(dict(enumerate(get_state_dict(model, optimizer))))
    losses = train(model, optimizer, 3, start=3)

    other, resumed, again = build(make, torch.float64, seed=7)
    before = everything(other, again)
    _, empty = get_state_dict(other, resumed)
    assert again.step == 0
    assert len(again.history) == 0
    assert_same(everything(other, again), before)
    assert "state.0.weight.nm_dense" in empty or "nm_dense" in empty["state"]["0.weight"]
    set_state_dict(other, resumed, model_state_dict=saved[0], optim_state_dict=saved[1])
    assert again.step == 3
    assert train(other, resumed, 3, start=3) == losses
    assert_same(everything(other, again), everything(model, sparsifier))


def test_a_learning_rate_that_warms_up_from_zero_is_a_step() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    sparsifier = Sparsifier(model, optimizer, "2:4")
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        optimizer.step()
        scheduler.step()
    assert sparsifier.step == 3
    assert sparsifier.sad(since=0).keys() == {"0.weight", "2.weight"}
