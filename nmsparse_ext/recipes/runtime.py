"""Where a training run runs: device, processes, precision, and generators."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nmsparse_ext.recipes.config import TrainConfig
from nmsparse_ext.recipes.task import Shard, seed_for

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """One process of a run.

    Attributes:
        device: Where it computes.
        shard: Its rank, and the number of processes.
        amp: "none", "bf16" or "fp16".
    """

    device: torch.device
    shard: Shard
    amp: str

    @property
    def main(self) -> bool:
        """Whether this process writes logs and files."""
        return self.shard.rank == 0

    @property
    def distributed(self) -> bool:
        """Whether there are other processes (torchrun with one process counts too)."""
        return torch.distributed.is_initialized()

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of forward passes."""
        if self.amp == "none":
            return nullcontext()
        return torch.autocast(self.device.type, AMP_DTYPES[self.amp])

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is trained: in DistributedDataParallel if there are several processes."""
        if not self.distributed:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def place(self, batch: Any) -> Any:
        """A batch on this process's device; tuples and dictionaries of tensors."""
        if isinstance(batch, Tensor):
            return batch.to(self.device, non_blocking=True)
        if isinstance(batch, Mapping):
            return {key: self.place(value) for key, value in batch.items()}
        if isinstance(batch, (tuple, list)):
            return tuple(self.place(value) for value in batch)
        return batch

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.distributed:
            torch.distributed.all_reduce(value)
        return value

    def sum_by_name(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Sums over all processes; a process may lack some names, or all."""
        mine = {name: float(value) for name, value in values.items()}
        if not self.distributed:
            return mine
        everyones: list[dict[str, float]] = [{}] * self.shard.world
        torch.distributed.all_gather_object(everyones, mine)
        names = dict.fromkeys(name for of_one in everyones for name in of_one)
        return {name: sum(of_one.get(name, 0.0) for of_one in everyones) for name in names}

    def share_buffers(self, model: nn.Module) -> None:
        """Gives every process the first one's buffers: each has gathered its own batch norm statistics."""
        if self.distributed:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.distributed:
            torch.distributed.barrier()


@contextmanager
def runtime(config: TrainConfig) -> Iterator[Runtime]:
    """Sets up what the config and torchrun's environment ask for, and takes it down again.

    Raises:
        ValueError: If the device is not there.
    """
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = find_device(config.device, local)
    threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    started = "RANK" in os.environ and not torch.distributed.is_initialized()
    if started:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        yield Runtime(device, Shard(rank, world if torch.distributed.is_initialized() else 1), config.amp)
    finally:
        if started:
            torch.distributed.destroy_process_group()
        torch.set_num_threads(threads)


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a name means.

    Raises:
        ValueError: If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"device {name!r} is not there: {torch.cuda.device_count()} GPUs are visible")
        device = torch.device("cuda", index)
    return device


def seed_everything(seed: int, *place: int) -> None:
    """Seeds the global generators (torch, random) for one place of a run: an epoch of a process.

    As every epoch starts from a seed of its own, a run that goes on from a checkpoint needs no generator
    states.
    """
    number = seed_for(seed, *place)
    torch.manual_seed(number)
    random.seed(number)
