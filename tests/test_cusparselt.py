"""cuSPARSELt's Python side: what it means on the CPU, what it refuses, where the library is looked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import nmsparse_ext as nms
from nmsparse_ext import _lt_layout as lt
from nmsparse_ext import _lt_library, cusparselt
from nmsparse_ext._build import extension
from nmsparse_ext._lt_search import Choice

DTYPES = tuple(lt.MULTIPLES)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def integers(*shape: int, dtype: torch.dtype) -> Tensor:
    """Small ones: their sums are exact in every order and in every dtype that results have."""
    return torch.randint(-2, 3, shape).to(dtype)


def weight(*shape: int, dtype: torch.dtype, pattern: str | None = None) -> nms.NMTensor:
    chosen = nms.Pattern.parse(pattern) if pattern else lt.hardware_pattern(dtype)
    return nms.compress(integers(*shape, dtype=dtype), chosen, dim=-1, prune=True)


def expected(x: Tensor, w: nms.NMTensor) -> Tensor:
    return x.double() @ w.to_dense().double().mT


# ------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (7, 64), (2, 3, 64), (0, 64)])
def test_linear(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    w = weight(32, 64, dtype=dtype)
    x = integers(*shape, dtype=dtype)
    out_dtype = {torch.int8: torch.int32, torch.float8_e4m3fn: torch.float32}.get(dtype)
    y = cusparselt.linear(x, cusparselt.pack(w), out_dtype=out_dtype)
    assert y.dtype == (out_dtype or dtype)
    assert y.shape == (*shape[:-1], 32)
    assert torch.equal(y.double(), expected(x, w).to(y.dtype).double())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", cusparselt.ACTIVATIONS)
def test_bias_alpha_and_activation(dtype: torch.dtype, activation: str) -> None:
    w, x, bias = (
        weight(16, 32, dtype=dtype),
        integers(5, 32, dtype=dtype),
        integers(16, dtype=dtype),
    )
    y = cusparselt.linear(x, cusparselt.pack(w), bias, alpha=0.5, activation=activation)
    sums = (0.5 * expected(x, w) + bias.double()).to(dtype)
    wanted = sums if activation == "none" else getattr(F, activation)(sums)
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("out_dtype", lt.OUT_DTYPES[torch.int8])
def test_int8_with_a_scale_a_row(out_dtype: torch.dtype) -> None:
    w, x = weight(32, 32, dtype=torch.int8), integers(16, 32, dtype=torch.int8)
    scales, bias = torch.linspace(0.5, 40, 32), torch.linspace(-3, 3, 32)
    y = cusparselt.linear(x, cusparselt.pack(w), bias, scales=scales, out_dtype=out_dtype)
    sums = expected(x, w).float() * scales + bias
    if not out_dtype.is_floating_point:
        limits = torch.iinfo(out_dtype)
        sums = sums.double().round().clamp(limits.min, limits.max)
    assert torch.equal(y, sums.to(out_dtype))


def test_gelu_of_int8_is_taken_before_rounding() -> None:
    w, x = weight(32, 32, dtype=torch.int8), integers(4, 32, dtype=torch.int8)
    y = cusparselt.linear(x, cusparselt.pack(w), alpha=0.25, activation="gelu")
    assert torch.equal(y, F.gelu(0.25 * expected(x, w).float()).round().to(torch.int8))
    y = cusparselt.linear(x, cusparselt.pack(w), alpha=0.25, activation="gelu", out_dtype=torch.float16)
    torch.testing.assert_close(y, F.gelu(0.25 * expected(x, w).half()))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_batch_of_weights(dtype: torch.dtype) -> None:
    w, x = weight(3, 16, 32, dtype=dtype), integers(3, 5, 32, dtype=dtype)
    packed = cusparselt.pack(w)
    assert packed.batches == 3
    y = cusparselt.linear(x, packed, integers(16, dtype=dtype) * 0)
    wanted = torch.stack([a.double() @ b.double().T for a, b in zip(x, w.to_dense(), strict=True)])
    assert torch.equal(y.double(), wanted)


@pytest.mark.parametrize("pattern", ["1:4", "2:8", "1:8", "2:16", "1:16", "1:32"])
def test_patterns_that_embed(pattern: str) -> None:
    w, x = weight(16, 64, dtype=torch.float16, pattern=pattern), integers(8, 64, dtype=torch.float16)
    assert torch.equal(cusparselt.linear(x, cusparselt.pack(w)).double(), expected(x, w))


def test_strides_of_x_do_not_matter() -> None:
    w = weight(16, 32, dtype=torch.float32)
    packed, x = cusparselt.pack(w), integers(8, 32, dtype=torch.float32)
    for other in (
        x.T.contiguous().T,
        x.repeat(1, 2)[:, :32],
        x.repeat_interleave(2, 0)[::2],
        x[:1].expand(8, 32),
    ):
        assert torch.equal(cusparselt.linear(other, packed).double(), expected(other, w))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 20), st.sampled_from(DTYPES), st.booleans())
def test_sizes(rows: int, k: int, tokens: int, dtype: torch.dtype, with_bias: bool) -> None:
    multiple = lt.MULTIPLES[dtype].weight
    w = weight(rows * multiple, k * multiple, dtype=dtype)
    x = integers(tokens, k * multiple, dtype=dtype)
    out = torch.float16 if dtype.itemsize == 1 else dtype
    bias = torch.ones(rows * multiple, dtype=lt.bias_dtype(dtype, out)) if with_bias else None
    y = cusparselt.linear(x, cusparselt.pack(w), bias, out_dtype=out)
    assert y.is_contiguous()
    assert torch.equal(y.double(), (expected(x, w) + with_bias).to(out).double())


def test_kept_zeros_of_either_sign_cost_no_kept_weight() -> None:
    """More nonzero bit patterns than weights: the mask decides, not ``!= 0``."""
    w = torch.full((16, 16), -0.0, dtype=torch.float16)
    w.view(16, 4, 4)[:, :, 1:3] = 2.0
    packed = cusparselt.pack(nms.compress(w, "2:4"))
    x = torch.ones(8, 16, dtype=torch.float16)
    assert torch.equal(cusparselt.linear(x, packed), torch.full((8, 16), 16.0).half())


def test_compiled_and_fake() -> None:
    w, x = weight(16, 32, dtype=torch.float32), integers(6, 32, dtype=torch.float32)
    packed = cusparselt.pack(w)
    compiled = torch.compile(lambda x: cusparselt.linear(x, packed), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), cusparselt.linear(x, packed))
    with FakeTensorMode() as mode:
        fake = packed._replace(blob=mode.from_tensor(packed.blob))
        y = cusparselt.linear(torch.empty(2, 3, 32), fake, choice=Choice(0))
        assert y.shape == (2, 3, 16)
        cuda = packed._replace(blob=torch.empty(packed.blob.shape, dtype=torch.uint8, device="cuda"))
        y = cusparselt.linear(torch.empty(5, 32, device="cuda"), cuda, choice=Choice(0))
        assert y.device.type == "cuda"
        assert y.shape == (5, 16)


# ------------------------------------------------------------------------------------ gradients and autocast


def transposable(rows: int, k: int) -> nms.NMTensor:
    """2:4 along its rows as well."""
    w = integers(rows, k, dtype=torch.bfloat16)
    return nms.compress(torch.where(nms.transposable_mask(w), w, 0), "2:4")


@pytest.mark.parametrize("activation", cusparselt.ACTIVATIONS)
@pytest.mark.parametrize("both_ways", [False, True])
def test_gradients_of_input_and_bias(activation: str, both_ways: bool) -> None:
    w = transposable(32, 64) if both_ways else weight(32, 64, dtype=torch.bfloat16)
    packed = cusparselt.pack(w, gradients=True)
    assert packed.backing is not None
    assert (packed.backing.transposed is not None) == both_ways
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(32, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    cusparselt.linear(x, packed, bias, alpha=0.5, activation=activation).backward(grad)
    exact_x, exact_bias = (t.detach().float().requires_grad_() for t in (x, bias))
    y = 0.5 * F.linear(exact_x, w.to_dense().float()) + exact_bias
    (y if activation == "none" else getattr(F, activation)(y)).backward(grad.float())
    torch.testing.assert_close(x.grad.float(), exact_x.grad, rtol=0.05, atol=0.1)
    torch.testing.assert_close(bias.grad.float(), exact_bias.grad, rtol=0.05, atol=0.1)


def test_gradients_of_a_batch_of_weights_and_in_a_graph() -> None:
    w = weight(3, 16, 32, dtype=torch.float32)
    packed = cusparselt.pack(w, gradients=True)

    def product(x: Tensor, bias: Tensor) -> Tensor:
        return cusparselt.linear(x, packed, bias, activation="silu")

    for call in (product, torch.compile(product, backend="aot_eager", fullgraph=True)):
        x = torch.randn(3, 5, 32, requires_grad=True)
        bias = torch.randn(16, requires_grad=True)
        call(x, bias).square().sum().backward()
        expected = x.detach().requires_grad_(), bias.detach().requires_grad_()
        F.silu(expected[0] @ w.to_dense().mT + expected[1]).square().sum().backward()
        torch.testing.assert_close(x.grad, expected[0].grad)
        torch.testing.assert_close(bias.grad, expected[1].grad)


def test_which_gradients_there_are_not() -> None:
    with pytest.raises(TypeError, match=r"weight of .*int8 has no gradients"):
        cusparselt.pack(weight(32, 32, dtype=torch.int8), gradients=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_autocast(dtype: torch.dtype) -> None:
    w = weight(32, 64, dtype=dtype)
    packed = cusparselt.pack(w, gradients=True)
    x = integers(5, 64, dtype=torch.float32).requires_grad_()
    bias = integers(32, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = cusparselt.linear(x, packed, bias, activation="relu")
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    expected = F.relu(x.detach() @ w.to_dense().float().T + bias.detach())
    assert torch.equal(y.float(), expected.bfloat16().float())
    torch.testing.assert_close(x.grad, (expected > 0).float() @ w.to_dense().float())
    torch.testing.assert_close(bias.grad, (expected > 0).float().sum(0))


# --------------------------------------------------------------------------------------------------- errors


def half(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float16)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: half(16, 16), TypeError, "NMTensor .*got Tensor"),
        (lambda: weight(16, 16, dtype=torch.float64, pattern="2:4"), TypeError, "weight must be one of"),
        (lambda: nms.compress(half(16, 16), "2:4", dim=0), ValueError, "grouped along k"),
        (lambda: nms.compress(half(16), "2:4"), ValueError, r"\[rows, k\]"),
        (lambda: weight(16, 16, dtype=torch.float16, pattern="3:4"), ValueError, "embeds in 2:4.*got 3:4"),
        (lambda: weight(16, 24, dtype=torch.float16, pattern="2:6"), ValueError, "embeds in 2:4.*got 2:6"),
        (lambda: weight(16, 16, dtype=torch.float32, pattern="2:4"), ValueError, "embeds in 1:2.*got 2:4"),
        (lambda: weight(8, 16, dtype=torch.float16), ValueError, r"multiples of 16, got \[8, 16\]"),
        (lambda: weight(32, 48, dtype=torch.int8), ValueError, r"multiples of 32, got \[32, 48\]"),
        (lambda: weight(0, 16, dtype=torch.float16), ValueError, r"got \[0, 16\]"),
    ],
)
def test_what_pack_refuses(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        cusparselt.pack(make())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(4, 32)}, TypeError, "x must have the weight's dtype, torch.float16"),
        ({"x": half(4, 16)}, ValueError, r"x must be \[\.\.\., 32\], got \[4, 16\]"),
        (
            {"x": torch.empty(4, 32, dtype=torch.float16, device="meta")},
            ValueError,
            "x must be on the device",
        ),
        ({"weight": half(16, 32)}, TypeError, "cusparselt.pack gives, got Tensor"),
        ({"out_dtype": torch.float32}, TypeError, "out_dtype must be one of torch.float16 for"),
        ({"activation": "tanh"}, ValueError, "activation must be .* or 'silu', got 'tanh'"),
        ({"bias": half(8)}, ValueError, r"bias must be contiguous \[16\], got \[8\]"),
        ({"bias": torch.zeros(16)}, TypeError, "bias must be one of torch.float16, got torch.float32"),
        ({"bias": half(32)[::2]}, ValueError, "bias must be contiguous"),
        ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor, got float"),
        ({"scales": torch.ones(16)}, ValueError, "int8 weights only"),
        ({"x": half(4, 32).requires_grad_()}, ValueError, r"pack\(weight, gradients=True\)"),
    ],
)
def test_what_linear_refuses(change: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"x": half(4, 32), "weight": cusparselt.pack(weight(16, 32, dtype=torch.float16)), **change}
    with pytest.raises(error, match=words):
        cusparselt.linear(**given)


def test_what_linear_refuses_of_batches_int8_and_float8() -> None:
    several = cusparselt.pack(weight(2, 16, 32, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"x must be \[2, tokens, 32\] for 2 weights, got \[4, 32\]"):
        cusparselt.linear(half(4, 32), several)
    int8 = cusparselt.pack(weight(32, 32, dtype=torch.int8))
    x = torch.zeros(16, 32, dtype=torch.int8)
    with pytest.raises(ValueError, match="gelu"):
        cusparselt.linear(x, int8, activation="gelu", out_dtype=torch.int32)
    with pytest.raises(TypeError, match="scales must be one of torch"):
        cusparselt.linear(x, int8, scales=torch.ones(32).double())
    float8 = cusparselt.pack(weight(32, 32, dtype=torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="float8 results"):
        cusparselt.linear(x.to(torch.float8_e4m3fn), float8, activation="gelu")


@pytest.mark.parametrize(
    "change", [{"rows": 8}, {"activation": "silu"}, {"out_dtype": torch.int8}, {"x": half(32)}]
)
def test_the_op_refuses_the_same(change: dict[str, Any]) -> None:
    blob = cusparselt.pack(weight(16, 32, dtype=torch.float16)).blob
    arguments = {"x": half(8, 32), "blob": blob, "bias": None, "scales": None, "alpha": 1.0, "rows": 16}
    arguments |= {"activation": "none", "out_dtype": None, "algorithm": -1, "split_k": 1, "split_k_mode": 0}
    arguments |= change
    with pytest.raises(RuntimeError, match=next(iter(change)) if "rows" not in change else "multiples of 16"):
        torch.ops.nmsparse.lt_matmul(**arguments)


def test_a_blob_that_is_too_small() -> None:
    w = half(16, 32)
    with pytest.raises(RuntimeError, match="at least 576 bytes, got 100"):
        torch.ops.nmsparse.lt_compress(w, 100)
    with pytest.raises(RuntimeError, match="blob must hold 576 bytes, got 575"):
        torch.ops.nmsparse.lt_matmul(
            half(8, 32), torch.zeros(575, dtype=torch.uint8), None, None, 1.0, 16, "none", None, -1, 1, 0
        )


# ------------------------------------------------------------------------------------------------- library


def test_where_it_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheels = [tmp_path / folder / "lib" / _lt_library.SONAME for folder in ("cu13", "cusparselt")]
    for wheel in wheels:
        wheel.parent.mkdir(parents=True)
        wheel.touch()

    class Namespace:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.delenv("NMSPARSE_CUSPARSELT", raising=False)
    monkeypatch.setattr(_lt_library.importlib.util, "find_spec", lambda name: Namespace())
    assert _lt_library.candidates() == [_lt_library.SONAME, *map(str, wheels)]
    monkeypatch.setattr(_lt_library.importlib.util, "find_spec", lambda name: None)
    assert _lt_library.candidates() == [_lt_library.SONAME]
    monkeypatch.setenv("NMSPARSE_CUSPARSELT", "/opt/libcusparseLt.so.0")
    assert _lt_library.candidates() == ["/opt/libcusparseLt.so.0"]


@pytest.mark.skipif(extension is None, reason="pure PyTorch")
def test_the_reason_for_its_absence(tmp_path: Path) -> None:
    """In a process of its own, which has loaded nothing yet."""
    no_library = tmp_path / "libcusparseLt.so.0"
    no_library.write_text("no library")
    code = (
        "from nmsparse_ext import _C\n"
        "import sys\n"
        "loaded = _C.cusparselt_open(sys.argv[1:])\n"
        "print(loaded['version'], loaded['path'], loaded['reason'])\n"
        "print(_C.cusparselt_statistics())\n"
        "_C.cusparselt_clear(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import torch\n" + code, "/nonexistent/libcusparseLt.so.0", str(no_library)],
        env={**os.environ, "PYTHONPATH": str(Path(nms.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reason, statistics = done.stdout.splitlines()
    assert reason.startswith("None None no usable cuSPARSELt (/nonexistent/libcusparseLt.so.0: ")
    assert f"; {no_library}: " in reason
    assert statistics == "[]"


def test_why_not() -> None:
    assert cusparselt.why_not("cpu") == "cpu tensors run in plain PyTorch"
    info = nms.build_info()
    if info.cusparselt_version is None:
        assert cusparselt.why_not("cuda") == info.cusparselt_reason != ""
        with pytest.raises(ValueError, match="there is no cuSPARSELt"):
            cusparselt.set_plan_limit(10)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "8"])
def test_plan_limits_that_are_none(limit: Any) -> None:
    with pytest.raises(ValueError, match="limit must be an int of at least 1"):
        cusparselt.set_plan_limit(limit)


def test_nothing_has_run_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        assert cusparselt.statistics() == []
        cusparselt.clear(0)
