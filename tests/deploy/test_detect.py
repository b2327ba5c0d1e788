"""Which pattern a weight is said to hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nmsparse_ext as nms
from nmsparse_ext.deploy import USUAL_PATTERNS, detect_pattern


def test_order_of_the_usual_patterns() -> None:
    texts = [str(pattern) for pattern in USUAL_PATTERNS]
    assert texts[:6] == ["1:32", "1:16", "2:32", "1:8", "2:16", "4:32"]
    assert texts[-5:] == ["1:2", "2:4", "4:8", "8:16", "16:32"]
    assert {"1:4", "2:8", "4:16", "8:32"} <= set(texts)


@pytest.mark.parametrize("pattern", [str(pattern) for pattern in USUAL_PATTERNS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_each_is_found(pattern: str, dtype: torch.dtype) -> None:
    w = (torch.rand(8, 64) + 1).to(dtype)  # no zeros of its own, which could make it tighter
    assert detect_pattern(nms.nm_prune(w, pattern)) == nms.Pattern.parse(pattern)
    assert detect_pattern(nms.nm_prune(w.t(), pattern, dim=0), dim=0) == nms.Pattern.parse(pattern)


@pytest.mark.parametrize("w", [torch.randn(4, 8), torch.zeros(4, 8), torch.empty(0, 8), torch.randn(4, 7)])
def test_nothing_is_found(w: torch.Tensor) -> None:
    assert detect_pattern(w) is None


def test_conditions() -> None:
    w = nms.nm_prune(torch.rand(4, 16) + 1, "1:16")
    assert str(detect_pattern(w)) == "1:16"
    assert str(detect_pattern(w, allowed=lambda pattern: pattern.m <= 4)) == "1:4"
    nan = torch.zeros(4, 8)
    nan[0, 0] = float("nan")
    assert str(detect_pattern(nan)) == "1:8"


def test_groups_do_not_cross_filters() -> None:
    # Four conv groups of 4 input channels each, side by side in dim 0: a group of 8 would straddle two.
    conv = nn.ConvTranspose2d(16, 8, 1, groups=4)
    conv.weight.data.zero_()[::8] = 1.0
    packed = nms.convert(nn.Sequential(conv), policy="always")
    assert str(packed[0].weight.pattern) == "1:4"
