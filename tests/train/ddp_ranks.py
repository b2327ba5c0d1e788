"""DistributedDataParallel on two ranks: cases of workers.py."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from train.common import batch, loss_of, mlp, sgd
from train.ranks import (
    LAMBDA,
    WORLD,
    alone,
    case,
    compare,
    expect,
    mine,
    one_pass_adamw,
    one_pass_sgd,
    train_together,
)

from nmsparse_ext.train import Sparsifier


@case
def ddp_trains_like_one_process(folder: pathlib.Path) -> None:
    for wrap_first in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plain = mlp()
            model = DDP(plain) if wrap_first else plain
            optimizer = sgd(model)
            sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
            train_together(model if wrap_first else DDP(plain), optimizer, 6)
        compare(model, sparsifier, alone(sgd, 6))


@case
def ddp_with_accumulation_clipping_and_scaling(folder: pathlib.Path) -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, part: Callable[[Tensor], Tensor]) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            optimizer.zero_grad()
            for micro in batch(step).chunk(2):
                scaler.scale(loss_of(model, part(micro)) / 2).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()

    model = DDP(mlp(), gradient_as_bucket_view=True)
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
    loop(model, optimizer, mine)

    twin = mlp()
    plain = sgd(twin)
    other = Sparsifier(twin, plain, "2:4", lambda_w=LAMBDA, process_group=False)
    loop(twin, plain, lambda x: x)
    for name in other.masks:
        torch.testing.assert_close(
            sparsifier.dense_weight(name), other.dense_weight(name), rtol=1e-10, atol=1e-13
        )


@case
def ddp_feels_the_same_lambda(folder: pathlib.Path) -> None:
    after = {}
    for method in ("sr-ste", "ste"):
        model = DDP(mlp())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        sparsifier = Sparsifier(model, optimizer, "2:4", method=method, lambda_w=2e-4)
        before, pruned = sparsifier.dense_weight("0").clone(), ~sparsifier.masks["0"]
        train_together(model, optimizer, 1)
        after[method] = sparsifier.dense_weight("0").clone()
    felt = (after["ste"] - after["sr-ste"])[pruned] / (0.25 * before[pruned])
    torch.testing.assert_close(felt, torch.full_like(felt, 2e-4), rtol=1e-6, atol=0)


@case
def ranks_that_differ_are_told(folder: pathlib.Path) -> None:
    plain = mlp(seed=dist.get_rank())
    optimizer = sgd(plain)
    Sparsifier(plain, optimizer, "2:4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expect(RuntimeError, "0.weight differs", lambda: train_together(DDP(plain), optimizer, 1))

    model = DDP(mlp())
    optimizer = sgd(model)
    Sparsifier(model, optimizer, "2:4", lambda_w=0.1 * dist.get_rank())
    expect(RuntimeError, "the method differs", lambda: train_together(model, optimizer, 1))

    optimizer = sgd(plain)
    Sparsifier(plain, optimizer, "2:4" if dist.get_rank() else {"0": "2:4"})
    expect(RuntimeError, "2.weight differs", lambda: train_together(plain, optimizer, 1))


@case
def ranks_may_differ_where_they_are_meant_to(folder: pathlib.Path) -> None:
    model = mlp(seed=dist.get_rank())
    optimizer = sgd(model)
    Sparsifier(model, optimizer, "2:4", process_group=False)
    train_together(model, optimizer, 1)

    groups = [dist.new_group([rank]) for rank in range(WORLD)]
    optimizer = sgd(model)
    Sparsifier(model, optimizer, "2:4", process_group=groups[dist.get_rank()])
    train_together(model, optimizer, 1)


@case
def one_pass_optimizers_under_ddp(folder: pathlib.Path) -> None:
    for make in (one_pass_sgd, one_pass_adamw):
        model = DDP(mlp())
        optimizer = make(model)
        sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
        train_together(model, optimizer, 4)
        compare(model.module, sparsifier, alone(make, 4))
