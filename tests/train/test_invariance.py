"""λ means the same however the gradient came about."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from train.common import Tied, batch, loss_of, mlp

import nmsparse_ext as nms
from nmsparse_ext.train import Sparsifier

LR, LAMBDA = 0.25, 2e-4


def effective_lambda(
    build: Callable[[], nn.Module],
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    step: Callable[[nn.Module, torch.optim.Optimizer], None],
    name: str = "0.weight",
) -> Tensor:
    """λ as the pruned weights have felt it: from one step of SGD with it and one without."""
    after = {}
    for method in ("sr-ste", "ste"):
        model = build()
        optimizer = optimizer_of(model)
        sparsifier = Sparsifier(model, optimizer, "2:4", method=method, lambda_w=LAMBDA)
        before, pruned = sparsifier.dense_weight(name).clone(), ~sparsifier.masks[name]
        step(model, optimizer)
        after[method] = sparsifier.dense_weight(name).clone()
    assert not torch.equal(after["ste"], before)
    kept = ~pruned
    assert torch.equal(after["ste"][kept], after["sr-ste"][kept])
    return (after["ste"] - after["sr-ste"])[pruned] / (LR * before[pruned])


def check(felt: Tensor) -> None:
    torch.testing.assert_close(felt, torch.full_like(felt, LAMBDA), rtol=1e-6, atol=0)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR)


def fused_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, fused=True)


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss_of(model, batch(0)).backward()
    optimizer.step()


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for part in batch(0).chunk(4):
        (loss_of(model, part) / 4).backward()
    optimizer.step()


def scaled(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    scaler.scale(loss_of(model, batch(0))).backward()
    scaler.step(optimizer)
    scaler.update()


def scaled_and_accumulated(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    for part in batch(0).chunk(4):
        scaler.scale(loss_of(model, part) / 4).backward()
    scaler.step(optimizer)
    scaler.update()


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss_of(model, batch(0)).backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 1e-3) > 0.1
    optimizer.step()


def scaled_and_clipped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    scaler.scale(loss_of(model, batch(0))).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    scaler.step(optimizer)
    scaler.update()


def with_closure(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch(0))
        loss.backward()
        return loss

    optimizer.step(closure)


def checkpointed(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x = torch.utils.checkpoint.checkpoint(model[0], batch(0), use_reentrant=False)
    (model[2](model[1](x)) - 1).pow(2).mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "step",
    [
        plain,
        accumulated,
        scaled,
        scaled_and_accumulated,
        clipped,
        scaled_and_clipped,
        with_closure,
        checkpointed,
    ],
)
@pytest.mark.parametrize("optimizer_of", [sgd, fused_sgd])
def test_same_lambda(step: Callable, optimizer_of: Callable) -> None:
    check(effective_lambda(mlp, optimizer_of, step))


@pytest.mark.parametrize("step", [plain, scaled])
@pytest.mark.parametrize("optimizer_of", [sgd, fused_sgd])
def test_same_lambda_for_a_tied_weight(step: Callable, optimizer_of: Callable) -> None:
    check(effective_lambda(Tied, optimizer_of, step, "a.weight"))


def test_same_lambda_in_parameter_groups() -> None:
    def grouped(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            [{"params": model[2].parameters(), "lr": 9.0}, {"params": model[0].parameters()}], lr=LR
        )

    check(effective_lambda(mlp, grouped, plain))


def test_same_lambda_for_capturable_and_tensor_lr() -> None:
    check(
        effective_lambda(
            mlp, lambda m: torch.optim.SGD(m.parameters(), lr=torch.tensor(LR), foreach=False), plain
        )
    )


def test_float32_within_the_rounding_of_the_term() -> None:
    def build() -> nn.Module:
        return mlp(torch.float32)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        loss_of(model, batch(0, torch.float32)).backward()
        optimizer.step()

    # Two roundings of W at 2^-24 over a term of LR * λ * W.
    felt = effective_lambda(build, sgd, step)
    torch.testing.assert_close(felt, torch.full_like(felt, LAMBDA), rtol=4 * 2**-24 / (LR * LAMBDA), atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_changes_nothing(fused: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, fused=fused)
    sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x)).backward()
        scaler.step(optimizer)
        scaler.update()

    step(batch(0))
    before = [p.detach().clone() for p in model.parameters()]
    dense, sad, number = sparsifier.dense_weight("0").clone(), sparsifier.sad(), sparsifier.step
    step(batch(1) * float("inf"))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(dense, sparsifier.dense_weight("0"))
    assert (sparsifier.sad(), sparsifier.step, len(sparsifier.history)) == (sad, number, 1)
    step(batch(2))
    assert sparsifier.step == 2
    assert nms.find_violation(model[0].weight.detach(), "2:4") is None
