"""The training loop that all recipes share: CPU, one GPU or torchrun; logs, checkpoints, resume.

It is an ordinary PyTorch loop on purpose. What makes it sparse is the one Sparsifier built next to the
optimizer; accumulation, loss scaling, clipping and DistributedDataParallel need no special care.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

import nmsparse_ext as nms
from nmsparse_ext.recipes import checkpoint
from nmsparse_ext.recipes.config import TrainConfig
from nmsparse_ext.recipes.logs import Logs
from nmsparse_ext.recipes.lr import warmup_cosine
from nmsparse_ext.recipes.runtime import Runtime, runtime, seed_everything
from nmsparse_ext.recipes.task import Place, Task, check_batch
from nmsparse_ext.recipes.watch import Watched, release

Row = dict[str, Any]


@dataclass
class Outcome:
    """What a run left behind.

    Attributes:
        model: The trained model, in evaluation mode; sparse unless it was trained dense.
        rows: One row an epoch: step, learning rate, training loss, SAD, validation figures.
        test: Figures on the test data; empty if the config says not to look, or the run was stopped.
        sad: Weights whose kept/pruned state changed, per optimizer step.
        sad_from_start: Weights whose state differs between the first mask and the last.
        prunable: Number of weights under the pattern, the denominator of the SAD rate.
        lambda_w: SR-STE's lambda that was used; 0 for other methods.
        finished: Whether all epochs were made.
        seconds: Wall-clock time of this call.
        cpu_seconds: Processor time of this call.
    """

    model: nn.Module
    rows: list[Row]
    test: dict[str, float] = field(default_factory=dict)
    sad: list[int] = field(default_factory=list)
    sad_from_start: int = 0
    prunable: int = 0
    lambda_w: float = 0.0
    finished: bool = True
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def train(task: Task) -> Outcome:
    """Run a recipe: train, evaluate after every epoch, log, checkpoint, and test once at the end.

    The same config and number of threads and processes give the same result on a CPU, bit for bit, whether
    the run was interrupted or not.

    Args:
        task: The recipe, made with its config.

    Returns:
        The outcome. In `config.out`: ``log.csv``, ``sad.csv``, ``tensorboard/``, ``checkpoint.pt``,
        ``result.json`` and ``model.safetensors``.

    Raises:
        ValueError: If the config cannot be run, or a checkpoint is of another one.
    """
    with runtime(task.config) as process:
        return _Run(task, process).run()


class _Run:
    """One process's part of a run."""

    def __init__(self, task: Task, process: Runtime) -> None:
        config = self.config = task.config
        check_batch(config.batch_size, config.accumulate, process.shard.world)
        self.task, self.process = task, process
        self.start = time.perf_counter(), time.process_time()
        if process.main and config.out is not None:
            config.out.mkdir(parents=True, exist_ok=True)

        # The same weights in every process.
        seed_everything(config.seed, Place.WEIGHTS)
        self.plain = task.build_model().to(process.device)
        if config.start is not None:
            start_from(self.plain, config.start)
        self.optimizer = task.build_optimizer(self.plain)
        self.steps = config.epochs * task.steps_per_epoch
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, warmup_cosine(self.steps, round(config.warmup * self.steps))
        )
        self.lambda_w = 0.0
        if config.method == "sr-ste":
            given = config.lambda_w
            self.lambda_w = task.default_lambda(self.plain) if given is None else given
        self.scheme = task.scheme(self.plain)
        sparse = self.scheme.resolve(self.plain)
        if not sparse:
            asked = config.pattern if config.scheme is None else f"sparse by {config.scheme}"
            raise ValueError(f"no weight of the model can be {asked}: {dict(self.scheme.dense)}")
        # The one line that makes the model sparse; the loop below is an ordinary one.
        self.sparsifier = nms.Sparsifier(
            self.plain,
            self.optimizer,
            self.scheme,
            method=Watched() if config.method == "dense" else config.method,
            lambda_w=self.lambda_w,
            penalty=config.penalty,
        )
        self.prunable = sum(weight.parameter.numel() for weight in sparse.values())
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=config.amp == "fp16")
        self.rows: list[Row] = []
        self.seen = 0  # SAD entries that the rows so far account for
        if config.resume:
            self._resume()
        self.model = process.wrap(self.plain)

    # ------------------------------------------------------------------------------------------- the loop

    def run(self) -> Outcome:
        """Makes the epochs that are missing, then the end."""
        config, process = self.config, self.process
        first = len(self.rows)
        last = config.epochs
        if config.stop_after is not None:
            last = min(last, max(first, config.stop_after))
        with Logs(config, self.rows, self.task.steps_per_epoch * config.epochs, process.main) as logs:
            for epoch in range(first, last):
                seed_everything(config.seed, Place.EPOCH, epoch, process.shard.rank)
                row = {"epoch": epoch + 1, **self._train_epoch(epoch, logs), **self._evaluate("validation")}
                row["sad"] = self._sad_since_last_row()
                self.rows.append(row)
                logs.epoch(row)
                every = config.checkpoint_every
                if every and ((epoch + 1) % every == 0 or epoch + 1 == last):
                    self._save()
        return self._finish(finished=last == config.epochs)

    def _train_epoch(self, epoch: int, logs: Logs) -> Row:
        """One epoch; returns its figures."""
        self.model.train()
        total, steps = 0.0, 0
        batches = self.task.train_batches(epoch, self.process.shard)
        for micro in _grouped(batches, self.config.accumulate):
            loss = self._step(micro)
            total, steps = total + loss, steps + 1
            logs.step(loss)
        mean = torch.tensor(total / max(steps, 1), dtype=torch.float64, device=self.process.device)
        mean = self.process.sum(mean)
        step = (epoch + 1) * self.task.steps_per_epoch
        lr = self.schedule.get_last_lr()[0]
        return {"step": step, "lr": lr, "train_loss": float(mean) / self.process.shard.world}

    def _step(self, micro: list[Any]) -> float:
        """One optimizer step over several batches; returns the mean loss."""
        total = 0.0
        for i, batch in enumerate(micro):
            # Gradients are averaged over processes once, with the last of them.
            waits = self.process.distributed and i + 1 < len(micro)
            with self.model.no_sync() if waits else nullcontext():  # type: ignore[operator]
                with self.process.autocast():
                    loss = self.task.loss(self.model, self.process.place(batch)) / len(micro)
                self.scaler.scale(loss).backward()
            total += loss.item()
        if self.config.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.plain.parameters(), self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()
        return total

    @torch.no_grad()
    def _evaluate(self, part: str) -> dict[str, float]:
        """Figures over one part of the data, all processes together: ``{"validation_loss": ...}``."""
        self.process.share_buffers(self.plain)
        self.plain.eval()
        sums: dict[str, Any] = {}
        for batch in self.task.eval_batches(part, self.process.shard):
            with self.process.autocast():
                measured = self.task.measure(self.plain, self.process.place(batch))
            for name, value in measured.items():
                sums[name] = sums.get(name, 0.0) + value.double()
        totals = self.process.sum_by_name(sums)
        count = totals.pop("count", 0.0)
        return {f"{part}_{name}": value / count for name, value in totals.items()}

    def _sad_since_last_row(self) -> float:
        """Mean share of weights that changed sides per step since the last row."""
        history = self.sparsifier.history.total
        new, self.seen = history[self.seen :], len(history)
        return sum(new) / max(len(new), 1) / self.prunable

    # ------------------------------------------------------------------------------------------ checkpoints

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.plain.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sparsifier": self.sparsifier.state_dict(),
            "rows": self.rows,
            "seen": self.seen,
        }

    def _save(self) -> None:
        if self.process.main and self.config.out is not None:
            checkpoint.save(self.config, self._state())
        self.process.barrier()

    def _resume(self) -> None:
        state = checkpoint.load(self.config)
        if state is None:
            return
        # Model before Sparsifier: what is loaded into a parameter would else be a write from outside.
        self.plain.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sparsifier.load_state_dict(state["sparsifier"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.rows, self.seen = state["rows"], state["seen"]

    # ---------------------------------------------------------------------------------------------- the end

    def _finish(self, finished: bool) -> Outcome:
        config = self.config
        sad, from_start = self.sparsifier.history, sum(self.sparsifier.sad(since=0).values())
        if config.method == "dense":
            release(self.sparsifier)
        elif finished:
            self.sparsifier.finalize()
        test = self._evaluate("test") if finished and config.test else {}
        wall, cpu = self.start
        outcome = Outcome(
            model=self.plain.eval(),
            rows=self.rows,
            test=test,
            sad=sad.total,
            sad_from_start=from_start,
            prunable=self.prunable,
            lambda_w=self.lambda_w,
            finished=finished,
            seconds=time.perf_counter() - wall,
            cpu_seconds=time.process_time() - cpu,
        )
        if finished and self.process.main and config.out is not None:
            checkpoint.write_results(config, outcome, sad, self.task.describe())
            self.task.save(self.plain, config.out)
        self.process.barrier()
        return outcome


def _grouped(batches: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Batches in lists of `size`; a last list that is shorter is left out."""
    while len(group := list(islice(batches, size))) == size:
        yield group


def start_from(model: nn.Module, path: Path) -> None:
    """Gives a model the weights of a file; packed ones are unpacked, so that all can be trained.

    Raises:
        ValueError: If names or shapes of the file and the model differ.
    """
    loaded = {
        name: tensor.to_dense() if isinstance(tensor, nms.NMTensor) else tensor
        for name, tensor in nms.load_file(path).items()
    }
    try:
        model.load_state_dict(loaded)
    except RuntimeError as error:
        raise ValueError(f"start: {path} does not match the model:\n  {error}") from None


def out_folder(config: TrainConfig, name: str) -> Path:
    """The folder of a run that was given none: ``runs/NAME-METHOD-PATTERN-SEED``, or the scheme's name."""
    pattern = config.scheme.stem if config.scheme is not None else config.pattern.replace(":", "-")
    return config.out or Path("runs") / f"{name}-{config.method}-{pattern}-{config.seed}"
