"""``nms.optim`` with a Sparsifier: the same training as ``torch.optim`` with one, in one pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train.common import assert_same, assert_satisfies, batch, loss_of, mlp, train

import nmsparse_ext as nms
from nmsparse_ext import foreach, ops
from nmsparse_ext.train import Rule, Sparsifier
from nmsparse_ext.train.schedule import DecayingMask, DenseWarmup, Freeze, Gradual, RefreshEvery

LAMBDA = 0.05
OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01},
    "adamw": {"lr": 0.02, "weight_decay": 0.1},
}
OURS: dict[str, Any] = {"sgd": nms.optim.SGD, "adamw": nms.optim.AdamW}
THEIRS: dict[str, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
NAMES = list(OURS)


def make(kinds: dict[str, Any], name: str, model: nn.Module, **options: Any) -> Any:
    return kinds[name](model.parameters(), **{**OPTIONS[name], **options})


def both(
    name: str,
    model: Callable[[], nn.Module] = mlp,
    scheme: Any = "2:4",
    options: Any = None,
    **arguments: Any,
) -> list[tuple[nn.Module, Any, Sparsifier]]:
    """The same model with our optimizer and with torch's."""
    found = []
    for kinds in (OURS, THEIRS):
        built = model()
        optimizer = make(kinds, name, built, **(options or {}))
        found.append(
            (built, optimizer, Sparsifier(built, optimizer, scheme, **{"lambda_w": LAMBDA, **arguments}))
        )
    return found


def assert_alike(ours: Sparsifier, theirs: Sparsifier, **tolerance: float) -> None:
    for name in ours.masks:
        assert torch.equal(ours.masks[name], theirs.masks[name]), name
        torch.testing.assert_close(ours.dense_weight(name), theirs.dense_weight(name), **tolerance)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    assert ours.patterns == theirs.patterns
    assert ours.history.counts == theirs.history.counts


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which ops on lists have run: one pass, or several."""
    seen: list[str] = []
    for name in ("sgd_", "adamw_", "add_pruned", "apply_bits", "reselect"):
        function = getattr(foreach, name)

        def recorded(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> None:
            seen.append(name)
            function(*args, **kwargs)

        monkeypatch.setattr(foreach, name, recorded)
    return seen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"method": "ste"},
        {"method": "static"},
        {"penalty": "decoupled"},
        {"lambda_w": -0.02},
        {"schedule": DenseWarmup(2) + Gradual(4)},
        {"schedule": RefreshEvery(3) + Freeze(after=6)},
        {"method": "static", "schedule": Gradual(6)},
    ],
    ids=str,
)
def test_same_training_as_with_torch(name: str, arguments: dict[str, Any], calls: list[str]) -> None:
    ours, theirs = both(name, **arguments)
    train(*ours[:2], 8)
    train_calls, calls[:] = set(calls), []
    train(*theirs[:2], 8)
    assert_alike(ours[2], theirs[2])
    assert train_calls - {"apply_bits"} == {"sgd_" if name == "sgd" else "adamw_"}
    assert ours[2].step == 8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{"maximize": True, "lr": 1e-3}, {"lr": torch.tensor(0.1)}], ids=str)
def test_options(name: str, options: dict[str, Any]) -> None:
    ours, theirs = both(name, options=options)
    train(*ours[:2], 5)
    train(*theirs[:2], 5)
    assert_alike(ours[2], theirs[2])


def test_amsgrad_and_nesterov() -> None:
    for name, options in (("sgd", {"nesterov": True}), ("adamw", {"amsgrad": True})):
        ours, theirs = both(name, options=options)
        train(*ours[:2], 5)
        train(*theirs[:2], 5)
        assert_alike(ours[2], theirs[2])


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 2), nn.Flatten(), nn.Linear(8, 6), nn.LayerNorm(6)
    ).double()
    model[1].to(memory_format=torch.channels_last)
    return nn.Sequential(nn.Unflatten(1, (1, 4, 4)), model)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions(name: str, channels_last: bool, calls: list[str]) -> None:
    def model() -> nn.Module:
        built = conv_net()
        return built.to(memory_format=torch.channels_last) if channels_last else built

    ours, theirs = both(name, model, {"1.1": "2:4", "1.3": "4:8"})
    train(*ours[:2], 4)
    assert set(calls) - {"apply_bits"} == {"sgd_" if name == "sgd" else "adamw_"}
    train(*theirs[:2], 4)
    assert_alike(ours[2], theirs[2])


@pytest.mark.parametrize("name", NAMES)
def test_what_takes_more_passes(name: str, calls: list[str]) -> None:
    """Transposable masks, fading ones, and rules of one's own are exchanged as with any optimizer."""

    class Mine(Rule):
        pass

    for arguments in ({"transposable": True}, {"schedule": DecayingMask(10)}, {"method": Mine()}):
        ours, theirs = both(name, **arguments)
        train(*ours[:2], 3)
        train(*theirs[:2], 3)
        assert_alike(ours[2], theirs[2])
        assert ours[1].updates == {}


def test_no_gradient_no_update() -> None:
    ours, theirs = both("sgd", schedule=Gradual(3))
    for model, optimizer, _ in (ours, theirs):
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, batch(step)).backward()
            if step == 1:
                model[0].weight.grad = None
            optimizer.step()
    assert_alike(ours[2], theirs[2])


@pytest.mark.parametrize("name", NAMES)
def test_lambda_whatever_the_loop(name: str) -> None:
    """Scaled, accumulated or closed over: the same weights."""

    def scaled(model: nn.Module, optimizer: Any, step: int) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        scaler.scale(loss_of(model, batch(step))).backward()
        before = model[0].weight.grad.clone()
        scaler.step(optimizer)
        assert torch.equal(model[0].weight.grad, before)

    def unscaled(model: nn.Module, optimizer: Any, step: int) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        scaler.scale(loss_of(model, batch(step))).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)

    def accumulated(model: nn.Module, optimizer: Any, step: int) -> None:
        for part in batch(step).chunk(4):
            (loss_of(model, part) / 4).backward()
        optimizer.step()

    def closed(model: nn.Module, optimizer: Any, step: int) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch(step))
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0

    plain = both(name)[1]
    train(*plain[:2], 3)
    for loop in (scaled, unscaled, accumulated, closed):
        model, optimizer, sparsifier = both(name)[0]
        for step in range(3):
            optimizer.zero_grad()
            loop(model, optimizer, step)
        assert_alike(sparsifier, plain[2])


@pytest.mark.parametrize("name", NAMES)
def test_an_inf_skips_the_step(name: str) -> None:
    model, optimizer, sparsifier = both(name)[0]
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(loss_of(model, batch(5) * torch.inf)).backward()
    scaler.step(optimizer)
    assert sparsifier.step == 2
    for key, entries in optimizer.state_dict()["state"].items():
        assert_same(entries, before["state"][key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_narrow_parameters_have_wide_weights(name: str, dtype: torch.dtype) -> None:
    ours, theirs = both(name, lambda: mlp(dtype))
    train(*ours[:2], 4, dtype=dtype)
    train(*theirs[:2], 4, dtype=dtype)
    for model, optimizer, sparsifier in (ours, theirs):
        assert sparsifier.dense_weight("0").dtype == torch.float32
        keys = ["momentum_buffer"] if name == "sgd" else ["exp_avg", "exp_avg_sq"]
        assert all(optimizer.state[model[0].weight][key].dtype == torch.float32 for key in keys)
        assert model[0].weight.dtype == dtype
        assert torch.equal(
            model[0].weight, torch.where(sparsifier.masks["0"], sparsifier.dense_weight("0").to(dtype), 0)
        )
    torch.testing.assert_close(ours[2].dense_weight("0"), theirs[2].dense_weight("0"), rtol=0.1, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_resumes_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model, optimizer, sparsifier = both(name, lambda: mlp(dtype))[0]
    train(model, optimizer, 3, dtype=dtype)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    losses = train(model, optimizer, 3, start=3, dtype=dtype)
    other, its_optimizer, its_sparsifier = both(name, lambda: mlp(dtype, seed=5))[0]
    other.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    assert train(other, its_optimizer, 3, start=3, dtype=dtype) == losses
    assert its_sparsifier.step == sparsifier.step == 6
    assert_same(dict(model.named_parameters()), dict(other.named_parameters()))
    assert_same(dict(sparsifier.masks), dict(its_sparsifier.masks))


@pytest.mark.parametrize("name", NAMES)
def test_goes_on_from_torch(name: str) -> None:
    """A checkpoint of the torch optimizer with its Sparsifier, and one of the plain optimizer."""
    ours, theirs = both(name)
    train(*theirs[:2], 3)
    ours[0].load_state_dict(theirs[0].state_dict())
    ours[1].load_state_dict(copy.deepcopy(theirs[1].state_dict()))
    for model, optimizer, _ in (ours, theirs):
        train(model, optimizer, 3, start=3)
    assert_alike_now(ours[2], theirs[2])


def assert_alike_now(a: Sparsifier, b: Sparsifier) -> None:
    for name in a.masks:
        assert torch.equal(a.masks[name], b.masks[name]), name
        torch.testing.assert_close(a.dense_weight(name), b.dense_weight(name))


@pytest.mark.parametrize("name", NAMES)
def test_deep_copies_go_their_own_ways(name: str) -> None:
    model, optimizer, sparsifier = both(name)[0]
    train(model, optimizer, 2)
    twin, twin_optimizer, twin_sparsifier = copy.deepcopy((model, optimizer, sparsifier))
    assert twin_optimizer.sparsifier is twin_sparsifier
    assert train(model, optimizer, 3, start=2) == train(twin, twin_optimizer, 3, start=2)
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_the_optimizer_makes_the_sparsifier(name: str) -> None:
    model, other = mlp(), mlp()
    mine = OURS[name](
        model.named_parameters(),
        **OPTIONS[name],
        scheme={"0": "2:4", "2": "1:4"},
        lambda_w=LAMBDA,
        method="ste",
    )
    theirs = make(THEIRS, name, other)
    sparsifier = Sparsifier(other, theirs, {"0": "2:4", "2": "1:4"}, method="ste")
    train(model, mine, 3)
    train(other, theirs, 3)
    assert_alike(mine.sparsifier, sparsifier)
    assert_satisfies(model, {"0.weight": "2:4", "2.weight": "1:4"})
    mine.sparsifier.finalize()
    assert mine.sparsifier is None
    train(model, mine, 1)  # a plain optimizer again


def test_the_model_may_be_given() -> None:
    model = mlp()
    optimizer = nms.optim.SGD([model[0].weight], lr=0.1, scheme=nms.Scheme({"0": "2:4"}), model=model)
    assert list(optimizer.sparsifier.masks) == ["0.weight"]
    assert optimizer.sparsifier.rule.lambda_w == 2e-4
    assert nms.optim.AdamW(mlp().parameters(), scheme="2:4", transposable=True).sparsifier is not None
    with pytest.raises(ValueError, match="scheme needs the model"):
        nms.optim.SGD([model[0].weight], lr=0.1, scheme="2:4")


@pytest.mark.parametrize("name", NAMES)
def test_memory_per_weight(name: str) -> None:
    """What the docstrings say: bytes per element of a sparse weight, by what storages hold."""
    for dtype, each in ((torch.float32, 4), (torch.bfloat16, 2)):
        layer = nn.Linear(256, 256, bias=False).to(dtype)
        optimizer = make(OURS, name, layer)
        sparsifier = Sparsifier(layer, optimizer, "2:4")
        for _ in range(2):
            layer.weight.grad = torch.randn_like(layer.weight)
            optimizer.step()
        weight = next(iter(sparsifier._weights.values()))
        held = [
            layer.weight,
            layer.weight.grad,
            *optimizer.state[layer.weight].values(),
            *vars(weight).values(),
        ]
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in held
            if isinstance(t, Tensor)
        }
        per_element = (sum(storages.values()) - (4 if name == "adamw" else 0)) / layer.weight.numel()
        assert per_element == each + each + 4 + (4 if name == "sgd" else 8) + 1 / 8


@pytest.mark.parametrize("name", NAMES)
def test_engines_train_alike_bit_for_bit(name: str, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine.name == "cuda":
        pytest.skip("tests/gpu compares with the GPU")
    monkeypatch.setattr(foreach, "_nms", ops._nms)
    model, optimizer, sparsifier = both(name, lambda: mlp(torch.float32))[0]
    for step in range(4):
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    found = {"weight": model[0].weight.detach(), "dense": sparsifier.dense_weight("0")}
    expected = EXPECTED.setdefault(name, found)
    assert_same(found, expected)


EXPECTED: dict[str, dict[str, Tensor]] = {}
