"""Small models of every kind, pruned to 2:4: as they are, and packed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTModel,
)

import nmsparse_ext as nms
from nmsparse_ext.tensor import NMTensor

WIDTH, VOCABULARY = 32, 50


class Pair(NamedTuple):
    """A pruned model, the same one packed, and how both are called. To be copied before it is changed."""

    dense: nn.Module
    packed: nn.Module
    inputs: dict[str, Any]


def tokens(rows: int = 2, length: int = 8) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length))


def sequence(length: int = 8) -> Tensor:
    return torch.randn(2, length, WIDTH)


def padding() -> Tensor:
    """True at what is filling: the last two of the first row."""
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, -2:] = True
    return mask


def attention(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(WIDTH, 4, batch_first=True, **options)


def encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True, dropout=0.0, **options)


def decoder() -> nn.Module:
    return nn.TransformerDecoderLayer(WIDTH, 4, 64, batch_first=True, dropout=0.0)


def bert() -> nn.Module:
    config = BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
    )
    return BertModel(config)


def gpt2() -> nn.Module:
    config = GPT2Config(
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def llama(tied: bool = False) -> nn.Module:
    config = LlamaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=VOCABULARY + 2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_channels=4,
    )
    return ViTModel(config)


def resnet() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], num_labels=4)
    )


#: Name -> what makes the model, what makes its inputs. All of them run packed; an RNN stays dense.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "self-attention": (attention, lambda: dict.fromkeys(("query", "key", "value"), sequence())),
    "cross-attention": (
        lambda: attention(kdim=16, vdim=24),
        lambda: {"query": sequence(), "key": torch.randn(2, 5, 16), "value": torch.randn(2, 5, 24)},
    ),
    "encoder": (encoder, lambda: {"src": sequence(), "src_key_padding_mask": padding()}),
    "encoder-norm-first": (lambda: encoder(norm_first=True, activation="gelu"), lambda: {"src": sequence()}),
    "decoder": (decoder, lambda: {"tgt": sequence(), "memory": sequence(5)}),
    "bert": (bert, lambda: {"input_ids": tokens(), "attention_mask": 1 - padding().long()}),
    "gpt2": (gpt2, lambda: {"input_ids": tokens(), "use_cache": False}),
    "llama": (llama, lambda: {"input_ids": tokens(), "use_cache": False}),
    "llama-tied": (lambda: llama(tied=True), lambda: {"input_ids": tokens(), "use_cache": False}),
    "vit": (vit, lambda: {"pixel_values": torch.randn(2, 4, 16, 16)}),
    "resnet": (resnet, lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}),
    "lstm": (lambda: nn.LSTM(WIDTH, WIDTH, 2), lambda: {"input": torch.randn(5, 2, WIDTH)}),
    "gru": (lambda: nn.GRU(WIDTH, WIDTH), lambda: {"input": torch.randn(5, 2, WIDTH)}),
}


def pruned(model: nn.Module) -> nn.Module:
    """The model with 2:4 in every weight that can have it; changed in place."""
    scheme = nms.Scheme.uniform(model, "2:4")
    for name, weight in scheme.resolve(model).items():
        nms.nm_prune_(model.get_parameter(name).data, weight.pattern, dim=weight.group_dim)
    return model


def packed(model: nn.Module) -> nn.Module:
    """A packed copy of a pruned model."""
    return nms.convert(copy.deepcopy(model), policy="always")


@functools.cache
def pair(name: str) -> Pair:
    """The models of that name, in eval mode."""
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    dense = pruned(make().eval())
    return Pair(dense, packed(dense), inputs())


def first(output: Any) -> Tensor:
    """The first tensor of what a model returns."""
    return output if isinstance(output, Tensor) else first(output[0])


def packed_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if isinstance(parameter, NMTensor)}
