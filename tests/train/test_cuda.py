"""On a GPU: nothing waits for it, skipped steps are known to it alone, and steps can be captured."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from train.common import assert_satisfies, batch, loss_of, mlp, train

import nmsparse_ext as nms
from nmsparse_ext.train import Sparsifier

pytestmark = pytest.mark.needs_cuda


def data(step: int) -> torch.Tensor:
    return batch(step, torch.float32).cuda()


def fused_adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=0.05, fused=True)


@pytest.mark.parametrize(
    "make",
    [
        fused_adam,
        lambda m: torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9, foreach=True),
        lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.05, device="cuda"), capturable=True),
    ],
)
@pytest.mark.parametrize("method", ["sr-ste", "ste", "static"])
@pytest.mark.parametrize("penalty", ["gradient", "decoupled"])
def test_hooks_neither_wait_nor_allocate(make, method: str, penalty: str) -> None:
    model = mlp(torch.float32).cuda()
    optimizer = make(model)
    sparsifier = Sparsifier(model, optimizer, "2:4", method=method, penalty=penalty)
    inputs = [data(step) for step in range(4)]
    for step, x in enumerate(inputs):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        if step < 2:
            optimizer.step()
            continue
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            sparsifier._stepper.before_step(optimizer, (optimizer,), {})
            sparsifier._stepper.after_step(optimizer, (optimizer,), {})
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert len(sparsifier.history) == 4
    assert_satisfies(model, sparsifier.scheme)


@pytest.mark.parametrize("penalty", ["gradient", "decoupled"])
def test_a_step_that_only_the_kernel_skips(penalty: str) -> None:
    model = mlp(torch.float32).cuda()
    optimizer = fused_adam(model)
    sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=0.5, penalty=penalty)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    for step in range(5):
        optimizer.zero_grad()
        before = sparsifier.dense_weight("0").clone()
        scaler.scale(loss_of(model, data(step) * (float("inf") if step in (1, 3) else 1))).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, sparsifier.dense_weight("0")) == (step in (1, 3))
    assert sparsifier.step == 3
    assert sparsifier.history.steps == [1, 2, 3]
    assert optimizer.state_dict()["param_groups"][0]["nm_step"] == 3


def test_scale_does_not_matter_to_a_fused_optimizer() -> None:
    after = []
    for scale in (1.0, 65536.0):
        model = mlp().cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25, fused=True)
        sparsifier = Sparsifier(model, optimizer, "2:4")
        scaler = torch.amp.GradScaler("cuda", init_scale=scale)
        scaler.scale(loss_of(model, batch(0).cuda())).backward()
        scaler.step(optimizer)
        after.append(sparsifier.dense_weight("0").clone())
    torch.testing.assert_close(*after, rtol=1e-13, atol=0)


def test_equals_the_cpu() -> None:
    results = []
    for device in ("cpu", "cuda"):
        model = mlp().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=0.05)
        for step in range(5):
            optimizer.zero_grad()
            loss_of(model, batch(step).to(device)).backward()
            optimizer.step()
        results.append((sparsifier.dense_weight("0").cpu(), sparsifier.masks["0"].cpu(), sparsifier.history))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-10, atol=1e-12)
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


def test_follows_the_model_to_the_gpu() -> None:
    model = mlp(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparsifier = Sparsifier(model, optimizer, "2:4")
    train(model, optimizer, 2, dtype=torch.float32)
    dense = sparsifier.dense_weight("0").clone()
    model.cuda()
    assert torch.equal(sparsifier.dense_weight("0").cpu(), dense)
    assert sparsifier.masks["0"].is_cuda
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, data(step)).backward()
        optimizer.step()
    assert sparsifier.history.steps == [1, 2, 3, 4]
    assert_satisfies(model, sparsifier.scheme)


def test_a_whole_step_in_a_cuda_graph() -> None:
    """Replays choose masks anew, and pull at what those prune."""
    x = data(0)

    def build() -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
        model = mlp(torch.float32).cuda()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05, capturable=True)
        return model, optimizer, Sparsifier(model, optimizer, "2:4", lambda_w=0.05)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()

    model, optimizer, sparsifier = build()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, optimizer)
    for _ in range(5):
        graph.replay()

    twin, plain, other = build()
    for _ in range(3 + 5):
        step(twin, plain)
    assert nms.sad(sparsifier.masks["0"], other.masks["0"]) == 0
    torch.testing.assert_close(sparsifier.dense_weight("0"), other.dense_weight("0"))
    assert_satisfies(model, sparsifier.scheme)
