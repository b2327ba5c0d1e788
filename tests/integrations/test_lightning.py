"""Predicting with packed weights under PyTorch Lightning, and its checkpoints of them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from model_zoo import packed_names, pair
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_lightning as lightning


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = copy.deepcopy(pair("encoder").packed)

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.net(batch[0])


def trainer(folder: Path) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def predict(module: Module, x: Tensor, folder: Path, **options: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cat(
            trainer(folder).predict(module, DataLoader(TensorDataset(x), batch_size=2), **options)
        )


def test_predict_and_checkpoint(tmp_path: Path) -> None:
    x = torch.randn(4, 8, 32)
    module = Module()
    actual = predict(module, x, tmp_path)
    torch.testing.assert_close(actual, pair("encoder").dense(x), atol=1e-5, rtol=1e-5)

    running = trainer(tmp_path)
    running.strategy.connect(module)
    running.save_checkpoint(tmp_path / "checkpoint", weights_only=True)
    again = Module()
    for name in packed_names(again):
        again.get_parameter(name).values.zero_()
    assert torch.equal(predict(again, x, tmp_path, ckpt_path=tmp_path / "checkpoint"), actual)
    assert packed_names(again) == packed_names(module)
