"""Transposable masks in training: 2:4 both ways, the best of every tile, or a clear refusal."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from train.common import loss_of, mlp, sgd, train

import nmsparse_ext as nms
from nmsparse_ext.train import Sparsifier


def build(method: str = "sr-ste", seed: int = 0):
    model = mlp(seed=seed)
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4", method=method, lambda_w=0.05, transposable=True)
    return model, optimizer, sparsifier


def check_both_ways(weight: Tensor, other: int = 0) -> None:
    for dim in (1, other):
        assert nms.find_violation(weight.detach(), "2:4", dim=dim) is None


@pytest.mark.parametrize("method", ["sr-ste", "ste", "static"])
def test_masks_are_the_best_of_every_tile(method: str) -> None:
    model, optimizer, sparsifier = build(method)
    first = dict(sparsifier.masks)
    for step in range(4):
        for name in ("0.weight", "2.weight"):
            weight, dense = model.get_parameter(name), sparsifier.dense_weight(name)
            check_both_ways(weight)
            if method != "static":
                assert torch.equal(sparsifier.masks[name], nms.transposable_mask(dense))
            else:
                assert torch.equal(sparsifier.masks[name], first[name])
            assert torch.equal(weight, torch.where(sparsifier.masks[name], dense, 0))
        train(model, optimizer, 1, start=step)
    assert (sum(sparsifier.history.total) > 0) == (method != "static")
    sparsifier.finalize()
    check_both_ways(model[0].weight)


def test_convolutions_and_transposed_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 3), nn.ConvTranspose2d(12, 4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, "2:4", transposable=True)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 8, 5, 5)).square().mean().backward()
        optimizer.step()
        for name in sparsifier.masks:
            weight = model.get_parameter(name).detach()
            check_both_ways(weight)
            dense = sparsifier.dense_weight(name)
            for i in range(weight.shape[2]):
                for j in range(weight.shape[3]):
                    kept = sparsifier.masks[name][:, :, i, j]
                    best = nms.transposable_mask(dense[:, :, i, j].contiguous())
                    total = dense[:, :, i, j].abs().double()
                    assert (total * kept).sum().item() == pytest.approx(
                        (total * best).sum().item(), rel=1e-12
                    )


def test_resumes_bit_for_bit() -> None:
    model, optimizer, sparsifier = build()
    train(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    losses = train(model, optimizer, 3, start=3)
    other, resumed, again = build(seed=7)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert train(other, resumed, 3, start=3) == losses
    assert torch.equal(again.dense_weight("0"), sparsifier.dense_weight("0"))


def test_a_mask_that_is_not_transposable_is_chosen_anew_on_loading() -> None:
    plain = mlp()
    optimizer = sgd(plain)
    Sparsifier(plain, optimizer, "2:4")
    train(plain, optimizer, 1)
    other, resumed, _ = build(seed=7)
    resumed.load_state_dict(optimizer.state_dict())
    check_both_ways(other[0].weight)


def test_writes_from_outside_are_adopted_by_the_tile() -> None:
    model, optimizer, sparsifier = build()
    train(model, optimizer, 2)
    dense = sparsifier.dense_weight("0").clone()
    with torch.no_grad():
        model[0].weight[1, 2] += 5
    values = model[0].weight.detach().clone()
    with pytest.warns(UserWarning, match="changed outside"):
        now = sparsifier.dense_weight("0")
    assert torch.equal(now[:4, :4], values[:4, :4])
    dense[:4, :4] = values[:4, :4]
    assert torch.equal(now, dense)
    check_both_ways(model[0].weight)


@pytest.mark.parametrize(
    ("layer", "scheme", "match"),
    [
        (nn.Linear(16, 6), "2:4", r"0.weight of shape \[6, 16\] has 6 along dim 0, no multiple of 4"),
        (nn.Linear(16, 8), "1:4", "needs the pattern 2:4, but 0.weight has 1:4"),
        (nn.Conv1d(8, 8, 1, groups=2), "2:4", r"convolutions of one group, but 0.weight has shape"),
    ],
)
def test_refusals_name_the_weight(layer: nn.Module, scheme: str, match: str) -> None:
    model = nn.Sequential(layer)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=match):
        Sparsifier(model, sgd(model), scheme, transposable=True)
    assert torch.equal(layer.weight, before)


def test_lambda_reaches_the_pruned_weights() -> None:
    after = {}
    for method in ("sr-ste", "ste"):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        sparsifier = Sparsifier(model, optimizer, "2:4", method=method, lambda_w=2e-4, transposable=True)
        before, pruned = sparsifier.dense_weight("0").clone(), ~sparsifier.masks["0"]
        loss_of(model, torch.ones(2, 16, dtype=torch.float64)).backward()
        optimizer.step()
        after[method] = sparsifier.dense_weight("0").clone()
    felt = (after["ste"] - after["sr-ste"])[pruned] / (0.25 * before[pruned])
    torch.testing.assert_close(felt, torch.full_like(felt, 2e-4), rtol=1e-6, atol=0)
