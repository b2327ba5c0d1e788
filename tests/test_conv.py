"""The packed convolution on the CPU against the dense one: instruction sets, dtypes, patterns, geometries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import assert_same_bits
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import nmsparse_ext as nms
from nmsparse_ext import deploy, reference
from nmsparse_ext._build import extension
from nmsparse_ext.conv_panels import conv_pack, conv_unpack, panel_conv, why_no_conv
from nmsparse_ext.panels import Activation, Panels
from nmsparse_ext.pattern import Pattern
from nmsparse_ext.tensor import NMTensor

needs_extension = pytest.mark.skipif(extension is None, reason="the engine is for the compiled extension")

PATTERNS = ("2:4", "1:4", "1:8", "2:8", "4:8", "1:16", "4:16", "1:2", "3:4", "2:3", "5:7", "3:10", "1:1")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONVS = (F.conv1d, F.conv2d, F.conv3d)


def integers(*shape: int, dtype: torch.dtype = torch.float32, limit: int = 3) -> Tensor:
    """Small integers: exact in every dtype, as are the sums of their products here."""
    return torch.randint(-limit, limit + 1, shape).to(dtype)


def packed(w: Tensor, pattern: str) -> tuple[Tensor, Panels]:
    """A weight pruned to ``pattern``, dense and in panels."""
    p = Pattern.parse(pattern)
    values, indices = reference.compress(w, p.n, p.m, 1, True)
    return reference.decompress(values, indices, p.n, p.m, w.shape[1], 1), conv_pack(
        values, indices, p, k=w.shape[1]
    )


# Name -> shapes of input and weight, what follows the bias.
GEOMETRIES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((2, 16, 9, 7), (20, 16, 3, 3), {"padding": 1}),
    "3x3, no padding": ((1, 32, 6, 6), (16, 32, 3, 3), {}),
    "stride": ((3, 24, 11, 8), (17, 24, 3, 3), {"padding": 1, "stride": 2}),
    "strides": ((1, 8, 7, 12), (33, 8, 2, 3), {"padding": (2, 0), "stride": (3, 2), "dilation": (1, 2)}),
    "all padding": ((1, 4, 1, 1), (5, 4, 3, 3), {"padding": 2}),
    "same": ((2, 12, 6, 5), (18, 12, 3, 3), {"padding": "same", "dilation": (2, 1)}),
    "same, even": ((2, 12, 6, 5), (18, 12, 2, 4), {"padding": "same"}),
    "valid": ((2, 12, 6, 5), (18, 12, 2, 4), {"padding": "valid"}),
    "groups": ((2, 48, 5, 6), (48, 16, 3, 3), {"padding": 1, "groups": 3}),
    "depthwise": ((2, 6, 5, 6), (12, 1, 3, 3), {"padding": 1, "groups": 6}),
    "unaligned groups": ((2, 16, 5, 6), (24, 8, 3, 3), {"groups": 2}),
    "1x1": ((2, 40, 5, 7), (35, 40, 1, 1), {}),
    "1x1, stride": ((2, 40, 5, 7), (35, 40, 1, 1), {"stride": 2}),
    "1x1, padding": ((1, 40, 3, 2), (35, 40, 1, 1), {"padding": 1}),
    "1-D": ((2, 24, 19), (21, 24, 5), {"stride": 2, "padding": 2, "dilation": 2}),
    "3-D": ((2, 20, 4, 5, 3), (16, 20, 2, 3, 2), {"padding": (1, 0, 1), "stride": (1, 2, 1)}),
    "unbatched": ((16, 6, 7), (20, 16, 3, 3), {"padding": 1}),
    "unbatched 1-D": ((16, 9), (20, 16, 3), {}),
    "no images": ((0, 16, 6, 7), (20, 16, 3, 3), {"padding": 1}),
    "one pixel": ((1, 17, 3, 3), (1, 17, 3, 3), {}),
    "many pixels and panels": ((2, 20, 20, 19), (330, 20, 3, 3), {"padding": 1}),
}


def conv_of(weight: Tensor) -> Callable[..., Tensor]:
    """``F.conv1d``, ``conv2d`` or ``conv3d``."""
    return CONVS[weight.dim() - 3]


# ----------------------------------------------------------------------------------------------- panel form


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_panel_form(pattern: str, dtype: torch.dtype) -> None:
    """There and back, for input channels that fill windows and for others."""
    for shape in ((5, 16, 3, 3), (17, 33, 2), (16, 3, 1, 2, 2), (20, 50, 1, 1), (1, 1, 3)):
        w, panels = packed(torch.randn(shape).to(dtype), pattern)
        assert_same_bits(conv_unpack(panels, Pattern.parse(pattern), shape=shape).contiguous(), w, f"{shape}")


@needs_extension
def test_panels_take_the_memory_of_the_packed_form() -> None:
    for pattern in ("2:4", "1:4", "1:8", "1:16"):
        for dtype in DTYPES:
            weight = nms.compress(torch.randn(64, 64, 3, 3).to(dtype), pattern, prune=True)
            assert weight.engine == "cpu-conv-panels"
            assert weight.engine_nbytes <= 1.15 * weight.nbytes, (pattern, dtype)


# -------------------------------------------------------------------------------------------------- product


@pytest.mark.parametrize("pattern", PATTERNS)
def test_integers_are_exact(isa: str, pattern: str) -> None:
    """Bit for bit the masked dense convolution, in every geometry and dtype."""
    torch.manual_seed(0)
    for name, (x_shape, w_shape, options) in GEOMETRIES.items():
        dtype = DTYPES[(PATTERNS.index(pattern) + list(GEOMETRIES).index(name)) % 3]
        x, bias = integers(*x_shape, dtype=dtype), integers(w_shape[0], dtype=dtype)
        w = nms.nm_prune(integers(*w_shape, dtype=dtype, limit=2), pattern, remainder="pad")
        weight = nms.compress(w, pattern, remainder="pad")
        op = conv_of(w)
        # PyTorch rounds some sums of 16-bit numbers on the way.
        expected = op(x.float(), w.float(), bias.float(), **options)
        assert_same_bits(op(x, weight, bias, **options), expected.to(dtype), name)
        assert_same_bits(op(x, weight, **options), op(x.float(), w.float(), **options).to(dtype), name)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_real_numbers(isa: str, dtype: torch.dtype) -> None:
    epsilon = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}[dtype]
    for pattern in ("2:4", "1:16", "3:4"):
        w, panels = packed(torch.randn(37, 70, 3, 3).to(dtype), pattern)
        x, bias = torch.randn(2, 70, 8, 9).to(dtype), torch.randn(37).to(dtype)
        y = panel_conv(
            x,
            panels,
            bias,
            Pattern.parse(pattern),
            shape=w.shape,
            stride=[1, 1],
            padding=[1] * 4,
            dilation=[1, 1],
            groups=1,
        )
        exact = F.conv2d(x.double(), w.double(), bias.double(), padding=1)
        scale = F.conv2d(x.double().abs(), w.double().abs(), bias.double().abs(), padding=1)
        assert ((y.double() - exact).abs() <= epsilon * (scale + 1e-3)).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3), label="dims")
    small = lambda least, most: data.draw(st.integers(least, most))  # noqa: E731
    kernel = [small(1, 3) for _ in range(dims)]
    stride, dilation = ([small(1, 3) for _ in range(dims)] for _ in range(2))
    padding = [small(0, 2) for _ in range(dims)]
    places = [max(1, dilation[d] * (kernel[d] - 1) + 1 - 2 * padding[d]) + small(0, 6) for d in range(dims)]
    groups = small(1, 2)
    outputs, inputs = groups * 16 * small(1, 2) if groups > 1 else small(1, 40), small(1, 40)
    pattern = data.draw(st.sampled_from(PATTERNS), label="pattern")
    w = nms.nm_prune(integers(outputs, inputs, *kernel), pattern, remainder="pad")
    x, bias = integers(small(0, 2), groups * inputs, *places), integers(outputs)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    expected = conv_of(w)(x, w, bias, **options)
    actual = conv_of(w)(x, nms.compress(w, pattern, remainder="pad"), bias, **options)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation(isa: str, dtype: torch.dtype, activation: Activation) -> None:
    w, panels = packed(torch.randn(33, 16, 3).to(dtype), "2:4")
    x, bias = 3 * torch.randn(2, 16, 9).to(dtype), torch.randn(33).to(dtype)
    geometry: dict[str, Any] = {"stride": [1], "padding": [1, 1], "dilation": [1], "groups": 1}
    y = panel_conv(x, panels, bias, Pattern(2, 4), shape=w.shape, activation=activation, **geometry)
    before = F.conv1d(x.float(), w.float(), bias.float(), padding=1)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(y, getattr(F, activation)(before).to(dtype), **tolerance)


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual(isa: str, dtype: torch.dtype, activation: Activation) -> None:
    """Added before the activation and before anything is rounded, whatever its strides."""
    geometry: dict[str, Any] = {"stride": [1, 2], "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1}
    for outputs, places in ((32, (9, 7)), (37, (3, 40))):
        w, panels = packed(torch.randn(outputs, 16, 3, 3).to(dtype), "2:4")
        x, bias = torch.randn(2, 16, *places).to(dtype), torch.randn(outputs).to(dtype)
        before = F.conv2d(x.float(), w.float(), bias.float(), stride=(1, 2), padding=1)
        residual = torch.randn(before.shape).to(dtype)
        expected = before + residual.float()
        expected = expected if activation == "none" else getattr(F, activation)(expected)
        options = {"shape": w.shape, "activation": activation, **geometry}
        for laid_out in (residual, residual.to(memory_format=torch.channels_last)):
            y = panel_conv(x, panels, bias, Pattern(2, 4), residual=laid_out, **options)
            tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {}
            torch.testing.assert_close(y, expected.to(dtype), **tolerance)
        y = panel_conv(x[0], panels, bias, Pattern(2, 4), residual=residual[0], **options)
        torch.testing.assert_close(y, expected[0].to(dtype), **tolerance)


@needs_extension
def test_special_numbers(isa: str) -> None:
    """NaN and infinity come through where they meet a kept weight, and only there; padding is zeros."""
    w = integers(17, 5, 3, 3)
    w[:, :2], w[:, 2:4], w[:, 4] = 3.0, 0.0, 1.0
    weight = nms.compress(w, "2:4", remainder="pad")
    x = integers(1, 5, 6, 6)
    x[:, 4, 5, 5] = float("inf")
    expected = F.conv2d(x, w, padding=1)
    x[:, 2:4] = float("nan")
    assert_same_bits(F.conv2d(x, weight, padding=1), expected)


# --------------------------------------------------------------------------------------------------- layouts


def test_memory_formats(isa: str) -> None:
    """The result lies in memory as that of a dense convolution with a contiguous weight."""
    w = nms.nm_prune(integers(20, 16, 3, 3), "2:4")
    weight = nms.compress(w, "2:4")
    base = integers(2, 16, 9, 8)
    inputs = {
        "contiguous": base,
        "channels_last": base.to(memory_format=torch.channels_last),
        "every second row": base.to(memory_format=torch.channels_last)[:, :, ::2],
        "every second column": base[..., ::2],
        "turned": base.mT,
        "flipped": base.flip(-1).to(memory_format=torch.channels_last)[:1],
        "narrowed channels": integers(2, 40, 9, 8).to(memory_format=torch.channels_last)[:, 8:24],
        "expanded": integers(1, 16, 9, 8).expand(3, -1, -1, -1),
        "expanded channels": integers(2, 1, 9, 8).expand(-1, 16, -1, -1),
        "one place": integers(2, 16, 1, 1),  # strides there mean nothing
        "one place, channels_last": integers(2, 16, 1, 1).to(memory_format=torch.channels_last),
    }
    for name, x in inputs.items():
        expected = F.conv2d(x, w, padding=1)
        actual = F.conv2d(x, weight, padding=1)
        assert_same_bits(actual, expected, name)
        if name != "one place":
            assert actual.stride() == expected.stride(), name
    for x in (integers(2, 16, 9, 7, 3), integers(2, 16, 9, 7, 3).to(memory_format=torch.channels_last_3d)):
        w3 = nms.nm_prune(integers(8, 16, 2, 2, 2), "2:4")
        expected, actual = F.conv3d(x, w3), F.conv3d(x, nms.compress(w3, "2:4"))
        assert_same_bits(actual, expected)
        assert actual.stride() == expected.stride()


def test_threads_do_not_change_results(isa: str) -> None:
    before = torch.get_num_threads()
    try:
        for pattern, x_shape in (("2:4", (1, 64, 7, 7)), ("1:16", (3, 64, 13, 15)), ("3:4", (1, 64, 5, 40))):
            for dtype in DTYPES:
                w = nms.nm_prune(torch.randn(96, 64, 3, 3).to(dtype), pattern)
                weight, x = nms.compress(w, pattern), torch.randn(x_shape).to(dtype)
                results = []
                for threads in (1, 2, 3, 5):
                    torch.set_num_threads(threads)
                    results.append(F.conv2d(x, weight, padding=1))
                for result in results[1:]:
                    assert_same_bits(result, results[0])
    finally:
        torch.set_num_threads(before)


# -------------------------------------------------------------------------------------------------- refusals


def test_refusals() -> None:
    _, panels = packed(torch.randn(8, 16, 3, 3), "2:4")
    x = torch.randn(1, 5, 5, 16)
    valid: dict[str, Any] = {
        "bias": None,
        "rows": 8,
        "k": 16,
        "kernel": [3, 3],
        "stride": [1, 1],
        "padding": [0] * 4,
        "dilation": [1, 1],
        "groups": 1,
        "activation": "none",
    }
    for why, changed in {
        "1 to 3 sizes": {"kernel": []},
        "stride and dilation must have 2": {"stride": [1]},
        "padding must have 4": {"padding": [0, 0]},
        "must be positive": {"dilation": [0, 1]},
        "must not be negative": {"padding": [0, -1, 0, 0]},
        "larger than x": {"dilation": [3, 1]},
        "multiple of 16 outputs": {"groups": 2},
        "value_panels must": {"rows": 30},
        "bias must": {"bias": torch.randn(9)},
        "residual must": {"residual": torch.randn(1, 3, 3, 32)},
        "activation must be": {"activation": "tanh"},
    }.items():
        arguments = valid | changed
        bias, residual = arguments.pop("bias"), arguments.pop("residual", None)
        for function in (torch.ops.nmsparse.panel_conv, reference.panel_conv):
            with pytest.raises(RuntimeError, match=why):
                function(x, *panels, bias, residual, 2, 4, *arguments.values())
    bias = valid.pop("bias")
    for bad, why in (
        (x[..., :8], "last size of x"),
        (x[0], "must have 4 dimensions"),
        (x.double(), "dtype of value_panels"),
    ):
        for function in (torch.ops.nmsparse.panel_conv, reference.panel_conv):
            with pytest.raises(RuntimeError, match=why):
                function(bad, *panels, bias, None, 2, 4, *valid.values())


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
