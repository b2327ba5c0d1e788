"""The engine of packed products in integers: accuracy, gradients, views, saving, compiling."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from int8_samples import DTYPES, packed, random_int8
from samples import assert_same_bits
from torch import Tensor, nn
from torch.autograd import gradcheck

import nmsparse_ext as nms
from nmsparse_ext import reference
from nmsparse_ext.int8 import multiply_int8
from nmsparse_ext.panels import Activation
from nmsparse_ext.pattern import Pattern

# ------------------------------------------------------------------------------------- quantized by others


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_linear_keeps_integers_and_scales(isa: str, dtype: torch.dtype) -> None:
    w = nms.nm_prune(random_int8(40, 64), "2:4")
    weight = nms.compress(w, "2:4").with_engine("cpu-int8")
    scales, bias = torch.rand(40, 1), torch.randn(40)
    x = torch.randint(-127, 128, (6, 64)).float()
    x[:, 0] = 127  # rounding then changes nothing
    x = x.to(dtype)
    sums = (x.double() @ w.double().T).float()  # exact
    expected = sums * scales[:, 0] + bias.to(dtype).float()
    for s in (scales, scales[:, 0], scales.double()):
        actual = nms.int8_linear(x, weight, s, bias)
        assert actual.dtype == dtype
        assert_same_bits(actual, expected.to(dtype))
    relu = nms.int8_linear(x, weight, scales, bias, activation="relu")
    assert_same_bits(relu, nms.int8_linear(x, weight, scales, bias).relu())
    assert torch.equal(F.linear(x.float(), weight), x.float() @ w.float().T)  # scale 1


# ---------------------------------------------------------------------------------------------- the engine


def layer(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, nn.Linear]:
    """A dense layer with a pruned weight, and the same one packed and rounded."""
    dense = nn.Linear(64, 48, dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(nms.nm_prune(dense.weight, "2:4"))
    return dense, nms.convert(copy.deepcopy(dense), "2:4", policy="always", engine="cpu-int8")


def rounded(dense: nn.Linear) -> Tensor:
    """The weight as the engine sees it."""
    values, scales = reference.quantize_rows(dense.weight.detach())
    return values * scales


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "1:8", "5:7"])
def test_accuracy(dtype: torch.dtype, pattern: str) -> None:
    """On a layer like those of a network: never beyond what rounding allows, usually far below."""
    out, inputs = 256, 700
    w = (nms.nm_prune(torch.randn(out, inputs), pattern, remainder="pad") / inputs**0.5).to(dtype)
    x, bias = (torch.randn(32, inputs) * torch.rand(32, 1) * 10).to(dtype), torch.randn(out).to(dtype)
    weight = nms.compress(w, pattern, remainder="pad").with_engine("cpu-int8")
    y = F.linear(x, weight, bias)
    assert y.dtype == dtype
    x, w, bias = x.double(), w.double(), bias.double()
    exact = F.linear(x, w, bias)
    x_unit, w_unit = x.abs().amax(1, keepdim=True) / 127, w.abs().amax(1) / 127
    kept = (w != 0).double()
    bound = x_unit / 2 * w.abs().sum(1) + w_unit / 2 * (x.abs() @ kept.T) + x_unit * w_unit * kept.sum(1) / 4
    error = (y.double() - exact).abs()
    ulp = torch.finfo(dtype).eps * exact.abs()
    assert (error <= bound * 1.001 + ulp).all()
    assert error.square().mean().sqrt() < 0.015 * (exact - bias).square().mean().sqrt()


def test_only_on_request() -> None:
    weight = nms.compress(torch.randn(8, 16), "2:4", prune=True)
    assert weight.engine != "cpu-int8"
    assert weight.with_engine("cpu-int8").engine == "cpu-int8"


def test_memory() -> None:
    """Values of a byte each, and what the indices take."""
    weight = nms.compress(torch.randn(64, 256), "2:4", prune=True).with_engine("cpu-int8")
    assert weight.engine_nbytes == 64 * 256 // 2 + 64 * 256 // 8 + 64 * 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    dense, packed_layer = layer(dtype)
    x = torch.randn(2, 5, 64).to(dtype).requires_grad_()
    grad = torch.randn(2, 5, 48).to(dtype)
    packed_layer(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ rounded(dense).to(dtype))
    torch.testing.assert_close(packed_layer.bias.grad, grad.sum((0, 1)))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_gradients_of_activations(activation: Activation) -> None:
    w, panels = packed("2:4", 16, 32)
    x, bias = torch.randn(4, 32, requires_grad=True), torch.randn(16, requires_grad=True)
    p = Pattern(2, 4)
    grad = torch.randn(4, 16)
    multiply_int8(x, panels, bias, p, rows=16, k=32, activation=activation).backward(grad)
    scaled = w * panels.scales.flatten().unsqueeze(1)
    before = multiply_int8(x, panels, bias, p, rows=16, k=32).detach().requires_grad_()
    getattr(F, activation)(before).backward(grad)
    torch.testing.assert_close(x.grad, before.grad @ scaled)
    torch.testing.assert_close(bias.grad, before.grad.sum(0))


def test_what_it_does_not_round() -> None:
    """Groups along the outputs, gradients of the values, forward-mode derivatives: as before rounding."""
    w = nms.nm_prune(torch.randn(16, 8), "2:4")
    weight = nms.compress(w, "2:4").with_engine("cpu-int8")
    x, direction = torch.randn(3, 8), torch.randn(3, 8)
    _, derivative = torch.func.jvp(lambda x: nms.linear(x, weight), (x,), (direction,))
    torch.testing.assert_close(derivative, F.linear(direction, w))
    torch.testing.assert_close(F.linear(torch.ones(2, 16), weight.t()), torch.ones(2, 16) @ w)
    assert gradcheck(lambda x: F.linear(x, weight.to_dense().double()), (x.double().requires_grad_(),))


def test_matrix_products_and_views() -> None:
    w = nms.nm_prune(torch.randn(48, 32), "2:4")
    weight = nms.compress(w, "2:4").with_engine("cpu-int8")
    x, bias = torch.randn(5, 32), torch.randn(48)
    y = F.linear(x, weight, bias)
    assert_same_bits(torch.addmm(bias, x, weight.t()), y)
    assert_same_bits(x @ weight.t() + bias, y)
    assert_same_bits(F.linear(x, weight, bias.expand(5, 48)), y)
    for part, rows in zip(weight.split(16), F.linear(x, weight).split(16, dim=1), strict=True):
        assert part.engine == "cpu-int8"
        assert_same_bits(F.linear(x, part), rows.contiguous())


def test_saved_form_is_not_rounded() -> None:
    dense, packed_layer = layer()
    assert torch.equal(packed_layer.weight.to_dense(), dense.weight)
    state = packed_layer.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    forms = packed_layer.weight.engine_nbytes
    assert len(buffer.getvalue()) < packed_layer.weight.nbytes + forms // 2 + 4096
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    other = layer()[1]
    other.load_state_dict(loaded)
    x = torch.randn(3, 64)
    assert_same_bits(other(x), packed_layer(x))
    plain = nn.Linear(64, 48)
    plain.load_state_dict(loaded)
    assert torch.equal(plain.weight, dense.weight)
    assert_same_bits(copy.deepcopy(packed_layer)(x), packed_layer(x))


def test_writes_and_casts_round_anew() -> None:
    _, packed_layer = layer()
    x, new = torch.randn(3, 64), nms.nm_prune(torch.randn(48, 64), "2:4")
    with torch.no_grad():
        packed_layer.weight.copy_(new)
    expected = F.linear(x, nms.compress(new, "2:4").with_engine("cpu-int8"), packed_layer.bias)
    assert_same_bits(packed_layer(x), expected)
    half = copy.deepcopy(packed_layer).bfloat16()
    assert half.weight.engine == "cpu-int8"
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    _, packed_layer = layer()
    x = torch.randn(3, 64)
    with torch.autocast("cpu", dtype=dtype):
        y = packed_layer(x)
    expected = F.linear(x.to(dtype), packed_layer.weight, packed_layer.bias.to(dtype))
    assert_same_bits(y, expected)


def test_compiled_and_exported() -> None:
    torch._dynamo.reset()
    _, packed_layer = layer()
    model = nn.Sequential(packed_layer, nn.ReLU()).eval()
    x = torch.randn(5, 64)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same_bits(compiled(x), model(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same_bits(compiled(x), model(x))
        exported = torch.export.export(model, (x,)).module()
        assert_same_bits(exported(x), model(x))


def test_compiled_with_gradients() -> None:
    torch._dynamo.reset()
    _, packed_layer = layer()
    x = torch.randn(5, 64, requires_grad=True)
    torch.compile(packed_layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    expected = torch.autograd.grad(packed_layer(x).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    _, panels = packed("2:4", 20, 32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.randn(2, 3, 32, dtype=torch.bfloat16))
        y = multiply_int8(x, panels, None, Pattern(2, 4), rows=20, k=32)
    assert y.shape == (2, 3, 20)
    assert y.dtype == torch.bfloat16


def test_fused_activation_and_writes_to_values() -> None:
    _, packed_layer = layer()
    weight, x = packed_layer.weight, torch.randn(3, 64)
    with torch.no_grad():
        assert_same_bits(nms.linear(x, weight, None, "relu"), F.linear(x, weight).relu())
        before = F.linear(x, weight)
        weight.values.mul_(2)
        torch.testing.assert_close(F.linear(x, weight), 2 * before)
