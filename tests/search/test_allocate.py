"""allocate: the best scheme by each criterion, against trying all schemes."""

from __future__ import annotations

import copy
import itertools
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import nmsparse_ext as nms
from nmsparse_ext.search import Costs, find_candidates
from nmsparse_ext.search.criteria import visit_gradients

pytest.importorskip("scipy")

P = nms.Pattern


def mlp(seed: int = 0, sizes=(16, 32, 48, 16)) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    for i, layer in enumerate(layers):
        layer.weight.data *= 1 + 3 * i  # so that layers differ in what they are worth
    return nn.Sequential(*layers)


def lost(weight: torch.Tensor, pattern: P) -> float:
    return float((weight - nms.nm_prune(weight, pattern)).double().square().sum())


def best_by_hand(model, budget, losses, m):
    found = find_candidates(model, m=m)
    costs = Costs(model, torch.randn(3, 16), candidates=found)
    limits = costs.limits(budget)
    schemes = [dict(zip(found, chosen, strict=True)) for chosen in itertools.product(*found.values())]
    return min(
        sum(losses[name][pattern] for name, pattern in scheme.items())
        for scheme in schemes
        if costs.within(scheme, limits)
    )


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 5),
    m=st.sampled_from([4, 8, 16]),
    budget=st.sampled_from(
        [{"params": 0.3}, {"macs": 0.4}, {"bytes": 0.5}, {"params": 0.4, "bytes": 0.45}, {"params": 1.0}]
    ),
)
def test_magnitude_equals_trying_all(seed, m, budget):
    model = mlp(seed)
    parsed = nms.Budget(**budget)
    losses = {
        f"{i}.weight": {
            p: lost(model[i].weight.detach(), p) for p in find_candidates(model, m=m)[f"{i}.weight"]
        }
        for i in range(3)
    }
    result = nms.allocate(model, budget, m=m, example_input=torch.randn(3, 16))
    for name, by_pattern in losses.items():
        for pattern, loss in by_pattern.items():
            assert result.losses[name][pattern] == pytest.approx(loss, rel=1e-5, abs=1e-12)
    best = best_by_hand(model, parsed, losses, m)
    assert result.objective == pytest.approx(best, rel=1e-5, abs=1e-12)
    assert result.gap <= 2e-6
    costs = Costs(model, torch.randn(3, 16))
    assert costs.within(result.scheme, parsed)
    assert result.costs == costs.total(result.scheme)
    assert result.scheme.complete
    result.scheme.resolve(model)


def test_beats_or_equals_uniform():
    model = mlp()
    uniform = nms.Scheme.uniform(model, "4:16")
    result = nms.allocate(model, nms.Budget(params=0.25))
    assert result.objective <= sum(lost(model[i].weight.detach(), P(4, 16)) for i in range(3)) * (1 + 1e-6)
    assert result.costs.params <= Costs(model).total(uniform).params


def test_relative_losses_forget_the_scale():
    model, scaled = mlp(), mlp()
    scaled[0].weight.data *= 64
    budget = nms.Budget(params=0.25)
    first = nms.allocate(model, budget, relative=True)
    assert first.scheme == nms.allocate(scaled, budget, relative=True).scheme
    assert nms.allocate(model, budget).scheme != nms.allocate(scaled, budget).scheme


def test_dense_reasons_and_constraints():
    model = mlp()
    constraints = nms.search.Constraints(at_least={"2": 8})
    result = nms.allocate(model, {"params": 0.4}, skip=["0"], constraints=constraints)
    assert result.scheme.dense["0.weight"] == "skipped by '0'"
    assert result.scheme.get("2", P(16, 16)).density >= 0.5
    whole = nms.allocate(model, {"params": 1.0})
    assert dict(whole.scheme) == {}
    assert whole.scheme.dense["0.weight"] == "dense is worth most here"
    assert whole.objective == 0


def test_embeds_in_24():
    result = nms.allocate(
        mlp(),
        {"params": 0.4},
        constraints=nms.search.Constraints(embeds_in_24=True),
        candidates=["2:4", "1:4", "2:8", "1:8", "2:16", "4:8"],
    )
    assert len(result.scheme) == 3
    assert all(pattern.embeds_in_24 for pattern in result.scheme.values())
    assert result.costs.params <= 0.4 * result.dense.params


def test_embeds_in_24_without_candidates():
    """Half of the weights are kept, by 2:4, where n:16 could keep an eighth at most."""
    constraints = nms.search.Constraints(embeds_in_24=True)
    half = nms.allocate(mlp(), {"params": 0.5}, constraints=constraints)
    assert set(half.scheme.values()) == {P(2, 4)}
    less = nms.allocate(mlp(), {"params": 0.2}, constraints=constraints)
    assert len(less.scheme) == 3
    assert all(pattern.embeds_in_24 for pattern in less.scheme.values())
    assert 0.1 * less.dense.params < less.costs.params <= 0.2 * less.dense.params


def test_given_latency():
    def seconds(name, pattern):  # only the last layer is faster if pruned
        return 1.0 if pattern is None or name != "2.weight" else pattern.density

    result = nms.allocate(mlp(), {"latency": 0.75}, latency=seconds)
    assert set(result.scheme) == {"2.weight"}
    assert result.costs.latency <= 2.25


def test_impossible_budgets():
    with pytest.raises(ValueError, match="budget of params is"):
        nms.allocate(mlp(), {"params": 0.01})
    with pytest.raises(ValueError, match="macs needs an example_input"):
        nms.allocate(mlp(), {"macs": 0.5})


def test_taylor_equals_its_definition():
    model = mlp()
    x = torch.randn(4, 8, 16)
    calls = itertools.count()

    def step(model):
        return model(x[next(calls) % 4]).square().mean()

    weights = [layer.weight for layer in model]
    grads = [torch.autograd.grad(model(x[i]).square().mean(), weights) for i in range(4)]
    result = nms.allocate(model, {"params": 0.25}, criterion="taylor", step=step, steps=4)
    assert next(calls) == 4
    for i, layer in enumerate(model):
        scores = sum((layer.weight * g[i]).detach().double().square() for g in grads) / 4
        for pattern, loss in result.losses[f"{i}.weight"].items():
            pruned = ~nms.nm_mask(layer.weight.detach(), pattern)
            assert loss == pytest.approx(float(scores[pruned].sum()), rel=1e-4, abs=1e-12)
    assert all(layer.weight.grad is None and layer.weight.requires_grad for layer in model)


def test_taylor_is_allocated_for_several_m():
    model = mlp()
    x = torch.randn(8, 16)
    grads = torch.autograd.grad(model(x).square().mean(), [layer.weight for layer in model])
    patterns = ["4:4", "2:4", "1:8", "3:16"]
    result = nms.allocate(
        model, {"params": 0.4}, candidates=patterns, criterion="taylor", steps=1,
        step=lambda model: model(x).square().mean(),
    )  # fmt: skip
    for i, layer in enumerate(model):
        scores = (layer.weight * grads[i]).detach().double().square()
        for pattern, loss in result.losses[f"{i}.weight"].items():
            pruned = ~nms.nm_mask(layer.weight.detach(), pattern)
            assert loss == pytest.approx(float(scores[pruned].sum()), rel=1e-4, abs=1e-12)


def test_taylor_lets_gradients_go_and_leaves_the_model_alone():
    """Each is visited in the backward pass, with what all uses of a tied weight add to it, and not kept."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    model[3].weight = model[0].weight
    model[1].weight.grad = kept = torch.randn(16, 16)
    model[2].weight.requires_grad_(False)
    weights = find_candidates(model).weights
    alive: list[weakref.ref] = []
    seen: dict[str, torch.Tensor] = {}
    most = 0

    def visit(name, gradient):
        nonlocal most
        seen[name] = gradient.clone()
        alive.append(weakref.ref(gradient))
        most = max(most, sum(ref() is not None for ref in alive))

    x = torch.randn(8, 16)
    visit_gradients(model, weights, lambda model: model(x).square().mean(), 1, visit)
    assert set(seen) == set(weights)
    assert most == 1  # one at a time
    model[2].weight.requires_grad_(True)
    expected = torch.autograd.grad(model(x).square().mean(), [w.parameter for w in weights.values()])
    for name, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(seen[name], gradient)
    assert model[1].weight.grad is kept
    assert model[0].weight.grad is None
    # Nothing stays behind that would visit the gradients of the training to come.
    seen.clear()
    model(x).sum().backward()
    assert not seen


@pytest.mark.parametrize("kind", ["compiled", "checkpointed"])
def test_taylor_of_compiled_and_checkpointed_models(kind):
    """Their gradients, too, come one weight at a time, once each."""
    x = torch.randn(4, 16)

    def step(model):
        output = checkpoint(model, x, use_reentrant=False) if kind == "checkpointed" else model(x)
        return output.square().mean()

    model = torch.compile(mlp(), backend="aot_eager") if kind == "compiled" else mlp()
    arguments = {"criterion": "taylor", "steps": 2}
    found = nms.allocate(model, {"params": 0.4}, step=step, **arguments)
    plain = nms.allocate(mlp(), {"params": 0.4}, step=lambda m: m(x).square().mean(), **arguments)
    assert found.objective == pytest.approx(plain.objective, rel=1e-5)
    assert found.scheme == plain.scheme


def test_taylor_counts_gradients_that_are_not_finite():
    def step(model):
        loss = model(torch.ones(1, 16)).sum()
        return loss + (model[1].weight[0, 0] - model[1].weight[0, 0].detach()).abs().sqrt()

    with pytest.raises(ValueError, match=r"1\.weight has NaN or infinite"):
        nms.allocate(mlp(), {"params": 0.5}, criterion="taylor", step=step, steps=1)


def test_taylor_on_frozen_weights():
    model = mlp().requires_grad_(False)
    nms.allocate(
        model, {"params": 0.5}, criterion="taylor", step=lambda m: m(torch.ones(1, 16)).sum(), steps=1
    )
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"criterion": "size"}, ValueError, "magnitude, taylor, output, got 'size'"),
        ({"criterion": "taylor"}, ValueError, "needs step"),
        ({"criterion": "taylor", "step": lambda m: 1.0}, TypeError, "step must return"),
        ({"criterion": "taylor", "step": lambda m: torch.tensor(float("nan"))}, ValueError, "finite"),
        (
            {"criterion": "taylor", "step": lambda m: m[0](torch.ones(16)).sum()},
            ValueError,
            "reaches 1.weight",
        ),
        ({"criterion": "taylor", "step": lambda m: m, "steps": 0}, ValueError, "steps must be at least 1"),
        ({"criterion": "output"}, ValueError, "needs calibration"),
        ({"criterion": "output", "calibration": []}, ValueError, "at least one batch"),
        ({"budget": "params=0.5"}, TypeError, "budget must be"),
    ],
)
def test_refused(arguments, error, message):
    budget = arguments.pop("budget", {"params": 0.5})
    with pytest.raises(error, match=message):
        nms.allocate(mlp(), budget, **arguments)


def test_output_is_relative_by_default():
    model = mlp()
    batches = [torch.randn(32, 16) for _ in range(2)]
    arguments = {"criterion": "output", "calibration": batches}
    result = nms.allocate(model, {"params": 0.25}, **arguments)
    x = torch.cat(batches)
    weight = model[0].weight.detach()
    error = (x @ (weight - nms.nm_prune(weight, "4:16")).T).square().sum(1).mean()
    assert result.losses["0.weight"][P(4, 16)] == pytest.approx(float(error), rel=1e-4)
    model[0].weight.data *= 8
    model[0].bias.data *= 8
    model[1].weight.data /= 8
    again = nms.allocate(model, {"params": 0.25}, **arguments)
    assert again.objective == pytest.approx(result.objective, rel=1e-3)
    assert 0 < result.objective < 3
    absolute = nms.allocate(model, {"params": 0.25}, relative=False, **arguments)
    assert absolute.objective != pytest.approx(again.objective, rel=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_not_finite(value):
    model = mlp()
    model[1].weight.data[3, 5] = value
    with pytest.raises(ValueError, match=r"1\.weight has NaN or infinite"):
        nms.allocate(model, {"params": 0.5})


def test_prints_and_serialises():
    import json

    result = nms.allocate(mlp(), {"params": 0.25})
    text = str(result)
    assert "params" in text
    assert "budget" in text
    loaded = json.loads(json.dumps(result.to_json()))
    assert loaded["limits"] == {"params": 0.25 * result.dense.params}
    assert loaded["scheme"] == {name: str(pattern) for name, pattern in result.scheme.items()}
    assert set(loaded["seconds"]) == {"costs", "criterion", "solver"}


def test_permutation_loses_less_and_keeps_the_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16))
    x, calibration = torch.randn(5, 16), [torch.randn(32, 16)]
    for criterion in ("magnitude", "output"):
        permuted = copy.deepcopy(model)
        options = {"m": 4, "criterion": criterion, "calibration": iter(calibration)}
        plain = nms.allocate(model, {"params": 0.4}, **options)
        options["calibration"] = iter(calibration)  # used twice, so it has to be kept
        result = nms.allocate(permuted, {"params": 0.4}, permute=True, example_input=x, **options)
        torch.testing.assert_close(permuted(x), model(x))
        assert not torch.equal(permuted[2].weight, model[2].weight)
        assert plain.permutation is None
        assert result.permutation is not None
        assert set(result.permutation.refused) == {"0.weight"}  # the model's own inputs
        if criterion == "magnitude":
            assert result.objective < plain.objective
        # What it says of the scheme is said of the order that the model has now.
        again = nms.allocate(permuted, {"params": 0.4}, **options | {"calibration": calibration})
        assert (again.scheme, again.objective) == (result.scheme, result.objective)
        assert "permutation" in result.seconds
        assert result.to_json()["permutation"]["spaces"]


def test_permutation_needs_an_example():
    with pytest.raises(ValueError, match="permute needs example_input"):
        nms.allocate(mlp(), {"params": 0.4}, permute=True)
