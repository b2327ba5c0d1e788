"""Training loops of other libraries, on a tiny model: Lightning, accelerate, the Hugging Face Trainer.

The libraries are part of the ``test`` extra, so their absence is a failure, not a skip.
"""

from __future__ import annotations

import pathlib
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from train.common import assert_satisfies, batch, mlp

from nmsparse_ext.train import Sparsifier

FULL = {"0.weight": "2:4", "2.weight": "2:4"}
LAMBDA, STEPS = 0.05, 6


class Data(Dataset[dict[str, Tensor]]):
    """One batch's rows of `batch`, and what they are to become."""

    def __len__(self) -> int:
        return 32 * STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": batch(index // 32, torch.float32)[index % 32], "labels": torch.ones(4)}


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def by_hand(accumulate: int = 1, clip: float | None = None) -> tuple[nn.Module, Sparsifier]:
    """The same training in a plain loop."""
    model = mlp(torch.float32)
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
    for step, part in enumerate(DataLoader(Data(), batch_size=32)):
        ((model(part["x"]) - part["labels"]).pow(2).mean() / accumulate).backward()
        if (step + 1) % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return model, sparsifier


def compare(model: nn.Module, sparsifier: Sparsifier, expected: tuple[nn.Module, Sparsifier]) -> None:
    for p, q in zip(model.parameters(), expected[0].parameters(), strict=True):
        torch.testing.assert_close(p, q)
    for name in FULL:
        torch.testing.assert_close(sparsifier.dense_weight(name), expected[1].dense_weight(name))
    assert sparsifier.step == expected[1].step
    assert sparsifier.history == expected[1].history
    assert_satisfies(model, FULL)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(accumulate: int, tmp_path: pathlib.Path) -> None:
    """It passes a closure to every step; its checkpoints hold model and optimizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pytorch_lightning as lightning

    class Module(lightning.LightningModule):
        def __init__(self, seed: int = 0) -> None:
            super().__init__()
            self.net = mlp(torch.float32, seed)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = sgd(self.net)
            self.sparsifier = Sparsifier(self.net, optimizer, "2:4", lambda_w=LAMBDA)
            return optimizer

        def training_step(self, part: dict[str, Tensor], index: int) -> Tensor:
            return (self.net(part["x"]) - part["labels"]).pow(2).mean()

    def fit(module: Module, steps: int, epochs: int = 1, checkpoint: str | None = None) -> lightning.Trainer:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            limit_train_batches=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=0.5,
            default_root_dir=tmp_path,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, DataLoader(Data(), batch_size=32), ckpt_path=checkpoint)
        return trainer

    module = Module()
    trainer = fit(module, STEPS)
    compare(module.net, module.sparsifier, by_hand(accumulate, clip=0.5))

    trainer.save_checkpoint(tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    again = Module(seed=7)
    optimizer = again.configure_optimizers()
    again.load_state_dict(saved["state_dict"])
    optimizer.load_state_dict(saved["optimizer_states"][0])
    for name in FULL:
        assert torch.equal(again.sparsifier.dense_weight(name), module.sparsifier.dense_weight(name))
    assert again.sparsifier.step == module.sparsifier.step

    # Resumed by Lightning, against a run that was not interrupted.
    through, resumed = Module(), Module(seed=7)
    fit(through, STEPS, epochs=2)
    fit(resumed, STEPS, epochs=2, checkpoint=str(tmp_path / "checkpoint"))
    assert resumed.sparsifier.step == through.sparsifier.step == 2 * module.sparsifier.step
    for name in FULL:
        assert torch.equal(resumed.sparsifier.dense_weight(name), through.sparsifier.dense_weight(name))
    assert_satisfies(resumed.net, FULL)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("wrapped_first", [True, False])
def test_accelerate(accumulate: int, wrapped_first: bool) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = mlp(torch.float32)
    optimizer = sgd(model)
    if not wrapped_first:
        sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Data(), batch_size=32))
    if wrapped_first:
        sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
    for part in loader:
        with accelerator.accumulate(model):
            accelerator.backward((model(part["x"]) - part["labels"]).pow(2).mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    compare(accelerator.unwrap_model(model), sparsifier, by_hand(accumulate, clip=0.5))


def test_accelerate_resumes(tmp_path: pathlib.Path) -> None:
    """Its checkpoints hold the dense weights, in the optimizer's state: half of a run, and the other half."""
    from accelerate import Accelerator

    def part_of_run(steps: range, load: bool, seed: int) -> tuple[nn.Module, Sparsifier]:
        accelerator = Accelerator(cpu=True)
        model = mlp(torch.float32, seed)
        optimizer = sgd(model)
        sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
        model, optimizer = accelerator.prepare(model, optimizer)
        if load:
            accelerator.load_state(str(tmp_path / "state"))
        for step, part in enumerate(DataLoader(Data(), batch_size=32)):
            if step in steps:
                accelerator.backward((model(part["x"]) - part["labels"]).pow(2).mean())
                optimizer.step()
                optimizer.zero_grad()
        if not load:
            accelerator.save_state(str(tmp_path / "state"))
        return accelerator.unwrap_model(model), sparsifier

    part_of_run(range(STEPS // 2), load=False, seed=0)
    model, sparsifier = part_of_run(range(STEPS // 2, STEPS), load=True, seed=7)
    expected, by_hand_sparsifier = by_hand()
    assert sparsifier.step == STEPS
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    for name in FULL:
        torch.testing.assert_close(sparsifier.dense_weight(name), by_hand_sparsifier.dense_weight(name))


class Net(nn.Module):
    """What the Trainer wants: labels in, a loss out."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = mlp(torch.float32, seed)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.net(x) - labels).pow(2).mean()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hugging_face_trainer(accumulate: int, tmp_path: pathlib.Path) -> None:
    """Handed over with its optimizer; saved by it, and resumed by it."""
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: object) -> Sampler[int]:
            return SequentialSampler(Data())

    def trainer_of(seed: int, steps: int) -> tuple[Trainer, Net, Sparsifier]:
        model = Net(seed)
        optimizer = sgd(model.net)
        sparsifier = Sparsifier(model.net, optimizer, "2:4", lambda_w=LAMBDA)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=32,
            gradient_accumulation_steps=accumulate,
            max_steps=steps,
            max_grad_norm=0.5,
            save_steps=STEPS // accumulate,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        trainer = InOrder(model, arguments, train_dataset=Data(), optimizers=(optimizer, constant))
        return trainer, model, sparsifier

    steps = STEPS // accumulate
    trainer, model, sparsifier = trainer_of(0, steps)
    trainer.train()
    compare(model.net, sparsifier, by_hand(accumulate, clip=0.5))

    trainer, model, again = trainer_of(7, 2 * steps)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert again.step == 2 * steps
    assert again.history.steps == list(range(steps + 1, 2 * steps + 1))
    assert_satisfies(model.net, FULL)
