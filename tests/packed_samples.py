"""Packed weights and small networks of them, for the tests of `NMTensor`."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext.tensor import NMTensor

PATTERNS = ("2:4", "1:4", "4:8", "1:16", "3:7", "5:32", "1:1")
ENGINES = ("decompress", "dense")


def sparse(*shape: int, pattern: str = "2:4", dim: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random dense weight that satisfies a pattern."""
    return nms.nm_prune(torch.randn(shape).to(dtype), pattern, dim=dim)


def packed(w: Tensor, pattern: str = "2:4", dim: int = 1, engine: str | None = None) -> NMTensor:
    return nms.compress(w, pattern, dim=dim).with_engine(engine)


def freeze(w: Tensor, pattern: str = "2:4", dim: int = 1, engine: str | None = None) -> nn.Parameter:
    return nn.Parameter(packed(w, pattern, dim, engine), requires_grad=False)


class Net(nn.Module):
    """One of each kind that runs packed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(F.relu(self.conv(x)).mean((2, 3)))))


def pruned_net(pattern: str = "2:4") -> Net:
    net = Net()
    for module in (net.conv, net.fc1, net.fc2):
        nms.nm_prune_(module.weight.data, pattern)
    return net


def packed_copy(net: Net, pattern: str = "2:4", engine: str | None = None) -> Net:
    net = copy.deepcopy(net)
    for module in (net.conv, net.fc1, net.fc2):
        module.weight = freeze(module.weight.detach(), pattern, engine=engine)
    return net
