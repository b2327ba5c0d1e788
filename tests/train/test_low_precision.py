"""16-bit parameters: the dense weight, its gradient and the momenta behind them are float32."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from train.common import Make, assert_satisfies, batch, loss_of, mlp, train

import nmsparse_ext as nms
from nmsparse_ext.train import Sparsifier

DTYPES = [torch.bfloat16, torch.float16]
MAKES: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=1e-3),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, fused=True),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.05, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
}
WEIGHTS = ("0.weight", "2.weight")
LAMBDA = 0.05


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def build(make: Make, dtype: torch.dtype, seed: int = 0, **kwargs: object):
    model = mlp(dtype, seed)
    optimizer = make(model.parameters())
    return model, optimizer, Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA, **kwargs)


@pytest.mark.parametrize("name", MAKES)
@pytest.mark.parametrize("method", ["sr-ste", "ste", "static"])
def test_the_optimizer_updates_float32_weights(name: str, method: str, dtype: torch.dtype) -> None:
    """As it would update float32 parameters with the gradients of the rounded ones."""
    model, optimizer, sparsifier = build(MAKES[name], dtype, method=method)
    dense = {n: nn.Parameter(sparsifier.dense_weight(n).clone()) for n in WEIGHTS}
    plain = MAKES[name](dense.values())
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, batch(step, dtype)).backward()
        for n, weight in dense.items():
            mask, grad = sparsifier.masks[n], model.get_parameter(n).grad.float()
            if method == "static":
                grad = torch.where(mask, grad, 0)
            elif method == "sr-ste":
                grad = torch.where(mask, grad, grad + LAMBDA * weight.detach())
            weight.grad = grad
        optimizer.step()
        plain.step()
        for n, weight in dense.items():
            assert sparsifier.dense_weight(n).dtype == torch.float32
            torch.testing.assert_close(sparsifier.dense_weight(n), weight.detach(), rtol=1e-6, atol=1e-7)
            kept = torch.where(sparsifier.masks[n], sparsifier.dense_weight(n), 0)
            assert torch.equal(model.get_parameter(n), kept.to(dtype))
            assert model.get_parameter(n).dtype == model.get_parameter(n).grad.dtype == dtype
    state = optimizer.state[model.get_parameter("0.weight")]
    assert all(v.dtype == torch.float32 for k, v in state.items() if k != "nm_bits" and v is not None)
    assert_satisfies(model, dict.fromkeys(WEIGHTS, "2:4"))


def test_small_updates_add_up(dtype: torch.dtype) -> None:
    """Which a 16-bit weight would swallow one by one."""
    model = nn.Linear(8, 4, bias=False).to(dtype)
    nn.init.constant_(model.weight, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    sparsifier = Sparsifier(model, optimizer, {"weight": "2:4"}, method="ste")
    for _ in range(400):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    torch.testing.assert_close(sparsifier.dense_weight(""), torch.full((4, 8), 0.996), rtol=1e-5, atol=0)
    assert (model.weight[model.weight != 0] < 1).all()


@pytest.mark.parametrize("name", MAKES)
def test_resumes_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model, optimizer, sparsifier = build(MAKES[name], dtype)
    train(model, optimizer, 3, dtype=dtype)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    losses = train(model, optimizer, 3, start=3, dtype=dtype)
    other, resumed, again = build(MAKES[name], dtype, seed=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(saved[1])
        other.load_state_dict(saved[0])
        assert train(other, resumed, 3, start=3, dtype=dtype) == losses
    for n in WEIGHTS:
        assert torch.equal(again.dense_weight(n), sparsifier.dense_weight(n))
        ours, theirs = resumed.state[other.get_parameter(n)], optimizer.state[model.get_parameter(n)]
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert value is None or torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[key])), key


def test_distributed_checkpoint() -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer, sparsifier = build(MAKES["adam-foreach"], torch.bfloat16)
    train(model, optimizer, 3, dtype=torch.bfloat16)
    saved = copy.deepcopy(get_state_dict(model, optimizer))
    losses = train(model, optimizer, 2, start=3, dtype=torch.bfloat16)
    other, resumed, again = build(MAKES["adam-foreach"], torch.bfloat16, seed=7)
    before = other[0].weight.detach().clone()
    get_state_dict(other, resumed)  # makes the state by a step at lr 0
    assert torch.equal(other[0].weight, before)
    assert resumed.state[other[0].weight]["exp_avg"].dtype == torch.float32
    set_state_dict(other, resumed, model_state_dict=saved[0], optim_state_dict=saved[1])
    assert train(other, resumed, 2, start=3, dtype=torch.bfloat16) == losses
    assert torch.equal(again.dense_weight("0"), sparsifier.dense_weight("0"))


def test_momenta_of_dense_training_are_widened() -> None:
    model = mlp(torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    train(model, optimizer, 2, dtype=torch.bfloat16)
    before = optimizer.state[model[0].weight]["exp_avg"].clone()
    Sparsifier(model, optimizer, "2:4")
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], before.float())
    train(model, optimizer, 2, dtype=torch.bfloat16)


def test_gradients_are_left_alone(dtype: torch.dtype) -> None:
    model, optimizer, _ = build(MAKES["sgd"], dtype)
    loss_of(model, batch(0, dtype)).backward()
    before = [(p.grad, p.grad.clone()) for p in model.parameters()]
    optimizer.step()
    for p, (grad, value) in zip(model.parameters(), before, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, value)


def test_writes_keep_the_dense_weights_of_other_groups(dtype: torch.dtype) -> None:
    model, optimizer, sparsifier = build(MAKES["sgd"], dtype)
    train(model, optimizer, 3, dtype=dtype)
    dense = sparsifier.dense_weight("0").clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        assert torch.equal(sparsifier.dense_weight("0"), dense)
    with torch.no_grad():
        model[0].weight[0, 0] = 3.0
    with pytest.warns(UserWarning, match="changed outside"):
        now = sparsifier.dense_weight("0")
    assert now[0, 0] == 3
    assert torch.equal(now[:, 4:], dense[:, 4:])


def test_follows_the_model_to_16_bits_and_back() -> None:
    model, optimizer, sparsifier = build(MAKES["sgd"], torch.float32)
    train(model, optimizer, 2, dtype=torch.float32)
    dense = sparsifier.dense_weight("0").clone()
    optimizer.state.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.bfloat16()
        train(model, optimizer, 0, dtype=torch.bfloat16)
        assert torch.equal(sparsifier.dense_weight("0"), dense)
        model.float()
        assert torch.equal(sparsifier.dense_weight("0"), dense)
    assert nms.find_violation(model[0].weight.detach(), "2:4") is None


def test_decoupled_penalty_reaches_the_float32_weight() -> None:
    model = mlp(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=0.5, penalty="decoupled")
    before, pruned = sparsifier.dense_weight("0").clone(), ~sparsifier.masks["0"]
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    optimizer.step()
    torch.testing.assert_close(
        sparsifier.dense_weight("0")[pruned], before[pruned] * (1 - 5e-4), rtol=1e-6, atol=0
    )
