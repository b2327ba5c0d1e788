"""DDP and FSDP2 over two gloo processes; see workers.py."""

from __future__ import annotations

import json
import pathlib
import socket

import pytest
import torch
from train import workers

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch is built without torch.distributed or gloo",
)


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What went wrong, by case, for each rank. Starting processes takes longer than all cases do."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(workers.run, (str(folder), port), nprocs=workers.WORLD)
    return [json.loads(pathlib.Path(folder, f"{rank}.json").read_text()) for rank in range(workers.WORLD)]


@pytest.mark.parametrize("name", workers.CASES)
def test_case(errors: list[dict[str, str]], name: str) -> None:
    for rank, of_rank in enumerate(errors):
        assert name not in of_rank, f"rank {rank}:\n{of_rank[name]}"
