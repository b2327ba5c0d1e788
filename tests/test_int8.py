"""The packed product in integers: instruction sets against the reference, the engine, its accuracy."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from int8_samples import DTYPES, packed, random_int8
from properties import for_any, integers, seeds
from samples import assert_same_bits
from torch import Tensor

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
nan, inf = math.nan, math.inf


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
