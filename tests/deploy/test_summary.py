"""summary: patterns, parameters, MACs and bytes of a model's weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nmsparse_ext as nms


@pytest.fixture
def model() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 10))
    nms.nm_prune_(model[0].weight.data, "1:4")
    return model


def test_rows(model: nn.Sequential) -> None:
    found = nms.summary(model, example_input=torch.randn(2, 8, 4, 4))
    conv, fc = found
    assert (conv.name, conv.shape, conv.pattern, conv.reason) == (
        "0.weight",
        (16, 8, 3, 3),
        "1:4",
        "detected",
    )
    assert (conv.params, conv.kept) == (1152, 288)
    assert (conv.macs, conv.kept_macs) == (2 * 4 * 1152, 2 * 4 * 288)
    assert conv.bytes == nms.Pattern(1, 4).packed_bytes((16, 8, 3, 3), 1, 4) == 288 * 4 + 16 * 9
    assert (fc.pattern, fc.kept, fc.kept_macs, fc.bytes) == (None, 640, 2 * 640, 2560)
    assert found.total("params") == 1152 + 640
    assert "total" in str(found)
    assert found.to_json()[1]["pattern"] is None


def test_packed_and_dense_agree(model: nn.Sequential) -> None:
    before = nms.summary(model)
    after = nms.summary(nms.convert(model, policy="always"))
    assert after[0].reason == "packed"
    assert [row.bytes for row in before] == [row.bytes for row in after]
    assert after[0].bytes == model[0].weight.nbytes
    assert before.total("macs") is None


def test_a_scheme_is_assumed(model: nn.Sequential) -> None:
    found = nms.summary(model, {"2": "2:8"})
    assert [row.pattern for row in found] == [None, "2:8"]
    assert found[0].reason == "not in the scheme"
    assert found[1].kept == 160
