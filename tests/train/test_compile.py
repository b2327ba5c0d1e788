"""A compiled model trains like any other, without compiling anew at every step."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from train.common import batch, loss_of, mlp, sgd, train

from nmsparse_ext.train import Sparsifier


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("before", [True, False], ids=["compiled-first", "compiled-later"])
def test_model_and_loss_compile_once(before: bool) -> None:
    counter = CompileCounter()
    model, twin = mlp(), mlp()
    compiled = torch.compile(lambda x: loss_of(model, x), backend=counter, fullgraph=True)
    if before:
        compiled(batch(0)).backward()
    optimizer, plain = sgd(model), sgd(twin)
    sparsifier, other = (
        Sparsifier(m, o, "2:4", lambda_w=0.05) for m, o in ((model, optimizer), (twin, plain))
    )
    for step in range(5):
        optimizer.zero_grad()
        loss = compiled(batch(step))
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(train(twin, plain, 1, start=step)[0], rel=1e-12)
    assert counter.frame_count == 1
    torch.testing.assert_close(sparsifier.dense_weight("0"), other.dense_weight("0"))


def test_aot_autograd_sees_the_new_weights() -> None:
    model, twin = mlp(), mlp()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer, plain = sgd(compiled), sgd(twin)
    sparsifier = Sparsifier(compiled, optimizer, "2:4")
    Sparsifier(twin, plain, "2:4")
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = train(compiled, optimizer, 4)
    assert losses == pytest.approx(train(twin, plain, 4), rel=1e-12)
    assert list(sparsifier.masks) == ["0.weight", "2.weight"]


def test_a_compiled_step_runs_the_hooks() -> None:
    model, twin = mlp(), mlp()
    optimizer, plain = sgd(model), sgd(twin)
    sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=0.05)
    Sparsifier(twin, plain, "2:4", lambda_w=0.05)
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(4):
        optimizer.zero_grad()
        loss = loss_of(model, batch(i))
        loss.backward()
        step()
        assert loss.item() == pytest.approx(train(twin, plain, 1, start=i)[0], rel=1e-12)
    assert sparsifier.step == 4
