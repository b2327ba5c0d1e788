"""Training through cuSPARSELt, on the CPU: the same results as the masked dense model has."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nmsparse_ext as nms
from nmsparse_ext import cusparselt
from nmsparse_ext.train import Accelerate, DenseWarmup, Rule, masked_linear
from nmsparse_ext.train.accelerate import MaskedForward

Accelerated = tuple[nn.Module, torch.optim.Optimizer, nms.Sparsifier]


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked_linear, "_why_not_on", lambda device: None)


class Calls:
    """What ran through cuSPARSELt's ops: ``[(what, rows)]``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.packed = self.products = 0
        compress, multiply = cusparselt.compress, cusparselt.multiply

        def count_packed(*args: Any) -> Tensor:
            self.packed += 1
            return compress(*args)

        def count_products(*args: Any, **kwargs: Any) -> Tensor:
            self.products += 1
            return multiply(*args, **kwargs)

        monkeypatch.setattr(cusparselt, "compress", count_packed)
        monkeypatch.setattr(cusparselt, "multiply", count_products)

    def take(self) -> tuple[int, int]:
        """Packed weights and products since the last time."""
        taken = self.packed, self.products
        self.packed = self.products = 0
        return taken


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def network(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16)).to(dtype)


def made(model: nn.Module, accelerate: Any = None, pattern: str = "2:4", **options: Any) -> Accelerated:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, nms.Sparsifier(model, optimizer, pattern, accelerate=accelerate, **options)


ALWAYS = Accelerate(min_tokens=0)


def batch(dtype: torch.dtype = torch.bfloat16, tokens: int = 24) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, 32).to(dtype), torch.randn(tokens, 16).to(dtype)


def train(trained: Accelerated, steps: int = 3, accumulate: int = 1, **options: Any) -> list[float]:
    model, optimizer, _ = trained
    losses = []
    torch.manual_seed(1)
    call = options.get("call", model)
    for _ in range(steps):
        for _ in range(accumulate):
            x, y = batch(options.get("dtype", torch.bfloat16))
            with torch.autocast("cpu", torch.bfloat16, enabled=options.get("autocast", False)):
                loss = F.mse_loss(call(x), y)
            (loss / accumulate).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def assert_same_training(mine: Accelerated, other: Accelerated, **options: Any) -> None:
    torch.testing.assert_close(train(mine, **options), train(other, **options), rtol=2e-2, atol=2e-2)
    for a, b in zip(mine[0].parameters(), other[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=2e-2)


# -------------------------------------------------------------------------------------------------- the same


@pytest.mark.parametrize("transposable", [False, True])
def test_training_gives_the_same(transposable: bool, calls: Calls) -> None:
    mine = made(network(), ALWAYS, transposable=transposable)
    assert mine[2].accelerated == {"0.weight": None, "2.weight": None}
    other = made(network(), transposable=transposable)
    keys = list(mine[0].state_dict())
    assert keys == list(other[0].state_dict())
    losses = train(mine, steps=2)
    packed, products = calls.take()
    # Two layers, two steps; with transposable masks the gradient of the second layer's input as well (the
    # input of the first takes none).
    assert (packed, products) == ((6, 6) if transposable else (4, 4))
    torch.testing.assert_close(losses, train(other, steps=2), rtol=2e-2, atol=2e-2)
    assert calls.take() == (0, 0)
    assert_same_training(mine, other)


@pytest.fixture
def _our_packer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our packer writes "the library's" bytes, which here are of the layout that multiplies on the CPU."""
    monkeypatch.setattr(cusparselt, "_our_layout", lambda like, rows, k: "portable")
    compress_on_the_cpu = torch.ops.nmsparse.lt_compress

    def pack(values: Tensor, indices: Tensor, k: int, layout: str) -> Tensor:
        assert layout == "portable"
        return torch.cat([values.flatten().view(torch.uint8), indices.flatten()])

    def prune_pack(w: Tensor, layout: str) -> Tensor:
        return compress_on_the_cpu(w, w.numel() * w.itemsize * 9 // 16)

    monkeypatch.setattr(torch.ops.nmsparse, "lt_pack", pack)
    monkeypatch.setattr(torch.ops.nmsparse, "lt_prune_pack", prune_pack)


@pytest.mark.usefixtures("_our_packer")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_pass_packs_both_ways(dtype: torch.dtype, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    both_ways, at_once = cusparselt.compress_both_ways, []

    def counted(dense: Tensor) -> tuple[Tensor, Tensor] | None:
        at_once.append(dense.dtype)
        return both_ways(dense)

    monkeypatch.setattr(cusparselt, "compress_both_ways", counted)
    options = {"dtype": dtype, "autocast": dtype == torch.float32}
    mine, other = (made(network(dtype), accelerate, transposable=True) for accelerate in (ALWAYS, None))
    assert_same_training(mine, other, steps=2, accumulate=2, **options)
    # Two layers, two steps, whatever is accumulated; none is packed one way alone.
    assert at_once == [torch.bfloat16] * 4
    assert calls.take() == (0, 12)


@pytest.mark.usefixtures("_our_packer")
def test_without_transposable_masks_one_way_is_packed(calls: Calls) -> None:
    train(made(network(), ALWAYS), steps=2)
    assert calls.take() == (4, 4)


def test_float32_in_1_2_is_exact(calls: Calls) -> None:
    mine, other = (made(network(torch.float32), accelerate, "1:2") for accelerate in (ALWAYS, None))
    losses = train(mine, dtype=torch.float32)
    assert calls.take() == (6, 6)
    torch.testing.assert_close(losses, train(other, dtype=torch.float32))
    for a, b in zip(mine[0].parameters(), other[0].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_accumulation_packs_once_a_step(calls: Calls) -> None:
    mine, other = made(network(), ALWAYS), made(network())
    assert_same_training(mine, other, steps=2, accumulate=3)
    assert calls.take() == (4, 12)


def test_autocast_packs_the_cast_weight(calls: Calls) -> None:
    mine, other = made(network(torch.float32), ALWAYS), made(network(torch.float32))
    assert_same_training(mine, other, dtype=torch.float32, autocast=True)
    assert calls.take() == (6, 6)
    x, _ = batch(torch.float32)
    assert mine[0](x).dtype == torch.float32  # float32 has no 2:4: dense
    assert calls.take() == (0, 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, calls: Calls) -> None:
    mine, other = made(network(), ALWAYS, transposable=True), made(network(), transposable=True)

    def call(model: nn.Module) -> Any:
        return lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)

    first = train(mine, call=call(mine[0]))
    assert calls.take() == (12, 18)
    torch.testing.assert_close(first, train(other, call=call(other[0])), rtol=2e-2, atol=2e-2)


def test_compiled(calls: Calls) -> None:
    mine, other = made(network(), ALWAYS, transposable=True), made(network(), transposable=True)
    torch._dynamo.reset()  # other tests have compiled nn.Sequential, too
    compiled = torch.compile(mine[0], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        train(mine, steps=4, call=compiled), train(other, steps=4), rtol=2e-2, atol=2e-2
    )
    assert calls.take() == (12, 12)
    with torch.no_grad():  # a write that nobody vouches for is seen by compiled code, too
        mine[0][0].weight.fill_(0.01)
    x, _ = batch()
    torch.testing.assert_close(compiled(x), mine[0](x))
    dense = F.linear(F.gelu(F.linear(x, mine[0][0].weight, mine[0][0].bias)), *mine[0][2].parameters())
    torch.testing.assert_close(compiled(x), dense)


# ----------------------------------------------------------------------------------------- when it goes dense


def test_few_tokens_go_dense(calls: Calls) -> None:
    model, _, _ = made(network(), Accelerate(min_tokens=24))
    model(batch(tokens=23)[0])
    model(batch(tokens=0)[0])
    assert calls.take() == (0, 0)
    model(batch(tokens=12)[0].expand(2, 12, 32))
    assert calls.take() == (2, 2)


def test_writes_from_outside_go_dense_until_the_next_step(calls: Calls) -> None:
    model, optimizer, sparsifier = made(network(), ALWAYS)
    x, _ = batch()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(64, 32))
    dense = F.linear(F.gelu(F.linear(x, model[0].weight, model[0].bias)), model[2].weight, model[2].bias)
    torch.testing.assert_close(model(x), dense, rtol=2e-2, atol=2e-2)
    assert calls.take() == (1, 1)
    model(x).sum().backward()
    with pytest.warns(UserWarning, match="changed outside"):
        optimizer.step()
    calls.take()
    model(x)
    assert calls.take() == (2, 2)
    state = sparsifier.state_dict()
    with torch.no_grad():
        model[2].weight.zero_()
    sparsifier.load_state_dict(state)
    model(x)
    assert calls.take()[1] == 2


def test_outside_of_a_captured_step_every_product_packs(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, _ = made(network(), ALWAYS)
    x, _ = batch()
    with monkeypatch.context() as capture:
        capture.setattr(masked_linear, "_is_capturing", lambda weight: True)
        model(x).sum().backward()
        optimizer.step()
    calls.take()
    for _ in range(2):  # between them the graph may be replayed, of which no version counter tells
        model(x)
        assert calls.take() == (2, 2)
    optimizer.step()
    for _ in range(2):
        model(x)
        assert calls.take() == (2, 2)


def test_schedules_and_rules_that_soften_go_dense(calls: Calls) -> None:
    trained = made(network(), ALWAYS, schedule=DenseWarmup(2))
    train(trained, steps=2)
    assert calls.take() == (0, 0)
    train(trained, steps=2)
    assert calls.take()[1] == 4

    class Soft(Rule):
        def soften(self, weight: Any, out: Tensor, step: Any) -> None:
            out.add_(0.1)

    train(made(network(), ALWAYS, method=Soft()))
    assert calls.take() == (0, 0)


def test_what_is_left_dense_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(16, 24), nn.Linear(24, 32))
    sparsifier = made(model.bfloat16(), ALWAYS)[2]
    assert "Conv2d" in str(sparsifier.accelerated["0.weight"])
    assert "multiples of 16, not 24x16" in str(sparsifier.accelerated["2.weight"])
    assert "4:8 does not embed" in str(made(network(), ALWAYS, "4:8")[2].accelerated["0.weight"])
    assert set(made(network())[2].accelerated.values()) == {"accelerate was not asked for"}
    monkeypatch.setattr(masked_linear, "_why_not_on", cusparselt.why_not)
    there = made(network(), "cusparselt")
    assert set(there[2].accelerated.values()) == {"cpu tensors run in plain PyTorch"}
    assert "forward" not in vars(there[0][0])
    replaced = network()
    replaced[0].forward = lambda x: x  # type: ignore[method-assign]
    assert made(replaced, ALWAYS)[2].accelerated["0.weight"] == "its forward was replaced by somebody else"


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ("tensorrt", ValueError, "accelerate must be 'cusparselt', got 'tensorrt'"),
        (True, TypeError, "accelerate must be a str, an Accelerate or None, got bool"),
    ],
)
def test_what_is_refused(value: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        made(network(), value)
    with pytest.raises(ValueError, match="min_tokens must be an int of at least 0, got -1"):
        Accelerate(min_tokens=-1)
    with pytest.raises(ValueError, match="backend must be"):
        Accelerate("cudnn")


# ---------------------------------------------------------------------------------------------- the model


def test_the_end_and_copies(calls: Calls) -> None:
    trained = made(network(), ALWAYS)
    model, _, sparsifier = trained
    again_model, again_optimizer, again = copy.deepcopy(trained)
    assert isinstance(again_model[0].forward, MaskedForward)
    assert again_model[0].forward.module is again_model[0]
    torch.testing.assert_close(train(trained), train((again_model, again_optimizer, again)))
    assert calls.take() == (12, 12)
    loaded = pickle.loads(pickle.dumps(model))
    x, _ = batch()
    torch.testing.assert_close(loaded(x), model(x), rtol=2e-2, atol=2e-2)
    assert calls.take()[1] == 2  # nobody vouches for a loaded model: dense
    sparsifier.finalize()
    assert "forward" not in vars(model[0])
    model(x)
    assert calls.take() == (0, 0)


def test_memory_of_models_that_are_gone_is_given_back() -> None:
    before = len(masked_linear._vouched)
    for _ in range(3):
        trained = made(network(), ALWAYS)
        train(trained)
        del trained
    assert len(masked_linear._vouched) <= before + 4


def test_the_ops() -> None:
    weight = nms.nm_prune(torch.randn(16, 32), "1:2").requires_grad_()
    masked_linear.vouch(weight, nms.Pattern(1, 2))
    x, bias = torch.randn(3, 5, 32, requires_grad=True), torch.randn(16, requires_grad=True)
    torch.library.opcheck(torch.ops.nmsparse.masked_linear, (x, weight, bias, 0))
    torch.library.opcheck(torch.ops.nmsparse.masked_linear, (x[0, 0], weight, None, 100))
    torch.library.opcheck(torch.ops.nmsparse.masked_matmul, (torch.randn(5, 16), weight, 0))
    y = masked_linear.masked_linear(x, weight, bias)
    torch.testing.assert_close(y, F.linear(x, weight, bias))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    exact = x.detach().requires_grad_()
    dense = weight.detach().requires_grad_()
    (grad,) = torch.autograd.grad(F.linear(exact, dense, bias).square().sum(), exact, create_graph=True)
    grad.square().sum().backward()
    torch.testing.assert_close(weight.grad, dense.grad)
    for wrong in (x[..., :16], x.double()):
        with pytest.raises(RuntimeError):
            masked_linear.masked_linear(wrong, weight)
    per_row = torch.func.vmap(torch.func.grad(lambda x: masked_linear.masked_linear(x, weight, bias).sum()))
    torch.testing.assert_close(per_row(x.detach()[0]), dense.detach().sum(0).expand(5, 32))
    masked_linear.disown(weight)
    torch.testing.assert_close(masked_linear.masked_linear(x, weight, bias), y)
