"""Packed models in `accelerate`: ``save_state`` and ``load_state``.

A packed model goes through ``Accelerator.prepare`` and ``dispatch_model`` as it is. Saving it needs a word:
`accelerate` hands tensors to safetensors, which takes no packed ones::

    accelerator = register(Accelerator())
    model = accelerator.prepare(model)
    accelerator.save_state("folder")  # the model as `nms.save_file` writes it

``save_state(..., safe_serialization=False)`` pickles them and works without. Models that a `Sparsifier`
trains are dense tensors, and need nothing either.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from ..deploy.files import load_into, save_file
from ..tensor import NMTensor

_NAME = "packed_model{}.safetensors"


def register(accelerator: Any) -> Any:
    """Lets an ``Accelerator`` save and load the states of packed models, in the portable form.

    Args:
        accelerator: The ``accelerate.Accelerator``; gets two hooks.

    Returns:
        ``accelerator``.
    """

    def save(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        for number, i in enumerate(_packed(models)):
            if accelerator.is_main_process:
                save_file(models[i], os.path.join(folder, _name(number)))
        # What is taken out of the list is not saved by accelerate; models of another kind stay in.
        for i in reversed(_packed(models)):
            del weights[i]

    def load(models: list[nn.Module], folder: str) -> None:
        packed = _packed(models)
        for number, i in enumerate(packed):
            load_into(models[i], os.path.join(folder, _name(number)))
        for i in reversed(packed):
            del models[i]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    return accelerator


def _packed(models: list[nn.Module]) -> list[int]:
    """Which of the models hold packed weights."""
    return [i for i, model in enumerate(models) if any(isinstance(p, NMTensor) for p in model.parameters())]


def _name(number: int) -> str:
    return _NAME.format(f"_{number}" if number else "")
