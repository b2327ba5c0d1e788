"""Whole models, unchanged but for packed weights, compute what they did: run, compiled, exported, saved."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import MODELS, attention, encoder, first, packed, packed_names, padding, pair, pruned, sequence
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext.deploy import report
from nmsparse_ext.tensor import NMTensor

RECURRENT = ("lstm", "gru")
NAMES = tuple(MODELS)
PACKED = tuple(name for name in NAMES if name not in (*RECURRENT, "llama-tied"))


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(first(actual), first(expected), atol=tolerance, rtol=tolerance)


@pytest.fixture(autouse=True)
def _no_graphs_of_others() -> None:
    torch.compiler.reset()


# ---------------------------------------------------------------------------------------------------- running


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", NAMES)
def test_eager(name: str, grad: bool) -> None:
    model = pair(name)
    with torch.set_grad_enabled(grad):
        assert_close(model.packed(**model.inputs), model.dense(**model.inputs))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_packed(name: str) -> None:
    names = packed_names(pair(name).packed)
    assert set(report(pair(name).packed).packed) == names
    assert bool(names) == (name not in RECURRENT)
    if name in RECURRENT:
        assert all("dense weights only" in row.reason for row in report(pair(name).packed))
    if name == "llama":
        assert "lm_head.weight" in names
    if name in ("llama-tied", "gpt2"):  # the embedding needs its rows
        assert "lm_head.weight" not in names


@pytest.mark.parametrize("name", PACKED)
def test_compile(name: str) -> None:
    model = pair(name)
    with torch.no_grad():
        actual = torch.compile(model.packed, fullgraph=True, backend="aot_eager")(**model.inputs)
        assert_close(actual, model.dense(**model.inputs))


def test_compile_and_freeze() -> None:
    """By inductor, with the weights as constants of the graph."""
    model = pair("encoder")
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        actual = torch.compile(copy.deepcopy(model.packed), fullgraph=True)(**model.inputs)
        assert_close(actual, model.dense(**model.inputs))


@pytest.mark.parametrize("name", NAMES)
def test_export(name: str) -> None:
    model = pair(name)
    with torch.no_grad():
        program = torch.export.export(model.packed, (), model.inputs)
        assert_close(program.module()(**model.inputs), model.dense(**model.inputs))


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name: str) -> None:
    model = pair(name)  # with gradients: without, dense encoder layers are fused, and round less often
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = first(model.packed(**model.inputs)), first(model.dense(**model.inputs))
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, tolerance=0.05)


# ------------------------------------------------------------------------------------------- copies and files


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts(name: str) -> None:
    """Other weights are loaded from packed to packed, from dense to packed, and from packed to dense."""
    model = pair(name)
    torch.manual_seed(1)
    other = pruned(MODELS[name][0]().eval())
    other_packed, expected = packed(other), other(**model.inputs)
    for source, target in ((other_packed, model.packed), (other, model.packed), (other_packed, model.dense)):
        loaded = copy.deepcopy(target)
        before = packed_names(loaded)
        loaded.load_state_dict(source.state_dict())
        assert packed_names(loaded) == before
        assert_close(loaded(**model.inputs), expected)


@pytest.mark.parametrize("name", NAMES)
def test_files(name: str, tmp_path: Path) -> None:
    model = pair(name)
    nms.save_file(model.packed, tmp_path / "model.safetensors")
    torch.manual_seed(1)
    loaded = nms.load_into(MODELS[name][0]().eval(), tmp_path / "model.safetensors")
    assert packed_names(loaded) == packed_names(model.packed)
    assert_close(loaded(**model.inputs), model.dense(**model.inputs))


@pytest.mark.parametrize("name", NAMES)
def test_torch_save(name: str) -> None:
    model = pair(name)
    file = io.BytesIO()
    torch.save(model.packed.state_dict(), file)
    file.seek(0)
    loaded = copy.deepcopy(model.packed)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert_close(loaded(**model.inputs), model.dense(**model.inputs))


@pytest.mark.parametrize("name", NAMES)
def test_copies(name: str) -> None:
    model = pair(name)
    expected = model.dense(**model.inputs)
    for copied in (copy.deepcopy(model.packed), pickle.loads(pickle.dumps(model.packed))):
        assert packed_names(copied) == packed_names(model.packed)
        assert_close(copied(**model.inputs), expected)


# ---------------------------------------------------------------------------------------------------- details


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_attention(need_weights: bool, batch_first: bool, grad: bool) -> None:
    """Self and cross attention, with padding; without gradients PyTorch has a fused kernel for it."""
    dense = pruned(nn.MultiheadAttention(32, 4, batch_first=batch_first).eval())
    model = packed(dense)
    x, memory = sequence(), sequence()
    if not batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    with torch.set_grad_enabled(grad):
        for inputs in ((x, x, x), (x, memory, memory), (x, memory, x)):
            for mask in (None, padding()):
                options = {"key_padding_mask": mask, "need_weights": need_weights}
                actual, expected = model(*inputs, **options), dense(*inputs, **options)
                assert_close(actual, expected)
                if need_weights:
                    assert_close(actual[1], expected[1])
                else:
                    assert actual[1] is None


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}])
@pytest.mark.parametrize("masks", ["none", "padding", "causal", "both"])
def test_fused_encoder_layer_in_graphs(options: dict[str, Any], masks: str) -> None:
    """A graph without gradients holds PyTorch's fused layer, which then is composed anew."""
    dense = pruned(encoder(**options).eval())
    given = {
        "src_mask": nn.Transformer.generate_square_subsequent_mask(8)
        if masks in ("causal", "both")
        else None,
        "src_key_padding_mask": torch.zeros(2, 8).masked_fill_(padding(), -torch.inf)
        if masks in ("padding", "both")
        else None,
    }
    with torch.no_grad():
        x = sequence()
        actual = torch.compile(packed(dense), fullgraph=True, backend="aot_eager")(x, **given)
        assert_close(actual, dense(x, **given))


@pytest.mark.parametrize("need_weights", [True, False])
def test_fused_attention_in_graphs(need_weights: bool) -> None:
    dense = pruned(attention().eval())
    with torch.no_grad():
        x = sequence()
        model = torch.compile(packed(dense), fullgraph=True, backend="aot_eager")
        for mask in (None, padding()):
            options = {"need_weights": need_weights, "key_padding_mask": mask}
            actual, expected = model(x, x, x, **options), dense(x, x, x, **options)
            assert_close(actual, expected)
            if need_weights:
                assert_close(actual[1], expected[1])


@pytest.mark.parametrize("name", ["self-attention", "encoder", "decoder", "bert", "llama", "resnet"])
def test_gradients(name: str) -> None:
    """In training mode, what is not packed gets the gradients that it got."""
    model = pair(name)
    torch.manual_seed(0)
    grads = []
    for original in (model.dense, model.packed):
        trained = copy.deepcopy(original).train()
        for module in trained.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout") or hasattr(module, "dropout_prob"):
                module.attention_dropout = module.dropout_prob = 0.0
        first(trained(**model.inputs)).square().mean().backward()
        grads.append({key: p.grad for key, p in trained.named_parameters() if p.grad is not None})
    dense, packed_grads = grads
    assert packed_grads
    assert set(packed_grads) == set(dense) - packed_names(model.packed)
    for key, grad in packed_grads.items():
        torch.testing.assert_close(grad, dense[key], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied"])
def test_generate(name: str) -> None:
    """With its cache, a decoder makes the same tokens one by one."""
    model = pair(name)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = model.inputs["input_ids"]
    actual, expected = model.packed.generate(prompt, **options), model.dense.generate(prompt, **options)
    assert actual.shape == (2, 14)
    assert torch.equal(actual, expected)


# --------------------------------------------------------------------------------------------------- adapters


class Adapted(nn.Module):
    """A linear layer and a low-rank correction of it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(4, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, 4) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.mT @ self.up.mT


def test_low_rank_adapters() -> None:
    """Adapters on packed layers get the gradients they would get on dense ones, and train."""
    model = pair("llama")
    results = []
    for original in (model.dense, model.packed):
        torch.manual_seed(0)
        adapted = (
            copy.deepcopy(original).requires_grad_(False)
            if original is model.dense
            else copy.deepcopy(original)
        )
        for layer in adapted.model.layers:
            layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
            layer.mlp.down_proj = Adapted(layer.mlp.down_proj)
        adapters = {key: p for key, p in adapted.named_parameters() if key.endswith((".up", ".down"))}
        optimizer = torch.optim.SGD(adapters.values(), lr=0.5)
        losses = []
        for _ in range(3):
            loss = adapted(**model.inputs, labels=model.inputs["input_ids"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        results.append(adapters)
    for key, trained in results[1].items():
        torch.testing.assert_close(trained, results[0][key], atol=1e-5, rtol=1e-3)


def test_peft() -> None:
    """LoRA as the peft package puts it on."""
    peft = pytest.importorskip("peft")
    model = pair("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    outputs = []
    for original in (model.dense, model.packed):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(copy.deepcopy(original), config)
        loss = adapted(**model.inputs, labels=model.inputs["input_ids"]).loss
        loss.backward()
        trained = {key: p.grad for key, p in adapted.named_parameters() if p.requires_grad}
        assert trained
        assert all("lora_" in key for key in trained)
        outputs.append((loss, trained))
    (expected, dense_grads), (actual, grads) = outputs
    torch.testing.assert_close(actual, expected)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, dense_grads[key], atol=1e-5, rtol=1e-3)
    base = adapted.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert isinstance(base.weight, NMTensor)


# ----------------------------------------------------------------------------------------------------- report


def test_report_as_text() -> None:
    """A line for each weight: pattern, tokens, both times, bytes, choice, reason."""
    model = copy.deepcopy(pair("bert").dense)
    nms.convert(model, example_input=pair("bert").inputs)
    lines = str(report(model)).splitlines()
    for column in ("layer", "pattern", "tokens", "dense ms", "packed ms", "packed bytes", "choice", "reason"):
        assert column in lines[0]
    line = next(line for line in lines if line.startswith("encoder.layer.0.intermediate.dense.weight"))
    assert line.split()[1:3] == ["2:4", "16"]
    assert "as fast" in line
    assert f"of {len(report(model))} weights packed" in lines[-1]
