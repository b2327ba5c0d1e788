"""``nms.optim`` without a Sparsifier: what ``torch.optim`` does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nmsparse_ext as nms

OURS = {"sgd": nms.optim.SGD, "adamw": nms.optim.AdamW}
THEIRS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}

SGD_OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.5, "maximize": True},
    {"weight_decay": 0.1, "lr": torch.tensor(0.05)},
]
ADAMW_OPTIONS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True, "weight_decay": 0.1},
    {"betas": (0.5, 0.8), "eps": 1e-3, "maximize": True},
    {"lr": torch.tensor(0.02), "weight_decay": 0.0},
]
CASES = [("sgd", options) for options in SGD_OPTIONS] + [("adamw", options) for options in ADAMW_OPTIONS]


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Parameters of many layouts: linear, channels last, a vector, a scalar, a transposed matrix."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 4 * 4, 33), nn.LayerNorm(33), nn.Linear(33, 1)
    )
    model.register_parameter("scale", nn.Parameter(torch.tensor(0.5)))
    model[2].weight = nn.Parameter(model[2].weight.detach().t().contiguous().t())
    return model.to(dtype).to(memory_format=torch.channels_last)


def set_grads(model: nn.Module, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        grad = torch.empty_like(parameter)
        parameter.grad = grad.copy_(torch.randn(parameter.shape, generator=generator)).mul_(scale)


def pair(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> list[tuple[nn.Module, Any]]:
    options = {"lr": 0.1, **options}
    models = [net(dtype), net(dtype)]
    return [
        (m, make(m.parameters(), **options))
        for m, make in zip(models, (OURS[name], THEIRS[name]), strict=True)
    ]


def assert_close(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_same_as_torch(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    (ours, mine), (theirs, other) = pair(name, dtype, **options)
    for step in range(6):
        for model in (ours, theirs):
            set_grads(model, step)
        mine.step()
        other.step()
    assert_close(ours, theirs)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_parameters(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Computed in float32, stored in 16 bits."""
    ours, theirs = net(dtype), net(dtype).float()
    mine = OURS[name](ours.parameters(), **{"lr": 0.1, **options})
    other = THEIRS[name](theirs.parameters(), **{"lr": 0.1, **options})
    for step in range(4):
        set_grads(ours, step)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = p.grad.float()
        mine.step()
        other.step()
        stored = [p.data for p in theirs.parameters()]
        stored += [
            t for state in other.state.values() for k, t in state.items() if k != "step" and t is not None
        ]
        for tensor in stored:
            tensor.copy_(tensor.to(dtype))
    theirs.to(dtype)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_state_dicts_go_both_ways(name: str, direction: str) -> None:
    options: dict[str, Any] = {"momentum": 0.9} if name == "sgd" else {"amsgrad": True}
    (ours, mine), (theirs, other) = pair(name, **options)
    first, second = (
        ((theirs, other), (ours, mine)) if direction == "from torch" else ((ours, mine), (theirs, other))
    )
    for step in range(3):
        set_grads(first[0], step)
        first[1].step()
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    for model, optimizer in (first, second):
        set_grads(model, 9)
        optimizer.step()
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", OURS)
def test_own_state_dict_bit_for_bit(name: str) -> None:
    (a, first), (b, _) = pair(name, weight_decay=0.1)
    for step in range(2):
        set_grads(a, step)
        first.step()
    second = OURS[name](b.parameters(), lr=1.0)
    b.load_state_dict(a.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in ((a, first), (b, second)):
        set_grads(model, 5)
        optimizer.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", OURS)
def test_grad_scaler(name: str) -> None:
    """As a fused optimizer: scaled gradients come in and stay so; a step with an inf changes nothing."""
    (ours, mine), (theirs, other) = pair(name)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)]
    for step in range(5):
        for model, optimizer, scaler in ((ours, mine, scalers[0]), (theirs, other, scalers[1])):
            scaler.scale(torch.ones(()))
            set_grads(model, step, scale=scaler.get_scale())
            if step == 2:
                model[0].weight.grad[0, 0, 0, 0] = torch.inf
            before = [p.grad.clone() for p in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            if model is ours:
                assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    assert_close(ours, theirs)
    assert scalers[0].get_scale() == scalers[1].get_scale()


@pytest.mark.parametrize("name", OURS)
def test_closure_and_scheduler(name: str) -> None:
    results = []
    for model, optimizer in pair(name):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

        def closure(model: nn.Module = model) -> Tensor:
            model.zero_grad()
            loss = model(torch.ones(2, 3, 6, 6)).square().sum() + model.scale
            loss.backward()
            return loss

        losses = []
        for _ in range(3):
            losses.append(optimizer.step(closure).item())
            scheduler.step()
        results.append(torch.tensor(losses))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_parameter_groups_and_late_ones(name: str) -> None:
    models = [net(), net()]
    optimizers = []
    for model, make in zip(models, (OURS[name], THEIRS[name]), strict=True):
        first, *rest = model.parameters()
        optimizers.append(
            make([{"params": [first], "lr": 0.01}, {"params": rest[:3], "weight_decay": 0.3}], lr=0.1)
        )
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            set_grads(model, step)
            if step == 2:
                optimizer.add_param_group({"params": list(model.parameters())[4:], "lr": 0.2})
            if step == 1:
                next(model.parameters()).grad = None
            optimizer.step()
    assert_close(*models)


class Odd(nn.Module):
    """What the kernels do not take: complex numbers, gaps in memory; and gradients in another order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.complex = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.gaps = nn.Parameter(torch.randn(4, 6)[:, ::2])
        self.order = nn.Parameter(torch.randn(4, 6))
        self.empty = nn.Parameter(torch.randn(0, 3))


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("scale", [None, 8.0])
def test_parameters_that_the_kernels_do_not_take(name: str, scale: float | None) -> None:
    models = [Odd(), Odd()]
    make: list[Callable[..., Any]] = [OURS[name], THEIRS[name]]
    optimizers = [make(model.parameters(), lr=0.1) for make, model in zip(make, models, strict=True)]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(step)
            factor = scale if scale and optimizer is optimizers[0] else 1.0
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter) * factor
            model.order.grad = model.order.grad.t().contiguous().t()
            if factor != 1:
                optimizer.grad_scale = torch.tensor(factor)
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_sparse_gradients() -> None:
    models = [nn.Embedding(5, 4, sparse=True) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, make in zip(models, (nms.optim.SGD, torch.optim.SGD), strict=True):
        optimizer = make(model.parameters(), lr=0.1)
        model(torch.tensor([1, 3, 3])).sum().backward()
        optimizer.step()
    assert torch.equal(models[0].weight, models[1].weight)
    optimizer = nms.optim.AdamW(models[0].parameters())
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()


@pytest.mark.parametrize("name", OURS)
def test_nothing_but_state_is_allocated(name: str) -> None:
    model = nn.Linear(64, 64)
    set_grads(model, 0)
    optimizer = OURS[name](model.parameters(), lr=0.1, **({"momentum": 0.9} if name == "sgd" else {}))
    optimizer.step()
    held = sum(t.untyped_storage().nbytes() for t in optimizer.state[model.weight].values())
    assert held == model.weight.nbytes * (1 if name == "sgd" else 2) + (4 if name == "adamw" else 0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sgd", {"differentiable": True}, "differentiable=True is not supported by nmsparse_ext.optim.SGD"),
        ("adamw", {"differentiable": True}, "differentiable=True is not supported"),
        ("adamw", {"capturable": True}, "capturable=True is not supported by nmsparse_ext.optim.AdamW"),
        ("sgd", {"lr": -1.0}, "learning rate"),
        ("sgd", {"nesterov": True}, "Nesterov"),
        ("adamw", {"betas": (1.0, 0.9)}, "beta"),
        ("sgd", {"scheme": "2:4"}, "scheme needs the model"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OURS[name](list(net().parameters()), **options)
    with pytest.raises(ValueError, match="differentiable"):
        OURS[name](net().parameters()).add_param_group(
            {"params": [nn.Parameter(torch.ones(1))], "differentiable": True}
        )


def test_they_are_torch_optimizers() -> None:
    assert isinstance(nms.optim.SGD(net().parameters()), torch.optim.SGD)
    assert isinstance(nms.optim.AdamW(net().parameters()), torch.optim.AdamW)
    assert nms.optim.SGD(net().parameters()).sparsifier is None
