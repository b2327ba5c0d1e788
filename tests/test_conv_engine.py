"""Packed convolutions as layers: refusals, gradients, engines, compiling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_samples import DTYPES, integers, needs_extension, packed
from samples import assert_same_bits
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import nmsparse_ext as nms
from nmsparse_ext import deploy
from nmsparse_ext.conv_panels import panel_conv, why_no_conv
from nmsparse_ext.panels import Activation
from nmsparse_ext.pattern import Pattern
from nmsparse_ext.tensor import NMTensor


def test_why_no_conv() -> None:
    x = torch.randn(1, 32, 5, 5)
    assert why_no_conv(x, (32, 32, 3, 3), 1) is None
    assert why_no_conv(x[0], (32, 16, 3, 3), 2) is None
    assert "dimensions" in str(why_no_conv(x, (32, 32, 3), 1))
    assert "16 outputs" in str(why_no_conv(x, (40, 16, 3, 3), 2))
    assert "channels" in str(why_no_conv(x, (32, 16, 3, 3), 1))


@needs_extension
def test_wrong_calls_are_refused_as_dense_ones_are() -> None:
    w = nms.nm_prune(torch.randn(16, 8, 3, 3), "2:4")
    weight, x = nms.compress(w, "2:4"), torch.randn(1, 8, 5, 5)
    for options in (
        {"stride": 0},
        {"stride": (1, 1, 1)},
        {"padding": -1},
        {"padding": "same", "stride": 2},
        {"padding": "full"},
        {"groups": 0},
        {"groups": 3},
        {"dilation": 3},
        {"colour": 1},
    ):
        for one in (w, weight):
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                F.conv2d(x, one, **options)
    for bad in (torch.randn(1, 9, 5, 5), torch.randn(5, 5), x.double()):
        for one in (w, weight):
            with pytest.raises(RuntimeError):
                F.conv2d(bad, one)


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
@pytest.mark.parametrize(
    ("shape", "places", "geometry"),
    [
        ((6, 8, 3, 2), (4, 5), {"stride": [1, 2], "padding": [1, 1, 0, 1], "dilation": [1, 1], "groups": 1}),
        ((32, 4, 2), (5,), {"stride": [2], "padding": [2, 0], "dilation": [2], "groups": 2}),
    ],
)
def test_gradients(
    activation: Activation, shape: tuple[int, ...], places: tuple[int, ...], geometry: dict[str, Any]
) -> None:
    w, panels = packed(torch.randn(shape, dtype=torch.float64), "2:4")
    x = torch.randn(2, geometry["groups"] * shape[1], *places, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(shape[0], dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        options = {"shape": w.shape, "activation": activation, "residual": residual, **geometry}
        return panel_conv(x, panels, bias, Pattern(2, 4), **options)

    residual = torch.randn_like(product(x, bias)).requires_grad_()
    assert gradcheck(product, (x, bias), fast_mode=True)
    assert gradcheck(product, (x, bias, residual), fast_mode=True)
    assert gradcheck(lambda bias: product(x.detach(), bias), (bias,), fast_mode=True)
    assert gradgradcheck(lambda x: product(x, None) ** 2, (x,), fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_a_layer(dtype: torch.dtype) -> None:
    w = nms.nm_prune(integers(24, 32, 3, 3), "2:4").to(dtype)
    weight = nms.compress(w, "2:4")
    x = integers(2, 32, 5, 5, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    bias = integers(24, dtype=dtype).requires_grad_()
    grad = integers(2, 24, 5, 5, dtype=dtype, limit=1)
    F.conv2d(x, weight, bias, padding=1).backward(grad)
    expected_x, expected_bias = torch.autograd.grad(F.conv2d(x, w, bias, padding=1), (x, bias), grad)
    torch.testing.assert_close(x.grad, expected_x)
    torch.testing.assert_close(bias.grad, expected_bias)
    assert x.grad is not None
    assert x.grad.stride() == expected_x.stride()


def test_forward_mode_derivatives() -> None:
    w = nms.nm_prune(torch.randn(16, 8, 3), "2:4")
    weight = nms.compress(w, "2:4")
    x, direction = torch.randn(3, 8, 7), torch.randn(3, 8, 7)
    _, derivative = torch.func.jvp(lambda x: F.conv1d(x, weight), (x,), (direction,))
    torch.testing.assert_close(derivative, F.conv1d(direction, w))


# -------------------------------------------------------------------------------------------------- engine


def layer(pattern: str = "2:4", dtype: torch.dtype = torch.float32) -> tuple[nn.Conv2d, nn.Conv2d]:
    """A dense layer with a pruned weight, and the same one packed."""
    dense = nn.Conv2d(32, 48, 3, padding=1, stride=2, dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(nms.nm_prune(dense.weight, pattern))
    packed_layer = nn.Conv2d(32, 48, 3, padding=1, stride=2, dtype=dtype)
    packed_layer.load_state_dict(dense.state_dict())
    return dense, nms.convert(packed_layer, pattern, policy="always")


@needs_extension
def test_where_it_runs() -> None:
    for weight, why in (
        (nms.compress(torch.randn(4, 64, 3), "2:32", prune=True), "m <= 16"),
        (nms.compress(torch.randn(4, 8, 3, dtype=torch.float64), "2:4", prune=True), "float64"),
        (nms.compress(torch.randn(4, 8), "2:4", prune=True), "2 dimensions"),
        (nms.compress(torch.randn(8, 4, 3), "2:4", dim=0, prune=True), "along dim 0"),
    ):
        assert weight.engine != "cpu-conv-panels"
        with pytest.raises(ValueError, match=why):
            weight.with_engine("cpu-conv-panels")


@needs_extension
def test_report_says_what_is_unpacked() -> None:
    model = nn.Sequential(nn.Conv2d(16, 24, 3, groups=2), nn.Conv2d(24, 32, 3), nn.ConvTranspose2d(32, 8, 3))
    with torch.no_grad():
        for dim, module in zip((1, 1, 0), model, strict=True):
            module.weight.copy_(nms.nm_prune(module.weight, "2:4", dim=dim))  # type: ignore[operator, arg-type]
    grouped, plain, transposed = deploy.report(nms.convert(model, "2:4", policy="always"))
    assert grouped.engine == plain.engine == "cpu-conv-panels"
    assert "unpacked in every call: each of 2 groups must have a multiple of 16" in grouped.reason
    assert "unpacked" not in plain.reason
    assert transposed.engine == "decompress"


@needs_extension
def test_pieces_run_on_another_engine() -> None:
    w = nms.nm_prune(integers(32, 8, 3), "2:4")
    x = integers(2, 8, 9)
    for piece, dense in zip(nms.compress(w, "2:4").split(16), w.split(16), strict=True):
        assert piece.engine == "decompress"
        assert_same_bits(F.conv1d(x, piece), F.conv1d(x, dense))


def test_module_life(isa: str) -> None:
    dense, packed_layer = layer()
    x = torch.randn(2, 32, 8, 8)
    expected = packed_layer(x)
    torch.testing.assert_close(expected, dense(x))
    last = packed_layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    # Without panels PyTorch's own convolution runs, which sums in another order for another memory format.
    (torch.testing.assert_close if isa == "reference" else assert_same_bits)(last, expected)
    with torch.no_grad():
        packed_layer.weight.copy_(2 * dense.weight)
        torch.testing.assert_close(packed_layer(x), F.conv2d(x, 2 * dense.weight, dense.bias, 2, 1))
    with torch.inference_mode():
        assert packed_layer(x).shape == expected.shape


@needs_extension
def test_compiled_graph_convolves_from_panels() -> None:
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        torch.compile(layer()[1], fullgraph=True, backend=aot_autograd(fw_compiler=keep))(
            torch.randn(1, 32, 6, 6)
        )
    code = "".join(str(graph.graph) for graph in graphs)
    assert "panel_conv" in code
    assert "panel_pack" not in code
    assert "decompress" not in code


def test_compile_and_export() -> None:
    dense, packed_layer = layer()
    model = nn.Sequential(packed_layer, nn.ReLU())
    for x in (
        torch.randn(3, 32, 8, 6),
        torch.randn(3, 32, 8, 6).to(memory_format=torch.channels_last),
        torch.randn(2, 32, 9, 7),
    ):
        expected = F.relu(dense(x))
        compiled = torch.compile(model, fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), expected)
        y = compiled(x)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()
    program = torch.export.export(
        model, (torch.randn(3, 32, 8, 6),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    x = torch.randn(5, 32, 8, 6)
    torch.testing.assert_close(program.module()(x), F.relu(dense(x)))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(low: torch.dtype) -> None:
    torch.compiler.reset()  # as in test_linear_engine.py
    dense, packed_layer = layer()
    x = torch.randn(2, 32, 6, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=low):
        expected = dense(x)
        for _ in range(2):
            actual = packed_layer(x)
            assert actual.dtype == expected.dtype == low
            torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(
            torch.compile(packed_layer, fullgraph=True)(x), expected, atol=2e-2, rtol=2e-2
        )
    actual.sum().backward()
    (expected_grad,) = torch.autograd.grad(dense(x).sum(), x)
    torch.testing.assert_close(x.grad, expected_grad, atol=5e-2, rtol=5e-2)


def test_other_convolutions_with_packed_weights() -> None:
    """Transposed ones, and calls that come below ``F.conv2d``."""
    w = nms.nm_prune(integers(16, 8, 3, 3), "2:4")
    weight, x = nms.compress(w, "2:4"), integers(2, 8, 6, 6)
    assert_same_bits(torch.conv2d(x, weight, padding=1), torch.conv2d(x, w, padding=1))
    geometry: tuple[Any, ...] = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    convolution = torch.ops.aten.convolution
    assert_same_bits(convolution(x, weight, None, *geometry), convolution(x, w, None, *geometry))
    geometry = ([2, 2], [1, 1], [1, 1], True, [1, 1], 1)
    y = integers(2, 16, 4, 4)
    assert_same_bits(convolution(y, weight, None, *geometry), convolution(y, w, None, *geometry))
    assert_same_bits(F.conv_transpose2d(y, weight, stride=2), F.conv_transpose2d(y, w, stride=2))
    assert isinstance(weight, NMTensor)
