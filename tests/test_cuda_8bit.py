"""Weights of 8 bits by the engines of GPUs, on the CPU: three ways, rounded or as they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_crossovers import decree, record_ways
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import nmsparse_ext as nms
from nmsparse_ext import crossover, cusparselt, engines_cuda, engines_cuda_8bit
from nmsparse_ext.crossover import DENSE, LT, SMALL_BATCH, Problem

pytestmark = pytest.mark.usefixtures("gpu")
ROWS, K = 32, 64
INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn
ENGINE = {INT8: "cuda-int8", FLOAT8: "cuda-float8"}
SIXTEEN = (torch.float16, torch.bfloat16)


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch, gpu: None) -> list[str]:
    """Which way products have gone."""
    return record_ways(monkeypatch, engines_cuda_8bit)


def problem(dtype: torch.dtype, inputs: torch.dtype, pattern: str = "2:4") -> Problem:
    return Problem(torch.device("cpu"), dtype, nms.Pattern.parse(pattern), ROWS, K, inputs)


def eight_bits(dtype: torch.dtype, pattern: str = "2:4") -> nms.NMTensor:
    """A weight of small integers."""
    w = torch.randint(-7, 8, (ROWS, K)).float()
    return nms.compress(nms.nm_prune(w, pattern).to(dtype), pattern)


def exact(x: Tensor, w: nms.NMTensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.double(), w.to_dense().double(), None if bias is None else bias.double())


# ------------------------------------------------------------------------------------- weights of 8 bits


@pytest.mark.parametrize("inputs", [*SIXTEEN, torch.float32])
@pytest.mark.parametrize("dtype", [INT8, FLOAT8])
def test_weights_of_8_bits_have_an_engine_of_their_own(
    dtype: torch.dtype, inputs: torch.dtype, gone: list[str]
) -> None:
    w = eight_bits(dtype)
    assert w.engine == ENGINE[dtype]
    assert engines_cuda_8bit.memory(w) == {
        "packed": ROWS * K * 5 // 8,
        "rounded": 0,
        "scales": 4 * ROWS,
        "for cuSPARSELt": 0,
    }
    small = dtype == INT8 and inputs != torch.float32
    for tokens in (0, 1, 32, 33):
        x, bias = torch.randint(-3, 4, (tokens, K)).to(inputs), torch.randint(-3, 4, (ROWS,)).to(inputs)
        y = nms.linear(x, w, bias, "relu")
        assert y.dtype == inputs
        torch.testing.assert_close(y.double(), F.relu(exact(x, w, bias)), rtol=1e-2, atol=0)
        assert torch.equal(F.linear(x, w).double(), exact(x, w).to(inputs).double())
    assert gone == [SMALL_BATCH if small else DENSE] * 6 + [DENSE] * 2


@pytest.mark.parametrize("inputs", SIXTEEN)
@pytest.mark.parametrize("dtype", [INT8, FLOAT8])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_cusparselt_rounds_inputs_where_it_may(
    dtype: torch.dtype, inputs: torch.dtype, activation: str, gone: list[str]
) -> None:
    assert "would have inputs rounded to" in str(crossover.reasons(problem(dtype, inputs))[LT])
    decree(problem(dtype, inputs), (8, DENSE), (9, LT))
    decree(problem(dtype, torch.bfloat16), (8, DENSE), (9, LT))  # what forms are chosen by
    x, bias = torch.randn(2, 9, K).to(inputs) * 300, torch.randn(ROWS).to(inputs)
    x[0, 3] = 0
    w = eight_bits(dtype)
    nms.linear(x, w, bias, activation)
    assert gone == [DENSE]
    layer = nn.Linear(K, ROWS)
    layer.weight = nn.Parameter(w, requires_grad=False)
    crossover.allow_rounded_inputs()
    assert nms.deploy.refit(layer) == -ROWS * K * 5 // 8
    w = layer.weight
    assert "cusparselt from 9 tokens (measured)" in engines_cuda_8bit.why(w)
    y = nms.linear(x, w, bias, activation)
    assert y.shape == (2, 9, ROWS)
    assert gone == [DENSE, LT]
    expected = exact(x, w, bias)
    expected = expected if activation == "none" else F.silu(expected)
    # Half a unit of each input (float8: half of its last place), and roundings to 16 bits on the way.
    size = x.double().abs()
    off = (
        size.amax(-1, keepdim=True) / 254
        if dtype == INT8
        else size / 16 + size.amax(-1, keepdim=True) / 2**18
    )
    bound = F.linear(off.expand_as(x).contiguous(), w.to_dense().double().abs()) * 1.2
    assert ((y.double() - expected).abs() <= bound + 0.02 * expected.abs() + 0.02).all()
    torch.testing.assert_close(y[0, 3], nms.linear(x[0, 3], w, bias, activation))
    x[1, 2, 5] = float("nan")
    y = nms.linear(x, w, bias, activation)
    assert y[1, 2].isnan().all()
    assert y.isnan().sum() == ROWS
    crossover.allow_rounded_inputs(False)
    nms.linear(x, w)
    assert gone[-1] == DENSE
    assert nms.deploy.refit(layer) == ROWS * K * 5 // 8


def test_float16_does_not_overflow_on_the_way() -> None:
    crossover.allow_rounded_inputs()
    for dtype, largest in ((INT8, 127), (FLOAT8, 448)):
        w = nms.compress(torch.full((ROWS, 1024), largest).to(dtype), "2:4", prune=True)
        problem = Problem(torch.device("cpu"), dtype, nms.Pattern(2, 4), ROWS, 1024, torch.float16)
        assert crossover.choices_for(problem).at(40) == LT
        x = torch.full((40, 1024), 1e-3 if dtype == FLOAT8 else 0.5).half()
        torch.testing.assert_close(F.linear(x, w).double(), exact(x, w), rtol=2e-2, atol=0)


def test_scales_that_somebody_else_has_found(gone: list[str]) -> None:
    w, scales, bias = eight_bits(INT8), torch.rand(ROWS) + 0.5, torch.randn(ROWS)
    for tokens, inputs in ((3, torch.bfloat16), (40, torch.float16), (3, torch.float32)):
        x = torch.randn(tokens, K).to(inputs)
        expected = F.gelu(
            F.linear(x.float(), w.to_dense().float() * scales[:, None], bias.to(inputs).float())
        )
        for given in (scales, scales[:, None]):
            y = nms.int8_linear(x, w, given, bias, activation="gelu")
            torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=5e-2)
    assert gone == [SMALL_BATCH] * 2 + [DENSE] * 4
    with pytest.raises(ValueError, match="'cuda-int8' on a GPU"):
        nms.int8_linear(x, w.with_engine("decompress"), scales)


def test_inputs_of_8_bits_are_multiplied_as_ever() -> None:
    w = eight_bits(INT8)
    x = torch.randint(-1, 2, (3, K), dtype=INT8)
    assert torch.equal(F.linear(x, w), F.linear(x, w.to_dense()))
    assert torch.equal(x.new_ones(2, ROWS) @ w, x.new_ones(2, ROWS) @ w.to_dense())
    y = cusparselt.linear(x, cusparselt.pack(w), out_dtype=torch.int32)
    assert torch.equal(y.double(), exact(x, w))


@pytest.mark.parametrize("dtype", [INT8, FLOAT8])
def test_products_copies_and_casts(dtype: torch.dtype) -> None:
    w = eight_bits(dtype)
    dense = w.to_dense().float()
    g = torch.randint(-3, 4, (3, ROWS)).half()
    assert torch.equal((g @ w).float(), g.float() @ dense)
    assert torch.equal(F.linear(g, w.t()).float(), g.float() @ dense)
    assert copy.deepcopy(w).engine == w.engine
    assert w.to(torch.bfloat16).engine == "cuda"  # nothing is rounded that was not asked to be
    x = torch.randint(-3, 4, (3, K)).half()
    other = nms.nm_prune(torch.randint(-7, 8, (ROWS, K)).float(), "2:4").to(dtype)
    with torch.no_grad():
        w.copy_(other)
    assert torch.equal(F.linear(x, w).float(), F.linear(x.float(), other.float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x.float(), w).dtype == torch.bfloat16
    with FakeTensorMode():
        fake = nms.compress(torch.empty(ROWS, K, device="cuda", dtype=dtype), "2:4", prune=True)
        assert fake.engine == ENGINE[dtype]
        assert F.linear(torch.empty(3, K, device="cuda", dtype=torch.bfloat16), fake).shape == (3, ROWS)


@pytest.mark.parametrize("dtype", [INT8, FLOAT8])
def test_graphs_and_gradients(dtype: torch.dtype, gone: list[str]) -> None:
    crossover.allow_rounded_inputs()
    decree(problem(dtype, torch.bfloat16), (8, DENSE), (9, LT))
    layer = nn.Linear(K, ROWS, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(eight_bits(dtype), requires_grad=False)
    assert layer.weight.form_blob.numel()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    dense = layer.weight.to_dense().float()
    for tokens, way in ((3, DENSE), (40, LT)):
        x = torch.randint(-2, 3, (tokens, K)).bfloat16().requires_grad_()
        for call in (layer, compiled):
            x.grad = layer.bias.grad = None
            y = call(x)
            torch.testing.assert_close(
                y.float(), F.linear(x.float(), dense, layer.bias.float()), rtol=0.1, atol=2
            )
            y.sum().backward()
            torch.testing.assert_close(x.grad.float(), dense.sum(0).expand(tokens, K), rtol=2e-2, atol=1e-1)
            torch.testing.assert_close(layer.bias.grad, torch.full_like(layer.bias, tokens))
            assert gone[-1] == way
    w = layer.weight
    operands = (*engines_cuda_8bit.parts_of(w), layer.bias.detach(), 2, 4, "relu")
    utils = ["test_autograd_registration", "test_faketensor"]
    if dtype == INT8:  # the check of schemas adds random numbers, which there are none of in float8
        utils.append("test_schema")
    torch.library.opcheck(
        torch.ops.nmsparse.eight_bit_linear, (x.detach()[:3], *operands), test_utils=tuple(utils)
    )


def test_what_does_not_run() -> None:
    with pytest.raises(ValueError, match="takes float16 and bfloat16, not float32"):
        nms.compress(torch.randn(ROWS, K), "2:4", prune=True).with_engine("cuda-float8")
    with pytest.raises(ValueError, match="it multiplies matrices, the weight has 4"):
        nms.compress(torch.randn(ROWS, K, 1, 1).half(), "2:4", prune=True).with_engine("cuda-int8")
    w = eight_bits(INT8)
    with pytest.raises(RuntimeError):
        F.linear(torch.randn(3, K // 2).half(), w)
    crossover.allow_rounded_inputs()
    assert "4:8 does not embed" in str(crossover.reasons(problem(INT8, torch.float16, "4:8"))[LT])
    assert "not float32" in str(crossover.reasons(problem(INT8, torch.float32))[LT])
    small = crossover.reasons(problem(FLOAT8, torch.float16))[SMALL_BATCH]
    assert small == "the small-batch kernel takes 8-bit weights of int8 only, not float8_e4m3fn"
    assert str(problem(INT8, torch.float16)) == "int8 by float16 2:4 32x64"


# ------------------------------------------------------------------------------------------------ measuring


class _Stub:
    def __init__(self, problem: Problem, parts: engines_cuda_8bit.Parts) -> None:
        assert parts.values.dtype == problem.dtype

    def microseconds(self, tokens: int, branches: Any) -> dict[str, float]:
        return {branch: 1.0 if branch == LT else 5.0 for branch in branches}


@pytest.mark.parametrize("dtype", [INT8, FLOAT8])
def test_measured_like_other_weights(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines_cuda_8bit, "_Timer", _Stub)
    monkeypatch.setattr(engines_cuda, "_may_measure", lambda values: True)
    crossover.allow_rounded_inputs()
    monkeypatch.setattr(crossover, "_many", lambda problem, ways: DENSE)
    dense = nms.nm_prune(torch.randn(ROWS, K).half(), "2:4")
    w = nms.compress(dense, "2:4").with_engine(ENGINE[dtype])
    assert not w.form_blob.numel()
    measured = engines_cuda_8bit.tuned(w, 100)
    assert measured.form_blob.numel()
    assert engines_cuda_8bit.tuned(measured, 100) is measured
    found = crossover.measured(problem(dtype, torch.float16))
    assert found is not None
    assert list(found.points) == [1, 4, 8, 16, 32, 64, 100]
    assert crossover.measured(problem(dtype, torch.bfloat16)) is None
    plain = nms.compress(dense.bfloat16(), "2:4")
    monkeypatch.setattr(engines_cuda, "_measures_now", lambda device: True)
    plain.with_engine(ENGINE[dtype])
    assert crossover.measured(problem(dtype, torch.bfloat16)) is not None


def test_what_was_measured_before_inputs_could_be_rounded_counts_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engines_cuda_8bit, "_Timer", _Stub)
    monkeypatch.setattr(engines_cuda, "_may_measure", lambda values: True)
    w = engines_cuda_8bit.tuned(eight_bits(INT8), 64)
    assert not w.form_blob.numel()
    assert "cusparselt" not in str(crossover.choices_for(problem(INT8, torch.bfloat16)))
    monkeypatch.setattr(engines_cuda_8bit, "_Timer", None)  # nothing is measured again
    crossover.allow_rounded_inputs()
    assert str(crossover.choices_for(problem(INT8, torch.bfloat16))) == "cusparselt always"
    assert engines_cuda_8bit.tuned(w, 64).form_blob.numel()


@pytest.mark.parametrize("dtype", [INT8, FLOAT8])
def test_what_is_timed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmsparse_ext._crossover_timer.COLD_BYTES", 4 * ROWS * K)
    parts = engines_cuda_8bit.parts_of(eight_bits(dtype))
    timer = engines_cuda_8bit._Timer(problem(dtype, torch.bfloat16), parts)
    x = torch.randn(3, K).bfloat16()
    for way in (SMALL_BATCH, DENSE, LT) if dtype == INT8 else (DENSE, LT):
        sets = timer._sets(way)
        assert len(sets) > 2
        assert len({(one.blob if way == LT else one.values).data_ptr() for one in sets}) == len(sets)
        call = timer._call(way, x, sets)
        torch.testing.assert_close(call(0), call(1))


# ----------------------------------------------------------------------------------- rounded on request


@pytest.mark.parametrize("tokens", [1, 32, 33])
def test_float8_weights(tokens: int) -> None:
    dense = nms.nm_prune(torch.randn(ROWS, K).bfloat16(), "2:4")
    w = nms.compress(dense, "2:4").with_engine("cuda-float8")
    assert w.form_rounded.dtype == FLOAT8
    x = torch.randn(tokens, K).bfloat16()
    bound = F.linear(x.double().abs(), dense.double().abs()) / 16
    assert ((F.linear(x, w).double() - exact(x, w)).abs() <= bound * 1.1 + 0.05).all()
    zeros = nms.compress(torch.zeros(ROWS, K).half(), "2:4").with_engine("cuda-float8")
    assert torch.equal(F.linear(x.half(), zeros), torch.zeros(tokens, ROWS).half())


def test_converted_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in ENGINE.values():
        model = nn.Sequential(nn.Linear(K, ROWS), nn.ReLU(), nn.Linear(ROWS, K)).bfloat16()
        for i in (0, 2):
            nms.nm_prune_(model[i].weight.data, "2:4")
        x = torch.randn(5, K).bfloat16()
        expected = model(x)
        nms.convert(model, policy="always", engine=engine)
        assert model[0].weight.engine == model[2].weight.engine == engine
        torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.1)
        (first, _) = nms.deploy.report(model)
        assert "would have inputs rounded" in first.reason
        assert f"{ROWS * K // 2:,} rounded" in first.reason


@pytest.mark.parametrize("tokens", [1, 32, 33])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_int8_weights(tokens: int, activation: str) -> None:
    dense = nms.nm_prune(torch.randn(ROWS, K).bfloat16(), "2:4")
    w = nms.compress(dense, "2:4").with_engine("cuda-int8")
    assert w.form_rounded.dtype == torch.int8
    scales = dense.float().abs().amax(1) / 127
    x = torch.randn(1, tokens, K, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(ROWS, dtype=torch.bfloat16, requires_grad=True)
    y = nms.linear(x, w, bias, activation)
    expected = F.linear(x.float(), dense.float(), bias.float())
    expected = expected if activation == "none" else F.silu(expected)
    bound = 0.5 * scales * x.detach().float().abs().sum(-1, keepdim=True) * 1.1
    assert ((y.float() - expected).abs() <= bound + 0.02 * expected.abs() + 0.01).all()
    y.sum().backward()
    other = x.detach().float().requires_grad_()
    y = F.linear(other, dense.float(), bias.detach().float())
    (y if activation == "none" else F.silu(y)).sum().backward()
    torch.testing.assert_close(x.grad.float(), other.grad, rtol=0.05, atol=0.2)
    with torch.no_grad():
        w.copy_(2 * dense)
        torch.testing.assert_close(
            nms.linear(x, w).float(), F.linear(x.float(), 2 * dense.float()), rtol=0.1, atol=0.3
        )


def test_int8_weights_elsewhere() -> None:
    w = nms.compress(torch.randn(ROWS, K).half(), "4:8", prune=True).with_engine("cuda-int8")
    x = torch.randn(3, K).half()
    expected = F.linear(x, w.to_dense())
    full = torch.randn(3, ROWS).half()
    torch.testing.assert_close(nms.linear(x, w, full, "relu"), F.relu(expected + full), rtol=0.1, atol=0.1)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.linear(x, w), backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (3, 40):
        x = torch.randn(tokens, K).half()
        torch.testing.assert_close(compiled(x), F.linear(x, w.to_dense()), rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x.float(), w).dtype == torch.bfloat16
    operands = (x[:3], w.form_rounded, w.indices, w.form_scales, w.form_blob, None, 4, 8, "relu")
    torch.library.opcheck(torch.ops.nmsparse.eight_bit_linear, operands)
    with pytest.raises(ValueError, match="takes float16 and bfloat16, not float32"):
        nms.compress(torch.randn(ROWS, K), "2:4", prune=True).with_engine("cuda-int8")
