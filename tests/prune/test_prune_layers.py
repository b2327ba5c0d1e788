"""prune_model on every kind of layer, and on transformers' models; what it skips, and that it says so."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_zoo import MODELS, VOCABULARY, WIDTH, first, tokens
from prune_samples import CRITERIA
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext.search.inputs import find_sources
from nmsparse_ext.search.moments import Moments, collect
from nmsparse_ext.weights import weights


def violations(model: nn.Module, scheme: nms.Scheme) -> list[str]:
    return [
        name
        for name, weight in scheme.resolve(model, remainder="pad").items()
        if nms.find_violation(
            weight.parameter.detach(), weight.pattern, dim=weight.group_dim, remainder="pad"
        )
    ]


#: What makes a layer, and the shape of one of its inputs.
CONVS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(16, 12, 3, padding=1), (16, 9)),
    "conv2d": (lambda: nn.Conv2d(16, 12, 3, stride=2, padding=1), (16, 8, 8)),
    "reflect": (lambda: nn.Conv2d(16, 12, 3, padding=1, padding_mode="reflect"), (16, 8, 8)),
    "dilated": (lambda: nn.Conv2d(8, 12, (3, 2), dilation=(1, 2)), (8, 8, 8)),
    "grouped": (lambda: nn.Conv2d(16, 12, 3, groups=2), (16, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(8, 6, 2), (8, 4, 4, 4)),
    "channels_last": (lambda: nn.Conv2d(16, 12, 3).to(memory_format=torch.channels_last), (16, 8, 8)),  # type: ignore[call-overload]
}


@pytest.mark.parametrize("pattern", ["2:4", "1:8"])
@pytest.mark.parametrize("name", CONVS)
def test_convolutions(name: str, pattern: str) -> None:
    make, shape = CONVS[name]
    layer = make()
    x = torch.randn(6, *shape).cumsum(1)
    errors = {}
    for criterion in CRITERIA:
        pruned = copy.deepcopy(layer)
        report = nms.prune_model(pruned, pattern, criterion=criterion, calibration=[x[:3], x[3:]])
        assert report.pruned == ("weight",)
        assert violations(pruned, report.scheme) == []
        assert pruned.weight.stride() == layer.weight.stride()
        with torch.no_grad():
            bare = layer.bias.view(-1, *[1] * (x.dim() - 2))
            error = float((pruned(x) - layer(x)).norm() / (layer(x) - bare).norm())
        assert report[0].error == pytest.approx(error, rel=1e-3)
        errors[criterion] = error
    # It chooses greedily: of seven in eight weights the first choices can cost more than updates bring back.
    slack = {"2:4": 1.0, "1:8": 1.2}[pattern]
    assert errors["sparsegpt"] < slack * min(errors["wanda"], errors["magnitude"])


def test_wanda_on_a_convolution_by_hand() -> None:
    layer = nn.Conv2d(8, 6, 3, padding=1, stride=2)
    x = torch.randn(5, 8, 7, 7) * torch.arange(1, 9)[:, None, None]
    dense = layer.weight.detach().clone()
    patches = torch.nn.functional.unfold(x, 3, padding=1, stride=2)  # [images, channels * kernel, places]
    norms = patches.movedim(1, 0).flatten(1).norm(dim=1).view(8, 3, 3)
    nms.prune_model(layer, "1:4", criterion="wanda", calibration=[x])
    mask = nms.nm_mask(dense.abs() * norms, "1:4", dim=1)
    assert torch.equal(layer.weight.detach(), torch.where(mask, dense, 0.0))


def test_transposed_convolutions() -> None:
    for groups in (1, 2):
        layer = nn.ConvTranspose2d(16, 12, 2, stride=2, groups=groups)
        x = torch.randn(6, 16, 5, 5).cumsum(1)
        errors = []
        for criterion in CRITERIA:
            pruned = copy.deepcopy(layer)
            report = nms.prune_model(pruned, "2:4", criterion=criterion, calibration=[x])
            assert violations(pruned, report.scheme) == []
            with torch.no_grad():
                bare = layer.bias[:, None, None]
                error = float((pruned(x) - layer(x)).norm() / (layer(x) - bare).norm())
            assert report[0].error == pytest.approx(error, rel=1e-3)
            errors.append(error)
        assert errors[2] < min(errors[:2])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_short_last_groups(criterion: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.Flatten(), nn.Linear(90, 7))
    x = [torch.randn(5, 3, 5, 5) for _ in range(30)]
    with pytest.raises(ValueError, match="not a multiple of m = 4"):
        nms.prune_model(model, {"2": "2:4"}, criterion=criterion, calibration=x)
    report = nms.prune_model(model, "2:4", criterion=criterion, calibration=x, remainder="pad")
    assert report.pruned == ("0.weight", "2.weight")
    assert violations(model, report.scheme) == []
    assert bool((model[0].weight.count_nonzero(dim=1) == 2).all())
    assert bool((model[2].weight.count_nonzero(dim=1) == 46).all())  # 22 groups, and two of two


def transformers_case(name: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    return make().train(), [inputs() for _ in range(2)]


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("lstm", "gru")])
def test_models(name: str, criterion: Any) -> None:
    model, data = transformers_case(name)
    scheme = nms.Scheme.uniform(model, "2:4")
    with warnings.catch_warnings():
        warnings.simplefilter("error" if name != "vit" else "ignore", UserWarning)
        report = nms.prune_model(model, "2:4", criterion=criterion, calibration=data)
    assert set(report.pruned) == set(scheme) - UNCALLED.get(name, set())
    assert violations(model, report.scheme) == []
    assert all(row.error is not None and 0 < row.error < 1 for row in report if row.pattern)
    assert model.training
    assert bool(torch.isfinite(first(model(**data[0]))).all())
    assert bool(report.recalibrated) == (name == "resnet")


#: What these models hold and do not use when they are called this way.
UNCALLED: dict[str, set[str]] = {}


def test_tied_heads_and_embeddings_stay_dense() -> None:
    for name, embedding in (
        ("gpt2", "transformer.wte.weight"),
        ("llama-tied", "model.embed_tokens.weight"),
        ("bert", "embeddings.word_embeddings.weight"),
    ):
        model, data = transformers_case(name)
        before = model.get_parameter(embedding).detach().clone()
        report = nms.prune_model(model, "2:4", criterion="wanda", calibration=data)
        assert "embeddings stay dense" in report.skipped[embedding]
        assert torch.equal(model.get_parameter(embedding), before)


def test_a_tied_head_that_is_named_is_calibrated_as_a_head() -> None:
    model, data = transformers_case("llama-tied")
    report = nms.prune_model(model, {"lm_head": "2:4"}, criterion="sparsegpt", calibration=data)
    assert report.pruned == ("model.embed_tokens.weight",)
    assert nms.find_violation(model.lm_head.weight.detach(), "2:4") is None


class Partly(nn.Module):
    """Looks token ids up, never calls one layer, and takes its head's weight from the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.used, self.unused = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.rnn(self.used(self.embedding(ids)))[0]
        return torch.nn.functional.linear(x, self.embedding.weight)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_what_cannot_be_calibrated(criterion: Any) -> None:
    scheme = dict.fromkeys(
        ("embedding", "used", "unused", "rnn.weight_ih_l0", "rnn.weight_hh_l0"), nms.Pattern(2, 4)
    )
    data = [tokens() for _ in range(3)]
    model = Partly()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    prune = functools.partial(nms.prune_model, criterion=criterion, calibration=data)
    with pytest.warns(UserWarning, match="these weights stay dense") as caught:
        report = prune(model, scheme)
    assert "unused.weight: no calibration batch calls it" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert report.pruned == ("used.weight",)
    assert "token ids" in report.skipped["embedding.weight"]
    assert "no calibration batch calls it" in report.skipped["unused.weight"]
    assert "belongs to a LSTM" in report.skipped["rnn.weight_hh_l0"]
    for name in report.skipped:
        assert torch.equal(model.get_parameter(name), before[name])
    with pytest.raises(ValueError, match="cannot be calibrated"):
        prune(fresh := Partly(), scheme, uncalibrated="error")
    assert nms.find_violation(fresh.used.weight.detach(), "2:4") is not None
    report = prune(model := Partly(), scheme, uncalibrated="magnitude")
    assert {row.name: row.criterion for row in report} == {
        name: criterion if name == "used.weight" else "magnitude" for name in before if "bias" not in name
    }
    assert violations(model, report.scheme) == []
    magnitude = nms.prune_model(Partly(), scheme, calibration=data)  # which needs no inputs
    assert len(magnitude.pruned) == 5


def test_layers_that_are_called_more_than_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.layer(torch.relu(self.layer(x))))

    model = Twice()
    x = torch.randn(20, 16)
    w = model.layer.weight.detach().clone()
    both = torch.cat([x, torch.relu(model.layer(x))]).detach()
    nms.prune_model(model, "2:4", criterion="wanda", calibration=[x])
    mask = nms.nm_mask(w.abs() * both.norm(dim=0), "2:4")
    assert torch.equal(model.layer.weight.detach(), torch.where(mask, w, 0.0))


# ------------------------------------------------------------------------------------------------- experts


def moe(implementation: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers.models.mixtral.modeling_mixtral, "MixtralExperts"):
        pytest.skip("this transformers has a module for each expert")
    config = transformers.MixtralConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        vocab_size=VOCABULARY,
        experts_implementation=implementation,
    )
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config).eval()


def test_experts_see_their_own_inputs() -> None:
    model = moe("eager")
    data = {"input_ids": tokens(4, 8), "use_cache": False}
    (weight,) = (w for w in weights(model) if w.name == "model.layers.0.mlp.experts.gate_up_proj")
    caught: list[tuple[Any, ...]] = []
    handle = weight.module.register_forward_pre_hook(lambda m, args: caught.append(args))
    moments = Moments(3)
    collect(model, {"w": find_sources(model, weight)}, {"w": moments}, data)
    handle.remove()
    hidden, index, _ = caught[0]
    for expert in range(3):
        rows = hidden[(index == expert).any(1)]
        assert moments.counts[expert] == len(rows)
        if len(rows):
            torch.testing.assert_close(moments.blocks[0][expert], rows.T @ rows / len(rows))


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_experts(criterion: Any) -> None:
    results = []
    for implementation in ("eager", "grouped_mm"):
        model = moe(implementation)
        torch.manual_seed(1)
        data = [{"input_ids": tokens(4, 16), "use_cache": False} for _ in range(2)]
        report = nms.prune_model(model, "2:4", criterion=criterion, calibration=data)
        assert sum("experts" in name for name in report.pruned) == 4
        assert violations(model, report.scheme) == []
        assert model.config._experts_implementation == implementation
        results.append(model.model.layers[0].mlp.experts.down_proj.detach())
    assert float((results[0] == results[1]).float().mean()) > 0.99
    assert float((results[0] != 0).float().mean()) == pytest.approx(0.5, abs=0.01)
