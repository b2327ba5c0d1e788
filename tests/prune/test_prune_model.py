"""prune_model: in which order layers are pruned, what it must leave alone, and what it refuses."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from prune_samples import CRITERIA, assert_same_state, batches, mlp, state, weights_of
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext.prune import model as module_under_test
from nmsparse_ext.search import moments as moments_module

# ------------------------------------------------------------------------------------------------- sequence


def test_what_is_calibrated_with_what_is_pruned() -> None:
    """Blocks of a module list see those before them pruned, layers of one block do not see each other."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in "ab")

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    def wanda(weight: Tensor, x: Tensor) -> Tensor:
        return torch.where(nms.nm_mask(weight.abs() * x.norm(dim=0), "2:4"), weight, 0.0)

    torch.manual_seed(0)
    dense = Blocks()
    (x,) = data = batches(1)
    for sequential in ("block", "layer", None):
        model = copy.deepcopy(dense)
        nms.prune_model(model, "2:4", criterion="wanda", calibration=data, sequential=sequential, memory=0)
        expected, seen = copy.deepcopy(dense), copy.deepcopy(dense)
        y = x
        with torch.no_grad():
            for a, b in zip(expected.layers, seen.layers, strict=True):
                for i in range(2):
                    a[i].weight.copy_(wanda(a[i].weight, y))
                    y = (a if sequential == "layer" else b)[i](y)
                if sequential == "block":  # what comes after sees all of the block pruned
                    y = a(x) if a is expected.layers[0] else y
        if sequential == "block":  # weights of one block that do not fit together are pruned in turn
            model = copy.deepcopy(dense)
            nms.prune_model(model, "2:4", criterion="wanda", calibration=data)
        for name, parameter in weights_of(model):
            torch.testing.assert_close(parameter, expected.get_parameter(name), msg=f"{sequential}: {name}")


def test_iterators_are_read_once_and_loaders_again() -> None:
    asked = 0

    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            nonlocal asked
            asked += 1
            return iter(batches())

    models = [mlp() for _ in range(3)]
    for model, data in zip(models, (batches(), iter(batches()), Loader()), strict=True):
        nms.prune_model(model, "2:4", criterion="sparsegpt", calibration=data)
        assert_same_state(model, state(models[0]))
    assert asked == 4  # to find out the order, and for each layer


@pytest.mark.parametrize("memory", [0, 12_000, 1 << 30])
@pytest.mark.parametrize("sequential", ["block", None])
def test_memory_is_bounded(memory: int, sequential: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0
    add = moments_module.Moments.add

    def watched(self: Any, columns: Any) -> None:
        nonlocal most
        add(self, columns)
        alive.add(self)
        most = max(most, sum(b.nbytes for m in alive for b in m.blocks))

    monkeypatch.setattr(moments_module.Moments, "add", watched)
    layers = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layers, 2, enable_nested_tensor=False)
    nms.prune_model(
        model,
        "2:4",
        criterion="sparsegpt",
        calibration=[torch.randn(2, 8, 32)],
        memory=memory,
        sequential=sequential,
    )
    attention, wide = 32 * 32 * 4, 64 * 64 * 4
    of_block = attention * 3 + wide
    bounds = {0: wide, 12_000: max(wide, 12_000), 1 << 30: of_block if sequential else 2 * of_block}
    assert 0 < most <= bounds[memory]
    if memory == 1 << 30:
        assert most == bounds[memory]


def test_only_as_much_of_the_model_runs_as_is_needed() -> None:
    model = mlp()
    calls: list[nn.Module] = []
    handles = [m.register_forward_hook(lambda m, args, out: calls.append(m)) for m in model]
    nms.prune_model(model, "2:4", criterion="wanda", calibration=batches(1))
    assert [len([c for c in calls if c is m]) for m in model] == [3, 3, 2, 2, 1]  # the last one of each stops
    for handle in handles:
        handle.remove()


# ----------------------------------------------------------------------------------- what it must leave alone


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(criterion: Any, dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    data = [batch.to(dtype) for batch in batches()]
    report = nms.prune_model(model, "2:4", criterion=criterion, calibration=data)
    assert all(p.dtype == dtype for p in model.parameters())
    assert all(nms.find_violation(p.detach(), "2:4") is None for _, p in weights_of(model))
    # Sums are made in float32 or better: the same as of the model in float32, but for the rounding.
    wide = nms.prune_model(
        mlp().to(dtype).float(), "2:4", criterion=criterion, calibration=[b.float() for b in data]
    )
    assert report[0].error == pytest.approx(wide[0].error, rel=0.02)


def test_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(), nn.BatchNorm1d(16), nn.Linear(16, 4))
    model[0].weight.requires_grad_(False)
    model[2].eval()
    parameters = dict(model.named_parameters())
    biases = {n: p.detach().clone() for n, p in parameters.items() if p.dim() == 1}
    pointers = {n: p.data_ptr() for n, p in parameters.items()}
    momentum = model[2].momentum
    random = torch.random.get_rng_state()
    nms.prune_model(model, "2:4", criterion="sparsegpt", calibration=batches())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert dict(model.named_parameters()) == parameters
    assert {n: p.data_ptr() for n, p in parameters.items()} == pointers
    assert [m.training for m in model] == [True, True, False, True]
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * 5]
    assert all(not (m._forward_pre_hooks or m._forward_hooks) for m in model.modules())
    assert (model[2].momentum, int(model[2].num_batches_tracked)) == (momentum, 0)
    for name, bias in biases.items():
        assert torch.equal(parameters[name], bias)
    model(torch.randn(3, 16)).sum().backward()


class Interrupted(nn.Module):
    """Breaks off in its so-manyth call."""

    def __init__(self, model: nn.Module, call: int, error: BaseException) -> None:
        super().__init__()
        self.inner, self.call, self.error = model, call, error

    def forward(self, x: Tensor) -> Tensor:
        self.call -= 1
        if self.call == 0:
            raise self.error
        return self.inner(x)


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("permute", [False, True])
def test_interruptions_leave_the_model_as_it_was(call: int, error: BaseException, permute: bool) -> None:
    model = Interrupted(mlp(norm=True), call + 4 * permute, error).train()
    before = state(model)
    with pytest.raises(type(error)):
        nms.prune_model(model, "2:4", criterion="sparsegpt", calibration=batches(1), permute=permute)
    assert_same_state(model, before)
    assert model.training
    assert all(not m._forward_pre_hooks for m in model.modules())


def test_interruption_while_a_weight_is_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    prune = module_under_test.pruned_values
    calls = 0

    def third_fails(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return prune(*args)

    monkeypatch.setattr(module_under_test, "pruned_values", third_fails)
    for arguments in ({}, {"criterion": "wanda", "calibration": batches()}):
        model, calls = mlp(), 0
        before = state(model)
        with pytest.raises(KeyboardInterrupt):
            nms.prune_model(model, "2:4", **arguments)
        assert_same_state(model, before)


# ------------------------------------------------------------------------------------------------ batch norms


def test_batch_norms_are_taken_anew() -> None:
    model = mlp(norm=True).eval()
    data = batches(4, 64)
    model.train()
    for _ in range(200):  # its statistics are those of the data
        model(data[0])
    model.eval()
    frozen = copy.deepcopy(model)
    report = nms.prune_model(model, "1:4", calibration=data)
    assert report.recalibrated == ("3",)
    with torch.no_grad():
        means = torch.stack([model[2](torch.relu(model[0](x))).mean(0) for x in data]).mean(0)
        spreads = torch.stack([model[2](torch.relu(model[0](x))).var(0) for x in data]).mean(0)
    torch.testing.assert_close(model[3].running_mean, means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[3].running_var, spreads, rtol=1e-4, atol=1e-5)
    report = nms.prune_model(frozen, "1:4", calibration=data, recalibrate=False)
    assert report.recalibrated == ()
    assert torch.equal(frozen[3].running_mean, mlp_statistics(data).running_mean)
    assert nms.prune_model(mlp(norm=True), "1:4").recalibrated == ()  # there is no data


def mlp_statistics(data: list[Tensor]) -> nn.BatchNorm1d:
    model = mlp(norm=True).train()
    for _ in range(200):
        model(data[0])
    return model[3]  # type: ignore[return-value]


def test_batch_norms_that_nothing_reaches_keep_theirs() -> None:
    model = nn.ModuleDict({"used": nn.BatchNorm1d(16), "unused": nn.BatchNorm1d(16), "fc": nn.Linear(16, 4)})
    model.forward = lambda x: model["fc"](model["used"](x))  # type: ignore[method-assign]
    model["unused"].running_mean.fill_(3)
    assert nms.prune_model(model, "2:4", calibration=batches()).recalibrated == ("used",)
    assert bool((model["unused"].running_mean == 3).all())
    with pytest.raises(ValueError, match="used gets one value a channel"):
        nms.prune_model(model, "2:4", calibration=batches(1, 1))


# ---------------------------------------------------------------------------------------------- bad arguments


def nothing() -> nn.Module:
    model = mlp()
    model[2].weight.data[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"criterion": "hessian"}, ValueError, "criterion must be 'magnitude' or 'wanda' or 'sparsegpt'"),
        ({"criterion": "wanda"}, ValueError, "'wanda' needs calibration"),
        ({"permute": True}, ValueError, "permute needs calibration"),
        ({"sequential": "all"}, ValueError, "sequential must be 'block', 'layer' or None, got 'all'"),
        ({"uncalibrated": "ignore"}, ValueError, "uncalibrated must be"),
        ({"remainder": "cut"}, ValueError, "remainder must be"),
        ({"dampening": -1}, ValueError, "dampening must be 0 or more"),
        ({"dampening": "1"}, TypeError, "dampening must be a number"),
        ({"memory": 1.5}, TypeError, "memory must be an int"),
        ({"memory": -1}, ValueError, "memory must be 0 or more"),
        ({"calibration": torch.randn(3, 16)}, TypeError, "calibration must be an iterable of batches"),
        ({"calibration": 3}, TypeError, "calibration must be an iterable of batches"),
        ({"calibration": []}, ValueError, "calibration must hold at least one batch"),
        ({"calibration": [None]}, TypeError, "calibration must hold tensors"),
        ({"calibration": [(torch.ones(3, 16), torch.ones(3))]}, TypeError, "The 2 items .* leave labels out"),
        ({"calibration": [torch.full((3, 16), torch.inf)]}, ValueError, r"inputs of 0\.weight are NaN"),
        ({"scheme": {"5": "2:4"}}, ValueError, "the model has no 5"),
        ({"scheme": "2:5x"}, ValueError, "n:m"),
        ({"scheme": {"0": "3:5"}}, ValueError, "not a multiple of m = 5"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    model = mlp()
    before = state(model)
    with pytest.raises(error, match=match):
        nms.prune_model(model, **{"scheme": "2:4", **arguments})
    assert_same_state(model, before)


def test_weights_that_cannot_be_pruned() -> None:
    with pytest.raises(ValueError, match=r"2\.weight has NaN"):
        nms.prune_model(nothing(), "2:4")
    with pytest.raises(ValueError, match=r"0\.weight is on the meta device"):
        nms.prune_model(mlp().to("meta"), "2:4")
    packed = mlp()
    nms.prune_model(packed, "2:4")
    nms.convert(packed, policy="always")
    with pytest.raises(ValueError, match=r"0\.weight is packed already"):
        nms.prune_model(packed, "2:4")
    layer = nn.Linear(8, 4)
    layer.weight = nn.Parameter(torch.zeros(1, 8).expand(4, 8))
    with pytest.raises(ValueError, match="weight has elements that share memory"):
        nms.prune_model(layer, "2:4")
    whole = nn.Linear(8, 4)
    whole.weight = nn.Parameter(torch.ones(4, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"torch\.int8: wanda is for floating point"):
        nms.prune_model(whole, "2:4", criterion="wanda", calibration=batches())
    nms.prune_model(whole, "2:4")
    assert nms.find_violation(whole.weight, "2:4") is None


def test_report() -> None:
    model = mlp()
    seen: list[Any] = []
    report = nms.prune_model(
        model,
        {"0": "2:4", "2": "1:4"},
        criterion="wanda",
        calibration=batches(),
        permute=True,
        progress=lambda *state: seen.append(state),
    )
    assert seen == [("0.weight", 1, 2), ("2.weight", 2, 2)]
    assert report.pruned == ("0.weight", "2.weight")
    assert report.skipped == {"4.weight": "not in the scheme"}
    assert len(report[:2]) == 2
    assert dict(report.scheme) == {"0.weight": nms.Pattern(2, 4), "2.weight": nms.Pattern(1, 4)}
    assert report.scheme.resolve(model)
    assert report.permutation is not None
    assert report.to_json()["weights"][1]["pattern"] == "1:4"
    assert "2 of 3 weights pruned" in str(report)
    assert "not in the scheme" in str(report)
    nms.convert(model, report.scheme, policy="always")


def test_channels_are_reordered_before() -> None:
    for pattern in ("2:4", "1:4", "2:8"):
        plain, permuted = mlp(64), mlp(64)
        nms.prune_model(plain, pattern)
        report = nms.prune_model(permuted, pattern, calibration=batches(1), permute=True)
        assert report.permutation is not None
        assert {name for space in report.permutation.spaces for name in space.weights} == {
            "2.weight",
            "4.weight",
        }
        for at in (2, 4):
            assert permuted[at].weight.square().sum() > plain[at].weight.square().sum()
