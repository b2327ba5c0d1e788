"""compressed-tensors, the last release with the sparse formats, and what newer ones have left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.sparse_compressors import BitmaskCompressor, Sparse24BitMaskCompressor
from compressed_tensors.config import CompressionFormat, Sparse24BitMaskConfig, SparsityCompressionConfig
from safetensors.torch import load_file as load_plain
from safetensors.torch import save_file as save_plain
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import nmsparse_ext as nms
from nmsparse_ext.deploy import detect_format, from_peer, to_peer
from nmsparse_ext.deploy.interchange.compressed_tensors import _pack_mask, from_bitmask24, to_bitmask24
from nmsparse_ext.tensor import NMTensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def weight(rows: int, k: int, dtype: torch.dtype) -> Tensor:
    return nms.nm_prune(torch.randn(rows, k).mul(9).to(dtype), "2:4")


def compressor24() -> Sparse24BitMaskCompressor:
    return Sparse24BitMaskCompressor(config=Sparse24BitMaskConfig())


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [16, 20], ids=str)
def test_reading_what_it_writes(tmp_path: Path, dtype: torch.dtype, k: int) -> None:
    w = weight(6, k, dtype)
    stored = compressor24().compress({"model.fc.weight": w, "model.fc.bias": torch.ones(6)}, {"model.fc"})
    assert sorted(stored) == ["model.fc.bias", "model.fc.bitmask", "model.fc.compressed", "model.fc.shape"]
    save_plain(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"sparsity_config": Sparse24BitMaskConfig().model_dump()}})
    )
    assert detect_format(tmp_path) == "compressed-tensors"
    ours = from_peer(tmp_path)
    assert ours.keys() == {"model.fc.weight", "model.fc.bias"}
    assert isinstance(ours["model.fc.weight"], NMTensor)
    assert str(ours["model.fc.weight"].pattern) == "2:4"
    assert same_bits(ours["model.fc.weight"].to_dense(), w)
    assert same_bits(ours["model.fc.weight"].values, stored["model.fc.compressed"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_reads_what_we_write(tmp_path: Path, dtype: torch.dtype) -> None:
    w = weight(6, 20, dtype)
    embeds = nms.nm_prune(torch.randn(4, 16), "2:8")
    tensors = {
        "a.weight": nms.compress(w, "2:4"),
        "b.weight": nms.compress(embeds, "2:8"),
        "dense.weight": torch.randn(3, 8),
        "conv.weight": nms.compress(nms.nm_prune(torch.randn(4, 8, 3, 3), "2:4"), "2:4"),
    }
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    to_peer(tensors, tmp_path, format="compressed-tensors")
    theirs = dict(compressor24().decompress(str(tmp_path / "model.safetensors")))
    assert theirs.keys() == tensors.keys()
    assert same_bits(theirs["a.weight"], w)
    assert torch.equal(theirs["b.weight"], embeds)
    assert torch.equal(theirs["conv.weight"], tensors["conv.weight"].to_dense())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama"
    sparsity = config["quantization_config"]["sparsity_config"]
    parsed = SparsityCompressionConfig.load_from_registry(sparsity["format"], **sparsity)
    assert isinstance(parsed, Sparse24BitMaskConfig)
    assert parsed.sparsity_structure == "2:4"
    assert parsed.ignore == ["dense"]
    assert parsed.global_sparsity == pytest.approx(0.5)


def test_the_whole_way_of_a_model(tmp_path: Path) -> None:
    """`ModelCompressor` itself, on a module, with its own names and targets."""
    from compressed_tensors.compressors import ModelCompressor

    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    for layer in (model[0], model[2]):
        nms.nm_prune_(layer.weight.data, "2:4")
    config = Sparse24BitMaskConfig(targets=["Linear"], ignore=[])
    stored = ModelCompressor(sparsity_config=config).compress(model)
    save_plain({name: t.contiguous() for name, t in stored.items()}, tmp_path / "model.safetensors")
    loaded = from_peer(tmp_path)  # found by its names, without a config.json
    assert {name for name, t in loaded.items() if isinstance(t, NMTensor)} == {"0.weight", "2.weight"}
    nms.save_file(loaded, tmp_path / "ours.safetensors")
    ours = nms.load_into(
        nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), tmp_path / "ours.safetensors"
    )
    x = torch.randn(3, 16)
    torch.testing.assert_close(ours(x), model(x))


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    """What is written beside a real config.json, its own loader puts into a real model."""
    from compressed_tensors.compressors import ModelCompressor
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "proj" in name:
            nms.nm_prune_(parameter.data, "2:4")
    config.save_pretrained(tmp_path)
    to_peer(model, tmp_path, format="compressed-tensors")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["hidden_size"] == 32
    assert written["quantization_config"]["sparsity_config"]["ignore"] == ["model.embed_tokens", "lm_head"]
    theirs = LlamaForCausalLM(config).eval()
    ModelCompressor.from_compression_config(written["quantization_config"]).decompress(str(tmp_path), theirs)
    tokens = torch.arange(10)[None]
    assert torch.equal(theirs(tokens).logits, model(tokens).logits)
    tensors = from_peer(tmp_path)
    assert sum(isinstance(tensor, NMTensor) for tensor in tensors.values()) == 7
    nms.save_file(tensors, tmp_path / "ours.safetensors")
    ours = nms.load_into(LlamaForCausalLM(config).eval(), tmp_path / "ours.safetensors")
    torch.testing.assert_close(ours(tokens).logits, model(tokens).logits)


def test_negative_zeros_and_groups_with_fewer() -> None:
    w = weight(4, 16, torch.float32)
    w[0, :4] = torch.tensor([-0.0, 0.0, 0.0, 7.0])
    w[1, :4] = -0.0
    stored = compressor24().compress_weight("fc", w)
    ours = from_bitmask24(stored["fc.compressed"], stored["fc.bitmask"], (4, 16))
    assert torch.equal(ours.to_dense(), w)
    assert same_bits(ours.values, stored["fc.compressed"])
    again = to_bitmask24(ours)
    assert torch.equal(again["bitmask"], stored["fc.bitmask"])
    assert torch.equal(again["shape"], stored["fc.shape"])
    theirs = compressor24().decompress_weight(again)
    assert same_bits(theirs, ours.to_dense())


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unstructured_bitmasks(tmp_path: Path, dtype: torch.dtype, old_names: bool) -> None:
    w = nms.nm_prune(torch.randn(4, 32).mul(9).to(dtype), "1:8")
    prefix = "fc.weight" if old_names else "fc"  # releases before 0.9 had the whole name
    stored = BitmaskCompressor(config=None).compress_weight(prefix, w)
    save_plain(stored, tmp_path / "model.safetensors")
    ours = from_peer(tmp_path, format="compressed-tensors")
    assert ours.keys() == {"fc.weight"}
    assert str(ours["fc.weight"].pattern) == "1:8"
    assert same_bits(ours["fc.weight"].to_dense(), w)


FAULTS: list[tuple[str, Any, str]] = [
    ("fc.bitmask", lambda t: t.fill_(0x07), "group 0 of row 0 has not exactly two bits"),
    ("fc.bitmask", lambda t: t[:2].clone(), "bitmask must be uint8"),
    ("fc.bitmask", lambda t: t.view(torch.int8), "bitmask must be uint8"),
    ("fc.bitmask", lambda t: t | 0xF0, "bits set behind the end of a row"),
    ("fc.shape", lambda t: torch.tensor([6, -20]), "shape must hold two sizes"),
    ("fc.shape", lambda t: torch.tensor([6, 1 << 45]), "shape must hold two sizes"),
    ("fc.shape", lambda t: torch.tensor([6, 24]), "bits|bitmask|values must be"),
    ("fc.compressed", lambda t: t[:, :4].contiguous(), "values must be"),
    ("fc.compressed", lambda t: t.flatten()[:7].clone(), "the bitmask has 60 bits"),
    ("fc.compressed", lambda t: None, "has a bitmask, but no compressed"),
]


@pytest.mark.parametrize(("name", "change", "message"), FAULTS)
def test_hostile_folders(tmp_path: Path, name: str, change: Any, message: str) -> None:
    stored = compressor24().compress_weight("fc", weight(6, 20, torch.float32))
    changed = change(stored[name])
    stored = {key: t for key, t in (stored | {name: changed}).items() if t is not None}
    save_plain(stored, tmp_path / "model.safetensors")
    with pytest.raises(nms.FormatError, match=message):
        from_peer(tmp_path, format="compressed-tensors")


def test_other_formats_are_refused_by_name(tmp_path: Path) -> None:
    save_plain({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    config = {"compression_config": {"sparsity_config": {"format": CompressionFormat.marlin_24.value}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(nms.FormatError, match="sparsity format must be sparse-24-bitmask or sparse-bitmask"):
        from_peer(tmp_path, format="compressed-tensors")
    assert load_plain(tmp_path / "model.safetensors")["a"] == 1


def test_bitmasks_are_made_where_the_weight_is() -> None:
    with FakeTensorMode():
        assert _pack_mask(torch.ones(4, 12, dtype=torch.bool, device="cuda")).device.type == "cuda"
