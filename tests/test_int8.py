"""The packed product in integers: instruction sets against the reference, the engine, its accuracy."""

from __future__ import annotations

import copy
import io
import math
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from properties import for_any, integers, seeds
from samples import assert_same_bits
from torch import Tensor, nn
from torch.autograd import gradcheck

import nmsparse_ext as nms
from nmsparse_ext import reference
from nmsparse_ext._panel_layout import MAX_INT8_KEPT
from nmsparse_ext.int8 import Int8Panels, int8_panels, multiply_int8
from nmsparse_ext.panels import Activation
from nmsparse_ext.pattern import Pattern

# All kinds of loops: 2-bit and 4-bit fields, one to sixteen slots, windows that are not full.
PATTERNS = (
    "1:2",
    "2:4",
    "1:4",
    "1:3",
    "1:8",
    "2:8",
    "4:8",
    "1:16",
    "2:16",
    "8:16",
    "3:4",
    "1:1",
    "2:3",
    "5:7",
    "3:10",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
nan, inf = math.nan, math.inf


def random_int8(rows: int, k: int, seed: int = 0) -> Tensor:
    """Any bytes, with -128 and 127 more often than by chance."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(-128, 128, (rows, k), generator=generator).to(torch.int8)
    extreme = torch.rand(rows, k, generator=generator)
    return torch.where(extreme < 0.1, -128, torch.where(extreme > 0.9, 127, w)).to(torch.int8)


def packed(pattern: str, rows: int, k: int, seed: int = 0) -> tuple[Tensor, Int8Panels]:
    """A pruned int8 weight ``[rows, k]``, dense and in panels with random scales."""
    p = Pattern.parse(pattern)
    values, indices = reference.compress(random_int8(rows, k, seed), p.n, p.m, 1, True)
    panels = int8_panels(values, indices, p, k=k)
    scales = 0.01 * torch.rand(panels.scales.shape, generator=torch.Generator().manual_seed(seed))
    return reference.decompress(values, indices, p.n, p.m, k, 1), panels._replace(scales=scales)


def product(
    x: Tensor,
    panels: Int8Panels,
    bias: Tensor | None,
    pattern: str,
    rows: int,
    activation: Activation = "none",
) -> Tensor:
    """What the op gives, compared with the reference: to the bit where no function is approximated."""
    p, k = Pattern.parse(pattern), x.shape[-1]
    actual = multiply_int8(x, panels, bias, p, rows=rows, k=k, activation=activation)
    expected = reference.panel_linear_int8(x, *panels, bias, p.n, p.m, rows, k, activation)
    if activation in ("none", "relu"):
        assert_same_bits(actual.nan_to_num(nan=123.0), expected.nan_to_num(nan=123.0))
    else:
        torch.testing.assert_close(actual, expected, equal_nan=True)
    return actual


# ----------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize(
    ("row", "expected", "scale"),
    [
        ([127.0, -127.0, 0.0, 1.0], [127, -127, 0, 1], 1.0),
        ([254.0, 1.0, 3.0, 5.0, -1.0, -3.0], [127, 0, 2, 2, 0, -2], 2.0),  # ties to even
        ([0.0, -0.0], [0, 0], 0.0),
        ([1e-40, -1e-38], [0, 0], 0.0),
        ([2.0**-100, 0.0], [127, 0], 2.0**-100 / 127),
        ([3.4028234663852886e38, 0.0, -3.4028234663852886e38], [127, 0, -127], 3.4028234663852886e38 / 127),
        ([1.0, nan, 2.0], [0, 0, 0], nan),
        ([1.0, inf], [0, 0], nan),
        ([-inf, 0.0], [0, 0], nan),
    ],
)
def test_rounding_by_hand(row: list[float], expected: list[int], scale: float) -> None:
    values, scales = reference.quantize_rows(torch.tensor([row]))
    assert values.dtype == torch.int8
    assert values.tolist() == [expected]
    torch.testing.assert_close(scales, torch.tensor([[scale]]), rtol=1e-7, atol=0, equal_nan=True)


def test_rounding_of_no_numbers() -> None:
    values, scales = reference.quantize_rows(torch.empty(3, 0))
    assert values.shape == (3, 0)
    assert scales.tolist() == [[0.0]] * 3


@for_any(seed=seeds, exponent=integers(-90, 120))
def test_rounding_is_within_half_a_unit(seed: int, exponent: int) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    values, scales = reference.quantize_rows(x)
    assert values.abs().amax() == 127
    assert ((x - values * scales).abs() <= scales * (0.5 + 1e-4)).all()


# ---------------------------------------------------------------------------------------------------- product


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_product_is_the_reference_s(isa: str, pattern: str, dtype: torch.dtype) -> None:
    for rows, k in ((48, 128), (37, 130), (3, 7), (100, 50)):
        _, panels = packed(pattern, rows, k)
        bias = torch.randn(rows).to(dtype)
        for batch in (1, 2, 4, 5, 8, 9, 16, 17, 33) if k == 130 else (1, 6, 18):
            product(torch.randn(batch, k).to(dtype), panels, bias if batch % 2 else None, pattern, rows)


@pytest.mark.parametrize("pattern", ["2:4", "1:16", "3:4", "5:7"])
def test_many_blocks(isa: str, pattern: str) -> None:
    """Inputs and outputs of several blocks of steps and panels, several threads' worth of them."""
    _, panels = packed(pattern, 1040, 2080)
    product(torch.randn(19, 2080), panels, None, pattern, 1040)


def test_sums_are_exact(isa: str) -> None:
    """Integers, scaled by powers of two: what comes out is the product itself."""
    w, panels = packed("2:4", 64, 256)
    x = torch.randint(-127, 128, (9, 256)).float()
    x[:, 0] = 127
    ones = panels._replace(scales=torch.ones_like(panels.scales))
    assert torch.equal(product(x, ones, None, "2:4", 64), x @ w.float().T)


def test_extreme_integers(isa: str) -> None:
    """No pair of products is clipped on the way: 127 * -128 everywhere."""
    w = torch.full((17, 512), -128, dtype=torch.int8)
    p = Pattern(1, 1)
    panels = int8_panels(*reference.compress(w, 1, 1, 1, True), p, k=512)
    for sign in (1.0, -1.0):
        y = product(torch.full((5, 512), 127.0 * sign), panels, None, "1:1", 17)
        assert (y == -128 * 127 * 512 * sign).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_activation(isa: str, activation: Activation, dtype: torch.dtype) -> None:
    _, panels = packed("2:4", 33, 16)
    x = torch.cat([torch.randn(9, 16), 30 * torch.randn(9, 16), torch.zeros(1, 16)]).to(dtype)
    product(x, panels, torch.randn(33).to(dtype), "2:4", 33, activation)


def test_rows_that_cannot_be_rounded(isa: str) -> None:
    """NaN and infinity make their row NaN and no other; zeros give the bias."""
    _, panels = packed("2:4", 20, 32)
    x, bias = torch.randn(6, 32), torch.randn(20)
    x[0, 3], x[1, 5], x[2, 7], x[3], x[4] = nan, inf, -inf, 0.0, 1e-38
    for dtype in DTYPES:
        y = product(x.to(dtype), panels, bias.to(dtype), "2:4", 20)
        assert y[:3].isnan().all()
        assert torch.equal(y[3:5], bias.to(dtype).expand(2, 20))
        assert y[5].isfinite().all()


def test_weights_that_cannot_be_rounded() -> None:
    w = torch.randn(4, 8)
    w[1, 0], w[2, 0], w[3] = nan, inf, 0.0
    y = F.linear(torch.randn(2, 8), nms.compress(w, "1:1").with_engine("cpu-int8"))
    assert y[:, 1:3].isnan().all()
    assert (y[:, 3] == 0).all()
    assert y[:, 0].isfinite().all()


def test_layouts_of_x_and_bias(isa: str) -> None:
    _, panels = packed("2:4", 40, 32)
    base = torch.randn(6, 5, 64)
    for x in (
        base[..., :32].contiguous(),
        base[..., 16:48],
        base[..., ::2],
        torch.randn(32, 9).T,
        base[..., :32].transpose(0, 1),
        torch.randn(1, 32).expand(7, 32),
        torch.randn(7, 1).expand(7, 32),
        torch.randn(1 + 3 * 32)[1:].view(3, 32),
        torch.randn(32),
        torch.randn(64)[::2],
        torch.randn(2, 3, 4, 32)[:, ::2, ::2],
    ):
        for bias in (torch.randn(80)[::2], torch.randn(1).expand(40)):
            assert product(x, panels, bias, "2:4", 40).is_contiguous()


def test_zero_sizes(isa: str) -> None:
    for rows, k, batch in ((0, 8, 3), (5, 8, 0), (5, 0, 3)):
        _, panels = packed("2:4", rows, k)
        bias = torch.randn(rows)
        y = product(torch.randn(batch, k), panels, bias, "2:4", rows)
        assert_same_bits(y, bias.expand(batch, rows).contiguous())


def any_case(random: Random) -> tuple[str, int, int, int, int, torch.dtype]:
    m = random.randint(1, 16)
    sizes = random.randint(1, 50), random.randint(1, 200), random.randint(1, 40)
    return f"{random.randint(1, m)}:{m}", *sizes, random.randrange(2**31), random.choice(DTYPES)


@for_any(case=any_case)
def test_any_product(isa: str, case: tuple[str, int, int, int, int, torch.dtype]) -> None:
    pattern, rows, k, batch, seed, dtype = case
    _, panels = packed(pattern, rows, k, seed)
    x = torch.randn(batch, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    product(x, panels, None, pattern, rows)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_damaged_indices_are_as_safe_as_others(isa: str, pattern: str) -> None:
    p = Pattern.parse(pattern)
    values, indices = reference.compress(random_int8(20, 50), p.n, p.m, 1, True)
    noise = torch.randint(0, 256, indices.shape, dtype=torch.uint8)
    panels = int8_panels(values, noise, p, k=50)
    assert multiply_int8(torch.ones(5, 50), panels, None, p, rows=20, k=50).isfinite().all()


def test_threads_do_not_change_results(isa: str) -> None:
    before = torch.get_num_threads()
    try:
        for pattern, batch in (("2:4", 1), ("2:4", 19), ("1:16", 3), ("3:4", 40)):
            _, panels = packed(pattern, 530, 1040)
            x = torch.randn(batch, 1040)
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                product(x, panels, None, pattern, 530)
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------- refusals


def test_refusals_of_the_op() -> None:
    p = Pattern(2, 4)
    _, panels = packed("2:4", 8, 16)
    x = torch.randn(2, 16)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("last size of x", {"x": torch.randn(2, 8)}),
        ("x must be", {"x": x.double()}),
        ("bias must", {"bias": torch.randn(9)}),
        ("bias must", {"bias": torch.randn(8).bfloat16()}),
        ("scales must", {"scales": panels.scales[:, :8]}),
        ("scales must", {"scales": panels.scales.double()}),
        ("sums must", {"sums": panels.sums.long()}),
        ("value_panels must", {"values": panels.values.float()}),
        ("index_panels must", {"indices": panels.indices[:, :0]}),
        ("activation must", {"activation": "tanh"}),
    ]
    for message, change in wrong:
        arguments = {"x": x, **panels._asdict(), "bias": None, "activation": "none", **change}
        form = Int8Panels(*(arguments.pop(name) for name in Int8Panels._fields))
        with pytest.raises(RuntimeError, match=message):
            multiply_int8(
                arguments["x"], form, arguments["bias"], p, rows=8, k=16, activation=arguments["activation"]
            )
    with pytest.raises(RuntimeError, match="value_panels must be"):  # the product of floats takes no bytes
        torch.ops.nmsparse.panel_linear(x, panels.values, panels.indices, None, 2, 4, 8, 16, "none")


def test_rows_too_long_for_their_sums() -> None:
    k = MAX_INT8_KEPT + 1
    weight = nms.compress(torch.ones(1, k, dtype=torch.int8), "1:1")
    with pytest.raises(ValueError, match=f"its sums hold {MAX_INT8_KEPT} products, the rows keep {k}"):
        weight.with_engine("cpu-int8")
    panels = int8_panels(weight.values, weight.indices, Pattern(1, 1), k=k)
    with pytest.raises(RuntimeError, match=f"at most {MAX_INT8_KEPT} weights"):
        multiply_int8(torch.ones(1, k), panels, None, Pattern(1, 1), rows=1, k=k)
    fits = nms.compress(torch.full((1, k - 1), -128, dtype=torch.int8), "1:1").with_engine("cpu-int8")
    y = F.linear(torch.full((1, k - 1), -127.0), fits)
    assert y.item() == 127 * 128 * (k - 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(8, 16)}, TypeError, "weight must be an NMTensor, got Tensor"),
        ({"weight": "float"}, TypeError, "weight must be int8, got torch.float32"),
        ({"weight": "decompress"}, ValueError, "must be run by engine 'cpu-int8', got 'decompress'"),
        ({"weight": "transposed"}, ValueError, "packed along dim 1, its inputs, got dim 0"),
        ({"x": torch.ones(2, 16).double()}, TypeError, "x must be one of .*, got torch.float64"),
        ({"x": torch.ones(2, 8)}, ValueError, r"x must have last size 16, got shape \[2, 8\]"),
        ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
        ({"scales": torch.ones(8).int()}, TypeError, "scales must be floating point, got torch.int32"),
        ({"scales": torch.ones(1, 8)}, ValueError, r"scales must have shape \[8\] or \[8, 1\], got \[1, 8\]"),
        ({"bias": torch.ones(9)}, ValueError, r"bias must have shape \[8\], got \[9\]"),
        ({"activation": "tanh"}, ValueError, "activation must be one of .*, got 'tanh'"),
    ],
)
def test_refusals_of_int8_linear(change: dict[str, Any], error: type[Exception], message: str) -> None:
    dense = nms.nm_prune(random_int8(8, 16), "2:4")
    weight = nms.compress(dense, "2:4").with_engine("cpu-int8")
    others = {
        "float": lambda: nms.compress(dense.float(), "2:4").with_engine("cpu-int8"),
        "decompress": lambda: weight.with_engine("decompress"),
        "transposed": lambda: weight.t(),
    }
    if isinstance(change.get("weight"), str):
        change = {"weight": others[change["weight"]]()}
    arguments = {"x": torch.ones(2, 16), "weight": weight, "scales": torch.ones(8), **change}
    with pytest.raises(error, match=message):
        nms.int8_linear(**arguments)


def test_weights_that_the_engine_refuses() -> None:
    for w, pattern, message in (
        (torch.randn(4, 8, 3, 3), "2:4", "multiplies matrices, the weight has 4 dimensions"),
        (torch.randn(4, 8).double(), "2:4", "takes weights of .*, not torch.float64"),
        (torch.randn(4, 64), "2:32", "patterns with m <= 16, not 2:32"),
    ):
        with pytest.raises(ValueError, match=message):
            nms.compress(w, pattern, prune=True).with_engine("cpu-int8")
    on_meta = nms.compress(torch.randn(4, 8), "2:4", prune=True).to("meta")
    with pytest.raises(ValueError, match="runs on the CPU, the weight is on meta"):
        on_meta.with_engine("cpu-int8")


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
