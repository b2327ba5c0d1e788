"""Weights whose groups are longer than a window of panels: multiplied as the pattern of the groups' parts."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import assert_same_bits
from torch import nn

import nmsparse_ext as nms
from nmsparse_ext._build import extension
from nmsparse_ext.panels import parts_pattern
from nmsparse_ext.pattern import Pattern

pytestmark = pytest.mark.skipif(extension is None, reason="panels are for the compiled extension")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def test_parts() -> None:
    for whole, parts in (
        ("1:32", "1:16"),
        ("8:32", "8:16"),
        ("3:24", "3:12"),
        ("4:64", "4:16"),
        ("5:17", "1:1"),
    ):
        assert parts_pattern(Pattern.parse(whole)) == Pattern.parse(parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["1:32", "2:32", "4:32", "8:32", "3:24", "4:64"])
def test_products_and_gradient(pattern: str, dtype: torch.dtype) -> None:
    m = Pattern.parse(pattern).m
    w = nms.nm_prune(torch.randn(40, 3 * m), pattern).to(dtype)
    weight = nms.compress(w, pattern)
    assert weight.engine == "cpu-split-panels"
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype] * 10}
    for batch in (1, 5, 17):
        x, bias = torch.randn(batch, 3 * m).to(dtype).requires_grad_(), torch.randn(40).to(dtype)
        y = F.linear(x, weight, bias)
        torch.testing.assert_close(y, F.linear(x, w, bias), **tolerance)
        grad = torch.randn_like(y)
        torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], grad @ w, **tolerance)
        torch.testing.assert_close(grad @ weight, grad @ w, **tolerance)


@given(
    pattern=st.sampled_from(["1:32", "7:32", "10:32", "2:20", "3:48"]),
    rows=st.integers(0, 40),
    k=st.integers(1, 140),
    batch=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(pattern: str, rows: int, k: int, batch: int) -> None:
    weight = nms.compress(torch.randn(rows, k), pattern, prune=True, remainder="pad")
    assert weight.engine == "cpu-split-panels"
    x = torch.randn(batch, k)
    torch.testing.assert_close(F.linear(x, weight), F.linear(x, weight.to_dense()), rtol=1e-5, atol=1e-4)


def test_the_weight_is_untouched() -> None:
    """Its other forms do not come from the panels: the same bits, with kept zeros and their signs."""
    w = torch.zeros(16, 64)
    w[:, ::8], w[0, 3] = -0.0, -1.0
    weight = nms.compress(w, "8:32")
    plain = weight.with_engine("decompress")
    assert_same_bits(weight.to_dense(), plain.to_dense())
    assert_same_bits(weight.packed_values, plain.packed_values)


def test_too_dense_or_without_parts() -> None:
    for pattern, why in (("16:32", "may hold 16"), ("4:17", "may hold 1"), ("2:4", "longer than 16")):
        weight = nms.compress(torch.randn(16, 17 * 32), pattern, prune=True)
        assert weight.engine != "cpu-split-panels"
        with pytest.raises(ValueError, match=why):
            weight.with_engine("cpu-split-panels")
    with pytest.raises(ValueError, match="keep"):
        nms.compress(torch.randn(16, 64), "2:32", prune=True).with_engine("cpu-split-panels", keep="engine")


def test_module_life() -> None:
    layer, other = nn.Linear(64, 32), nn.Linear(64, 32)
    for one in (layer, other):
        one.weight = nn.Parameter(nms.compress(one.weight.detach(), "4:32", prune=True), requires_grad=False)
    x = torch.randn(3, 64)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_bits(other(x), expected)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(x), expected)
    half = layer.to(torch.bfloat16)
    assert half.weight.engine == "cpu-split-panels"
    torch.testing.assert_close(half(x.bfloat16()).float(), expected, rtol=2e-2, atol=5e-2)
    low = half.weight[:16]  # a piece shares the panels
    assert low.engine == "cpu-split-panels"
