"""``x @ W`` from panels, the gradient of a layer's input: instruction sets, patterns, shapes, autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from panel_samples import DTYPES, EPSILON, PATTERNS, packed
from samples import assert_same_bits
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import nmsparse_ext as nms
from nmsparse_ext import panels, reference
from nmsparse_ext._build import extension
from nmsparse_ext.panels import Panels
from nmsparse_ext.pattern import Pattern

pytestmark = pytest.mark.skipif(extension is None, reason="panels are for the compiled extension")


def product(x: Tensor, pattern: str, rows: int, k: int, form: Panels) -> Tensor:
    return panels.panel_matmul(x, form, Pattern.parse(pattern), rows=rows, k=k)


def assert_close(actual: Tensor, x: Tensor, w: Tensor) -> None:
    """``actual`` is ``x @ w`` within the rounding of its sums, output by output."""
    exact = x.double() @ w.double()
    scale = x.double().abs() @ w.double().abs() + 1e-3
    assert actual.shape == exact.shape
    assert actual.dtype == x.dtype
    error = (actual.double() - exact).abs() / scale
    assert (error <= EPSILON[x.dtype]).all(), float(error.max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_product(isa: str, pattern: str, dtype: torch.dtype) -> None:
    for batch, (rows, k) in zip(
        (1, 2, 5, 6, 13, 33), ((1, 1), (16, 64), (5, 33), (150, 31), (17, 200), (300, 96)), strict=True
    ):
        w, form = packed(pattern, rows, k, dtype)
        x = torch.randn(batch, rows).to(dtype)
        assert_close(product(x, pattern, rows, k, form), x, w)


@pytest.mark.parametrize("pattern", ["2:4", "5:7"])
def test_product_in_float64(isa: str, pattern: str) -> None:
    w, form = packed(pattern, 70, 90, torch.float64)
    x = torch.randn(4, 70, dtype=torch.float64)
    assert_close(product(x, pattern, 70, 90, form), x, w)


@given(
    m=st.integers(1, 16),
    n=st.integers(1, 16),
    rows=st.integers(1, 80),
    k=st.integers(1, 150),
    batch=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_any_pattern_and_shape(m: int, n: int, rows: int, k: int, batch: int, dtype: torch.dtype) -> None:
    pattern = f"{min(n, m)}:{m}"
    w, form = packed(pattern, rows, k, dtype)
    x = torch.randn(batch, rows).to(dtype)
    assert_close(product(x, pattern, rows, k, form), x, w)


def test_small_integers_are_exact(isa: str) -> None:
    """Their sums are, in any order: all instruction sets and the reference give the same bits."""
    for dtype in DTYPES:
        p = Pattern(2, 4)
        values, indices = reference.compress(torch.randint(-3, 4, (40, 72)).to(dtype), 2, 4, 1, True)
        form = panels.panel_pack(values, indices, p, k=72)
        x = torch.randint(-2, 3, (7, 40)).to(dtype)
        expected = reference.panel_matmul(x, *form, 2, 4, 40, 72)
        assert_same_bits(product(x, "2:4", 40, 72, form), expected)


def test_large_batches(isa: str) -> None:
    """More rows of x than share a dense block."""
    w, form = packed("2:4", 40, 136, torch.float32)
    x = torch.randn(3, 100, 40)
    assert_close(product(x, "2:4", 40, 136, form), x, w)


def test_layouts_of_x(isa: str) -> None:
    for dtype in DTYPES:
        w, form = packed("1:4", 37, 48, dtype)
        for x in (
            torch.randn(37, 5).to(dtype).t(),
            torch.randn(5, 74).to(dtype)[:, ::2],
            torch.randn(2, 5, 37).to(dtype).transpose(0, 1),
            torch.randn(37).to(dtype),
            torch.randn(1, 37).to(dtype).expand(4, 37),
        ):
            assert_close(product(x, "1:4", 37, 48, form), x, w)


def test_zero_sizes(isa: str) -> None:
    for batch, rows, k in ((0, 8, 16), (3, 8, 0), (3, 0, 16)):
        _, form = packed("2:4", rows, k, torch.float32)
        y = product(torch.randn(batch, rows), "2:4", rows, k, form)
        assert_same_bits(y, torch.zeros(batch, k))


def test_threads_do_not_change_results(isa: str) -> None:
    before = torch.get_num_threads()
    try:
        for dtype in DTYPES:
            for pattern, batch in (("2:4", 1), ("1:8", 19), ("3:4", 300)):
                _, form = packed(pattern, 210, 520, dtype)
                x = torch.randn(batch, 210).to(dtype)
                results = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    results.append(product(x, pattern, 210, 520, form))
                for result in results[1:]:
                    assert_same_bits(result, results[0])
                alone = product(x[-1:], pattern, 210, 520, form)  # nor does what else is in the batch
                assert_same_bits(alone, results[0][-1:])
    finally:
        torch.set_num_threads(before)


def test_damaged_indices_are_as_safe_as_others(isa: str) -> None:
    for pattern in PATTERNS:
        p = Pattern.parse(pattern)
        values, indices = reference.compress(torch.randn(20, 50), p.n, p.m, 1, True)
        noise = torch.randint(0, 256, indices.shape, dtype=torch.uint8)
        form = panels.panel_pack(values, noise, p, k=50)
        assert product(torch.ones(5, 20), pattern, 20, 50, form).isfinite().all()


def test_refusals() -> None:
    _, form = packed("2:4", 8, 16, torch.float32)
    with pytest.raises(RuntimeError, match="the last size of x must be rows = 8"):
        product(torch.randn(2, 16), "2:4", 8, 16, form)
    with pytest.raises(RuntimeError, match="x must have the dtype of value_panels"):
        product(torch.randn(2, 8).bfloat16(), "2:4", 8, 16, form)


# ------------------------------------------------------------------------------------------------- autograd


def test_gradients() -> None:
    _, form = packed("2:4", 6, 12, torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: product(x, "2:4", 6, 12, form), (x,))
    assert gradgradcheck(lambda x: product(x, "2:4", 6, 12, form) ** 2, (x,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "1:8", "3:4"])
def test_gradient_of_a_layer_s_input(isa: str, pattern: str, dtype: torch.dtype) -> None:
    w = nms.nm_prune(torch.randn(48, 64), pattern).to(dtype)
    layer = nn.Linear(64, 48).to(dtype)
    layer.weight = nn.Parameter(nms.compress(w, pattern), requires_grad=False)
    x = torch.randn(3, 5, 64).to(dtype).requires_grad_()
    grad = torch.randn(3, 5, 48).to(dtype)
    layer(x).backward(grad)
    assert_close(x.grad, grad, w)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)))


def test_low_rank_adapter_over_a_packed_layer() -> None:
    """As LoRA trains: the packed weight passes gradients on and gets none."""
    torch.manual_seed(0)
    w = nms.nm_prune(torch.randn(32, 64), "2:4")
    first, a, b = nn.Linear(64, 64), nn.Linear(64, 4, bias=False), nn.Linear(4, 32, bias=False)
    x = torch.randn(7, 64)

    def gradients(weight: Tensor) -> list[Tensor]:
        hidden = first(x)
        loss = (F.linear(hidden, weight) + b(a(hidden))).square().mean()
        return list(torch.autograd.grad(loss, [first.weight, first.bias, a.weight, b.weight]))

    for actual, expected in zip(gradients(nms.compress(w, "2:4")), gradients(w), strict=True):
        torch.testing.assert_close(actual, expected)


def test_matmul_with_a_packed_right_operand() -> None:
    w = nms.nm_prune(torch.randn(24, 32), "2:4")
    weight = nms.compress(w, "2:4")
    x = torch.randn(2, 5, 24, requires_grad=True)
    y = x @ weight
    torch.testing.assert_close(y, x @ w)
    grad = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, grad)[0] for out in (y, x @ w)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(x @ weight, x @ w)
    _, derivative = torch.func.jvp(lambda x: x @ weight, (x.detach(),), (x.detach(),))
    torch.testing.assert_close(derivative, x.detach() @ w)


def test_values_that_want_a_gradient_get_it() -> None:
    w = nms.nm_prune(torch.randn(8, 16), "2:4").requires_grad_()
    x = torch.randn(3, 8)
    (x @ nms.compress(w, "2:4")).sum().backward()
    torch.testing.assert_close(w.grad, x.sum(0).unsqueeze(1).expand(8, 16) * (w != 0))


def test_no_dense_weight_in_the_backward_pass() -> None:
    weight = nms.compress(torch.randn(32, 64), "2:4", prune=True)
    x = torch.randn(2, 64, requires_grad=True)
    with torch.profiler.profile() as profile:
        F.linear(x, weight).sum().backward()
    names = {event.name for event in profile.events()}
    assert "nmsparse::panel_matmul" in names
    assert not names & {"nmsparse::panel_unpack", "nmsparse::decompress"}


def test_compiled_backward() -> None:
    w = nms.nm_prune(torch.randn(32, 64), "2:4")
    layer = nn.Linear(64, 32)
    layer.weight = nn.Parameter(nms.compress(w, "2:4"), requires_grad=False)
    x = torch.randn(3, 64, requires_grad=True)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 32) @ w)
