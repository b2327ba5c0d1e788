"""The Sparsifier's hooks over a run: late groups, failures, finalizing, memory."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from train.common import assert_satisfies, batch, loss_of, mlp, sgd, train

import nmsparse_ext as nms
from nmsparse_ext.train import Sparsifier

LAMBDA = 0.05


def test_follows_the_model_to_another_dtype() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparsifier = Sparsifier(model, optimizer, "2:4")
    train(model, optimizer, 2)
    masks = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    model.float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sparsifier.dense_weight("0").dtype == torch.float32
        assert all(torch.equal(masks[name], sparsifier.masks[name]) for name in masks)
        train(model, optimizer, 2, dtype=torch.float32)
    assert_satisfies(model, sparsifier.scheme)


def test_late_parameter_groups() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model[0].parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
    assert_satisfies(model, sparsifier.scheme)
    train(model, optimizer, 2)
    frozen = sparsifier.dense_weight("2").clone()
    train(model, optimizer, 1)
    assert torch.equal(sparsifier.dense_weight("2"), frozen)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.2})
    train(model, optimizer, 2)
    assert not torch.equal(sparsifier.dense_weight("2"), frozen)
    assert_satisfies(model, sparsifier.scheme)
    assert optimizer.state[model[2].weight]["nm_dense"] is sparsifier.dense_weight("2")


def test_frozen_parameters_stay() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, "2:4")
    before = model[0].weight.clone()
    train(model, optimizer, 3)
    assert torch.equal(model[0].weight, before)
    assert_satisfies(model, sparsifier.scheme)


def test_a_failing_optimizer_does_not_leave_dense_weights_behind() -> None:
    class Fails(torch.optim.SGD):
        fail = False

        def step(self, closure=None):
            if self.fail:
                raise ZeroDivisionError
            return super().step(closure)

    model = mlp()
    optimizer = Fails(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
    train(model, optimizer, 1)
    sparse, dense = model[0].weight.detach().clone(), sparsifier.dense_weight("0").clone()
    optimizer.fail = True
    grad = model[0].weight.grad
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    # Nobody tells the hooks; whoever asks the Sparsifier, or steps again, finds all in order.
    assert sparsifier.step == 1
    assert torch.equal(sparsifier.dense_weight("0"), dense)
    assert torch.equal(model[0].weight, sparse)
    assert model[0].weight.grad is grad
    optimizer.fail = False
    train(model, optimizer, 1)
    assert sparsifier.step == 2


def test_a_failing_rule_leaves_everything_as_it_was() -> None:
    class Fails(nms.train.Rule):
        def adjust_grad(self, weight, grad, step):
            raise ZeroDivisionError

    model = mlp()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4", method=Fails())
    before = model[2].weight.detach().clone()
    loss_of(model, batch(0)).backward()
    grads = [p.grad for p in model.parameters()]
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert torch.equal(model[2].weight, before)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert_satisfies(model, sparsifier.scheme)


def test_the_names_and_tensors_of_the_model_stay() -> None:
    model = mlp()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    optimizer = sgd(model)
    Sparsifier(model, optimizer, "2:4")
    train(model, optimizer, 2)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert not list(model.buffers())
    assert type(model[0]) is nn.Linear


def test_finalize_leaves_a_plain_model_and_optimizer() -> None:
    model = mlp()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4")
    train(model, optimizer, 3)
    weight = model[0].weight.detach().clone()
    history = sparsifier.history
    assert sparsifier.finalize() is model
    assert torch.equal(model[0].weight, weight)
    assert_satisfies(model, sparsifier.scheme)
    assert not any(key.startswith("nm_") for state in optimizer.state.values() for key in state)
    assert not any(key.startswith("nm_") for group in optimizer.param_groups for key in group)
    assert "nm_step" not in str(optimizer.state_dict())
    train(model, optimizer, 1)
    assert nms.find_violation(model[0].weight.detach(), "2:4") is not None
    assert sparsifier.finalize() is model  # once more is once too many, but does no harm
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = model[0].weight.detach().clone()
        assert sparsifier.history == history
        assert sparsifier.sad() == {name: history[name][-1] for name in history.counts}
        assert sparsifier.masks["0"].sum() == 64
        assert torch.equal(model[0].weight, before)
    Sparsifier(model, optimizer, "1:4")
    assert_satisfies(model, {"0.weight": "1:4"})


def test_a_write_before_a_skipped_step_is_not_lost() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=True)
    sparsifier = Sparsifier(model, optimizer, "2:4")
    scaler = torch.amp.GradScaler("cpu")
    new = torch.randn_like(model[0].weight)
    with torch.no_grad():
        model[0].weight.copy_(new)
    scaler.scale(loss_of(model, batch(0) * float("inf"))).backward()
    with pytest.warns(UserWarning, match="changed outside"):
        scaler.step(optimizer)
    assert sparsifier.step == 0
    assert torch.equal(sparsifier.dense_weight("0"), new)


def test_an_optimizer_that_comes_wrapped() -> None:
    """As accelerate wraps it: an optimizer by type, but without hooks of its own."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = mlp()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, Wrapper(optimizer), "2:4")
    assert sparsifier.optimizer is optimizer
    train(model, optimizer, 1)
    assert sparsifier.step == 1


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_and_recurrent_weights(batch_first: bool) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=batch_first)
            self.lstm = nn.LSTM(16, 8, bidirectional=True, batch_first=batch_first)
            self.up = nn.ConvTranspose1d(16, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.lstm(self.attention(x, x, x)[0])[0].movedim(-1, 1)).sum()

    model = Both()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, "2:4")
    assert {"attention.in_proj_weight", "lstm.weight_hh_l0_reverse", "up.weight"} <= set(sparsifier.masks)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(3, 5, 16)).backward()
        optimizer.step()
        for name in sparsifier.masks:
            dim = 0 if name == "up.weight" else 1
            assert nms.find_violation(model.get_parameter(name).detach(), "2:4", dim=dim) is None


def test_needs_no_reference_to_itself() -> None:
    """The optimizer keeps it alive."""
    model = mlp()
    optimizer = sgd(model)
    Sparsifier(model, optimizer, "2:4")
    gc.collect()
    train(model, optimizer, 1)
    assert_satisfies(model, {"0.weight": "2:4", "2.weight": "2:4"})


class _LargestAllocation(TorchDispatchMode):
    """Notes the largest tensor that any op makes storage for, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("method", ["sr-ste", "ste", "static"])
@pytest.mark.parametrize("penalty", ["gradient", "decoupled"])
def test_hooks_allocate_no_tensors_after_the_first_step(method: str, penalty: str) -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, foreach=False)
    sparsifier = Sparsifier(model, optimizer, "2:4", method=method, penalty=penalty)

    def backward() -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 64)).sum().backward()

    backward()
    optimizer.step()
    backward()
    with _LargestAllocation() as hooks:
        sparsifier._stepper.before_step(optimizer, (optimizer,), {})
        sparsifier._stepper.after_step(optimizer, (optimizer,), {})
    assert hooks.largest == 0


def test_one_gradient_buffer_of_extra_memory_is_not_needed() -> None:
    """What a sparse weight costs: the dense weight, a mask of one bit a weight, and those remembered."""
    model = nn.Linear(64, 128)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sparsifier = Sparsifier(model, optimizer, {"weight": "2:4"})
    model(torch.ones(4, 64)).sum().backward()
    optimizer.step()
    weight = sparsifier._weights["weight"]
    tensors = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for t in vars(weight).values()
        if isinstance(t, Tensor)
    }
    own = model.weight.untyped_storage()
    assert tensors.pop(own._cdata) == own.nbytes()
    assert sum(tensors.values()) == own.nbytes() + model.weight.numel() // 8
