"""convert(policy="auto"): what packed layers are compared with, and the check of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import nmsparse_ext as nms
from nmsparse_ext.deploy import measure, race, report, whole
from nmsparse_ext.deploy.bare import bare_product
from nmsparse_ext.deploy.plan import Plan
from nmsparse_ext.deploy.prepacked import prepacked_calls
from nmsparse_ext.deploy.report import WholeModel
from nmsparse_ext.tensor import NMTensor
from nmsparse_ext.weights import weights


def layers(*sizes: int) -> nn.Sequential:
    """Linear layers in a row, in 2:4."""
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes))).eval()
    for layer in model:
        nms.nm_prune_(layer.weight.data, "2:4")
    return model


def packed_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, NMTensor)]


class Times:
    """Stands in for the clock: what each timed layer and model is said to take; the calls are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers: list[dict[str, float]] = []
        self.models: list[dict[str, float]] = []
        self.cold: list[bool] = []
        monkeypatch.setattr(race, "alternate", self._layer)
        monkeypatch.setattr(whole, "alternate", self._model)
        monkeypatch.setattr(race, "prepacked_calls", lambda *_: {"oneDNN": lambda: None})
        monkeypatch.setattr(race, "bare_product", lambda call: call)

    def _layer(
        self, calls: Mapping[str, Callable[[], object]], device: torch.device, before: Any = None
    ) -> dict[str, float]:
        for call in calls.values():
            if before is not None:
                before()
            call()
        self.cold.append(before is not None)
        assert set(calls) == {"dense", "packed", "packed, bare", "oneDNN"}
        seconds = self.layers.pop(0) if len(self.layers) > 1 else self.layers[0]
        return {"packed, bare": seconds["packed"], **seconds}

    def _model(
        self, calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int
    ) -> dict[str, float]:
        torch.testing.assert_close(calls["dense"](), calls["packed"]())
        return self.models.pop(0)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    return Times(monkeypatch)


# ---------------------------------------------------------------------------------- what it is compared with


def test_the_strongest_dense_product_decides(times: Times) -> None:
    times.layers = [{"dense": 3.0, "oneDNN": 1.0, "packed": 2.0}]
    model = nms.convert(layers(8, 8), example_input=torch.randn(2, 8))
    assert packed_names(model) == []
    row = report(model)[0]
    assert (row.dense_ms, row.prepacked_ms, row.packed_ms) == (3000.0, 1000.0, 2000.0)
    assert (
        row.reason
        == "packed is 0.50x as fast as with a prepacked dense weight, 1.50x as fast as in eager mode"
    )
    assert report(model).whole is None


def test_eager_mode_can_be_asked_for(times: Times) -> None:
    times.layers = [{"dense": 3.0, "oneDNN": 1.0, "packed": 2.0}]
    times.models = [{"dense": 3.0, "packed": 2.0}]
    model = nms.convert(layers(8, 8), example_input=torch.randn(2, 8), against="eager")
    assert packed_names(model) == ["0.weight"]
    assert report(model)[0].reason == "packed is 1.50x as fast"
    assert report(model)[0].prepacked_ms == 1000.0


def test_both_are_beaten(times: Times) -> None:
    times.layers = [{"dense": 3.0, "oneDNN": 2.0, "packed": 1.0}]
    times.models = [{"dense": 3.0, "packed": 2.0}]
    model = nms.convert(layers(8, 8), example_input=torch.randn(2, 8))
    assert packed_names(model) == ["0.weight"]
    assert report(model)[0].reason.startswith(
        "packed is 2.00x as fast as with a prepacked dense weight, 3.00x"
    )


@pytest.mark.parametrize(
    ("seconds", "gain", "choices"),
    [
        # Like with like: what eager mode adds to a packed layer is not held against its product ...
        ({"dense": 3.0, "oneDNN": 1.0, "packed": 2.0, "packed, bare": 0.5}, 2.0, ("packed", "packed")),
        # ... but a layer that is slower in eager mode is packed only for a model that will be compiled.
        ({"dense": 1.0, "oneDNN": 1.0, "packed": 2.0, "packed, bare": 0.5}, 2.0, ("dense", "packed")),
    ],
)
def test_products_are_compared_bare(
    times: Times, seconds: dict[str, float], gain: float, choices: tuple[str, str]
) -> None:
    for against, choice in zip(("best", "compiled"), choices, strict=True):
        times.layers = [seconds]
        plan = plan_of(layers(8, 8), torch.randn(2, 8), against)
        assert plan.choice == choice
        assert plan.seconds.over_best == gain


def plan_of(model: nn.Sequential, x: Tensor, against: str) -> Plan:
    """The decision for the first layer, without a look at the whole model."""
    packed = nn.Parameter(nms.compress(model[0].weight.detach(), "2:4"), requires_grad=False)
    plan = Plan(next(iter(weights(model))), pattern=nms.Pattern(2, 4), packed=packed)
    race.race(model, [plan], x, None, against)
    return plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: nn.Linear(32, 16), lambda: nn.Conv2d(32, 16, 3, padding=1)])
def test_the_bare_product_is_the_layer(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    layer = make().to(dtype).requires_grad_(False)
    x = torch.randn(2, 32, 5, 32 if isinstance(layer, nn.Linear) else 5).to(dtype)
    nms.nm_prune_(layer.weight.data, "2:4")
    packed = nms.compress(layer.weight, "2:4")
    for engine in (packed.engine, "decompress"):
        layer.weight = nn.Parameter(packed.with_engine(engine), requires_grad=False)
        bare = bare_product(lambda: layer(x))
        assert (bare is None) == (engine == "decompress")
        if bare is not None:
            assert torch.equal(bare().reshape(-1).sort().values, layer(x).reshape(-1).sort().values)


def test_wrong_rival() -> None:
    with pytest.raises(ValueError, match="against must be one of"):
        nms.convert(layers(8, 8), against="all")


def test_equal_layers_are_timed_once(times: Times) -> None:
    times.layers = [
        {"dense": 2.0, "oneDNN": 2.0, "packed": 1.0},
        {"dense": 1.0, "oneDNN": 1.0, "packed": 2.0},
    ]
    times.models = [{"dense": 3.0, "packed": 2.0}]
    model = nms.convert(layers(8, 8, 8, 12), example_input=torch.randn(2, 8))
    assert packed_names(model) == ["0.weight", "1.weight"]
    assert [row.packed_ms for row in report(model)] == [1000.0, 1000.0, 2000.0]
    assert len(times.cold) == 2


@pytest.mark.parametrize("large", [False, True])
def test_large_models_have_their_weights_in_memory(
    times: Times, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    monkeypatch.setattr(race, "last_level_cache", lambda: 8 * 8 * 4 if large else 1 << 30)
    times.layers = [{"dense": 1.0, "oneDNN": 1.0, "packed": 2.0}]
    model = nms.convert(layers(8, 8), example_input=torch.randn(2, 8))
    assert times.cold == [large]
    assert report(model).cold == large
    assert ("from memory" in str(report(model))) == large


def test_cache_size() -> None:
    assert 1 << 20 <= measure.last_level_cache() <= 1 << 32
    measure.Flush()()


@pytest.mark.parametrize("before", [None, lambda: seen.append("before")])
def test_alternate(before: Callable[[], object] | None) -> None:
    seen.clear()
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    seconds = measure.alternate(calls, torch.device("cpu"), rounds=3, before=before)
    assert set(seconds) == {"a", "b"}
    assert min(seconds.values()) > 0
    if before is not None:
        assert seen == ["a", "a", "b", "b", *["before", "a", "before", "b"] * 3]


seen: list[str] = []

# -------------------------------------------------------------------------------------------- the whole model


def fast(*gains: float) -> list[dict[str, float]]:
    return [{"dense": gain, "oneDNN": gain, "packed": 1.0} for gain in gains]


def test_the_whole_model_is_in_the_report(times: Times) -> None:
    times.layers, times.models = fast(2.0), [{"dense": 0.003, "packed": 0.002}]
    model = nms.convert(layers(8, 8), example_input=torch.randn(2, 8))
    assert report(model).whole == WholeModel(3.0, 2.0)
    assert "the model takes 2.000 ms, dense 3.000 ms" in str(report(model))


def test_the_layers_that_gain_least_are_undone(times: Times) -> None:
    times.layers = fast(2.0, 4.0, 3.0, 1.5)
    times.models = [{"dense": 0.002, "packed": 0.003}, {"dense": 0.002, "packed": 0.001}]
    model = layers(8, 12, 16, 20, 24)
    x = torch.randn(2, 8)
    expected = model(x)
    nms.convert(model, example_input=x)
    assert packed_names(model) == ["1.weight", "2.weight"]
    rows = report(model)
    assert rows[0].choice == rows[3].choice == "dense"
    assert "undone: the whole model took 3.000 ms packed, 2.000 ms dense" in rows[0].reason
    assert "undone" not in rows[1].reason
    assert rows.whole == WholeModel(2.0, 1.0)
    torch.testing.assert_close(model(x), expected)


def test_all_is_undone_if_need_be(times: Times) -> None:
    times.layers = fast(2.0, 4.0, 3.0)
    times.models = [{"dense": 0.002, "packed": 0.003}] * 2
    model = layers(8, 12, 16, 20)
    parameters = list(model.parameters())
    nms.convert(model, example_input=torch.randn(2, 8))
    assert packed_names(model) == []
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert report(model).whole == WholeModel(2.0, 2.0)


@pytest.mark.slow
def test_compiled_models_are_compared_compiled(times: Times) -> None:
    times.layers = fast(2.0, 4.0)
    times.models = [{"dense": 0.002, "packed": 0.003}, {"dense": 0.002, "packed": 0.001}]
    model = layers(8, 12, 16)
    x = torch.randn(2, 8)
    expected = model(x)
    torch._dynamo.reset()
    counters.clear()
    nms.convert(model, example_input=x, against="compiled")
    assert counters["stats"]["unique_graphs"] == 3  # dense, two packed, one packed
    assert packed_names(model) == ["1.weight"]
    assert report(model).whole == WholeModel(2.0, 1.0, compiled=True)
    assert "the compiled model takes 1.000 ms, dense 2.000 ms" in str(report(model))
    torch.testing.assert_close(model(x), expected)


def test_a_failing_model_keeps_its_weights(times: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    times.layers = fast(2.0)
    monkeypatch.setattr(whole, "alternate", lambda calls, *_, **__: calls["packed"]() and 1 / 0)
    model = layers(8, 8)
    with pytest.raises(RuntimeError):
        nms.convert(model, example_input=torch.randn(2, 8))
    assert packed_names(model) == []


# ---------------------------------------------------------------------------------------- prepacked products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_prepacked_linear(dtype: torch.dtype, bias: bool) -> None:
    layer = nn.Linear(32, 48, bias=bias).to(dtype)
    x = torch.randn(2, 5, 32, dtype=dtype)
    with torch.no_grad():
        for args, kwargs in (((x,), {}), ((), {"input": x})):
            for call in prepacked_calls(layer, args, kwargs, None).values():
                torch.testing.assert_close(call(), layer(x), atol=2e-2, rtol=2e-2)
        for call in prepacked_calls(layer.float(), (x.float(),), {}, torch.bfloat16).values():
            assert call().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(16, 32, 3, padding=1), (2, 16, 9, 9)),
        (nn.Conv2d(16, 32, 3, stride=2, dilation=2, groups=2, bias=False), (2, 16, 9, 9)),
        (nn.Conv2d(16, 32, 1), (16, 9, 9)),
        (nn.Conv1d(16, 32, 3), (2, 16, 9)),
        (nn.Conv3d(16, 32, 3), (2, 16, 5, 5, 5)),
    ],
)
def test_prepacked_conv(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with torch.no_grad():
        for call in prepacked_calls(layer, (x,), {}, None).values():
            torch.testing.assert_close(call().view_as(layer(x)), layer(x), atol=1e-4, rtol=1e-4)


class Odd(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs())


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (Odd(8, 8), torch.randn(2, 8)),
        (nn.ConvTranspose2d(8, 8, 3), torch.randn(1, 8, 5, 5)),
        (nn.Conv2d(8, 8, 3, padding="same"), torch.randn(1, 8, 5, 5)),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), torch.randn(1, 8, 5, 5)),
        (nn.Linear(8, 8).double(), torch.randn(2, 8).double()),
        (nn.Linear(8, 8), torch.randn(2, 7)),
    ],
)
def test_what_has_no_prepacked_product(layer: nn.Module, x: Tensor) -> None:
    assert prepacked_calls(layer, (x,), {}, None) == {}
    assert prepacked_calls(layer, (), {}, None) == {}


def test_on_this_machine_there_are_some() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch comes without oneDNN")
    assert prepacked_calls(nn.Conv2d(16, 32, 3), (torch.randn(2, 16, 9, 9),), {}, None)
