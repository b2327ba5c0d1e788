"""DominoSearch as a library call: what comes out, and what stays as it was."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
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


FAST = {"pull": 4.0, "check_every": 3, "max_steps": 2000, "progress": False}


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
    assert len(result.losses) == len(range(0, result.steps, 3))
