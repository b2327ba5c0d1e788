"""Activations that packed layers apply themselves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext import deploy
from nmsparse_ext._build import extension
from nmsparse_ext.deploy.fuse import FusedLinear

pytestmark = pytest.mark.skipif(extension is None, reason="only panels have fused activations")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32)
        )
        self.tail = nn.Sequential(nn.SiLU(), nn.Linear(32, 16), nn.SiLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(x + self.body(x))


def prune(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nms.nm_prune_(module.weight.data, "2:4")
    return model


def convert(model: nn.Module) -> nn.Module:
    return nms.convert(copy.deepcopy(model), policy="always", fuse=True)


def test_fused() -> None:
    dense = prune(Block())
    fused = convert(dense)
    assert [name for name, module in fused.named_modules() if type(module) is FusedLinear] == [
        "body.0",
        "body.2",
        "tail.1",
    ]
    assert list(fused.state_dict()) == list(dense.state_dict())
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in dense.named_modules()]
    reasons = {row.name: row.reason for row in deploy.report(fused)}
    assert reasons["body.0.weight"] == "policy 'always'; applies gelu"
    assert reasons["body.2.weight"] == "policy 'always'; applies relu"
    assert reasons["body.4.weight"] == "policy 'always'"
    assert "activation='silu'" in repr(fused.tail[1])
    x = torch.randn(5, 32)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for module, leaf in zip((dense, fused), inputs, strict=True):
        module(leaf).sin().sum().backward()
    torch.testing.assert_close(fused(x), dense(x))
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close(fused.body[0].bias.grad, dense.body[0].bias.grad)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), convert(fused)):
        torch.testing.assert_close(other(x), dense(x))
    target = convert(prune(Block()))
    target.load_state_dict(dense.state_dict())
    torch.testing.assert_close(target(x), dense(x))
    target.body[0].weight = nn.Parameter(dense.body[0].weight.detach().clone())  # dense again: still right
    torch.testing.assert_close(target(x), dense(x))
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), dense(x))


def test_left_alone() -> None:
    shared = nn.Linear(32, 32)
    hooked, watched = nn.Linear(32, 32), nn.ReLU()
    calls: list[str] = []
    hooked.register_forward_hook(lambda *_: calls.append("layer"))
    watched.register_forward_hook(lambda *_: calls.append("activation"))

    class MyReLU(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    class MySequential(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](2 * self[0](x))

    both = nn.ReLU()
    dense = nn.Sequential(
        *(shared, nn.ReLU(), shared),
        *(hooked, nn.ReLU()),
        *(nn.Linear(32, 32), watched),
        *(nn.Linear(32, 32), MyReLU()),
        *(nn.Linear(32, 32), nn.GELU("tanh")),
        *(nn.Linear(32, 32), nn.Tanh()),
        MySequential(nn.Linear(32, 32), nn.ReLU()),
        nn.Linear(32, 32, dtype=torch.float32),
    )
    prune(dense)
    dense[-1].weight.data.normal_()  # stays dense
    dense.append(nn.ReLU())
    fused = convert(dense)
    assert not any(isinstance(module, FusedLinear) for module in fused.modules())
    x = torch.randn(5, 32)
    torch.testing.assert_close(fused(x), dense(x))
    assert calls == ["layer", "activation"] * 2
    model = prune(nn.Sequential(nn.Linear(32, 32), both, nn.Sequential(both, nn.Linear(32, 32))))
    fused = convert(model)  # an activation in two places goes from one of them
    torch.testing.assert_close(fused(x - 3), model(x - 3))
    assert type(fused[2][0]) is nn.ReLU
    assert nms.linear(x, model[0].weight, activation="relu").equal(F.relu(F.linear(x, model[0].weight)))
