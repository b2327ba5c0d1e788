"""Packed models of transformers: saved, loaded, packed while loading, by its own means."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import WIDTH, first, llama, packed, packed_names, pair, pruned, tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertModel,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

import nmsparse_ext as nms
from nmsparse_ext.integrations.transformers import NMSparseConfig, NMSparseQuantizer, attach
from nmsparse_ext.tensor import NMTensor

NAMES = ("bert", "gpt2", "llama", "llama-tied", "vit", "resnet")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.disable_progress_bar()


def saved(name: str, folder: Path, **options: Any) -> Path:
    pair(name).packed.save_pretrained(folder, **options)
    return folder


def file_of(folder: Path) -> Path:
    return folder / "model.safetensors"


# ------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    model = pair(name)
    loaded, info = type(model.packed).from_pretrained(saved(name, tmp_path), output_loading_info=True)
    assert not any(info.values()), info
    assert packed_names(loaded) == packed_names(model.packed)
    assert torch.equal(first(loaded(**model.inputs)), first(model.packed(**model.inputs)))
    for key, weight in model.packed.named_parameters():
        if isinstance(weight, NMTensor):
            other = loaded.get_parameter(key)
            assert (other.pattern, other.group_dim, other.engine) == (
                weight.pattern,
                weight.group_dim,
                weight.engine,
            )
            assert torch.equal(other.values, weight.values)
            assert torch.equal(other.indices, weight.indices)


@pytest.mark.parametrize("name", NAMES)
def test_files_are_ours(name: str, tmp_path: Path) -> None:
    """The same portable form, under the names that transformers gives: load_file reads it."""
    model = pair(name).packed
    tensors = nms.load_file(file_of(saved(name, tmp_path)))
    assert sum(isinstance(tensor, NMTensor) for tensor in tensors.values()) == len(packed_names(model))
    assert len(tensors) == len(model.state_dict())  # tied ones too
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "nmsparse"
    assert config["scheme"] == dict.fromkeys(packed_names(model), "2:4")
    if name in ("bert", "llama", "llama-tied"):  # not renamed by transformers
        loaded = nms.load_into(copy.deepcopy(pair(name).dense), file_of(tmp_path))
        assert torch.equal(first(loaded(**pair(name).inputs)), first(model(**pair(name).inputs)))


def test_bytes(tmp_path: Path) -> None:
    """What is packed takes 0.53 of float32 in the file, too."""
    model = pair("llama")
    model.dense.save_pretrained(tmp_path / "dense")
    difference = file_of(tmp_path / "dense").stat().st_size - file_of(saved("llama", tmp_path)).stat().st_size
    weights = [p for p in model.packed.parameters() if isinstance(p, NMTensor)]
    expected = sum(p.numel() * 4 - p.nbytes for p in weights)
    assert 0 <= expected - difference < 12_000  # what the header says about the weights


def test_sharded(tmp_path: Path) -> None:
    model = pair("llama")
    saved("llama", tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    tensors = nms.load_file(tmp_path)  # ours, too
    assert sum(isinstance(tensor, NMTensor) for tensor in tensors.values()) == len(packed_names(model.packed))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert packed_names(loaded) == packed_names(model.packed)
    assert torch.equal(first(loaded(**model.inputs)), first(model.packed(**model.inputs)))


class Allocations(TorchDispatchMode):
    """The sizes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            dense = isinstance(tensor, Tensor) and not isinstance(tensor, NMTensor) and not tensor.is_meta
            if dense and tensor.is_floating_point():  # storages are seen as bytes, too
                self.sizes.add(tensor.numel())
        return result


def test_never_dense_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # all in this thread, where it is seen
    largest = max(p.numel() for p in pair("vit").packed.parameters() if isinstance(p, NMTensor))
    folder = saved("vit", tmp_path)
    with Allocations() as loading:
        AutoModel.from_pretrained(folder)
    assert largest // 2 in loading.sizes  # its values
    assert largest not in loading.sizes
    model = pair("vit").packed
    with Allocations() as saving:
        model.save_pretrained(tmp_path / "again")
    assert largest not in saving.sizes


def test_without_its_head(tmp_path: Path) -> None:
    """The scheme's names are found with and without the base model's prefix."""
    model = pair("llama")
    body = AutoModel.from_pretrained(saved("llama", tmp_path / "whole"))
    assert packed_names(body) == {
        name.removeprefix("model.") for name in packed_names(model.packed) if name != "lm_head.weight"
    }
    inputs = model.inputs["input_ids"]
    assert torch.equal(body(inputs).last_hidden_state, model.packed.model(inputs).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    assert packed_names(whole) == packed_names(model.packed) - {"lm_head.weight"}


def test_part_of_a_packed_model(tmp_path: Path) -> None:
    """A model inside another one is saved on its own."""
    outer = copy.deepcopy(pair("llama").packed)
    outer.model.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).layers[0].self_attn.q_proj.weight.pattern == nms.Pattern(2, 4)


@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": "auto"}]
)
def test_options(options: dict[str, Any], tmp_path: Path) -> None:
    model = pair("llama")
    loaded = AutoModelForCausalLM.from_pretrained(saved("llama", tmp_path), **options)
    assert packed_names(loaded) == packed_names(model.packed)
    dtype = options.get("dtype", torch.float32)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-6
    expected = first(model.packed(**model.inputs))
    torch.testing.assert_close(
        first(loaded(**model.inputs)).float(), expected, atol=tolerance, rtol=tolerance
    )


def test_experts(tmp_path: Path) -> None:
    """Stacks of experts, which transformers keeps apart in its own files, stay packed stacks in ours."""
    config = MixtralConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=52,
        num_local_experts=4,
        max_position_embeddings=32,
    )
    dense = pruned(MixtralForCausalLM(config).eval())
    model, x = packed(dense), tokens()
    assert "model.layers.0.mlp.experts.gate_up_proj" in packed_names(model)
    for folder in (tmp_path / "1", tmp_path / "2"):  # what was loaded is saved again
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert packed_names(model) == packed_names(packed(dense))
        torch.testing.assert_close(model(x).logits, dense(x).logits)
        tensors = nms.load_file(file_of(folder))
        assert sum(isinstance(tensor, NMTensor) for tensor in tensors.values()) == len(packed_names(model))


class TiedConfig(PretrainedConfig):
    model_type = "nmsparse-tied"


class Tied(PreTrainedModel):
    """Two layers of one weight, as in detection heads."""

    config_class = TiedConfig
    _tied_weights_keys = {"b.weight": "a.weight"}  # noqa: RUF012

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_tied_packed_weights(tmp_path: Path) -> None:
    model = packed(pruned(Tied(TiedConfig(tie_word_embeddings=True)).eval()))
    assert model.b.weight is model.a.weight
    model.save_pretrained(tmp_path)
    loaded = Tied.from_pretrained(tmp_path)
    assert isinstance(loaded.b.weight, NMTensor)
    assert loaded.b.weight is loaded.a.weight
    x = torch.randn(2, 16)
    assert torch.equal(loaded(x), model(x))


def test_packed_head_that_the_config_ties(tmp_path: Path) -> None:
    """Loaded, it would be the embedding again; so it is not saved."""
    model = pruned(llama(tied=True).eval())
    model.lm_head.weight = nn.Parameter(
        nms.compress(model.lm_head.weight.detach(), "2:4", prune=True), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"lm_head\.weight is packed, but the model's config ties it"):
        attach(model).save_pretrained(tmp_path)


def test_mixed_scheme_and_engine(tmp_path: Path) -> None:
    model = llama().eval()
    scheme = {"model.layers.0.mlp.up_proj": "1:4", "model.layers.1.mlp.down_proj": "3:16"}
    for name, pattern in scheme.items():
        nms.nm_prune_(model.get_submodule(name).weight.data, pattern)
    nms.convert(model, scheme, policy="always", keep="engine")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["scheme"] == {f"{name}.weight": pattern for name, pattern in scheme.items()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, pattern in scheme.items():
        weight = loaded.get_submodule(name).weight
        assert (str(weight.pattern), weight.keep) == (pattern, model.get_submodule(name).weight.keep)
    x = tokens()
    assert torch.equal(loaded(x).logits, model(x).logits)


# -------------------------------------------------------------------------------------- packing while loading


def test_dense_checkpoint_that_holds_the_pattern(tmp_path: Path) -> None:
    model = pair("bert")
    model.dense.save_pretrained(tmp_path / "dense")
    for scheme in ("2:4", None, dict.fromkeys(packed_names(model.packed), "2:4")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = BertModel.from_pretrained(tmp_path / "dense", quantization_config=NMSparseConfig(scheme))
        assert packed_names(loaded) == packed_names(model.packed)
        assert torch.equal(first(loaded(**model.inputs)), first(model.packed(**model.inputs)))
    loaded.save_pretrained(tmp_path / "packed")
    assert packed_names(BertModel.from_pretrained(tmp_path / "packed")) == packed_names(loaded)


def test_dense_checkpoint_that_does_not(tmp_path: Path) -> None:
    torch.manual_seed(1)
    dense = llama().eval()
    nms.nm_prune_(dense.model.layers[0].mlp.up_proj.weight.data, "2:4")
    dense.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"14 of 15 weights do not satisfy their pattern.*prune=True"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=NMSparseConfig("2:4"))
    assert packed_names(loaded) == {"model.layers.0.mlp.up_proj.weight"}
    x = tokens()
    torch.testing.assert_close(loaded(x).logits, dense(x).logits)
    config = NMSparseConfig("2:4", prune=True, skip=["lm_head"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert len(packed_names(loaded)) == 14
    assert "lm_head.weight" not in packed_names(loaded)
    expected = nms.nm_prune(dense.model.layers[1].self_attn.k_proj.weight.detach(), "2:4")
    assert torch.equal(loaded.model.layers[1].self_attn.k_proj.weight.to_dense(), expected)


# ----------------------------------------------------------------------------------------------- what follows


def test_generate_and_lora(tmp_path: Path) -> None:
    """The loaded model makes the same tokens; adapters train on it, and are saved without the rest."""
    peft = pytest.importorskip("peft")
    model = pair("llama")
    loaded = AutoModelForCausalLM.from_pretrained(saved("llama", tmp_path / "model"))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = model.inputs["input_ids"]
    assert torch.equal(loaded.generate(prompt, **options), model.dense.generate(prompt, **options))

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    adapted = peft.get_peft_model(loaded, config)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=prompt, labels=prompt).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    assert not any(
        "layers.0.mlp.up_proj" in key for key in nms.load_file(tmp_path / "adapter/adapter_model.safetensors")
    )
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "adapter"
    )
    torch.testing.assert_close(again(prompt).logits, adapted(prompt).logits)


def test_adapters_of_transformers_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``add_adapter`` trains on packed weights; only the adapter is saved, and ``load_adapter`` reads it."""
    peft = pytest.importorskip("peft")
    # transformers 5.24 asks for a peft that is not out yet; what it calls is in older ones, too.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    loaded = AutoModelForCausalLM.from_pretrained(saved("llama", tmp_path / "model"))
    x = pair("llama").inputs["input_ids"]
    before = loaded(x).logits
    loaded.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    trained = {name: p for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    losses = []
    for _ in range(4):
        loss = loaded(input_ids=x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    loaded.eval().save_pretrained(tmp_path / "adapter")
    names = set(nms.load_file(tmp_path / "adapter/adapter_model.safetensors"))
    assert len(names) == len(trained)
    assert all(".lora_" in name for name in names)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    again.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(again(x).logits, loaded(x).logits)
    assert sum(isinstance(p, nms.NMTensor) for p in again.parameters()) == len(
        packed_names(pair("llama").packed)
    )
    loaded.disable_adapters()
    torch.testing.assert_close(loaded(x).logits, before)


def test_files_whose_tensors_lie_at_odd_addresses(tmp_path: Path) -> None:
    """A header of any length is legal, and transformers hands out tensors as they lie in the mapped file."""
    path = saved("llama", tmp_path) / "model.safetensors"
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    path.unlink()  # not overwritten: somebody may have it mapped
    path.write_bytes((end - 8 + 1).to_bytes(8, "little") + raw[8:end] + b" " + raw[end:])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert packed_names(loaded) == packed_names(pair("llama").packed)
    for name in packed_names(loaded):
        values = loaded.get_parameter(name).values
        assert values.data_ptr() % values.itemsize == 0
    x = tokens()
    assert torch.equal(loaded(x).logits, pair("llama").packed(x).logits)


def test_trainer_trains_what_is_not_packed(tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved("llama", tmp_path / "model"))
    before = copy.deepcopy(loaded)
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_steps=2,
        dataloader_pin_memory=False,
    )
    Trainer(loaded, arguments, train_dataset=rows).train()
    assert not torch.equal(loaded.model.norm.weight, before.model.norm.weight)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-2")
    assert packed_names(again) == packed_names(before)
    x = tokens()
    assert torch.equal(again(x).logits, loaded.eval()(x).logits)


def test_copies_and_dtypes(tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved("llama", tmp_path))
    x = tokens()
    for copied in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(copied(x).logits, loaded(x).logits)
        copied.save_pretrained(tmp_path / "copied")
        assert packed_names(AutoModelForCausalLM.from_pretrained(tmp_path / "copied")) == packed_names(loaded)
    half = copy.deepcopy(loaded).to(torch.bfloat16)
    assert isinstance(half.lm_head.weight, NMTensor)
    assert half(x).logits.dtype == torch.bfloat16


def test_dequantize(tmp_path: Path) -> None:
    model = pair("llama")
    loaded = AutoModelForCausalLM.from_pretrained(saved("llama", tmp_path / "packed"))
    dense = loaded.dequantize()
    assert not packed_names(dense)
    for name, weight in model.dense.named_parameters():
        assert torch.equal(dense.get_parameter(name), weight)
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    # The same by hand, without telling anyone.
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    for module in again.modules():
        if isinstance(getattr(module, "weight", None), NMTensor):
            module.weight = nn.Parameter(module.weight.to_dense())
    again.save_pretrained(tmp_path / "by hand")
    assert not packed_names(AutoModelForCausalLM.from_pretrained(tmp_path / "by hand"))


# --------------------------------------------------------------------------------------------------- refusals


def changed(folder: Path, change: Any) -> Path:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file_of(folder))
    change(tensors)
    save_file(tensors, file_of(folder), {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("illegal index", "no legal choice"),
        ("missing part", "not in the file"),
        ("wrong size", "mismatch|must have shape"),
    ],
)
def test_damaged_files(what: str, message: str, tmp_path: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        key = next(name for name in tensors if name.endswith(".indices")).removesuffix(".indices")
        if what == "illegal index":
            tensors[f"{key}.indices"].fill_(0)
        elif what == "missing part":
            del tensors[f"{key}.values"]
        else:
            tensors[f"{key}.values"] = tensors[f"{key}.values"][:-1].clone()

    folder = changed(saved("vit", tmp_path), damage)
    with pytest.raises((nms.FormatError, RuntimeError), match=message):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"scheme": {"nowhere.weight": "2:4"}}, "has none"),
        ({"scheme": "2:4"}, "scheme by name"),
        ({"scheme": {"embeddings.word_embeddings.weight": "2:4"}}, "rows up"),
        ({"scheme": {"encoder.layer.0.output.dense.weight": "5:4"}}, "between 1 and"),
        ({"scheme": {"encoder.layer.0.output.dense.weight": "2:4"}}, "config.json .* the files"),
        ({"scheme": {"encoder.layer.0.output.dense.weight": "1:2"}}, "config.json .* the files"),
    ],
)
def test_configs_that_lie(entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved("bert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= entries
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match=message):
        BertModel.from_pretrained(tmp_path)


def test_a_config_that_turns_a_square_weight(tmp_path: Path) -> None:
    """Its parts have the same sizes along either dim."""
    saved("bert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    name = "encoder.layer.0.attention.output.dense.weight"
    assert name in config["quantization_config"]["scheme"]
    config["quantization_config"]["group_dims"] = {name: 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(nms.FormatError, match=f"{name}: config.json says .* dim 0, the file says .* dim 1"):
        BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scheme": "4:2"}, ValueError, "scheme"),
        ({"scheme": 2}, TypeError, "scheme must be a pattern .* or None, got 2 of type int"),
        ({"scheme": "2:4", "prune": "yes"}, TypeError, "prune must be True or False, got 'yes'"),
        ({"scheme": "2:4", "skip": "lm_head"}, TypeError, "skip must be a list of names"),
        ({"scheme": {"a": "2:4"}, "skip": ["b"]}, ValueError, "leave names out"),
        ({"prune": True}, ValueError, "which pattern"),
        ({"keep": "nothing"}, ValueError, "keep must be one of"),
        ({"engine": "warp"}, ValueError, "warp"),
        ({"group_dims": {"a": "1"}}, TypeError, "group_dims"),
        ({"quant_method": "gptq"}, ValueError, "quant_method"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NMSparseConfig(**arguments)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"scheme": "2:4", "patern": "2:4", "bits": 4},
            r"must have no keys but scheme, prune, .*quant_method, got \['patern', 'bits'\]",
        ),
        ({"scheme": "2:4", "version": 2, "news": 1}, "version 2 of nmsparse configs is not known, only 1"),
    ],
)
def test_unknown_keys_of_a_config(entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(nms.FormatError, match=message):
        NMSparseConfig.from_dict({"quant_method": "nmsparse", **entries})
    saved("bert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= entries
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(nms.FormatError, match=message):
        BertModel.from_pretrained(tmp_path)


def test_offloading_is_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="device_map must not offload"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
        )


def test_quantizers_of_others_are_left_alone() -> None:
    model = copy.deepcopy(pair("llama").packed)
    model.hf_quantizer = other = object()
    attach(model)
    assert model.hf_quantizer is other
    assert isinstance(pair("llama").packed.hf_quantizer, NMSparseQuantizer)
    assert isinstance(attach(nn.Linear(2, 2)), nn.Linear)


def test_importing_this_package_is_enough() -> None:
    """transformers is not imported with it, and knows packed models once somebody imports it."""
    program = """
import sys
import nmsparse_ext
assert "transformers" not in sys.modules
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZER_MAPPING["nmsparse"].__module__ == "nmsparse_ext.integrations.transformers"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
