"""torchao's names: what was written for them goes on running."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nmsparse_ext as nms
from nmsparse_ext.compat import (
    SemiSparseLinear,
    SemiSparseWeightConfig,
    apply_fake_sparsity,
    semi_sparse_weight,
    sparsify_,
    swap_linear_with_semi_sparse_linear,
    swap_semi_sparse_linear_with_linear,
)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Conv1d(4, 4, 1))


def first_linear(module: nn.Module, name: str) -> bool:
    return name == "0"


def test_sparsify() -> None:
    made = model()[:3]
    apply_fake_sparsity(made)
    x = torch.randn(5, 32)
    expected = made(x)
    assert sparsify_(made, semi_sparse_weight()) is made
    assert all(isinstance(made[i].weight.data, nms.NMTensor) for i in (0, 2))
    torch.testing.assert_close(made(x), expected)


def test_filter_and_pattern() -> None:
    made = model()
    apply_fake_sparsity(made, filter_fn=first_linear, pattern="1:8")
    assert nms.find_violation(made[0].weight, "1:8") is None
    assert nms.find_violation(made[2].weight, "2:4") is not None
    sparsify_(made, SemiSparseWeightConfig("1:8"), first_linear)
    assert isinstance(made[0].weight.data, nms.NMTensor)
    assert not isinstance(made[2].weight.data, nms.NMTensor)


def test_shared_embeddings_stay_dense() -> None:
    made = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16), nn.Linear(16, 8, bias=False))
    made[2].weight = made[0].weight
    apply_fake_sparsity(made)
    assert nms.find_violation(made[1].weight, "2:4") is None
    assert bool((made[0].weight != 0).all())


def test_what_does_not_hold_is_refused() -> None:
    made = model()
    apply_fake_sparsity(made, filter_fn=first_linear)
    with pytest.raises(ValueError, match=r"2\.weight"):
        sparsify_(made)
    assert not isinstance(made[0].weight.data, nms.NMTensor)
    with pytest.raises(TypeError, match="config must be"):
        sparsify_(made, "2:4")  # type: ignore[arg-type]


def test_swap() -> None:
    made = model()
    weight, bias = made[0].weight, made[0].bias
    swap_linear_with_semi_sparse_linear(made, {"0": SemiSparseLinear})
    assert type(made[0]) is SemiSparseLinear
    assert type(made[2]) is nn.Linear
    assert made[0].weight is weight
    assert made[0].bias is bias
    x = torch.randn(5, 32, requires_grad=True)
    y = made[0](x)
    pruned = torch.where(nms.transposable_mask(weight.detach()), weight.detach(), 0.0)
    torch.testing.assert_close(y, x @ pruned.T + bias)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(weight.grad, grad.T @ x)  # to all weights
    torch.testing.assert_close(x.grad, grad @ pruned)
    swap_semi_sparse_linear_with_linear(made)
    assert type(made[0]) is nn.Linear
    assert made[0].weight is weight


def test_swap_of_a_shared_layer() -> None:
    made = nn.ModuleDict({"a": nn.Linear(8, 8)})
    made["b"] = made["a"]
    swap_linear_with_semi_sparse_linear(made, {"a": SemiSparseLinear})
    assert isinstance(made["a"], SemiSparseLinear)
    assert made["b"] is made["a"]
    swap_semi_sparse_linear_with_linear(made)
    assert type(made["a"]) is nn.Linear
    assert made["b"] is made["a"]


def test_swap_of_what_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"linear layers of the model \('0', '2'\), got '1'"):
        swap_linear_with_semi_sparse_linear(model(), {"1": SemiSparseLinear})
    with pytest.raises(TypeError, match="must be SemiSparseLinear"):
        swap_linear_with_semi_sparse_linear(model(), {"0": nn.Linear})  # type: ignore[dict-item]
    made = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8, bias=False))
    with pytest.raises(ValueError, match="multiples of 4, got 8 x 6"):
        swap_linear_with_semi_sparse_linear(made, {"1": SemiSparseLinear, "0": SemiSparseLinear})
    assert type(made[1]) is nn.Linear
    swap_linear_with_semi_sparse_linear(made, {"1": SemiSparseLinear})
    assert made[1].bias is None


def test_swap_of_a_layer_that_is_in_no_module() -> None:
    """There is nothing in which another one could take its place."""
    linear = nn.Linear(8, 8)
    with pytest.raises(
        ValueError, match=r"got Linear, a layer .* take SemiSparseLinear\.from_dense\(model\)"
    ):
        swap_linear_with_semi_sparse_linear(linear, {"": SemiSparseLinear})
    sparse = SemiSparseLinear.from_dense(linear)
    with pytest.raises(ValueError, match=r"got SemiSparseLinear, .* SemiSparseLinear\.to_dense\(model\)"):
        swap_semi_sparse_linear_with_linear(sparse)
    assert SemiSparseLinear.to_dense(sparse).weight is linear.weight
    wrapped = nn.ModuleDict({"module": linear})  # as wrappers call what they hold
    swap_linear_with_semi_sparse_linear(wrapped, {"": SemiSparseLinear})
    assert type(wrapped["module"]) is SemiSparseLinear


def test_swap_with_arguments_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
        swap_linear_with_semi_sparse_linear({}, {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
        swap_semi_sparse_linear_with_linear({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config must be a mapping of module names, got list"):
        swap_linear_with_semi_sparse_linear(model(), ["0"])  # type: ignore[arg-type]
