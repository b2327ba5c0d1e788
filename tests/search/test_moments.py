"""Second moments of inputs: the output error must be that of running the pruned layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nmsparse_ext as nms
from nmsparse_ext.registry import register_module
from nmsparse_ext.search import inputs
from nmsparse_ext.search import moments as module_under_test
from nmsparse_ext.search.inputs import Columns
from nmsparse_ext.search.matrices import as_matrices, from_matrices
from nmsparse_ext.search.moments import Moments, input_moments
from nmsparse_ext.weights import weights


def error_by_running(layer: nn.Module, pruned: torch.Tensor, x: torch.Tensor, dim: int) -> float:
    """Mean over tokens or positions of the squared difference, summed over the outputs in ``dim``."""
    with torch.no_grad():
        before = layer(x)
        layer.weight.copy_(pruned)
        change = (layer(x) - before).double()
    return float(change.square().sum(dim).mean())


CONVS = [
    nn.Conv2d(8, 6, 3, padding=1),
    nn.Conv2d(8, 6, (3, 2), stride=(2, 1), dilation=(1, 2)),
    nn.Conv2d(8, 6, 3, padding="same", padding_mode="reflect"),
    nn.Conv2d(8, 6, 2, padding="same"),
    nn.Conv2d(8, 6, 1, stride=2),
    nn.Conv2d(16, 6, 3, groups=2, padding=(0, 1)),
    nn.Conv1d(8, 5, 3, padding=2, padding_mode="circular"),
    nn.Conv3d(8, 4, (1, 2, 3), padding=1),
]


@pytest.mark.parametrize("layer", CONVS, ids=str)
def test_convolutions(layer, monkeypatch):
    monkeypatch.setattr(inputs, "_ELEMENTS", 3000)  # a few images at a time
    torch.manual_seed(0)
    layer.reset_parameters()
    x = torch.randn(5, layer.in_channels, *(7, 6, 5)[: len(layer.kernel_size)])
    (weight,) = weights(layer)
    found = input_moments(layer, {"weight": weight}, [x[:2], x[2:]])["weight"]
    pruned = nms.nm_prune(layer.weight.detach(), "2:8", dim=1)
    change = layer.weight.detach() - pruned
    assert found.error(as_matrices(weight, change)) == pytest.approx(
        error_by_running(layer, pruned, x, dim=1), rel=1e-4
    )


def test_linear_on_many_dims():
    layer = nn.Linear(24, 10)
    x = torch.randn(3, 4, 5, 24) + 1
    (weight,) = weights(layer)
    found = input_moments(layer, {"weight": weight}, [x, x[:1]])["weight"]
    assert found.count == 3 * 20 + 20
    columns = torch.cat([x.reshape(-1, 24), x[:1].reshape(-1, 24)])
    torch.testing.assert_close(found.blocks[0][0], columns.T @ columns / len(columns))
    change = torch.randn(10, 24)
    expected = (columns @ change.T).square().sum(1).mean()
    assert found.error(as_matrices(weight, change)) == pytest.approx(float(expected), rel=1e-5)


def test_transformers_conv1d():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = Conv1D(6, 16)  # [in = 16, out = 6]
    x = torch.randn(9, 16)
    (weight,) = weights(layer)
    found = input_moments(layer, {"weight": weight}, [x])["weight"]
    pruned = nms.nm_prune(layer.weight.detach(), "1:4", dim=0)
    change = layer.weight.detach() - pruned
    assert found.error(as_matrices(weight, change)) == pytest.approx(
        error_by_running(layer, pruned, x, dim=1), rel=1e-5
    )


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention(batch_first):
    attention = nn.MultiheadAttention(16, 2, batch_first=batch_first).eval()
    x = torch.randn(3, 5, 16)
    found = input_moments(attention, {w.name: w for w in weights(attention)}, [(x, x, x)])
    columns = x.reshape(-1, 16)
    torch.testing.assert_close(found["in_proj_weight"].blocks[0][0], columns.T @ columns / 15)
    # What reaches out_proj: its output, with the projection undone.
    with torch.no_grad():
        output = attention(x, x, x)[0] - attention.out_proj.bias
        before = torch.linalg.solve(attention.out_proj.weight, output.reshape(-1, 16).T)
    torch.testing.assert_close(
        found["out_proj.weight"].blocks[0][0], before @ before.T / 15, rtol=1e-3, atol=1e-4
    )


def test_transformer_layers():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    listed = {w.name: w for w in weights(layer)}
    found = input_moments(layer, listed, [torch.randn(2, 4, 16)])
    assert {name: m.count for name, m in found.items()} == dict.fromkeys(listed, 8)


def test_cross_attention_has_three_inputs():
    attention = nn.MultiheadAttention(16, 2)
    listed = {w.name: w for w in weights(attention)}
    x, y, z = torch.randn(3, 4, 1, 16)
    found = input_moments(attention, listed, [(x, x, x), (x, y, z)])["in_proj_weight"]
    assert found.counts == [8, 8, 8]
    for at, other in enumerate((x, y, z)):
        columns = torch.cat([x, other]).reshape(-1, 16)
        torch.testing.assert_close(found.blocks[0][at], columns.T @ columns / 8)
    assert isinstance(attention.out_proj.bias, nn.Parameter)
    apart = nn.MultiheadAttention(16, 2, kdim=8)
    found = input_moments(apart, {w.name: w for w in weights(apart)}, [(x, y[..., :8], z)])
    columns = y[..., :8].reshape(-1, 8)
    torch.testing.assert_close(found["k_proj_weight"].blocks[0][0], columns.T @ columns / 4)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(groups):
    layer = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=groups)  # no two places write to the same output
    x = torch.randn(3, 8, 5, 4)
    (weight,) = weights(layer)
    found = input_moments(layer, {"weight": weight}, [x])["weight"]
    pruned = nms.nm_prune(layer.weight.detach(), "1:4", dim=0)
    change = layer.weight.detach() - pruned
    assert torch.equal(from_matrices(weight, as_matrices(weight, change)), change)
    # An input place has 4 output places.
    assert found.error(as_matrices(weight, change)) == pytest.approx(
        4 * error_by_running(layer, pruned, x, dim=1), rel=1e-4
    )


class Experts(nn.Module):
    """Two experts, the second of which gets the second half of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 8, 16))

    def forward(self, x):
        first, second = x.chunk(2)
        return torch.cat([first @ self.w[0].T, torch.nn.functional.linear(second, self.w[1])])


def test_modules_of_users_are_watched():
    register_module(Experts, {"w": 2})
    model = Experts()
    x = torch.randn(6, 16)
    (weight,) = weights(model)
    found = input_moments(model, {"w": weight}, [x])["w"]
    assert found.counts == [3, 3, 0]
    torch.testing.assert_close(found.blocks[0][1], x[3:].T @ x[3:] / 3)


def test_wide_layers_take_blocks(monkeypatch):
    monkeypatch.setattr(module_under_test, "BLOCK", 16)
    x = torch.randn(50, 1, 40)
    found = Moments()
    found.add(Columns(x[:20]))
    found.add(Columns(x[20:]))
    assert [tuple(block.shape) for block in found.blocks] == [(1, 16, 16), (1, 16, 16), (1, 8, 8)]
    change = torch.zeros(1, 3, 40)
    change[..., 16:32] = torch.randn(3, 16)  # within a block it is exact
    expected = (x[:, 0] @ change[0].T).square().sum(1).mean()
    assert found.error(change) == pytest.approx(float(expected), rel=1e-5)


def test_tied_modules_share_their_inputs():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    model = nn.Sequential(first, nn.ReLU(), second)
    x = torch.randn(6, 8)
    (weight,) = weights(model)
    found = input_moments(model, {"w": weight}, [x])["w"]
    both = torch.cat([x, torch.relu(first(x))]).detach()
    torch.testing.assert_close(found.blocks[0][0], both.T @ both / 12)


def test_model_is_left_alone():
    model = nn.Sequential(nn.Dropout(), nn.Linear(8, 8)).train()
    (weight,) = weights(model)
    input_moments(model, {"w": weight}, [torch.randn(2, 8)])
    assert model.training
    assert not model[1]._forward_pre_hooks


def test_unknown_modules_and_unreached_ones_are_refused():
    model = nn.LSTM(16, 16)
    weight = weights(model)[0]
    with pytest.raises(ValueError, match="weight_ih_l0 are not known, as it belongs to a LSTM"):
        input_moments(model, {weight.name: weight}, [torch.randn(1, 16)])
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))
    listed = {w.name: w for w in weights(model)}
    with pytest.raises(ValueError, match="token ids"):
        input_moments(model, {"0.weight": listed["0.weight"]}, [torch.arange(3)])
    with pytest.raises(ValueError, match="at least one batch"):
        input_moments(model, {"1.weight": listed["1.weight"]}, [])

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    model = Half()
    with pytest.raises(ValueError, match=r"reaches unused\.weight"):
        input_moments(model, {w.name: w for w in weights(model)}, [torch.randn(2, 8)])
    with pytest.raises(TypeError, match="example_input must be"):
        input_moments(model, {"used.weight": weights(model)[0]}, [3])


def test_few_columns_give_the_same_error_without_moments():
    """Held columns and moments agree; the second way begins once enough columns came."""
    few, many = torch.randn(5, 1, 32), torch.randn(30, 1, 32)
    change = torch.randn(1, 7, 32)
    found = Moments()
    for columns, count in ((few, 5), (many, 35)):
        found.add(Columns(columns))
        seen = few if count == 5 else torch.cat([few, many])
        expected = (seen[:, 0] @ change[0].T).square().sum() / count
        assert found.count == count
        assert found.error(change) == pytest.approx(float(expected), rel=1e-5)
        torch.testing.assert_close(found.squares(), seen.square().mean(0))
    torch.testing.assert_close(found.blocks[0][0], seen[:, 0].T @ seen[:, 0] / 35)


def test_held_columns_become_moments_when_asked_for():
    found = Moments()
    x = torch.randn(5, 1, 32)
    found.add(Columns(x))
    x.zero_()  # what was added does not change with it
    assert found.error(torch.ones(1, 2, 32)) > 0
    assert found.blocks[0].shape == (1, 32, 32)
    assert found.counts == [5]
    assert not found.blocks[0].eq(0).all()
