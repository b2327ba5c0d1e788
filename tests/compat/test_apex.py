"""apex's ASP: prune once, train on, restore."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import nmsparse_ext as nms
from nmsparse_ext.compat import ASP


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    ASP.reset()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1), nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def train(made: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        made(torch.randn(8, 16, 4, 4)).square().sum().backward()
        optimizer.step()


def test_prune_trained_model(capsys: pytest.CaptureFixture[str]) -> None:
    made = model()
    masks = {i: nms.nm_mask(made[i].weight.detach(), "2:4") for i in (0, 2)}
    optimizer = torch.optim.SGD(made.parameters(), lr=1e-4, momentum=0.9, weight_decay=0.1)
    ASP.prune_trained_model(made, optimizer)
    assert "4.weight stays dense" in capsys.readouterr().out
    assert set(ASP.scheme()) == {"0.weight", "2.weight"}
    assert ASP.is_sparsity_enabled()
    before = made[2].weight.detach().clone()
    train(made, optimizer)
    for i, mask in masks.items():
        assert torch.equal(made[i].weight != 0, mask)
    assert not torch.equal(made[2].weight, before)
    assert not any("mma" in name for name in made.state_dict())


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_masks_anew_and_weights_restored(with_optimizer: bool) -> None:
    made = model()
    dense = made[2].weight.detach().clone()
    ASP.init_model_for_pruning(made, verbosity=0, allow_recompute_mask=True)
    assert not ASP.is_sparsity_enabled()
    optimizer = torch.optim.SGD(made.parameters(), lr=1e-3)
    if with_optimizer:
        ASP.init_optimizer_for_pruning(optimizer)
    ASP.compute_sparse_masks()
    assert torch.equal(made[2].weight, nms.nm_prune(dense, "2:4"))
    ASP.compute_sparse_masks()
    assert torch.equal(made[2].weight, nms.nm_prune(dense, "2:4"))
    ASP.restore_pruned_weights()
    assert torch.equal(made[2].weight, dense)
    assert not ASP.is_sparsity_enabled()
    train(made, optimizer, 1)
    assert bool((made[2].weight != 0).all())


def test_other_masks() -> None:
    made = model()
    ASP.init_model_for_pruning(made, "m8n1_1d", 0, [nn.Linear])
    ASP.compute_sparse_masks()
    assert nms.find_violation(made[2].weight, "1:8") is None
    assert bool((made[0].weight != 0).all())
    ASP.reset()
    for name in ("m4n2_2d_best", "m4n2_2d_greedy"):
        made = model()
        ASP.init_model_for_pruning(made, name, 0)
        ASP.compute_sparse_masks()
        for dim in (0, 1):
            assert nms.find_violation(made[2].weight, "2:4", dim=dim) is None
            assert nms.find_violation(made[0].weight, "2:4", dim=dim) is None
        ASP.reset()


def test_lists_and_channels() -> None:
    made, plain = model(), model()
    x = torch.randn(2, 16, 4, 4)
    lists = {"allowed_layer_names": ["0", "2"], "disallowed_layer_names": ["0"]}
    ASP.init_model_for_pruning(made, verbosity=0, example_input=x, **lists)  # type: ignore[arg-type]
    ASP.compute_sparse_masks()
    assert set(ASP.scheme()) == {"2.weight"}
    assert bool((made[0].weight != 0).all())
    assert made[2].weight.square().sum() >= nms.nm_prune(plain[2].weight.detach(), "2:4").square().sum()


def test_wrong_order_and_arguments() -> None:
    made = model()
    for call in (ASP.compute_sparse_masks, ASP.restore_pruned_weights):
        with pytest.raises(RuntimeError, match="init_model_for_pruning before"):
            call()
    for calculator in ("n2m4", "m8n4_2d", None):
        with pytest.raises(ValueError, match="mask_calculator must look like"):
            ASP.init_model_for_pruning(made, calculator)  # type: ignore[arg-type]
    ASP.init_model_for_pruning(made, verbosity=0)
    with pytest.raises(RuntimeError, match="initialised already"):
        ASP.init_model_for_pruning(made)
    ASP.compute_sparse_masks()
    with pytest.raises(RuntimeError, match="allow_recompute_mask=True"):
        ASP.restore_pruned_weights()
