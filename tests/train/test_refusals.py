"""What cannot be trained this way says so, by name, before anything is changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from train.common import assert_satisfies, mlp, train

import nmsparse_ext as nms
from nmsparse_ext.train import Sparsifier


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


class FullyShardedDataParallel(nn.Module):
    """Stands for FSDP1, which needs several processes to be made."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_fsdp1() -> None:
    model = nn.Sequential(FullyShardedDataParallel(nn.Linear(16, 8)))
    with pytest.raises(ValueError, match=r"0 is wrapped in FullyShardedDataParallel .* use .*fully_shard"):
        Sparsifier(model, sgd(model), "2:4")


@pytest.mark.parametrize(
    ("parametrize", "how"),
    [
        (nn.utils.parametrizations.weight_norm, "torch.nn.utils.parametrize"),
        (nn.utils.parametrizations.orthogonal, "torch.nn.utils.parametrize"),
        (lambda m: prune.l1_unstructured(m, "weight", 0.5), "made from weight_orig"),
        (nn.utils.spectral_norm, "made from weight_orig"),
    ],
)
@pytest.mark.parametrize("scheme", ["2:4", {"0": "2:4"}, {"0.weight": "2:4"}])
def test_parametrized_weights(parametrize, how: str, scheme) -> None:
    model = mlp()
    parametrize(model[0])
    with pytest.raises(ValueError, match=rf"0.weight \({how}\)"):
        Sparsifier(model, sgd(model), scheme)
    Sparsifier(model, sgd(model), {"2": "2:4"})
    assert_satisfies(model, {"2.weight": "2:4"})


@pytest.mark.parametrize("optimizer", [None, nn.Linear(2, 2), "sgd"])
def test_no_optimizer(optimizer) -> None:
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got"):
        Sparsifier(mlp(), optimizer, "2:4")


def test_packed_weights() -> None:
    model = mlp()
    for layer in (model[0], model[2]):
        nms.nm_prune_(layer.weight.data, "2:4")
    nms.convert(model, policy="always")
    with pytest.raises(ValueError, match=r"packed weights cannot be trained: 0\.weight, 2\.weight"):
        Sparsifier(model, sgd(model), "2:4")


def test_no_model() -> None:
    model = mlp()
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got generator"):
        Sparsifier(model.parameters(), sgd(model), "2:4")


def test_differentiable_optimizer() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="differentiable=True"):
        Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1, differentiable=True), "2:4")


def test_a_second_sparsifier() -> None:
    model = mlp()
    optimizer = sgd(model)
    first = Sparsifier(model, optimizer, "2:4")
    with pytest.raises(ValueError, match="has a Sparsifier already; finalize"):
        Sparsifier(model, optimizer, "1:4")
    first.finalize()
    Sparsifier(model, optimizer, "1:4")


def test_two_sparsifiers_over_one_model() -> None:
    model = mlp()
    first, second = sgd(model), sgd(model)
    sparsifier = Sparsifier(model, first, {"0": "2:4"})
    with pytest.raises(ValueError, match=r"model already has a Sparsifier, which trains 0\.weight; finalize"):
        Sparsifier(model, second, "2:4")
    Sparsifier(model, second, {"2": "2:4"})  # other weights
    train(model, first, 1)
    sparsifier.finalize()
    Sparsifier(model, sgd(model), {"0": "1:4"})


def test_a_forgotten_sparsifier_is_in_nobodys_way() -> None:
    model = mlp()
    optimizer = sgd(model)
    Sparsifier(model, optimizer, "2:4")
    train(model, optimizer, 1)
    del optimizer
    optimizer = sgd(model)
    Sparsifier(model, optimizer, "2:4")
    train(model, optimizer, 1)


def test_an_optimizer_with_parameters_of_its_own() -> None:
    """One that does not update what is in its groups would train the sparse weights."""

    class Own(torch.optim.SGD):
        def __init__(self, params, **kwargs: object) -> None:
            super().__init__(params, **kwargs)
            self.own = [p for group in self.param_groups for p in group["params"]]

        @torch.no_grad()
        def step(self, closure=None) -> None:
            for p in self.own:
                p.sub_(0.1 * p.grad)

    model = mlp()
    optimizer = Own(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, "2:4")
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"Own.step\(\) has updated 0.weight itself"):
        train(model, optimizer, 1)
    assert torch.equal(model[0].weight, before)
    assert sparsifier.step == 0


@pytest.mark.parametrize(
    ("scheme", "error", "match"),
    [
        ({"1": "2:4"}, ValueError, "1"),
        ({"fc": "2:4"}, ValueError, "fc"),
        ({"0": "2:5"}, ValueError, "multiple of m = 5"),
        ({"0": "4:2"}, ValueError, "4:2"),
        (7, TypeError, "scheme must be"),
        ("two of four", ValueError, "two of four"),
    ],
)
def test_a_scheme_that_does_not_fit(scheme, error: type[Exception], match: str) -> None:
    model = mlp()
    before = model[0].weight.clone()
    optimizer = sgd(model)
    with pytest.raises(error, match=match):
        Sparsifier(model, optimizer, scheme)
    assert torch.equal(model[0].weight, before)
    train(model, optimizer, 1)


def test_parameters_that_were_replaced() -> None:
    model = mlp()
    optimizer = sgd(model)
    Sparsifier(model, optimizer, "2:4")
    model[0].weight = nn.Parameter(torch.randn(8, 16, dtype=torch.float64))
    with pytest.raises(
        RuntimeError, match=r"0.weight is another parameter than when the Sparsifier was made"
    ):
        train(model, optimizer, 1)


@pytest.mark.parametrize("argument", [3, "2:4", object()])
def test_a_schedule_that_is_none(argument) -> None:
    model = mlp()
    with pytest.raises(TypeError, match="schedule must be a Schedule, a function"):
        Sparsifier(model, sgd(model), "2:4", schedule=argument)


def test_what_stays_dense_is_left_alone() -> None:
    """A uniform scheme skips what cannot be sparse instead of refusing it."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8, 6))
    before = [p.detach().clone() for p in model.parameters()]
    sparsifier = Sparsifier(model, sgd(model), "2:4")
    assert list(sparsifier.masks) == ["3.weight"]
    assert all(torch.equal(a, b) for a, b in zip(before[:4], model.parameters(), strict=False))
    assert nms.find_violation(model[3].weight.detach(), "2:4") is None
