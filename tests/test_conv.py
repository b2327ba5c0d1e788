"""The packed convolution on the CPU against the dense one: instruction sets, dtypes, patterns, geometries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_samples import DTYPES, integers, needs_extension, packed
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import assert_same_bits
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext import reference
from nmsparse_ext.conv_panels import conv_unpack, panel_conv
from nmsparse_ext.panels import Activation
from nmsparse_ext.pattern import Pattern

PATTERNS = ("2:4", "1:4", "1:8", "2:8", "4:8", "1:16", "4:16", "1:2", "3:4", "2:3", "5:7", "3:10", "1:1")
CONVS = (F.conv1d, F.conv2d, F.conv3d)


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
