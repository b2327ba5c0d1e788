"""``torch.ao.pruning`` and torchao's Wanda: the same masks as the original, where there is one to ask."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import nmsparse_ext as nms
from nmsparse_ext.compat import WandaSparsifier, WeightNormSparsifier


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


@pytest.mark.parametrize("zeros", [1, 2, 3])
def test_the_same_as_the_original(zeros: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        original = pytest.importorskip("torch.ao.pruning").WeightNormSparsifier
    ours, theirs = model(), model()
    config = [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}]
    shape = {"sparsity_level": 1.0, "sparse_block_shape": (1, 4), "zeros_per_block": zeros}
    for sparsifier, made in ((WeightNormSparsifier(**shape), ours), (original(**shape), theirs)):
        sparsifier.prepare(made, config)
        assert torch.equal(made[0](torch.ones(16)), model()[0](torch.ones(16)))  # nothing is masked yet
        sparsifier.step()
        made(torch.ones(3, 16)).sum().backward()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    for i in (0, 2):
        masks = [made[i].parametrizations.weight[0].mask.bool() for made in (ours, theirs)]
        assert torch.equal(*masks)


@pytest.mark.parametrize(("zeros", "pattern"), [(1, "3:4"), (2, "2:4"), (3, "1:4")])
def test_what_is_pruned_and_what_is_kept(zeros: int, pattern: str) -> None:
    made = model()
    sparsifier = WeightNormSparsifier(zeros_per_block=zeros)
    assert str(sparsifier.pattern) == pattern
    sparsifier.prepare(made)
    sparsifier.step()
    dense = made[0].parametrizations.weight.original.detach().clone()
    with torch.no_grad():  # masks are chosen anew by the dense weights
        made[0].parametrizations.weight.original.mul_(-2)
    sparsifier.step()
    sparsifier.squash_mask()
    assert set(made.state_dict()) == set(model().state_dict())
    assert torch.equal(made[0].weight, nms.nm_prune(-2 * dense, pattern))


def test_what_is_no_pattern() -> None:
    for arguments, match in (
        ({"sparsity_level": 0.5}, "sparsity_level must be 1.0"),
        ({"sparse_block_shape": (4, 1)}, r"must be \(1, m\)"),
        ({"zeros_per_block": 4}, "between 1 and 3"),
    ):
        with pytest.raises(ValueError, match=match):
            WeightNormSparsifier(**arguments)  # type: ignore[arg-type]
    sparsifier = WeightNormSparsifier()
    with pytest.raises(RuntimeError, match="call prepare before"):
        sparsifier.step()
    with pytest.raises(ValueError, match="the model has no 7"):
        sparsifier.prepare(model(), [{"tensor_fqn": "7.weight"}])
    made = model()
    sparsifier.prepare(made)
    with pytest.raises(RuntimeError, match="call squash_mask before"):
        sparsifier.prepare(made)


def test_wanda() -> None:
    made = model()
    expected = copy.deepcopy(made)
    data = [torch.randn(20, 16) * torch.arange(16) for _ in range(3)]
    nms.prune_model(expected, "2:4", criterion="wanda", calibration=data, sequential=None)
    sparsifier = WandaSparsifier(semi_structured_block_size=4)
    sparsifier.prepare(made, None)
    with pytest.raises(RuntimeError, match="run the model on data"):
        sparsifier.step()
    for batch in data:
        made(batch)
    sparsifier.step()
    sparsifier.squash_mask()
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    assert not any(module._forward_pre_hooks for module in made.modules())


def test_wanda_with_embeddings() -> None:
    made = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 10))
    sparsifier = WandaSparsifier(pattern="1:4")
    sparsifier.prepare(made)
    made(torch.arange(10))
    sparsifier.step()
    sparsifier.squash_mask()
    assert nms.find_violation(made[1].weight, "1:4") is None
    assert bool((made[0].weight != 0).all())


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("training", [True, False])
def test_wanda_in_attention(training: bool) -> None:
    """Which multiplies with out_proj without calling it, by a fused function where it can."""
    torch.manual_seed(0)
    made = Attending().train(training)
    names = ("attention.out_proj.weight", "head.weight")
    expected, x = copy.deepcopy(made), torch.randn(8, 5, 16) * torch.linspace(0.1, 5, 16)
    patterns = dict.fromkeys(names, "2:4")
    nms.prune_model(expected, patterns, criterion="wanda", calibration=[x], sequential=None)
    sparsifier = WandaSparsifier(pattern="2:4")
    sparsifier.prepare(made, [{"tensor_fqn": name} for name in names])
    masked = made.state_dict().keys()
    with torch.no_grad():
        made(x)
    assert made.state_dict().keys() == masked
    sparsifier.step()
    sparsifier.squash_mask()
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_wanda_counts_what_is_pruned() -> None:
    assert str(WandaSparsifier(semi_structured_block_size=5).pattern) == "3:5"
    for arguments in ({}, {"semi_structured_block_size": 4, "pattern": "2:4"}):
        with pytest.raises(ValueError, match="one of them"):
            WandaSparsifier(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sparsity_level must be"):
        WandaSparsifier(0.7, 4)
