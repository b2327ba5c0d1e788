"""The engine of GPUs, on the CPU: every way gives the same results, and NMTensor holds what it needs."""

from __future__ import annotations

import copy
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_crossovers import decree, problem_like
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import nmsparse_ext as nms
from nmsparse_ext import crossover, cusparselt, engines_cuda
from nmsparse_ext.crossover import DENSE, LT, SMALL_BATCH

pytestmark = pytest.mark.usefixtures("gpu")
ROWS, K = 32, 64
HALF = torch.float16


def integers(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    """Small ones: their sums are exact in every order."""
    return torch.randint(-2, 3, shape).to(dtype)


def three_ways(pattern: str = "2:4", dtype: torch.dtype = HALF, **options: Any) -> nms.NMTensor:
    """A weight that goes a way of its own for 2, for 4 and for more tokens."""
    w = integers(ROWS, K, dtype=dtype)
    decree(problem_like(w, pattern), (2, SMALL_BATCH), (4, DENSE), (5, LT))
    return nms.compress(w, pattern, prune=True, **options)


class Ways:
    """Which way products have gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gone: list[str] = []
        multiply = engines_cuda.multiply

        def counted(branch: str, *args: Any) -> Tensor:
            self.gone.append(branch)
            return multiply(branch, *args)

        monkeypatch.setattr(engines_cuda, "multiply", counted)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch, gpu: None) -> Ways:
    return Ways(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
def test_every_way_gives_the_same(dtype: torch.dtype, activation: str, ways: Ways) -> None:
    pattern = "1:2" if dtype == torch.float32 else "2:4"
    w, bias = three_ways(pattern, dtype), integers(ROWS, dtype=dtype)
    assert w.engine == "cuda"
    for tokens in (0, 1, 2, 3, 4, 5, 40):
        x = integers(tokens, K, dtype=dtype)
        expected = x @ w.to_dense().T + bias
        if activation != "none":
            expected = getattr(F, activation)(expected)
        y = nms.linear(x, w, bias, activation)
        torch.testing.assert_close(y, expected)
        assert y.is_contiguous()
    first = DENSE if dtype == torch.float32 else SMALL_BATCH
    assert ways.gone == [*[first] * 3, DENSE, DENSE, LT, LT]


@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 1, K), (2, 3, K), (2, 0, K)])
def test_shapes_and_biases(shape: tuple[int, ...]) -> None:
    w, x = three_ways(), integers(*shape)
    for bias in (
        None,
        integers(ROWS),
        integers(ROWS + 1)[1:],
        integers(2 * ROWS)[::2],
        integers(1),
        integers(1)[0],
    ):
        expected = F.linear(x.double(), w.to_dense().double(), None if bias is None else bias.double())
        assert torch.equal(F.linear(x, w, bias).double(), expected)
    if len(shape) == 3:
        full = integers(*shape[:-1], ROWS)
        y = nms.linear(x, w, full, "relu")
        assert torch.equal(y.double(), F.relu(x.double() @ w.to_dense().double().T + full.double()))


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_inputs_that_do_not_fit(tokens: int, requires_grad: bool) -> None:
    w, bias = three_ways(), integers(ROWS)
    for x in (
        integers(tokens, K // 2),
        integers(tokens, 2 * K),
        integers(tokens, K, dtype=torch.float32),
        integers(tokens, K, dtype=torch.bfloat16),
    ):
        with pytest.raises(RuntimeError):
            F.linear(x.requires_grad_(requires_grad), w, bias)
    with pytest.raises(RuntimeError):
        F.linear(integers(tokens, K), w, bias.float())


@pytest.mark.parametrize("pattern", ["1:4", "2:8", "1:16", "4:8", "3:4", "1:32", "8:32", "1:64"])
def test_patterns(pattern: str, ways: Ways) -> None:
    w = integers(ROWS, K)
    packed = nms.compress(w, pattern, prune=True)
    for tokens in (1, 200):
        x = integers(tokens, K)
        assert torch.equal(F.linear(x, packed).double(), x.double() @ packed.to_dense().double().T)
    assert ways.gone[1] == DENSE  # so small a product
    assert ways.gone[0] == (DENSE if pattern in ("3:4", "1:64") else SMALL_BATCH)


@pytest.mark.parametrize("group_dim", [0, 1])
def test_products_of_all_kinds(group_dim: int) -> None:
    w = integers(K, ROWS) if group_dim == 0 else integers(ROWS, K)
    packed = nms.compress(w, "2:4", dim=group_dim, prune=True)
    assert packed.engine == "cuda"
    dense = packed.to_dense()
    for tokens in (1, 3, 17):
        x, g = integers(tokens, dense.shape[1]), integers(tokens, dense.shape[0])
        assert torch.equal(F.linear(x, packed), F.linear(x, dense))
        assert torch.equal(g @ packed, g @ dense)
        assert torch.equal(torch.addmm(integers(dense.shape[1]) * 0, g, packed), g @ dense)
        assert torch.equal(packed @ x.T, dense @ x.T)
        assert torch.equal(F.linear(g, packed.t()), g @ dense)


# ---------------------------------------------------------------------------------------- what is held


def test_only_forms_that_some_number_of_tokens_needs() -> None:
    w = integers(ROWS, K)
    dense_bytes = w.nbytes
    for way, held in ((SMALL_BATCH, {"dense"}), (DENSE, {"dense"}), (LT, {"blob"})):
        decree(problem_like(w, "2:4"), (1, way))
        packed = nms.compress(w, "2:4", prune=True)
        forms = dict(zip(("dense", "blob"), packed.forms(), strict=True))
        assert {name for name, form in forms.items() if form.numel()} == held, way
        assert packed.engine_nbytes == sum(form.nbytes for form in forms.values())
        assert packed.nbytes == dense_bytes * 9 // 16
    lean = packed.with_engine("cuda-packed")
    assert lean.engine_nbytes == 0
    for tokens in (1, 8):
        x = integers(tokens, K)
        assert torch.equal(F.linear(x, lean), F.linear(x, lean.to_dense()))


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "4:8"])
def test_less_memory_on_request(pattern: str, ways: Ways) -> None:
    w = integers(ROWS, K)
    decree(problem_like(w, pattern), (2, SMALL_BATCH), (2000, DENSE), (2001, LT))
    packed = nms.compress(w, pattern, prune=True)
    dense = packed.to_dense()
    engines = ("cuda-packed",) if pattern == "4:8" else ("cuda-packed", "cuda-sparse")
    for engine in engines:
        lean = packed.with_engine(engine)
        blob = ROWS * K * 2 * 9 // 16 if engine == "cuda-sparse" else 0
        assert lean.engine_nbytes == blob
        assert engines_cuda.memory(lean) == {"packed": packed.nbytes, "dense": 0, "for cuSPARSELt": blob}
        for compiled in (False, True):
            torch._dynamo.reset()
            call = F.linear
            if compiled:
                call = torch.compile(F.linear, backend="aot_eager", fullgraph=True, dynamic=True)
            ways.gone.clear()
            for tokens in (2, 32, 33, 64):
                x = integers(tokens, K).requires_grad_(compiled)
                assert torch.equal(call(x, lean), F.linear(x, dense))
            many = LT if engine == "cuda-sparse" else DENSE
            assert ways.gone == [SMALL_BATCH, SMALL_BATCH, many, many]
        assert torch.equal(integers(3, ROWS) * 0 @ lean, integers(3, ROWS) * 0 @ dense)
        with torch.no_grad():
            lean = lean.clone()
            lean.copy_(2 * dense)
            for tokens in (2, 64):
                x = integers(tokens, K)
                assert torch.equal(F.linear(x, lean), F.linear(x, 2 * dense))
        assert copy.deepcopy(lean).engine == engine
        assert engines_cuda.refit(lean) is lean
    if pattern == "4:8":
        with pytest.raises(ValueError, match="4:8 does not embed in 2:4"):
            packed.with_engine("cuda-sparse")


def test_less_memory_where_nothing_was_measured(ways: Ways) -> None:
    packed = nms.compress(integers(ROWS, K), "2:4", prune=True)
    for engine, many in (("cuda-packed", DENSE), ("cuda-sparse", LT)):
        ways.gone.clear()
        for tokens in (1, 32, 33, 3000):
            F.linear(integers(tokens, K), packed.with_engine(engine))
        assert ways.gone == [SMALL_BATCH, SMALL_BATCH, many, many]
    alone = nms.compress(integers(ROWS, K, dtype=torch.float32), "1:2", prune=True).with_engine("cuda-sparse")
    ways.gone.clear()
    F.linear(integers(1, K, dtype=torch.float32), alone)
    assert ways.gone == [LT]


def test_a_weight_of_less_memory_on_a_device_that_is_not_there() -> None:
    with FakeTensorMode():
        packed = nms.compress(torch.empty(ROWS, K, device="cuda", dtype=HALF), "2:4", prune=True)
        y = F.linear(torch.empty(3, K, device="cuda", dtype=HALF), packed.with_engine("cuda-sparse"))
        assert y.shape == (3, ROWS)


def test_refit_frees_what_never_wins() -> None:
    model = nn.Sequential(nn.Linear(K, ROWS, dtype=HALF), nn.Linear(K, ROWS, dtype=HALF), nn.ReLU())
    model[1].weight = model[0].weight
    nms.nm_prune_(model[0].weight.data, "2:4")
    dense_bytes = ROWS * K * 2
    decree(problem_like(model[0].weight, "2:4"), (2, SMALL_BATCH), (4, DENSE), (5, LT))
    nms.convert(model, policy="always")
    assert model[0].weight.held_nbytes == dense_bytes * 17 // 8
    (row,) = nms.deploy.report(model)
    assert row.packed_bytes == dense_bytes * 17 // 8
    assert "holds bytes: 2,304 packed, 4,096 dense, 2,304 for cuSPARSELt" in row.reason
    expected = F.linear(integers(9, K) * 0 + 1, model[0].weight)
    assert nms.deploy.refit(model) == 0
    before = model[0].weight
    decree(problem_like(before.to_dense(), "2:4"), (2, SMALL_BATCH), (3, LT))
    assert nms.deploy.refit(model) == dense_bytes
    assert model[0].weight is model[1].weight
    assert model[0].weight is not before
    assert torch.equal(F.linear(integers(9, K) * 0 + 1, model[0].weight), expected)
    (row,) = nms.deploy.report(model)
    assert row.packed_bytes == model[0].weight.held_nbytes == dense_bytes * 9 // 8
    assert "fitted anew: small-batch 1 to 2, cusparselt from 3 tokens (measured)" in row.reason
    decree(problem_like(before.to_dense(), "2:4"), (2, SMALL_BATCH), (3, DENSE))
    # Wrapped, under whose names its report does not know the weights.
    assert nms.deploy.refit(torch.compile(model)) == dense_bytes * 9 // 16 - dense_bytes
    (row,) = nms.deploy.report(model)
    assert row.packed_bytes == model[0].weight.held_nbytes == dense_bytes * 25 // 16
    alone = nn.Linear(K, ROWS, dtype=HALF)  # one that convert has not seen
    alone.weight = nn.Parameter(before, requires_grad=False)
    assert nms.deploy.refit(alone) == dense_bytes * 9 // 16


def test_a_way_whose_form_is_not_held_goes_dense() -> None:
    w = integers(ROWS, K)
    decree(problem_like(w, "2:4"), (1, DENSE))
    packed = nms.compress(w, "2:4", prune=True)
    decree(problem_like(w, "2:4"), (1, LT))
    x = integers(8, K)
    assert torch.equal(F.linear(x, packed), F.linear(x, packed.to_dense()))
    decree(problem_like(w, "2:4"), (1, LT))
    only_lt = nms.compress(w, "2:4", prune=True)
    decree(problem_like(w, "2:4"), (1, DENSE))
    assert torch.equal(F.linear(x, only_lt), F.linear(x, packed.to_dense()))
    assert torch.equal(x.new_ones(3, ROWS) @ only_lt, x.new_ones(3, ROWS) @ packed.to_dense())


def test_writes_reach_every_form() -> None:
    w = three_ways()
    dense_ptr = w.form_dense.data_ptr()
    other = nms.nm_prune(integers(ROWS, K), "2:4")
    with torch.no_grad():
        w.copy_(other)
    for tokens in (1, 3, 9):
        x = integers(tokens, K)
        assert torch.equal(F.linear(x, w), F.linear(x, other))
    with torch.no_grad():
        w.values.mul_(2)
    for tokens in (1, 3, 9):
        x = integers(tokens, K)
        assert torch.equal(F.linear(x, w), F.linear(x, 2 * other))
    assert w.form_dense.data_ptr() == dense_ptr
    decree(problem_like(other, "2:4"), (1, DENSE))  # what is held does not change under a write
    with torch.no_grad():
        w.copy_(other)
    assert torch.equal(F.linear(integers(9, K) * 0 + 1, w), F.linear(integers(9, K) * 0 + 1, other))


def test_copies_saves_and_pieces(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(K, ROWS, dtype=HALF), nn.ReLU(), nn.Linear(ROWS, K, dtype=HALF))
    for layer in (model[0], model[2]):
        nms.nm_prune_(layer.weight.data, "2:4")
    dense = copy.deepcopy(model)
    nms.convert(model, policy="always")
    assert [model[0].weight.engine, model[2].weight.engine] == ["cuda", "cuda"]
    x = torch.randn(5, K, dtype=HALF)
    expected = dense(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(model)
    again.load_state_dict(torch.load(file, weights_only=True))
    for one in (model, copy.deepcopy(model), again):
        torch.testing.assert_close(one(x), expected)
    top = model[0].weight[:16]
    torch.testing.assert_close(F.linear(x, top), F.linear(x, dense[0].weight[:16]))
    assert top.engine == "cuda-packed"
    assert model[0].weight.to(torch.bfloat16).engine == "cuda"


def test_a_weight_of_a_device_that_is_not_there() -> None:
    with FakeTensorMode():
        packed = nms.compress(torch.empty(ROWS, K, device="cuda", dtype=HALF), "2:4", prune=True)
        assert packed.engine == "cuda"
        y = F.linear(torch.empty(3, 5, K, device="cuda", dtype=HALF), packed)
        assert (y.shape, y.device.type) == ((3, 5, ROWS), "cuda")


def test_other_weights_go_other_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        engines_cuda.why_not_matrix(nms.compress(integers(ROWS, K).double(), "2:4", prune=True)) is not None
    )
    conv = nms.compress(torch.randn(8, 16, 3, 3).half(), "2:4", prune=True)
    assert "multiplies matrices" in str(engines_cuda.why_not_matrix(conv))
    with pytest.raises(ValueError, match="engine 'cuda' cannot run this weight: it multiplies matrices"):
        conv.with_engine("cuda")
    with monkeypatch.context() as patch:
        patch.setattr(engines_cuda, "DEVICES", {"cuda"})
        plain = nms.compress(integers(ROWS, K), "2:4", prune=True)
        assert plain.engine != "cuda"
        with pytest.raises(ValueError, match="it runs on NVIDIA GPUs, the weight is on cpu"):
            plain.with_engine("cuda")
        with pytest.raises(ValueError, match="weight cannot be measured: it runs on NVIDIA GPUs"):
            engines_cuda.measure_once(plain)


# ---------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("tokens", [2, 4, 6])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
def test_gradients_of_input_and_bias(tokens: int, activation: str, ways: Ways) -> None:
    w = three_ways(dtype=torch.bfloat16)
    x = torch.randn(1, tokens, K, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(ROWS, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(1, tokens, ROWS, dtype=torch.bfloat16)
    nms.linear(x, w, bias, activation).backward(grad)
    mine = x.grad, bias.grad
    assert ways.gone[0] == {2: SMALL_BATCH, 4: DENSE, 6: LT}[tokens]
    exact_x, exact_bias = x.detach().float().requires_grad_(), bias.detach().float().requires_grad_()
    y = F.linear(exact_x, w.to_dense().float(), exact_bias)
    (y if activation == "none" else getattr(F, activation)(y)).backward(grad.float())
    torch.testing.assert_close(mine[0].float(), exact_x.grad, rtol=0.05, atol=0.15)
    torch.testing.assert_close(mine[1].float(), exact_bias.grad, rtol=0.05, atol=0.15)


def test_gradients_of_values_and_of_one_vector() -> None:
    w = torch.randn(ROWS, K, dtype=torch.float32, requires_grad=True)
    x = torch.randn(5, K)
    nms.linear(x, nms.compress(w, "1:2", prune=True)).sum().backward()
    expected = (torch.ones(5, ROWS).T @ x) * nms.nm_mask(w.detach(), "1:2")
    torch.testing.assert_close(w.grad, expected)
    packed = nms.compress(w.detach(), "1:2", prune=True)
    x, bias = torch.randn(K, requires_grad=True), torch.zeros(ROWS, requires_grad=True)
    F.linear(x, packed, bias).sum().backward()
    torch.testing.assert_close(x.grad, packed.to_dense().sum(0))
    torch.testing.assert_close(bias.grad, torch.ones(ROWS))


def test_transforms() -> None:
    w = three_ways(dtype=torch.float32, pattern="1:2")
    x = torch.randn(3, 4, K)
    expected = F.linear(x, w.to_dense())
    torch.testing.assert_close(torch.func.vmap(lambda x: F.linear(x, w))(x), expected)
    _, tangent = torch.func.jvp(lambda x: F.linear(x, w), (x,), (x,))
    torch.testing.assert_close(tangent, expected)


# ---------------------------------------------------------------------------------------- compile and export


def test_compiled_for_any_number_of_tokens(ways: Ways) -> None:
    layer = nn.Linear(K, ROWS, dtype=HALF)
    layer.weight = nn.Parameter(three_ways(), requires_grad=False)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    sizes = []
    for tokens in (3, 2, 7, 40):
        x = integers(tokens, K).requires_grad_()
        y = compiled(x)
        y.sum().backward()
        sizes.append(ways.gone[-1])
        expected_x = x.detach().requires_grad_()
        expected = F.linear(expected_x, layer.weight.to_dense(), layer.bias)
        expected.sum().backward()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(x.grad, expected_x.grad)
    assert sizes == [DENSE, SMALL_BATCH, LT, LT]
    counters = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for tokens in (3, 50, 1):
            torch.testing.assert_close(compiled(integers(tokens, K)).shape, torch.Size([tokens, ROWS]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= counters + 2


def test_inductor() -> None:
    layer = nn.Linear(K, ROWS)
    layer.weight = nn.Parameter(three_ways("1:2", torch.float32), requires_grad=False)
    dense = layer.weight.to_dense()
    compiled = torch.compile(nn.Sequential(layer, nn.ReLU()), fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (4, 9):
            x = torch.randn(tokens, K)
            torch.testing.assert_close(compiled(x), F.relu(F.linear(x, dense, layer.bias)))


def test_exported_with_tokens_left_open(ways: Ways) -> None:
    layer = nn.Linear(K, ROWS, dtype=HALF)
    layer.weight = nn.Parameter(three_ways(), requires_grad=False)
    tokens = torch.export.Dim("tokens", min=1, max=1 << 16)
    program = torch.export.export(layer, (integers(3, K),), dynamic_shapes=({0: tokens},))
    assert any(node.target is torch.ops.nmsparse.tuned_linear.default for node in program.graph.nodes)
    module = program.module()
    ways.gone.clear()
    for count in (1, 4, 9):
        x = integers(count, K)
        torch.testing.assert_close(module(x), F.linear(x, layer.weight.to_dense(), layer.bias))
    assert ways.gone == [SMALL_BATCH, DENSE, LT]


def test_the_op() -> None:
    w = three_ways()
    operands = (w.values, w.indices, w.form_dense, w.form_blob)
    for tokens in (2, 4, 6):
        x, bias = torch.randn(tokens, K, dtype=HALF), torch.randn(ROWS, dtype=HALF)
        torch.library.opcheck(torch.ops.nmsparse.tuned_linear, (x, *operands, bias, 2, 4, "none"))
        x.requires_grad_()
        torch.library.opcheck(
            torch.ops.nmsparse.tuned_linear,
            (x, w.values, w.indices, None, None, None, 2, 4, "relu"),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


# ---------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled: bool, ways: Ways) -> None:
    w = integers(ROWS, K, dtype=torch.float32)
    decree(problem_like(w.bfloat16(), "2:4"), (2, SMALL_BATCH), (4, DENSE), (5, LT))
    layer = nn.Linear(K, ROWS)
    layer.weight = nn.Parameter(nms.compress(w, "2:4", prune=True), requires_grad=False)
    dense = nn.Linear(K, ROWS)
    dense.load_state_dict({"weight": layer.weight.to_dense(), "bias": layer.bias})
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    with torch.autocast("cpu", torch.bfloat16):
        for tokens in (1, 3, 9):
            x = integers(tokens, K, dtype=torch.float32).requires_grad_()
            y = call(x)
            assert y.dtype == torch.bfloat16
            y.sum().backward()
            torch.testing.assert_close(y, dense(x))
            torch.testing.assert_close(x.grad, layer.weight.to_dense().sum(0).expand(tokens, K))
    # In a graph there is no place for other forms of a weight that is cast.
    assert set(ways.gone) == ({SMALL_BATCH} if compiled else {SMALL_BATCH, DENSE, LT})
    if not compiled:  # cast once
        shared = layer.weight.shared
        assert shared is not None
        assert shared.cast_weight(torch.bfloat16) is shared.cast_weight(torch.bfloat16)


# ---------------------------------------------------------------------------------------- measured tables


def test_first_use_measures_where_a_weight_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    from nmsparse_ext import _crossover_timer

    made = []

    class Timer:
        def __init__(self, weight: nms.NMTensor) -> None:
            made.append(weight.dense_shape())

        def microseconds(self, tokens: int, branches: Any) -> dict[str, float]:
            return {branch: 1.0 if branch == LT else 5.0 for branch in branches}

    monkeypatch.setattr(_crossover_timer, "CudaTimer", Timer)
    monkeypatch.setattr(engines_cuda, "_measures_now", lambda device: cusparselt.search_mode() == "first-use")
    assert not crossover.choices_for(problem_like(integers(ROWS, K), "2:4")).measured
    nms.compress(integers(ROWS, K), "2:4", prune=True)
    assert made == []
    cusparselt.set_search_mode("first-use")
    for _ in range(2):
        packed = nms.compress(integers(ROWS, K), "2:4", prune=True)
    assert made == [(ROWS, K)]
    assert crossover.choices_for(engines_cuda.problem_of(packed)).branches == (LT,)
    assert packed.form_blob.numel()
    assert not packed.form_dense.numel()


def test_nothing_is_measured_on_the_cpu() -> None:
    assert not engines_cuda._measures_now(torch.device("cpu"))


# ----------------------------------------------------------------------------------------- converting models


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Measuring finds that cuSPARSELt wins from 32 tokens; the numbers of tokens that were asked for."""
    from nmsparse_ext import _crossover_timer

    asked: list[int] = []

    class Timer:
        def __init__(self, weight: nms.NMTensor) -> None:
            pass

        def microseconds(self, tokens: int, branches: Any) -> dict[str, float]:
            asked.append(tokens)
            times = {SMALL_BATCH: float(tokens), DENSE: 20.0 + tokens, LT: 30.0 + tokens / 2}
            return {branch: times[branch] for branch in branches}

    monkeypatch.setattr(_crossover_timer, "CudaTimer", Timer)
    monkeypatch.setattr(engines_cuda, "_may_measure", lambda values: cusparselt.search_mode() != "off")
    return asked


def pruned() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(K, ROWS), nn.ReLU(), nn.Linear(ROWS, K)).to(torch.bfloat16)
    nms.nm_prune_(model[0].weight.data, "2:4")
    nms.nm_prune_(model[2].weight.data, "4:8")
    return model


def test_convert_measures_what_its_example_needs(timer: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmsparse_ext.deploy.race.MIN_GAIN", 0.0)  # packed, whatever the clock says
    convert = sys.modules["nmsparse_ext.deploy.convert"]  # the name is the function's
    monkeypatch.setattr(convert, "undo_slower", lambda *args, **kwargs: None)
    x = torch.randn(3, 16, K, dtype=torch.bfloat16)
    model = nms.convert(pruned(), example_input=x)
    assert sorted(set(timer)) == [1, 4, 8, 16, 32, 48]
    assert crossover.choices_for(engines_cuda.problem_of(model[0].weight)).measured
    assert model[0].weight.form_blob.numel()
    first, second = nms.deploy.report(model)
    assert first.engine == second.engine == "cuda"
    assert "small-batch 1 to 32, cusparselt from 33 tokens (measured)" in first.reason
    assert "small-batch 1 to 32, dense from 33 tokens (measured); 4:8 does not embed in 2:4" in second.reason
    timer.clear()
    nms.convert(pruned(), example_input=x)
    assert timer == []  # it is known
    cusparselt.set_search_mode("off")
    crossover.forget_choices()
    nms.convert(pruned(), example_input=x.expand(9, 3, 16, K))
    assert timer == []


def test_a_report_without_measurements_says_so() -> None:
    model = nms.convert(pruned(), policy="always")
    reasons = [row.reason for row in nms.deploy.report(model)]
    assert all("by rule, not measured" in reason for reason in reasons)
    assert "4:8 does not embed in 2:4, which is what sparse tensor cores run" in reasons[1]
