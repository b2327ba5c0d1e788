"""What two processes do together; run by test_distributed.py, one process a rank, all cases in one go."""

from __future__ import annotations

import json
import os
import pathlib
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from train import ddp_ranks, domino_ranks, fsdp_ranks, ranks  # noqa: F401 - they enter their cases
from train.ranks import WORLD

__all__ = ["CASES", "WORLD", "run"]

CASES: dict[str, Callable[[pathlib.Path], None]] = {**domino_ranks.CASES, **ranks.CASES}


def run(rank: int, folder: str, port: int) -> None:
    """Runs all cases, and leaves what went wrong in a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=30))
    errors = {}
    for name, function in CASES.items():
        place = pathlib.Path(folder, name)
        place.mkdir(exist_ok=True)
        torch.manual_seed(0)
        try:
            function(place)
        except BaseException:
            errors[name] = traceback.format_exc()
        pathlib.Path(folder, f"{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()
