"""permute_channels: the model computes the same, its patterns keep more, what is not safe is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nmsparse_ext as nms
from nmsparse_ext.search import permute as module_under_test
from nmsparse_ext.search import permute_channels

X = torch.randn(3, 16, 8, 8)


class Residual(nn.Module):
    """A block whose inner channels are free, and whose stream has two writers and three readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(16, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.inner = nn.Conv2d(32, 16, 1, bias=False)
        self.inner_norm = nn.BatchNorm2d(16)
        self.back = nn.Conv2d(16, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = torch.relu(self.inner_norm(self.inner(x)))
        x = x + self.back(y)
        x = F.max_pool2d(self.depthwise(x), 2)
        return self.head(x.mean((2, 3)))


class GatedMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.gate, self.up = nn.Linear(16, 64), nn.Linear(16, 64, bias=False)
        self.down = nn.Linear(64, 16)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(self.norm(x))) * self.up(x))


def randomised(model: nn.Module) -> nn.Module:
    """Nothing in it is a constant that hides a mistake."""
    torch.manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(
                torch.rand_like(tensor) + 0.1 if tensor.dim() == 1 else torch.randn_like(tensor)
            )
    return model.eval()


def lost(model: nn.Module, names) -> float:
    weights = [model.get_parameter(name).detach() for name in names]
    return sum(float((w - nms.nm_prune(w, "2:4")).square().sum()) for w in weights)


MODELS = [
    (
        nn.Sequential(
            nn.Linear(16, 32),
            nn.ReLU(),
            nn.Dropout(),
            nn.LayerNorm(32),
            nn.Linear(32, 64),
            nn.GELU(),
            nn.Linear(64, 8),
        ),
        torch.randn(5, 16),
        {"4.weight", "6.weight"},
    ),
    (
        nn.Sequential(
            nn.Conv2d(16, 32, 3),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 16, 3),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 8),
        ),
        X,
        {"3.weight", "7.weight"},
    ),
    (Residual(), X, {"inner.weight", "back.weight", "head.weight"}),
    (GatedMlp(), torch.randn(2, 5, 16), {"down.weight"}),
    (
        nn.Sequential(nn.Conv1d(16, 32, 3), nn.BatchNorm1d(32), nn.Tanh(), nn.Conv1d(32, 8, 1)),
        torch.randn(2, 16, 9),
        {"3.weight"},
    ),
]


@pytest.mark.parametrize(("model", "x", "free"), MODELS, ids=lambda v: type(v).__name__)
def test_same_outputs_and_more_kept(model, x, free):
    model = randomised(copy.deepcopy(model))
    before, keys = model(x), list(model.state_dict())
    scheme = nms.Scheme.uniform(model, "2:4")
    lost_before = lost(model, free)
    result = permute_channels(model, scheme, x)
    assert {name for space in result.spaces for name in space.weights} == free
    assert set(result.refused) == set(scheme) - free
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert lost(model, free) < 0.99 * lost_before
    assert all(space.kept > space.kept_before for space in result.spaces)
    for space in result.spaces:
        weights = [model.get_parameter(name).detach() for name in space.weights]
        kept = sum(float(nms.nm_prune(w, "2:4").square().sum()) for w in weights)
        assert space.kept == pytest.approx(kept / sum(float(w.square().sum()) for w in weights), rel=1e-4)
    assert "kept before" in str(result)
    assert result.to_json()["refused"] == result.refused


def test_a_residual_stream_has_one_order():
    model = randomised(Residual())
    result = permute_channels(model, "2:4", X)
    assert ("inner.weight", "head.weight") in {space.weights for space in result.spaces}


def test_parts_of_models_that_cannot_be_traced():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(GatedMlp() for _ in range(2))

        def forward(self, x, scale=1.0):
            if x.sum() > 0:  # which tracing cannot follow
                x = x + scale
            for block in self.blocks:
                x = block(x)
            return {"out": x}

    model = randomised(Whole())
    x = torch.rand(2, 5, 16)
    before = model(x=x)["out"]
    result = permute_channels(model, "2:4", {"x": x})
    assert [space.weights for space in result.spaces] == [
        ("blocks.0.down.weight",),
        ("blocks.1.down.weight",),
    ]
    assert result.refused["blocks.0.gate.weight"]
    torch.testing.assert_close(model(x=x)["out"], before, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers(kind):
    transformers = pytest.importorskip("transformers")
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model, free = transformers.LlamaForCausalLM(config).eval(), "model.layers.{}.mlp.down_proj.weight"
    else:
        config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)
        model, free = transformers.GPT2LMHeadModel(config).eval(), "transformer.h.{}.mlp.c_proj.weight"
    example = {"input_ids": torch.randint(50, (1, 9))}
    with torch.no_grad():
        before = model(**example).logits
        result = permute_channels(model, nms.Scheme.uniform(model, "2:8"), example, restarts=0)
        after = model(**example).logits
    assert {name for space in result.spaces for name in space.weights} == {free.format(i) for i in range(2)}
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


class Odd(nn.Module):
    """Channels that go through something, then into a layer."""

    def __init__(self, between) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 8)
        self.between = between
        self.register_buffer("scale", torch.arange(16.0))

    def forward(self, x):
        return self.last(self.between(self, self.first(x)))


REFUSED = {
    "softmax": (lambda m, x: x.softmax(-1), "goes through softmax"),
    "cat": (lambda m, x: torch.cat([x[..., :8], x[..., 8:]], -1), "goes through getitem"),
    "view": (lambda m, x: x.view(-1, 4, 4).flatten(-2), "goes through view"),
    "scaled": (lambda m, x: x * m.scale, "whose order is fixed"),
    "input": (lambda m, x: x + m.scale[None], "whose order is fixed"),
    "norm": (lambda m, x: F.layer_norm(x, (16,)), "goes through layer_norm"),
    "matmul": (lambda m, x: x @ x.mT, "goes through matmul"),
    "mean": (lambda m, x: x - x.mean(-1, keepdim=True), "mean over channels"),
    "transposed": (lambda m, x: x.mT, "goes through"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_to_be_safe_is_refused(name):
    between, reason = REFUSED[name]
    model = randomised(Odd(between))
    x = torch.randn(16, 16)
    before = copy.deepcopy(model.state_dict())
    result = permute_channels(model, "2:4", x)
    assert result.spaces == ()
    assert reason in result.refused["last.weight"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_shared_repeated_and_hooked_modules_are_refused():
    linear = nn.Linear(16, 16)
    twice = nn.Sequential(linear, nn.ReLU(), linear, nn.ReLU(), nn.Linear(16, 8))
    result = permute_channels(randomised(twice), "2:4", torch.randn(2, 16))
    assert "more than once" in result.refused["4.weight"]
    tied = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    tied[2].weight = tied[0].weight
    assert not permute_channels(randomised(tied), "2:4", torch.randn(2, 16)).spaces
    hooked = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    hooked[0].register_forward_hook(lambda *args: None)
    assert "hooks" in permute_channels(hooked, "2:4", torch.randn(2, 16)).refused["2.weight"]


def test_outputs_and_other_uses_are_refused():
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Conv2d(16, 16, 1) for _ in range(3))
            self.grouped, self.last = nn.Conv2d(16, 16, 1, groups=2), nn.Conv2d(16, 16, 1)

        def forward(self, x):
            x = self.first(x)
            y = self.third(self.second(x)) * self.second.weight.sum()
            return self.last(self.grouped(y)), x

    result = permute_channels(randomised(Several()), "2:4", X)
    assert not result.spaces
    assert "is an output" in result.refused["second.weight"] or "shares" in result.refused["second.weight"]
    assert "shares its weight" in result.refused["third.weight"]
    assert "grouped convolution" in result.refused["last.weight"]


def test_wrong_output_is_put_back(monkeypatch):
    model = randomised(copy.deepcopy(MODELS[0][0]))
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(module_under_test, "_same", lambda *args: False)
    with pytest.raises(RuntimeError, match="put back"):
        permute_channels(model, "2:4", MODELS[0][1])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_training_mode_and_statistics_stay():
    model = randomised(copy.deepcopy(MODELS[1][0])).train()
    tracked = model[1].num_batches_tracked.clone()
    permute_channels(model, "2:4", X, restarts=0)
    assert model.training
    assert model[3].training
    assert torch.equal(model[1].num_batches_tracked, tracked)


def test_packed_models_are_refused():
    model = randomised(copy.deepcopy(MODELS[0][0]))
    for name in nms.Scheme.uniform(model, "2:4"):
        nms.nm_prune_(model.get_parameter(name).data, "2:4")
    nms.convert(model, "2:4", policy="always")
    result = permute_channels(model, {"4": "2:4", "6": "2:4"}, MODELS[0][1])
    assert "packed" in result.refused["4.weight"]
