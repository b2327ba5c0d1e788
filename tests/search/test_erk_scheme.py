"""ERK rounded to patterns: within the budget, and what it was rounded from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nmsparse_ext as nms
from nmsparse_ext import Pattern
from nmsparse_ext.search import Costs, erk_scheme
from nmsparse_ext.search.constraints import find_candidates
from nmsparse_ext.search.erk_scheme import erk_within


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 16),
    )


IMAGES = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    "budget",
    [
        {"params": 0.25},
        {"macs": 0.25},
        {"bytes": 0.25},
        {"params": 0.5, "macs": 0.2},
        {"params": 6000},
    ],
)
def test_meets_the_budget_and_leaves_no_room(budget: dict[str, float]) -> None:
    model = cnn()
    scheme = erk_scheme(model, budget, example_input=IMAGES)
    costs = Costs(model, IMAGES)
    assert costs.within(scheme, nms.Budget(**budget))
    assert scheme.complete
    assert scheme.dense["0.weight"].startswith("group dim 1 has 3 weights")
    for name, pattern in scheme.items():
        denser = Pattern(2 * pattern.n, 16)
        assert not costs.within({**scheme, name: denser}, nms.Budget(**budget))


def test_small_layers_keep_more() -> None:
    scheme = erk_scheme(cnn(), {"params": 0.3})
    assert scheme["4.weight"].density < scheme["2.weight"].density
    assert scheme.dense["10.weight"] == "dense by ERK"


def test_a_model_without_values_is_enough() -> None:
    with torch.device("meta"):
        model = cnn()
    assert erk_scheme(model, {"params": 0.3}) == erk_scheme(cnn(), {"params": 0.3})


def test_resnet50_rounds_to_a_fifth() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    with torch.device("meta"):
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
    scheme = erk_scheme(model, {"params": 0.2})
    share = Costs(model).shares(scheme)["params"]
    assert 0.199 < share <= 0.2


@pytest.mark.parametrize("metric", ["params", "macs", "bytes"])
def test_erk_spends_the_budget(metric: str) -> None:
    model = cnn()
    found = find_candidates(model)
    costs = Costs(model, IMAGES, candidates=found)
    limits = costs.limits(nms.Budget(**{metric: 0.3}))
    densities = erk_within(costs, found, limits).densities
    assert densities["0.weight"] == 1
    if metric != "bytes":  # in proportion, but for whole weights
        spent = sum(densities[name] * costs.of(name).as_dict()[metric] for name in costs.names)
        assert spent == pytest.approx(limits[metric], rel=1e-3)


def test_constraints_hold() -> None:
    scheme = erk_scheme(
        cnn(), {"params": 0.3}, constraints=nms.search.Constraints(embeds_in_24=True), skip=["10"]
    )
    assert all(pattern.embeds_in_24 for pattern in scheme.values())
    assert scheme.dense["10.weight"] == "skipped by '10'"


def test_out_of_reach() -> None:
    with pytest.raises(ValueError, match=r"the budget of params is .* but the sparsest candidates leave"):
        erk_scheme(cnn(), {"params": 0.05})
