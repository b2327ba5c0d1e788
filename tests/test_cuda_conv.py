"""The engine of GPUs for convolutions, on the CPU: 1x1 runs as a product, the others keep a dense weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_crossovers import decree, record_ways
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import nmsparse_ext as nms
from nmsparse_ext import engines, engines_cuda, ops
from nmsparse_ext.crossover import DENSE, LT, SMALL_BATCH, Problem

pytestmark = pytest.mark.usefixtures("gpu")
OUT, IN = 32, 64
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
CONVS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch, gpu: None) -> list[str]:
    """Which way products have gone."""
    return record_ways(monkeypatch, engines_cuda)


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small ones: their sums are exact in every order."""
    return torch.randint(-2, 3, shape).to(dtype)


def weight(*kernel: int, dtype: torch.dtype = torch.float32, pattern: str | None = None) -> nms.NMTensor:
    chosen = pattern or ("1:2" if dtype == torch.float32 else "2:4")
    return nms.compress(integers(OUT, IN, *kernel, dtype=dtype), chosen, prune=True)


def pixels(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[N, C, *sizes]`` in channels_last."""
    n, *spatial = sizes
    return integers(n, *spatial, IN, dtype=dtype).movedim(-1, 1)


def fail_to_unpack(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("unpacked in a call")

    monkeypatch.setattr(ops, "unpack", fail)
    monkeypatch.setattr(engines.ops, "unpack", fail)


def decree_ways(dtype: torch.dtype, *ways: tuple[int, str]) -> None:
    pattern = nms.Pattern.parse("1:2" if dtype == torch.float32 else "2:4")
    decree(Problem(torch.device("cpu"), dtype, pattern, OUT, IN), *ways)


@pytest.mark.parametrize("dims", [3, 4, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_a_1x1_convolution_goes_the_ways_of_products(
    dims: int, stride: int, bias: bool, gone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decree_ways(torch.float32, (3, DENSE), (9, LT))
    w = weight(*(1,) * (dims - 2))
    b = integers(OUT) if bias else None
    assert w.engine == "cuda-conv"
    dense = w.to_dense()
    fail_to_unpack(monkeypatch)
    for sizes, way in (((1, *(1,) * (dims - 2)), DENSE), ((2, 9, *(2,) * (dims - 3)), LT)):
        x = pixels(*sizes)
        y = CONVS[dims](x, w, b, stride=stride)
        assert torch.equal(y, CONVS[dims](x, dense, b, stride=stride))
        assert y.movedim(1, -1).is_contiguous()
        assert gone.pop() == way


def test_small_batches_of_pixels(gone: list[str]) -> None:
    decree_ways(torch.float16, (4, SMALL_BATCH), (9, LT))
    w = weight(1, 1, dtype=torch.float16)
    x = pixels(1, 2, 2, dtype=torch.float16)
    assert torch.equal(F.conv2d(x, w).double(), F.conv2d(x.double(), w.to_dense().double()))
    assert gone == [SMALL_BATCH]
    packed = w.with_engine("cuda-packed")
    assert packed.engine_nbytes == 0
    assert torch.equal(F.conv2d(x, packed), F.conv2d(x, w))
    big = pixels(2, 5, 5, dtype=torch.float16)
    assert torch.equal(F.conv2d(big, packed).double(), F.conv2d(big.double(), w.to_dense().double()))
    assert gone[1:] == [SMALL_BATCH, SMALL_BATCH, DENSE]


@pytest.mark.parametrize(
    "change",
    [
        {"padding": 1},
        {"padding": "same"},
        {"dilation": 3},
        {"stride": (2, 1)},
        {"groups": 1, "padding": (0, 1)},
        {},
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_arguments_of_1x1(change: dict[str, Any], channels_last: bool, gone: list[str]) -> None:
    decree_ways(torch.float32, (1, DENSE), (2, LT))
    w, x = weight(1, 1), pixels(2, 6, 5)
    if not channels_last:
        x = x.contiguous()
    expected = F.conv2d(x, w.to_dense(), None, **change)
    y = F.conv2d(x, w, None, **change)
    assert torch.equal(y, expected)
    padded = change.get("padding", 0) not in (0, "same")
    assert gone == ([LT] if channels_last and not padded else [])
    assert y.is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.parametrize("dims", [3, 4, 5])
@pytest.mark.parametrize("channels_last", [False, True])
def test_other_convolutions_keep_their_dense_weight(
    dims: int, channels_last: bool, gone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    w = weight(*(3,) * (dims - 2))
    dense = w.to_dense()
    assert w.engine == "cuda-conv"
    assert w.engine_nbytes == dense.nbytes
    assert engines_cuda.memory(w) == {"packed": w.nbytes, "dense": dense.nbytes, "for cuSPARSELt": 0}
    assert "no sparse kernel convolves but 1x1; holds bytes" in engines_cuda.why(w)
    assert "unpacked in every call" in engines_cuda.why(w.with_engine("cuda-packed"))
    fail_to_unpack(monkeypatch)
    x = pixels(2, *(7,) * (dims - 2))
    x = x if channels_last else x.contiguous()
    y = CONVS[dims](x, w, integers(OUT), stride=2, padding=1)
    assert y.shape == CONVS[dims](x, dense, None, stride=2, padding=1).shape
    assert torch.equal(CONVS[dims](x, w), CONVS[dims](x, dense))
    if dims in FORMATS and channels_last:
        assert w.form_dense.movedim(-1, 1).is_contiguous(memory_format=FORMATS[dims])
        assert y.is_contiguous(memory_format=FORMATS[dims])
    assert gone == []


def test_inputs_that_do_not_fit() -> None:
    w = weight(1, 1)
    for x in (torch.randn(1, IN // 2, 3, 3), torch.randn(2, 3), torch.randn(1, IN, 3, 3).double()):
        with pytest.raises(RuntimeError):
            F.conv2d(x.to(memory_format=torch.channels_last) if x.dim() == 4 else x, w)
    x = pixels(1, 4, 4)[0]  # without a batch
    assert torch.equal(F.conv2d(x, w), F.conv2d(x, w.to_dense()))


def test_what_is_left_to_others() -> None:
    transposed = nms.compress(torch.randn(IN, OUT, 3, 3), "2:4", dim=0, prune=True)
    assert transposed.engine == "decompress"
    with pytest.raises(ValueError, match="it sums over dim 1 of a weight, groups run along dim 0"):
        transposed.with_engine("cuda-conv")
    with pytest.raises(ValueError, match="it convolves in 1 to 3 dimensions, the weight has 2"):
        nms.compress(torch.randn(OUT, IN), "2:4", prune=True).with_engine("cuda-conv")
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        nms.compress(torch.randn(OUT, IN, 1, 1).double(), "2:4", prune=True).with_engine("cuda-conv")
    w = weight(3, 3)
    x = torch.randn(1, OUT, 5, 5)
    assert torch.equal(F.conv_transpose2d(x, w), F.conv_transpose2d(x, w.to_dense()))
    stack = nms.compress(torch.randn(4, IN, OUT), "2:4", prune=True)  # by its shape a 1-D convolution's
    x = torch.randn(4, 3, IN)
    torch.testing.assert_close(torch.bmm(x, stack), torch.bmm(x, stack.to_dense()))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("engine", ["cuda-conv", "cuda-packed"])
def test_gradients_and_transforms(kernel: int, engine: str) -> None:
    w = weight(kernel, kernel).with_engine(engine)
    dense = w.to_dense()
    x, bias = pixels(2, 4, 5).requires_grad_(), integers(OUT).requires_grad_()
    F.conv2d(x, w, bias).sum().backward()
    other, b = x.detach().requires_grad_(), bias.detach().requires_grad_()
    F.conv2d(other, dense, b).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(bias.grad, b.grad)
    expected = F.conv2d(x.detach(), dense)
    _, tangent = torch.func.jvp(lambda x: F.conv2d(x, w), (x.detach(),), (x.detach(),))
    torch.testing.assert_close(tangent, expected)
    values = torch.randn(OUT, IN, kernel, kernel, requires_grad=True)
    F.conv2d(x.detach(), nms.compress(values, "1:2", prune=True)).sum().backward()
    assert values.grad is not None


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("engine", ["cuda-conv", "cuda-packed"])
def test_autocast(kernel: int, compiled: bool, engine: str) -> None:
    layer = nn.Conv2d(IN, OUT, kernel)
    layer.weight.data = integers(OUT, IN, kernel, kernel)
    nms.nm_prune_(layer.weight.data, "2:4")
    x = pixels(2, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
    nms.convert(layer, "2:4", policy="always", engine=engine)
    assert layer.weight.engine == engine
    torch._dynamo.reset()
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            y = call(x)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kernel", [1, 3])
def test_compiled_and_exported(kernel: int, gone: list[str]) -> None:
    decree_ways(torch.float32, (16, DENSE), (17, LT))
    layer = nn.Conv2d(IN, OUT, kernel)
    layer.weight = nn.Parameter(weight(kernel, kernel), requires_grad=False)
    dense = layer.weight.to_dense()
    torch._dynamo.reset()
    program = torch.export.export(layer, (pixels(2, 5, 6),)).module()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    gone.clear()
    for size in ((2, 5, 6), (2, 4, 4)):
        x = pixels(*size)
        torch.testing.assert_close(compiled(x), F.conv2d(x, dense, layer.bias))
    x = pixels(2, 5, 6)
    torch.testing.assert_close(program(x), F.conv2d(x, dense, layer.bias))
    assert gone == ([LT] * 3 if kernel == 1 else [])


def test_writes_reach_every_form() -> None:
    decree_ways(torch.float32, (3, DENSE), (9, LT))
    for kernel in (1, 3):
        w, other = weight(kernel, kernel), weight(kernel, kernel).to_dense()
        with torch.no_grad():
            w.copy_(other)
        for size in (1, 4):
            x = pixels(1, max(size, kernel), max(size, kernel))
            assert torch.equal(F.conv2d(x, w), F.conv2d(x, other))


def test_forms_that_are_not_wanted_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    decree_ways(torch.float32, (1, LT))
    layer = nn.Conv2d(IN, OUT, 1)
    layer.weight = nn.Parameter(weight(1, 1), requires_grad=False)
    assert layer.weight.form_dense.numel() == 0
    dense = layer.weight.to_dense()
    x = pixels(2, 4, 4)
    for other in (x, x.contiguous()):  # the second unpacks
        assert torch.equal(F.conv2d(other, layer.weight), F.conv2d(other, dense))
    decree_ways(torch.float32, (1, DENSE))
    held = layer.weight.held_nbytes
    assert nms.deploy.refit(layer) == held - layer.weight.held_nbytes
    assert (layer.weight.form_dense.numel(), layer.weight.form_blob.numel()) == (OUT * IN, 0)
    for name in ("cuda-conv", "cuda-packed"):
        assert "channels_last inputs only" in engines_cuda.why(layer.weight.with_engine(name))


def test_a_weight_of_a_device_that_is_not_there() -> None:
    with FakeTensorMode():
        for kernel in (1, 3):
            w = nms.compress(torch.empty(OUT, IN, kernel, kernel, device="cuda"), "1:2", prune=True)
            assert w.engine == "cuda-conv"
            x = torch.empty(2, IN, 8, 8, device="cuda").to(memory_format=torch.channels_last)
            assert F.conv2d(x, w).shape == (2, OUT, 9 - kernel, 9 - kernel)


def test_a_whole_model(gone: list[str]) -> None:
    def block() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(IN, OUT, 1),
            nn.ReLU(),
            nn.Conv2d(OUT, OUT, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(OUT, IN, 1),
        )

    model = block().eval()
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            nms.nm_prune_(layer.weight.data, "2:4")
    x = torch.randn(2, IN, 6, 6).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model(x)
        for engine in (None, "cuda-packed"):
            packed = block().eval()
            packed.load_state_dict(model.state_dict())
            nms.convert(packed, policy="always", engine=engine)
            wanted = engine or "cuda-conv"
            assert [packed[i].weight.engine for i in (0, 2, 4)] == [wanted] * 3
            torch.testing.assert_close(packed(x), expected)
            assert "no sparse kernel convolves but 1x1" in nms.deploy.report(packed)[1].reason
    assert len(gone) == 4


class _Timer:
    def __init__(self, weight: nms.NMTensor) -> None:
        values, indices = engines_cuda.matrix_parts(weight)
        assert values.dim() == indices.dim() == 2

    def microseconds(self, tokens: int, branches: Any) -> dict[str, float]:
        return {branch: 1.0 if branch == LT else 5.0 for branch in branches}


def test_1x1_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from nmsparse_ext import _crossover_timer

    monkeypatch.setattr(_crossover_timer, "CudaTimer", _Timer)
    monkeypatch.setattr(engines_cuda, "_may_measure", lambda values: True)
    w = weight(1, 1)
    tuned = engines_cuda.tuned(w, 100)
    assert (tuned.form_dense.numel(), tuned.form_blob.numel() > 0) == (0, True)
    w = weight(3, 3)
    assert engines_cuda.tuned(w, 100) is w
    with pytest.raises(ValueError, match="it multiplies matrices"):
        engines_cuda.measure_once(w)
