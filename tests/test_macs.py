"""Multiply-accumulates per weight: each module type by hand, and a published ResNet-50 as a whole."""

from __future__ import annotations

import pytest
import torch
from published import published_scheme
from torch import nn

from nmsparse_ext.macs import count_macs
from nmsparse_ext.scheme import Scheme


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Linear(8, 4), (8,), 8 * 4),
        (nn.Linear(8, 4), (3, 5, 8), 15 * 8 * 4),
        # Outputs (2, 6, 8, 4) each sum over 4 input channels times a 3x5 kernel.
        (nn.Conv2d(4, 6, (3, 5)), (2, 4, 10, 8), 2 * 6 * 8 * 4 * (4 * 15)),
        (nn.Conv2d(4, 6, (3, 5), groups=2), (2, 4, 10, 8), 2 * 6 * 8 * 4 * (2 * 15)),
        (nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4), (1, 4, 9, 7), 4 * 5 * 4 * 9),
        (nn.Conv1d(4, 6, 3), (4, 10), 6 * 8 * 4 * 3),
        (nn.Conv3d(2, 3, (1, 2, 3)), (1, 2, 4, 5, 6), 3 * 4 * 4 * 4 * (2 * 6)),
        # Inputs (2, 4, 5, 3) each spread over 6 output channels (3 a group) times a 3x2 kernel.
        (nn.ConvTranspose2d(4, 6, (3, 2), stride=2), (2, 4, 5, 3), 2 * 4 * 5 * 3 * (6 * 6)),
        (nn.ConvTranspose2d(4, 6, (3, 2), groups=2), (2, 4, 5, 3), 2 * 4 * 5 * 3 * (3 * 6)),
        (nn.ConvTranspose1d(4, 6, 3), (4, 5), 4 * 5 * (6 * 3)),
        (nn.LSTMCell(8, 4), (3, 8), [3 * 16 * 8, 3 * 16 * 4]),
        (nn.GRU(8, 4), (5, 3, 8), [15 * 12 * 8, 15 * 12 * 4]),
        (
            nn.LSTM(8, 4, bidirectional=True, proj_size=2),
            (5, 3, 8),
            [15 * 16 * 8, 15 * 16 * 2, 15 * 2 * 4] * 2,
        ),
        (nn.Bilinear(4, 4, 4), ((3, 4), (3, 4)), None),
        (nn.MultiheadAttention(8, 2, batch_first=True), ((2, 3, 8),) * 3, [3 * 6 * 64, 6 * 64]),
        (
            nn.MultiheadAttention(8, 2, kdim=12, vdim=16),
            ((3, 2, 8), (5, 2, 12), (5, 2, 16)),
            [6 * 64, 10 * 12 * 8, 10 * 16 * 8, 6 * 64],
        ),
    ],
)
def test_module_types(module: nn.Module, shape: tuple, expected: int | list[int] | None) -> None:
    shapes = shape if isinstance(shape[0], tuple) else (shape,)
    counts = count_macs(module, tuple(torch.zeros(size) for size in shapes))
    assert list(counts.values()) == (expected if isinstance(expected, list) else [expected])


def test_packed_sequences() -> None:
    steps = nn.utils.rnn.pack_sequence([torch.zeros(5, 8), torch.zeros(2, 8)])
    assert list(count_macs(nn.RNN(8, 4), (steps,)).values()) == [7 * 4 * 8, 7 * 4 * 4]


class Twice(nn.Module):
    """Uses one layer twice, another never, and a third through a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.fc = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.drop = nn.Dropout()
        self.norm = nn.BatchNorm1d(8)
        self.unused.eval()

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.head(self.fc(self.fc(self.norm(self.drop(self.embedding(index))))))


def test_calls_add_up_and_the_model_is_left_as_it_was() -> None:
    model = Twice()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    counts = count_macs(model, {"index": torch.tensor([1, 2, 3])})
    assert counts == {"embedding.weight": 3 * 80, "fc.weight": 2 * 3 * 64, "unused.weight": 0}
    assert model.training
    assert model.fc.training
    assert not model.unused.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = Twice()
    with pytest.raises(TypeError, match="must be Tensor"):
        count_macs(model, (3,))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrapped_models(wrap: type[nn.Module]) -> None:
    model = wrap(nn.Sequential(nn.Linear(8, 4), nn.Sequential(nn.Linear(4, 2))))
    x = torch.zeros(3, 8)
    model(x)  # compiled code is there already, and has no hooks in it
    assert count_macs(model, x) == {"0.weight": 3 * 32, "1.0.weight": 3 * 8}


def test_transformer_layer() -> None:
    """Its fused path in eval mode calls none of the modules inside; it must not be taken."""
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    counts = count_macs(layer, torch.zeros(2, 3, 8))
    tokens = 6
    assert counts == {
        "self_attn.in_proj_weight": tokens * 3 * 64,
        "self_attn.out_proj.weight": tokens * 64,
        "linear1.weight": tokens * 128,
        "linear2.weight": tokens * 128,
    }


@pytest.mark.parametrize("value", [3, None, [torch.zeros(2, 8)], "x"])
def test_bad_example(value: object) -> None:
    with pytest.raises(TypeError, match="example_input must be a Tensor, a tuple of arguments or a mapping"):
        count_macs(nn.Linear(8, 4), value)


def test_gpt2_and_experts() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    counts = count_macs(transformers.GPT2Model(config), {"input_ids": torch.zeros(2, 3, dtype=torch.long)})
    assert counts["h.0.attn.c_attn.weight"] == 6 * 8 * 24
    assert counts["h.0.mlp.c_proj.weight"] == 6 * 32 * 8
    assert counts["wte.weight"] == 0

    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = transformers.MixtralModel(config)
    counts = count_macs(model, {"input_ids": torch.zeros(2, 3, dtype=torch.long)})
    # Every token goes through two of the four experts.
    experts = {name.rpartition(".")[2]: count for name, count in counts.items() if "experts" in name}
    assert experts == {"gate_up_proj": 6 * 2 * 8 * 24, "down_proj": 6 * 2 * 12 * 8}


def test_published_resnet50_scheme() -> None:
    path = published_scheme()
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    # MACs are a matter of shapes: without values the run costs nothing.
    with torch.device("meta"):
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
        counts = count_macs(model, torch.zeros(1, 3, 224, 224))
    scheme = Scheme.load(path, model)
    kept = sum(
        count * scheme[name].n // scheme[name].m for name, count in counts.items() if count is not None
    )
    assert sum(count for count in counts.values() if count is not None) == 4_089_184_256
    assert kept == 1_141_313_536
