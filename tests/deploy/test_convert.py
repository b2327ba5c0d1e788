"""convert: what is packed, what stays dense, and that the report says why."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext.deploy import race, report, whole
from nmsparse_ext.tensor import NMTensor


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, dropout=0.5)
        self.rnn = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 8)
        self.unused = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(self.stem(x)))).flatten(2).mT
        h = h + self.attention(h, h, h)[0]
        return self.head(self.rnn(h)[0][:, -1])


SPARSE = (
    "conv.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "head.weight",
    "unused.weight",
)


@pytest.fixture
def net() -> Net:
    model = Net().eval()
    for name in SPARSE:
        nms.nm_prune_(model.get_parameter(name).data, "2:4")
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 6, 6)


def rows(model: nn.Module) -> dict[str, object]:
    return {row.name: row for row in report(model)}


def packed_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if isinstance(parameter, NMTensor)}


def use_times(monkeypatch: pytest.MonkeyPatch, faster: Callable[[int], bool]) -> None:
    """Lets packed win the measurements that ``faster`` names by number; the calls are made all the same."""
    count = iter(range(1000))

    def alternate(
        calls: dict[str, Callable[[], object]], device: torch.device, **_: object
    ) -> dict[str, float]:
        for call in calls.values():
            call()
        return dict.fromkeys(calls, 2.0) | {"packed": 1.0 if faster(next(count)) else 3.0}

    monkeypatch.setattr(race, "alternate", alternate)
    monkeypatch.setattr(whole, "alternate", lambda calls, device, **_: {"dense": 2.0, "packed": 1.0})


def test_always(net: Net, x: Tensor) -> None:
    expected = net(x)
    keys = list(net.state_dict())
    model = nms.convert(net, policy="always")
    assert model is net
    assert list(model.state_dict()) == keys
    assert packed_names(model) == set(SPARSE)
    torch.testing.assert_close(model(x), expected)
    for name in SPARSE:
        parameter = model.get_parameter(name)
        assert isinstance(parameter, nn.Parameter)
        assert not parameter.requires_grad
        row = rows(model)[name]
        assert (row.pattern, row.choice, row.engine) == ("2:4", "packed", parameter.engine)
        assert row.packed_bytes == parameter.nbytes + parameter.engine_nbytes
        assert row.dense_bytes == parameter.shape.numel() * 4
        assert row.dense_ms is None
        assert "always" in row.reason
    assert rows(model)["stem.weight"].choice == "dense"
    assert "usual patterns" in rows(model)["stem.weight"].reason


def test_conversion_changes_nothing_but_rounding() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 32), nn.ReLU(), nn.Linear(32, 8)
    )
    for layer in (model[0], model[3], model[5]):
        nms.nm_prune_(layer.weight.data, "1:4")
    x = torch.randn(2, 8, 6, 6)
    for channels_last in (False, True):
        dense = copy.deepcopy(model)
        if channels_last:
            dense, x = dense.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        expected = dense(x)
        packed = nms.convert(dense, policy="always")
        assert len(packed_names(packed)) == 3
        torch.testing.assert_close(packed(x), expected)


def test_without_an_example_there_is_a_warning(net: Net) -> None:
    with pytest.warns(UserWarning, match="packs 5 weights without timing them"):
        nms.convert(net)
    assert packed_names(net) == set(SPARSE)
    assert all("not timed" in rows(net)[name].reason for name in SPARSE)


def test_auto_keeps_the_faster(net: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    use_times(monkeypatch, lambda number: number == 0)
    expected = net(x)
    nms.convert(net, example_input=x)
    assert packed_names(net) == {"conv.weight"}
    found = rows(net)
    assert found["conv.weight"].reason == "packed is 2.00x as fast"
    assert found["head.weight"].reason == "dense is 1.50x as fast"
    assert (found["head.weight"].dense_ms, found["head.weight"].packed_ms) == (2000.0, 3000.0)
    assert (found["conv.weight"].tokens, found["head.weight"].tokens) == (2 * 4 * 4, 2)
    assert found["attention.in_proj_weight"].tokens == 2 * 16
    assert found["attention.out_proj.weight"].dense_ms == 2000.0
    assert "did not reach" in found["unused.weight"].reason
    assert found["unused.weight"].dense_ms is None
    torch.testing.assert_close(net(x), expected)


def test_auto_really_measures() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Flatten(), nn.Linear(64, 8))
    for layer in (model[0], model[2]):
        nms.nm_prune_(layer.weight.data, "2:4")
    nms.convert(model, example_input=torch.randn(2, 8, 2, 2))
    for row in report(model):
        assert row.dense_ms > 0
        assert row.packed_ms > 0
        assert row.prepacked_ms is None or row.prepacked_ms > 0
        if row.choice == "packed":
            assert row.dense_ms >= 1.03 * row.packed_ms
            assert min(row.dense_ms, row.prepacked_ms or row.dense_ms) >= 1.03 * row.bare_ms


def test_measuring_leaves_nothing_behind(net: Net, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    use_times(monkeypatch, lambda number: False)
    net.train()
    net.head.eval()
    modes = [module.training for module in net.modules()]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    generator = torch.random.get_rng_state()
    nms.convert(net, example_input=x)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_hooks_go_when_the_model_fails(net: Net) -> None:
    with pytest.raises(RuntimeError):
        nms.convert(net, example_input=torch.randn(2, 5, 6, 6))
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert packed_names(net) == set()


def test_every_shape_that_occurs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x)[:1]) + self.fc(x)

    use_times(monkeypatch, lambda number: number == 1)  # dense 2 + 2 + 2, packed 3 + 1 + 3
    model = Twice()
    nms.nm_prune_(model.fc.weight.data, "2:4")
    nms.convert(model, example_input=(torch.randn(5, 8),))
    row = rows(model)["fc.weight"]
    assert (row.tokens, row.dense_ms, row.packed_ms, row.choice) == (5 + 1 + 5, 6000.0, 7000.0, "dense")


@pytest.mark.parametrize("example", [{"x": torch.zeros(2, 8)}, (torch.zeros(2, 8),), torch.zeros(2, 8)])
def test_forms_of_example_input(example: object, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=x)

    use_times(monkeypatch, lambda number: True)
    model = Wrapped()
    nms.nm_prune_(model.fc.weight.data, "2:4")
    nms.convert(model, example_input=example)
    assert packed_names(model) == {"fc.weight"}
    assert rows(model)["fc.weight"].tokens == 2


def test_what_cannot_run_packed_stays_dense(net: Net, x: Tensor) -> None:
    scheme = nms.Scheme.uniform(net, "2:4", skip=["stem"])
    for weight in scheme.resolve(net).values():
        nms.nm_prune_(weight.parameter.data, "2:4", dim=weight.group_dim)
    expected = net(x)
    nms.convert(net, scheme, policy="always")
    assert "LSTM" in rows(net)["rnn.weight_ih_l0"].reason
    assert rows(net)["rnn.weight_ih_l0"].pattern == "2:4"
    assert "skipped" in rows(net)["stem.weight"].reason
    torch.testing.assert_close(net(x), expected)


def test_an_unknown_module_that_cannot_is_found_out() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.abs())

    model = nn.Sequential(Odd(8, 4))
    nms.nm_prune_(model[0].weight.data, "2:4")
    nms.convert(model, example_input=torch.randn(2, 8))
    row = rows(model)["0.weight"]
    assert row.choice == "dense"
    assert "aten.abs" in row.reason
    assert row.dense_ms is None


def test_tied_weights_are_packed_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    nms.nm_prune_(model[0].weight.data, "2:4")
    model[2].weight = model[0].weight
    x = torch.randn(2, 8)
    expected = model(x)
    nms.convert(model, policy="always")
    assert model[0].weight is model[2].weight
    assert len(report(model)) == 1
    torch.testing.assert_close(model(x), expected)


def test_a_weight_tied_to_an_embedding_stays_dense() -> None:
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16, bias=False))
    nms.nm_prune_(model[1].weight.data, "2:4")
    model[0].weight = model[1].weight
    nms.convert(model, policy="always")
    assert packed_names(model) == set()
    nms.convert(model, {"1": "2:4"}, policy="always")
    assert packed_names(model) == set()
    assert "embedding" in report(model)[0].reason


def test_scheme_that_is_violated_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(
        ValueError, match=r"0\.weight: w does not satisfy 2:4: the group along dim 1 that starts at \[0, 0\]"
    ):
        nms.convert(model, "2:4", policy="always")
    model[0].weight.data.zero_()
    nms.convert(model, policy="always")
    assert report(model)[0].reason == "all weights are zero"


def test_converting_again(net: Net, x: Tensor) -> None:
    nms.convert(net, policy="always")
    expected = net(x)
    nms.convert(net, policy="always")
    assert rows(net)["head.weight"].reason == "was packed before"
    assert rows(net)["head.weight"].choice == "packed"
    assert torch.equal(net(x), expected)


def test_engine_is_chosen() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    nms.nm_prune_(model[0].weight.data, "2:4")
    nms.convert(model, policy="always", engine="dense")
    row = report(model)[0]
    assert model[0].weight.engine == row.engine == "dense"
    assert row.packed_bytes == model[0].weight.nbytes + 8 * 4 * 4
    with pytest.raises(ValueError, match="engine must be one of"):
        nms.convert(model, engine="warp")


def test_engine_that_cannot_run_all_weights(net: Net, x: Tensor) -> None:
    expected = net(x)
    if nms.compress(torch.randn(16, 16), "2:4", prune=True).engine != "cpu-panels":
        pytest.skip("panels are for the compiled extension")
    nms.convert(net, policy="always", engine="cpu-panels")
    assert rows(net)["head.weight"].engine == "cpu-panels"
    assert rows(net)["head.weight"].reason == "policy 'always'"
    assert rows(net)["conv.weight"].engine != "cpu-panels"
    assert "not by engine 'cpu-panels': it multiplies matrices" in rows(net)["conv.weight"].reason
    torch.testing.assert_close(net(x), expected)


def test_report(net: Net, x: Tensor) -> None:
    with pytest.raises(ValueError, match="has not been converted"):
        report(net)
    nms.convert(net, policy="always")
    found = report(net)
    text = str(found)
    assert len(text.splitlines()) == len(found) + 3
    assert f"5 of {len(found)} weights packed" in text
    assert found.bytes == sum(row.packed_bytes or row.dense_bytes for row in found)
    assert set(found.packed) == set(SPARSE)
    assert found[0].name == "stem.weight"
    assert found.to_json()[0]["choice"] == "dense"
    assert report(copy.deepcopy(net)).rows == found.rows
    assert report(torch.compile(net, backend="eager")).rows == found.rows
    assert not any("report" in key for key in net.state_dict())


def test_transformers_conv1d() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(pytorch_utils.Conv1D(12, 8))
    nms.nm_prune_(model[0].weight.data, "2:4", dim=0)
    x = torch.randn(2, 3, 8)
    expected = model(x)
    nms.convert(model, example_input=x, policy="always")
    assert model[0].weight.group_dim == 0
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"policy": "never"}, ValueError, "policy must be one of"),
        ({"scheme": 3}, TypeError, "scheme must be"),
        ({"example_input": 3}, TypeError, "example_input must be"),
    ],
)
def test_wrong_arguments(net: Net, arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nms.convert(net, **arguments)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        nms.convert({})
