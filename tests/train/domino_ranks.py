"""DominoSearch on two ranks: cases of workers.py."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import nmsparse_ext as nms

FAST: dict[str, Any] = {
    "budget": nms.Budget(params=0.3),
    "pull": 4.0,
    "check_every": 3,
    "max_steps": 2000,
    "progress": False,
}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 48), nn.ReLU(), nn.Dropout(0.1), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16)
    )


class Batches:
    """``step`` with batches of this rank's own; knows which comes next."""

    def __init__(self) -> None:
        self.next = 0

    def __call__(self, model: nn.Module) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * dist.get_rank() + self.next)
        self.next += 1
        x = torch.randn(8, 32, generator=generator)
        return F.cross_entropy(model(x), x[:, :16].argmax(1))

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def everyone(mine: Any) -> list[Any]:
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    return theirs


def domino_decides_the_same_on_all_ranks(folder: pathlib.Path) -> None:
    model = mlp()
    torch.manual_seed(dist.get_rank())  # for dropout
    result = nms.domino_search(DDP(model), Batches(), **FAST)
    assert result.reached
    assert everyone(result.moves) == [result.moves] * dist.get_world_size()
    assert set(result.scheme) <= {"0.weight", "3.weight", "5.weight"}


def domino_goes_on_with_every_ranks_own_state(folder: pathlib.Path) -> None:
    path = folder / "domino.pt"
    torch.manual_seed(dist.get_rank())
    whole = nms.domino_search(DDP(mlp()), Batches(), **FAST)
    torch.manual_seed(dist.get_rank())
    with pytest.warns(RuntimeWarning, match="not reached after 20 steps"):
        nms.domino_search(DDP(mlp()), Batches(), checkpoint=path, **{**FAST, "max_steps": 20})
    dist.barrier()
    torch.manual_seed(77)
    rest = nms.domino_search(DDP(mlp()), Batches(), checkpoint=path, **FAST)
    assert rest.moves == whole.moves
    assert rest.losses == whole.losses


def domino_refuses_ranks_that_drift_apart(folder: pathlib.Path) -> None:
    with pytest.raises(RuntimeError, match="ranks have come to train different weights: at step"):
        nms.domino_search(mlp(), Batches(), **{**FAST, "pull": 40.0, "lr": 0.5})
    own = nms.domino_search(mlp(), Batches(), process_group=False, **FAST)
    assert own.reached


def domino_refuses_other_settings_on_another_rank(folder: pathlib.Path) -> None:
    with pytest.raises(RuntimeError, match=r"rank \d has other pull than rank \d"):
        nms.domino_search(DDP(mlp()), Batches(), **{**FAST, "pull": 1.0 + dist.get_rank()})


def domino_searches_sharded_models(folder: pathlib.Path) -> None:
    def step(model: nn.Module) -> Tensor:
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
        return F.cross_entropy(model(x), x[:, :16].argmax(1))

    plain = nms.domino_search(mlp().eval(), step, **FAST)
    sharded = mlp().eval()
    for layer in (sharded[0], sharded[3], sharded[5]):
        fully_shard(layer)
    fully_shard(sharded)
    before = [p.full_tensor() for p in sharded.parameters()]
    result = nms.domino_search(sharded, step, **FAST)
    assert [(name, n) for _, name, n in result.trace] == [(name, n) for _, name, n in plain.trace]
    assert everyone(result.moves) == [result.moves] * dist.get_world_size()
    for p, value in zip(sharded.parameters(), before, strict=True):
        assert torch.equal(p.full_tensor(), value)
    with pytest.raises(ValueError, match=re.escape("checkpoint cannot hold sharded parameters")):
        nms.domino_search(sharded, step, checkpoint=folder / "domino.pt", **FAST)


CASES: dict[str, Callable[[pathlib.Path], None]] = {
    function.__name__: function
    for function in (
        domino_decides_the_same_on_all_ranks,
        domino_goes_on_with_every_ranks_own_state,
        domino_refuses_ranks_that_drift_apart,
        domino_refuses_other_settings_on_another_rank,
        domino_searches_sharded_models,
    )
}
