"""Packed weights on a GPU, whichever way products go: right, compiled, captured, on streams and devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_crossovers import decree, problem_like
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext import crossover, cusparselt, engines_cuda
from nmsparse_ext import tune as tuning
from nmsparse_ext._build import extension
from nmsparse_ext.crossover import DENSE, LT, SMALL_BATCH
from nmsparse_ext.train import Accelerate

pytestmark = [
    pytest.mark.needs_cuda,
    pytest.mark.skipif(
        extension is None or not extension.build_info()["cuda"], reason="this build has no CUDA kernels"
    ),
]

HALF = torch.float16
WAYS = (SMALL_BATCH, DENSE, LT)
TOKENS = {SMALL_BATCH: (1, 2, 7, 16, 32), DENSE: (3, 40), LT: (33, 64, 1000)}


@pytest.fixture(autouse=True)
def _own_tables(tmp_path: Path) -> Iterator[None]:
    before, path = cusparselt.search_mode(), cusparselt.algorithms_path()
    cusparselt.set_search_mode("file", path=tmp_path / "algorithms.json")
    crossover.set_table(tmp_path / "crossovers.json")
    yield
    cusparselt.set_search_mode(before, path=path)
    crossover.set_table(None)


def integers(*shape: int, dtype: torch.dtype = HALF, device: str = "cuda") -> Tensor:
    """Small ones: their sums are exact in every order."""
    return torch.randint(-2, 3, shape, device=device).to(dtype)


def can(way: str, device: str = "cuda") -> None:
    if way == LT and cusparselt.why_not(device) is not None:
        pytest.skip(str(cusparselt.why_not(device)))


def packed(
    way: str,
    rows: int = 256,
    k: int = 512,
    pattern: str = "2:4",
    dtype: torch.dtype = HALF,
    device: str = "cuda",
) -> nms.NMTensor:
    """A weight whose products all go one way."""
    can(way, device)
    w = integers(rows, k, dtype=dtype, device=device)
    decree(problem_like(w, pattern), (1 << 20 if way != SMALL_BATCH else 32, way))
    return nms.compress(w, pattern, prune=True)


def exact(x: Tensor, w: nms.NMTensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.double(), w.to_dense().double(), None if bias is None else bias.double())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:8", "1:16", "4:8"])
def test_every_way(way: str, dtype: torch.dtype, pattern: str) -> None:
    if way == LT and pattern == "4:8":
        pytest.skip("it does not embed in 2:4")
    w, bias = packed(way, pattern=pattern, dtype=dtype), integers(256, dtype=dtype)
    assert w.engine == "cuda"
    assert crossover.choices_for(engines_cuda.problem_of(w)).at(TOKENS[way][0]) == way
    for tokens in TOKENS[way]:
        x = integers(tokens, 512, dtype=dtype)
        expected = exact(x, w, bias)
        torch.testing.assert_close(F.linear(x, w, bias).double(), expected, rtol=1e-2, atol=1e-2)
        relu = nms.linear(x, w, bias, "relu").double()
        torch.testing.assert_close(relu, expected.relu(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("way", WAYS)
def test_biases_that_are_views(way: str) -> None:
    w, x = packed(way), integers(TOKENS[way][-1], 512)
    for bias in (integers(257)[1:], integers(512)[::2]):
        torch.testing.assert_close(F.linear(x, w, bias).double(), exact(x, w, bias), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_activations_and_gradients(way: str, activation: str) -> None:
    w, tokens = packed(way, dtype=torch.bfloat16), TOKENS[way][-1]
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16).requires_grad_()
    bias = torch.randn(256, device="cuda", dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    y = nms.linear(x, w, bias, activation)
    y.backward(grad)
    other_x, other_bias = x.detach().float().requires_grad_(), bias.detach().float().requires_grad_()
    expected = getattr(F, activation)(F.linear(other_x, w.to_dense().float(), other_bias))
    expected.backward(grad.float())
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=0.3)
    torch.testing.assert_close(x.grad.float(), other_x.grad, rtol=5e-2, atol=0.5)
    torch.testing.assert_close(bias.grad.float(), other_bias.grad, rtol=5e-2, atol=1.0)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str) -> None:
    can(LT)
    w = integers(256, 512)
    decree(problem_like(w, "2:4"), (8, SMALL_BATCH), (48, DENSE), (49, LT))
    layer = nn.Linear(512, 256, device="cuda", dtype=HALF)
    layer.weight = nn.Parameter(nms.compress(w, "2:4", prune=True), requires_grad=False)
    compiled = torch.compile(layer, fullgraph=True, dynamic=mode == "default", mode=mode)
    with torch.no_grad():
        for tokens in (4, 4, 4, 32, 100):
            x = integers(tokens, 512)
            y = compiled(x)
            torch.testing.assert_close(y.double(), exact(x, layer.weight, layer.bias), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("way", WAYS)
def test_captured(way: str) -> None:
    w, x = packed(way), integers(TOKENS[way][-1], 512)
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        F.linear(x, w)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
        y = nms.linear(x, w, None, "silu")
    for _ in range(3):
        x.copy_(integers(*x.shape))
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(y.double(), F.silu(exact(x, w)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("way", WAYS)
def test_streams(way: str) -> None:
    w = packed(way)
    xs = [integers(TOKENS[way][-1], 512) for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for x in xs:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            results.append(F.linear(x, w))
    torch.cuda.synchronize()
    for x, y in zip(xs, results, strict=True):
        torch.testing.assert_close(y.double(), exact(x, w), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("way", WAYS)
def test_a_second_device(way: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    first, second = packed(way), packed(way, device="cuda:1")
    for w in (second, first, second):
        x = integers(TOKENS[way][-1], 512, device=str(w.device))
        y = F.linear(x, w)
        assert y.device == w.device
        torch.testing.assert_close(y.double(), exact(x, w), rtol=1e-2, atol=1e-2)
    moved = first.to("cuda:1")
    assert (moved.engine, moved.device.index) == ("cuda", 1)


@pytest.mark.parametrize("way", WAYS)
def test_autocast(way: str) -> None:
    can(way)
    w = integers(256, 512, dtype=torch.float32)
    decree(problem_like(w.bfloat16(), "2:4"), (1 << 20 if way != SMALL_BATCH else 32, way))
    weight = nms.compress(w, "2:4", prune=True)
    x = integers(TOKENS[way][-1], 512, dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        y = F.linear(x, weight)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact(x, weight), rtol=1e-2, atol=1e-2)


def test_measuring_and_tuning() -> None:
    w = nms.compress(torch.randn(1024, 1024, device="cuda").half(), "2:4", prune=True)
    found = engines_cuda.measure_once(w, (1, 16, 256))
    assert list(found.points) == [1, 16, 256]
    assert SMALL_BATCH in found.points[1]
    assert DENSE in found.points[256]
    assert crossover.choices_for(engines_cuda.problem_of(w)).measured
    cusparselt.set_search_mode("first-use")
    other = nms.compress(torch.randn(512, 1024, device="cuda").half(), "2:4", prune=True)
    assert crossover.choices_for(engines_cuda.problem_of(other)).measured
    jobs = tuning.jobs_of_shapes([(256, 256)], [nms.Pattern(2, 4)], HALF)
    (tuned,) = tuning.tune(jobs, (1, 64))
    assert bool(tuned.searched) == (cusparselt.why_not("cuda") is None)


def test_convert_keeps_what_wins() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)).cuda().half()
    for layer in (model[0], model[2]):
        nms.nm_prune_(layer.weight.data, "2:4")
    x = torch.randn(4, 1024, device="cuda").half()
    expected = model(x)
    nms.convert(model, example_input=x)
    torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)
    assert len(nms.deploy.report(model)) == 2


# ------------------------------------------------------------------------------------------------- training


def trained(accelerate: Any, compiled: bool, transposable: bool) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparsifier = nms.Sparsifier(model, optimizer, "2:4", accelerate=accelerate, transposable=transposable)
    if accelerate is not None:
        assert set(sparsifier.accelerated.values()) == {None}
    call = torch.compile(model, fullgraph=True) if compiled else model
    losses = []
    for _ in range(5):
        for _ in range(2):
            x, y = torch.randn(64, 128, device="cuda"), torch.randn(64, 64, device="cuda")
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.mse_loss(call(x), y)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("transposable", [False, True])
def test_accelerated_training(compiled: bool, transposable: bool) -> None:
    can(LT)
    torch._dynamo.reset()
    mine = trained(Accelerate(min_tokens=0), compiled, transposable)
    torch.testing.assert_close(mine, trained(None, False, transposable), rtol=2e-2, atol=2e-2)


def test_a_captured_training_step_packs_the_weights_of_each_replay() -> None:
    can(LT)
    model = nn.Linear(128, 128, bias=False).cuda().half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nms.Sparsifier(model, optimizer, "2:4", accelerate=Accelerate(min_tokens=0))
    x = torch.randn(64, 128, device="cuda").half()

    def step() -> Tensor:
        y = model(x)
        y.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return y

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = step()
    for _ in range(3):
        before = model.weight.detach().clone()
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(y, F.linear(x, before), rtol=1e-2, atol=1e-2)
        now = F.linear(x, model.weight)
        torch.testing.assert_close(model(x), now, rtol=1e-2, atol=1e-2)  # outside of the graph, too
