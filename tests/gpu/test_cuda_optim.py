"""The one-pass optimizer steps on a GPU, against the reference on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import nmsparse_ext as nms

pytestmark = pytest.mark.needs_cuda


def trained(device: str, name: str, dtype: torch.dtype, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Flatten(), nn.Linear(64, 96), nn.Linear(96, 33)).to(dtype)
    model.to(device)
    scheme = {"0": "2:4", "2": "4:8", "3": "1:16"}
    make = {"sgd": nms.optim.SGD, "adamw": nms.optim.AdamW}[name]
    optimizer = make(model.named_parameters(), lr=0.05, scheme=scheme, lambda_w=0.02, **options)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device, dtype)
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sgd", {"momentum": 0.9, "weight_decay": 0.01}),
        ("sgd", {"method": "static"}),
        ("adamw", {}),
        ("adamw", {"amsgrad": True, "penalty": "decoupled"}),
    ],
    ids=str,
)
def test_same_as_on_the_cpu(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    ours, optimizer = trained("cuda", name, dtype, **options)
    theirs, other = trained("cpu", name, dtype, **options)
    for key, mask in optimizer.sparsifier.masks.items():
        assert torch.equal(mask.cpu(), other.sparsifier.masks[key])
        torch.testing.assert_close(
            optimizer.sparsifier.dense_weight(key).cpu(), other.sparsifier.dense_weight(key)
        )
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b)
    assert optimizer.sparsifier.history == other.sparsifier.history


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_that_the_device_skips(name: str) -> None:
    model, optimizer = trained("cuda", name, torch.float32)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer.grad_scale = torch.ones((), device="cuda")
    optimizer.found_inf = torch.ones((), device="cuda")
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert optimizer.sparsifier.step == 4


def test_the_learning_rate_may_live_on_the_device() -> None:
    model, optimizer = trained("cuda", "sgd", torch.float32)
    twin, other = trained("cuda", "sgd", torch.float32)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25, device="cuda")
    other.param_groups[0]["lr"] = 0.25
    for stepped in (optimizer, other):
        stepped.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
