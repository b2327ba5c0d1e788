"""The packed product on the CPU against the dense one: instruction sets, dtypes, patterns, shapes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from panel_samples import DTYPES, EPSILON, PATTERNS, packed
from samples import assert_same_bits
from torch import Tensor, nn
from torch.autograd import gradcheck

import nmsparse_ext as nms
from nmsparse_ext import deploy, panels, reference
from nmsparse_ext._build import extension
from nmsparse_ext.panels import Panels
from nmsparse_ext.pattern import Pattern
from nmsparse_ext.tensor import NMTensor

pytestmark = pytest.mark.skipif(extension is None, reason="panels are for the compiled extension")

BATCHES = (1, 2, 4, 5, 8, 9, 16, 17, 33)


def packed_from(w: Tensor) -> Panels:
    """The panels of a weight that satisfies 2:4."""
    return panels.panel_pack(*reference.compress(w, 2, 4, 1, True), Pattern(2, 4), k=w.shape[1])


def assert_close(actual: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    """``actual`` is ``F.linear(x, w, bias)`` within the rounding of its sums, output by output."""
    exact = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    scale = F.linear(x.double().abs(), w.double().abs(), None if bias is None else bias.double().abs())
    error = (actual.double() - exact).abs()
    assert actual.shape == exact.shape
    assert (error <= EPSILON[actual.dtype] * (scale + 1e-3)).all(), float((error / (scale + 1e-3)).max())


# ----------------------------------------------------------------------------------------------- panel form


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_panel_form_is_the_reference_s(pattern: str, dtype: torch.dtype, isa: str) -> None:
    p = Pattern.parse(pattern)
    for rows, k in ((1, 1), (16, 64), (5, 33), (40, 31), (17, 96), (0, 16), (3, 0)):
        values, indices = reference.compress(torch.randn(rows, k).to(dtype), p.n, p.m, 1, True)
        actual = torch.ops.nmsparse.panel_pack(values, indices, p.n, p.m, k)
        expected = reference.panel_pack(values, indices, p.n, p.m, k)
        for a, b in zip(actual, expected, strict=True):
            assert_same_bits(a.view(torch.int32) if a.dtype == torch.int32 else a, b, f"{rows}x{k}")
        dense = torch.ops.nmsparse.panel_unpack(*actual, p.n, p.m, rows, k)
        assert_same_bits(dense, reference.decompress(values, indices, p.n, p.m, k, 1))
        assert_same_bits(dense, reference.panel_unpack(*expected, p.n, p.m, rows, k))
        for restore in (torch.ops.nmsparse.panel_restore, reference.panel_restore):
            for restored, part in zip(restore(*actual, p.n, p.m, rows, k), (values, indices), strict=True):
                assert_same_bits(restored, part, f"{rows}x{k}")


def test_large_panels_are_the_reference_s(isa: str) -> None:
    """Values that are written past the cache: sixteen rows, again and again."""
    for dtype in DTYPES:
        values, indices = reference.compress(torch.randn(16, 8192).to(dtype), 2, 4, 1, True)
        actual = torch.ops.nmsparse.panel_pack(values.repeat(130, 1), indices.repeat(130, 1), 2, 4, 8192)
        for a, b in zip(actual, reference.panel_pack(values, indices, 2, 4, 8192), strict=True):
            assert_same_bits(a, b.expand_as(a).contiguous())


def test_panels_are_aligned() -> None:
    _, form = packed("2:4", 64, 64, torch.float32)
    assert form.values.data_ptr() % 64 == form.indices.data_ptr() % 64 == 0


def test_panels_take_the_memory_of_the_packed_form() -> None:
    """Nothing but the end of rows is added for the common patterns."""
    for pattern in ("2:4", "1:4", "1:8", "1:16"):
        for dtype in DTYPES:
            w = nms.compress(torch.randn(64, 256).to(dtype), pattern, prune=True)
            assert w.engine_nbytes <= w.nbytes + 1024, (pattern, dtype)


def test_damaged_indices_are_as_safe_as_others(isa: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for pattern in PATTERNS:
        p = Pattern.parse(pattern)
        values, indices = reference.compress(torch.randn(20, 50), p.n, p.m, 1, True)
        noise = torch.randint(0, 256, indices.shape, dtype=torch.uint8, generator=generator)
        form = panels.panel_pack(values, noise, p, k=50)
        assert panels.panel_linear(torch.ones(5, 50), form, None, p, rows=20, k=50).isfinite().all()
        assert panels.panel_unpack(form, p, rows=20, k=50).isfinite().all()
        assert panels.panel_restore(form, p, rows=20, k=50)[1].shape == indices.shape


# -------------------------------------------------------------------------------------------------- product


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_product(isa: str, pattern: str, dtype: torch.dtype) -> None:
    p = Pattern.parse(pattern)
    for rows, k in ((48, 128), (37, 130), (16, 16), (3, 7), (100, 50)):
        w, form = packed(pattern, rows, k, dtype)
        bias = torch.randn(rows).to(dtype)
        for batch in BATCHES if k == 130 else (1, 6, 18):
            x = torch.randn(batch, k).to(dtype)
            assert_close(panels.panel_linear(x, form, None, p, rows=rows, k=k), x, w)
            assert_close(panels.panel_linear(x, form, bias, p, rows=rows, k=k), x, w, bias)


@pytest.mark.parametrize("pattern", ["2:4", "1:16", "3:5"])
def test_product_in_float64(isa: str, pattern: str) -> None:
    p = Pattern.parse(pattern)
    w, form = packed(pattern, 37, 70, torch.float64)
    x = torch.randn(5, 70, dtype=torch.float64)
    assert_close(panels.panel_linear(x, form, None, p, rows=37, k=70), x, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_blocks(isa: str, dtype: torch.dtype) -> None:
    """Inputs and outputs of several blocks of steps and panels, several threads' worth of them."""
    rows, k, batch = 1040, 2080, 19
    for pattern in ("2:4", "1:16", "3:4"):
        w, form = packed(pattern, rows, k, dtype)
        x = torch.randn(batch, k).to(dtype)
        assert_close(panels.panel_linear(x, form, None, Pattern.parse(pattern), rows=rows, k=k), x, w)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_activation(isa: str, dtype: torch.dtype, activation: panels.Activation) -> None:
    p = Pattern(2, 4)
    w, form = packed("2:4", 33, 16, dtype)
    x = torch.cat([torch.randn(9, 16), 30 * torch.randn(9, 16), torch.zeros(1, 16)]).to(dtype)
    bias = torch.randn(33).to(dtype)
    compute = torch.promote_types(dtype, torch.float32)
    before = panels.panel_linear(
        x.to(compute), packed("2:4", 33, 16, compute)[1], bias.to(compute), p, rows=33, k=16
    )
    if dtype in (torch.bfloat16, torch.float16):  # the same weights as in the lower precision
        before = F.linear(x.float(), w.float(), bias.float())
    expected = getattr(F, activation)(before)
    actual = panels.panel_linear(x, form, bias, p, rows=33, k=16, activation=activation)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(actual, expected.to(dtype), **tolerance)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
def test_special_numbers(isa: str, activation: panels.Activation) -> None:
    """NaN and infinity come through where they meet a kept weight, and only there."""
    w = torch.zeros(17, 16)
    w[:, 0] = 1.0
    w[:16, 2] = 1.0
    form = packed_from(w)
    x = torch.ones(3, 16)
    x[0, 2] = float("inf")
    x[1, 0] = float("nan")
    x[2, 0] = -float("inf")
    y = panels.panel_linear(x, form, None, Pattern(2, 4), rows=17, k=16, activation=activation)
    assert y[0, :16].isposinf().all()
    assert y[0, 16].isfinite()
    assert y[1].isnan().all()
    before = torch.tensor(-float("inf"))
    expected = before if activation == "none" else getattr(F, activation)(before)
    assert torch.equal(y[2].nan_to_num(7.0), expected.nan_to_num(7.0).expand(17))


def test_layouts_of_x(isa: str) -> None:
    w, form = packed("2:4", 40, 32, torch.float32)
    base = torch.randn(6, 5, 64)
    inputs = {
        "3-D": base[..., :32].contiguous(),
        "narrowed": base[..., 16:48],
        "every second": base[..., ::2],
        "transposed": torch.randn(32, 9).T,
        "swapped batch dims": base[..., :32].transpose(0, 1),
        "expanded": torch.randn(1, 32).expand(7, 32),
        "expanded inputs": torch.randn(7, 1).expand(7, 32),
        "unaligned": torch.randn(1 + 3 * 32)[1:].view(3, 32),
        "1-D": torch.randn(32),
        "1-D strided": torch.randn(64)[::2],
        "4-D": torch.randn(2, 1, 3, 32),
        "odd rows": torch.randn(2, 3, 4, 32)[:, ::2, ::2],
    }
    for name, x in inputs.items():
        y = panels.panel_linear(x, form, None, Pattern(2, 4), rows=40, k=32)
        assert y.is_contiguous(), name
        assert_close(y, x, w)


def test_layouts_of_bias(isa: str) -> None:
    w, form = packed("2:4", 20, 16, torch.float32)
    x = torch.randn(3, 16)
    for bias in (torch.randn(40)[::2], torch.randn(1).expand(20), torch.randn(21)[1:]):
        assert_close(panels.panel_linear(x, form, bias, Pattern(2, 4), rows=20, k=16), x, w, bias)


def test_zero_sizes(isa: str) -> None:
    for rows, k, batch in ((0, 8, 3), (5, 8, 0), (5, 0, 3)):
        _, form = packed("2:4", rows, k, torch.float32)
        bias = torch.randn(rows)
        y = panels.panel_linear(torch.randn(batch, k), form, bias, Pattern(2, 4), rows=rows, k=k)
        assert_same_bits(y, bias.expand(batch, rows).contiguous())


def test_refusals() -> None:
    _, form = packed("2:4", 8, 16, torch.float32)
    p, x = Pattern(2, 4), torch.randn(2, 16)
    with pytest.raises(RuntimeError, match="last size of x"):
        panels.panel_linear(torch.randn(2, 8), form, None, p, rows=8, k=16)
    with pytest.raises(RuntimeError, match="dtype of value_panels"):
        panels.panel_linear(x.double(), form, None, p, rows=8, k=16)
    with pytest.raises(RuntimeError, match="value_panels must"):
        panels.panel_linear(torch.randn(2, 64), form, None, p, rows=8, k=64)
    with pytest.raises(RuntimeError, match="bias must"):
        panels.panel_linear(x, form, torch.randn(9), p, rows=8, k=16)
    with pytest.raises(RuntimeError, match="activation must be"):
        panels.panel_linear(x, form, None, p, rows=8, k=16, activation="tanh")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="<= 16"):
        panels.panel_pack(torch.randn(2, 2), torch.zeros(2, 2, dtype=torch.uint8), Pattern(2, 32), k=32)


# ---------------------------------------------------------------------------------- threads, determinism


def test_threads_do_not_change_results(isa: str) -> None:
    before = torch.get_num_threads()
    try:
        for dtype in DTYPES:
            for pattern, batch in (("2:4", 1), ("2:4", 19), ("1:8", 1), ("1:16", 3), ("3:4", 40)):
                _, form = packed(pattern, 530, 1040, dtype)
                x = torch.randn(batch, 1040).to(dtype)
                results = []
                for threads in (1, 2, 3, 5):
                    torch.set_num_threads(threads)
                    results.append(
                        panels.panel_linear(x, form, None, Pattern.parse(pattern), rows=530, k=1040)
                    )
                for result in results[1:]:
                    assert_same_bits(result, results[0])
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
def test_gradients(activation: panels.Activation) -> None:
    _, form = packed("2:4", 6, 12, torch.float64)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        return panels.panel_linear(x, form, bias, Pattern(2, 4), rows=6, k=12, activation=activation)

    assert gradcheck(product, (x, bias))
    assert gradcheck(lambda x: product(x, None), (x,))
    assert gradcheck(lambda bias: product(x.detach(), bias), (bias,))
    assert torch.autograd.gradgradcheck(lambda x: product(x, None) ** 2, (x,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_a_layer(dtype: torch.dtype) -> None:
    w = nms.nm_prune(torch.randn(24, 32), "2:4").to(dtype)
    weight = nms.compress(w, "2:4")
    assert weight.engine == "cpu-panels"
    x, bias = torch.randn(5, 32).to(dtype).requires_grad_(), torch.randn(24).to(dtype).requires_grad_()
    grad = torch.randn(5, 24).to(dtype)
    F.linear(x, weight, bias).backward(grad)
    expected_x, expected_bias = torch.autograd.grad(F.linear(x, w, bias), (x, bias), grad)
    torch.testing.assert_close(x.grad, expected_x)
    torch.testing.assert_close(bias.grad, expected_bias)


def test_forward_mode_derivatives() -> None:
    w = nms.nm_prune(torch.randn(16, 8), "2:4")
    weight = nms.compress(w, "2:4")
    x, direction = torch.randn(3, 8), torch.randn(3, 8)
    _, derivative = torch.func.jvp(lambda x: nms.linear(x, weight), (x,), (direction,))
    torch.testing.assert_close(derivative, F.linear(direction, w))


def test_values_that_want_a_gradient_get_it() -> None:
    w = nms.nm_prune(torch.randn(8, 16), "2:4").requires_grad_()
    x = torch.randn(3, 16)
    F.linear(x, nms.compress(w, "2:4")).sum().backward()
    torch.testing.assert_close(w.grad, x.sum(0).expand(8, 16) * (w != 0))


# -------------------------------------------------------------------------------------------------- engine


def layer(dtype: torch.dtype = torch.float32, pattern: str = "2:4") -> tuple[nn.Linear, nn.Linear]:
    """A dense layer with a pruned weight, and the same one packed."""
    dense = nn.Linear(64, 48, dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(nms.nm_prune(dense.weight, pattern))
    return dense, nms.convert(copy.deepcopy(dense), pattern, policy="always")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "1:16", "5:7"])
def test_chosen_for_cpu_weights(dtype: torch.dtype, pattern: str) -> None:
    w = nms.nm_prune(torch.randn(30, 56 if pattern == "5:7" else 64), pattern).to(dtype)
    weight = nms.compress(w, pattern)
    assert weight.engine == "cpu-panels"
    x = torch.randn(5, w.shape[1]).to(dtype)
    assert_close(F.linear(x, weight), x, w)


def test_where_it_cannot_run() -> None:
    for weight, why in (
        (nms.compress(torch.randn(4, 64), "2:32", prune=True), "m <= 16"),
        (nms.compress(torch.randn(4, 8, dtype=torch.float64), "2:4", prune=True), "float64"),
        (nms.compress(torch.randn(4, 8, 3, 3), "2:4", prune=True), "4 dimensions"),
        (nms.compress(torch.randn(8), "2:4", prune=True), "1 dimensions"),
    ):
        assert weight.engine != "cpu-panels"
        with pytest.raises(ValueError, match=why):
            weight.with_engine("cpu-panels")


def test_groups_along_the_outputs() -> None:
    w = nms.nm_prune(torch.randn(16, 12), "2:4", dim=0)
    weight = nms.compress(w, "2:4", dim=0)
    x = torch.randn(3, 12)
    torch.testing.assert_close(F.linear(x, weight), F.linear(x, w))
    y = torch.randn(3, 16)
    torch.testing.assert_close(y @ weight, y @ w)  # the layout of transformers' Conv1D


def test_pieces_keep_their_panels() -> None:
    w = nms.nm_prune(torch.randn(56, 32), "2:4")
    weight, x = nms.compress(w, "2:4"), torch.randn(3, 32)
    for sizes, engines in (
        ([16, 40], ["cpu-panels", "cpu-panels"]),
        ([32, 8, 16], ["cpu-panels", "decompress", "decompress"]),
        ([0, 56], ["cpu-panels", "cpu-panels"]),
        ([48, 8], ["cpu-panels", "cpu-panels"]),
    ):
        pieces = weight.split(sizes)
        assert [piece.engine for piece in pieces] == engines
        for piece, rows in zip(pieces, w.split(sizes), strict=True):
            assert_close(F.linear(x, piece), x, rows)


def test_module_life(isa: str) -> None:
    dense, packed_layer = layer()
    x = torch.randn(5, 64)
    expected = packed_layer(x)
    torch.testing.assert_close(expected, dense(x))
    assert_same_bits(copy.deepcopy(packed_layer)(x), expected)
    buffer = io.BytesIO()
    torch.save(packed_layer.state_dict(), buffer)
    buffer.seek(0)
    other = layer()[1]
    other.load_state_dict(torch.load(buffer))
    assert_same_bits(other(x), expected)
    with torch.no_grad():
        assert_same_bits(packed_layer(x), expected)
    with torch.inference_mode():
        assert_same_bits(packed_layer(x), expected)
    lower = copy.deepcopy(packed_layer).to(torch.bfloat16)
    assert lower.weight.engine == "cpu-panels"
    torch.testing.assert_close(lower(x.bfloat16()).float(), expected, atol=2e-2, rtol=2e-2)


def test_compile_and_export() -> None:
    dense, packed_layer = layer()
    model = nn.Sequential(packed_layer, nn.ReLU())
    x = torch.randn(5, 64)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), F.relu(dense(x)))
    torch.testing.assert_close(compiled(x), F.relu(dense(x)))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = torch.randn(9, 64)
    torch.testing.assert_close(program.module()(x), F.relu(dense(x)))


def test_compiled_graph_multiplies_from_panels() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    packed_layer = layer()[1]
    with torch.no_grad():
        torch.compile(packed_layer, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(
            torch.randn(2, 64)
        )
    code = "".join(str(graph.graph) for graph in graphs)
    assert "panel_linear" in code
    assert "panel_pack" not in code
    assert "decompress" not in code


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(low: torch.dtype) -> None:
    # Torch 2.11 may hand a graph with dynamic sizes, made under another autocast dtype, to a new layer.
    torch.compiler.reset()
    dense, packed_layer = layer()
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=low):
        expected = dense(x)
        for _ in range(2):
            actual = packed_layer(x)
            assert actual.dtype == expected.dtype == low
            torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)
        cached = packed_layer.weight.shared.cast(packed_layer.weight, low)
        packed_layer(x)
        again = packed_layer.weight.shared.cast(packed_layer.weight, low)
        assert all(a is b for a, b in zip(again, cached, strict=True))
        torch.testing.assert_close(
            torch.compile(packed_layer, fullgraph=True)(x), expected, atol=2e-2, rtol=2e-2
        )
    actual.sum().backward()
    torch.testing.assert_close(x.grad, dense.weight.sum(0).expand(5, 64), atol=5e-2, rtol=5e-2)


def test_autocast_sees_new_values() -> None:
    dense, packed_layer = layer()
    x = torch.randn(5, 64)
    for factor in (1, 2):
        with torch.no_grad():
            packed_layer.weight.copy_(factor * dense.weight)
        expected = F.linear(x, factor * dense.weight, dense.bias)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(packed_layer(x).float(), expected, atol=4e-2, rtol=2e-2)


def test_convert_measures_it() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 256))
    for module in (model[0], model[2]):
        with torch.no_grad():
            module.weight.copy_(nms.nm_prune(module.weight, "1:8"))
    nms.convert(model, example_input=torch.randn(4, 512))
    for row in deploy.report(model):
        if row.pattern is not None:
            assert row.engine == "cpu-panels"
            assert row.packed_ms is not None
            assert row.packed_ms > 0


def test_transformer_layer() -> None:
    torch.manual_seed(0)
    dense = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    with torch.no_grad():
        for module in dense.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(nms.nm_prune(module.weight, "2:4"))
        dense.self_attn.in_proj_weight.copy_(nms.nm_prune(dense.self_attn.in_proj_weight, "2:4"))
    packed_model = nms.convert(copy.deepcopy(dense), policy="always")
    assert any(isinstance(p, NMTensor) and p.engine == "cpu-panels" for p in packed_model.parameters())
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(packed_model(x), dense(x), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(packed_model(x), dense(x), atol=1e-5, rtol=1e-5)
