"""PyTorch's fused attention and encoder layer, composed of products that packed weights take part in.

In eager mode ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` see that a weight is no plain
tensor and do not call these functions. ``torch.compile`` does not let them see it. The fused kernels are for
inference, so nothing here drops out anything.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._tensor_tables import FUNCTIONS


def _spread(mask: Tensor, mask_type: int | None) -> Tensor:
    """A mask in a shape that broadcasts to ``[batch, heads, queries, keys]``."""
    if mask_type == 1 and mask.dim() == 2:  # [batch, keys]: padding
        return mask[:, None, None, :]
    return mask  # [queries, keys] or all four


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``torch._native_multi_head_attention``: ``[batch, rows, embed_dim]`` in and out, and the attention."""
    if query is key and key is value:
        projected = F.linear(query, qkv_weight, qkv_bias).chunk(3, dim=-1)
    else:
        weights, biases = qkv_weight.chunk(3), qkv_bias.chunk(3)
        parts = zip((query, key, value), weights, biases, strict=True)
        projected = tuple(F.linear(x, w, b) for x, w, b in parts)
    q, k, v = (x.unflatten(-1, (num_head, -1)).transpose(1, 2) for x in projected)
    if mask is not None:
        mask = _spread(mask, mask_type)
        if mask.dtype == torch.bool:  # here true means: not to be seen
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -math.inf)
    attention = None
    if need_weights:
        scores = (q * (embed_dim // num_head) ** -0.5) @ k.mT
        attention = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        mixed = attention @ v
        attention = attention.mean(1) if average_attn_weights else attention
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return F.linear(mixed.transpose(1, 2).flatten(2), proj_weight, proj_bias), attention


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """``torch._transformer_encoder_layer_fwd``: ``[batch, rows, embed_dim]`` in and out."""

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attend(x: Tensor) -> Tensor:
        return _attention(
            x,
            x,
            x,
            embed_dim,
            num_heads,
            qkv_weight,
            qkv_bias,
            proj_weight,
            proj_bias,
            mask,
            need_weights=False,
            mask_type=mask_type,
        )[0]

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    if norm_first:
        src = src + attend(norm_1(src))
        return src + feed_forward(norm_2(src))
    src = norm_1(src + attend(src))
    return norm_2(src + feed_forward(src))


FUNCTIONS[torch._native_multi_head_attention] = _attention
FUNCTIONS[torch._transformer_encoder_layer_fwd] = _encoder_layer
