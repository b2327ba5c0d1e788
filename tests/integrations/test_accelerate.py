"""Packed models in accelerate."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from model_zoo import packed_names, pair
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext.integrations.accelerate import register
from nmsparse_ext.tensor import NMTensor


def contents(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.to_dense() if isinstance(p, NMTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def erase(model: nn.Module) -> None:
    for p in model.parameters():
        (p.values if isinstance(p, NMTensor) else p.data).zero_()


@pytest.mark.parametrize("registered", [True, False])
def test_train_save_load(registered: bool, tmp_path: Path) -> None:
    """What is not packed trains; a packed and a dense model are saved and loaded together."""
    accelerator = Accelerator(cpu=True)
    if registered:
        register(accelerator)
    model, other = copy.deepcopy(pair("llama").packed), nn.Linear(3, 3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    names = packed_names(model)
    model, other, optimizer = accelerator.prepare(model, other, optimizer)
    inputs = pair("llama").inputs
    before = contents(model)
    accelerator.backward(model(**inputs, labels=inputs["input_ids"]).loss)
    optimizer.step()
    after = contents(model) | contents(other)
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])

    accelerator.save_state(str(tmp_path / "state"), safe_serialization=registered)
    erase(model)
    erase(other)
    accelerator.load_state(str(tmp_path / "state"))
    assert packed_names(model) == names
    for name, tensor in (contents(model) | contents(other)).items():
        assert torch.equal(tensor, after[name]), name
    if registered:
        tensors = nms.load_file(tmp_path / "state/packed_model.safetensors")
        assert {name for name, tensor in tensors.items() if isinstance(tensor, NMTensor)} == names


def test_moved_between_calls(tmp_path: Path) -> None:
    """Dispatched, and offloaded to CPU memory. To the disk it is refused: that takes NumPy arrays."""
    model, inputs = pair("llama").packed, pair("llama").inputs
    expected = model(**inputs).logits
    dispatched = dispatch_model(copy.deepcopy(model), {"": "cpu"})
    assert torch.equal(dispatched(**inputs).logits, expected)
    offloaded = cpu_offload(copy.deepcopy(model), torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(offloaded(**inputs).logits, expected)
        assert offloaded.lm_head.weight.is_meta
        assert isinstance(offloaded.lm_head.weight, NMTensor)
    with pytest.raises(NotImplementedError, match="numpy"):
        disk_offload(copy.deepcopy(model), tmp_path, execution_device=torch.device("cpu"))
