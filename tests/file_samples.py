"""A model with one of each kind of content, for the tests of files."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import nmsparse_ext as nms


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16, bias=False)
        self.tied.weight = self.fc.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("temporary", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(self.stem(x))).mean((2, 3))
        return self.tied(self.fc(h)) * self.scale


def pruned_net() -> Net:
    model = Net().eval()
    nms.nm_prune_(model.conv.weight.data, "1:4")
    nms.nm_prune_(model.fc.weight.data, "2:4")
    return model
