"""A GPT out of PyTorch's own transformer layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# As in GPT-2.
INITIAL_STD = 0.02


class Gpt(nn.Module):
    """A decoder-only transformer, pre-norm, with learned places and a head that is the embedding.

    Args:
        vocabulary: Number of tokens.
        context: Longest input.
        layers: Transformer layers.
        width: Features of the residual stream.
        heads: Attention heads; must divide `width`.
        dropout: Dropout.
    """

    def __init__(
        self, vocabulary: int, context: int, layers: int, width: int, heads: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide width={width}, got {heads}")
        self.token = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(context, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout, activation=F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.mask: Tensor
        self.register_buffer(
            "mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False
        )
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=INITIAL_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [count, length] -> logits [count, length, vocabulary]."""
        length = tokens.shape[1]
        x = self.token(tokens) + self.place(torch.arange(length, device=tokens.device))
        mask = self.mask[:length, :length]
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return F.linear(self.norm(x), self.token.weight)
