"""What two processes do together; run by test_distributed.py, one process a rank, all cases in one go."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import re
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel as DDP
from train import domino_ranks
from train.common import assert_same, assert_satisfies, batch, loss_of, mlp, train

import nmsparse_ext as nms
from nmsparse_ext.train import Sparsifier

WORLD = 2
LAMBDA = 0.05
CASES: dict[str, Callable[[pathlib.Path], None]] = {**domino_ranks.CASES}


def case(function: Callable[[pathlib.Path], None]) -> Callable[[pathlib.Path], None]:
    CASES[function.__name__] = function
    return function


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


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=0.05)


def fused_adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=0.05, fused=True)


def mine(x: Tensor) -> Tensor:
    return x.chunk(WORLD)[dist.get_rank()]


def train_together(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    """As `train`, each rank on its part of the batch."""
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, mine(batch(step))).backward()
        optimizer.step()


def alone(make: Callable[[nn.Module], torch.optim.Optimizer], steps: int, model: nn.Module | None = None):
    """The same training in one process on whole batches: dense weights, parameters, SAD."""
    model = model or mlp()
    optimizer = make(model)
    sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA, process_group=False)
    train(model, optimizer, steps)
    dense = {name: sparsifier.dense_weight(name) for name in sparsifier.masks}
    return dense, {name: p.detach() for name, p in model.named_parameters()}, sparsifier


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def compare(model: nn.Module, sparsifier: Sparsifier, expected: tuple) -> None:
    dense, parameters, other = expected
    for name, weight in dense.items():
        torch.testing.assert_close(whole(sparsifier.dense_weight(name)), weight, rtol=1e-10, atol=1e-13)
        assert torch.equal(whole(sparsifier.masks[name]), other.masks[name])
    for (_, p), q in zip(model.named_parameters(), parameters.values(), strict=True):
        torch.testing.assert_close(whole(p), q, rtol=1e-10, atol=1e-13)
    assert sparsifier.sad() == other.sad()
    assert sparsifier.sad(since=0) == other.sad(since=0)
    assert sparsifier.history == other.history


# ------------------------------------------------------------------------------------------------ DDP


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


# ---------------------------------------------------------------------------------------------- FSDP2


def odd() -> nn.Sequential:
    """As `mlp`, but neither layer's rows can be dealt out evenly; the last rank gets none of layer 2."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(1, 5)).double()


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


@case
def fsdp_trains_like_one_process(folder: pathlib.Path) -> None:
    for build in (mlp, odd):
        for make in (sgd, adam, fused_adam):
            model = sharded(build())
            optimizer = make(model)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
                addresses = [p._local_tensor.data_ptr() for p in model.parameters()]
                train_together(model, optimizer, 6)
            compare(model, sparsifier, alone(make, 6, build()))
            assert addresses == [p._local_tensor.data_ptr() for p in model.parameters()]
            assert isinstance(sparsifier.dense_weight("0"), DTensor)


@case
def fsdp_of_a_conv_with_uneven_rows(folder: pathlib.Path) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Unflatten(1, (8, 2, 1)), nn.Conv2d(8, 5, (2, 1)), nn.Flatten()).double()
    dense, parameters, other = alone(sgd, 4, plain)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Unflatten(1, (8, 2, 1)), nn.Conv2d(8, 5, (2, 1)), nn.Flatten()).double()
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model, mesh=mesh)
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
    train_together(model, optimizer, 4)
    compare(model, sparsifier, (dense, parameters, other))
    assert optimizer.state[model[1].weight]["nm_bits"].shape == (5, 2, 1, 1)


@case
def fsdp_feels_the_same_lambda(folder: pathlib.Path) -> None:
    for step in (fsdp_plain, fsdp_accumulated, fsdp_clipped, fsdp_scaled, fsdp_closure):
        for build in (mlp, odd):
            after = {}
            for method in ("sr-ste", "ste"):
                model = sharded(build())
                optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
                sparsifier = Sparsifier(model, optimizer, "2:4", method=method, lambda_w=2e-4)
                before, pruned = whole(sparsifier.dense_weight("0")).clone(), ~whole(sparsifier.masks["0"])
                step(model, optimizer)
                after[method] = whole(sparsifier.dense_weight("0")).clone()
            felt = (after["ste"] - after["sr-ste"])[pruned] / (0.25 * before[pruned])
            torch.testing.assert_close(felt, torch.full_like(felt, 2e-4), rtol=1e-6, atol=0)


def fsdp_plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    train_together(model, optimizer, 1)


def fsdp_accumulated(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for micro in mine(batch(0)).chunk(4):
        (loss_of(model, micro) / 4).backward()
    optimizer.step()


def fsdp_clipped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss_of(model, mine(batch(0))).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


def fsdp_scaled(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    scaler.scale(loss_of(model, mine(batch(0)))).backward()
    scaler.step(optimizer)
    scaler.update()


def fsdp_closure(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, mine(batch(0)))
        loss.backward()
        return loss

    optimizer.step(closure)


@case
def fsdp_with_a_fused_optimizer_under_a_scaler(folder: pathlib.Path) -> None:
    after = []
    for scale in (1.0, 4096.0):
        model = sharded(odd())
        optimizer = fused_adam(model)
        sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, mine(batch(step)))).backward()
            scaler.step(optimizer)
            scaler.update()
        after.append(whole(sparsifier.dense_weight("0")).clone())
    torch.testing.assert_close(*after, rtol=1e-9, atol=1e-12)


@case
def fsdp_gradients_are_restored(folder: pathlib.Path) -> None:
    model = sharded(mlp())
    optimizer = sgd(model)
    Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
    loss_of(model, mine(batch(0))).backward()
    before = [(p.grad, p.grad._local_tensor.clone()) for p in model.parameters()]
    optimizer.step()
    for p, (grad, value) in zip(model.parameters(), before, strict=True):
        assert p.grad is grad
        assert torch.equal(grad._local_tensor, value)


@case
def fsdp_adopts_writes(folder: pathlib.Path) -> None:
    model = sharded(mlp())
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
    train_together(model, optimizer, 2)
    saved = model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict({name: p.clone() for name, p in saved.items()})
        train_together(model, optimizer, 1)
    with torch.no_grad():
        model[0].weight.mul_(2)
    new = whole(model[0].weight).clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(whole(sparsifier.dense_weight("0")), new)
    assert any("changed outside" in str(warning.message) for warning in caught)


@case
def fsdp_checkpoints(folder: pathlib.Path) -> None:
    """Through files, in place, and bit for bit."""
    for make in (sgd, adam, lambda m: torch.optim.SGD(m.parameters(), lr=0.1)):
        place = folder / str(len(list(folder.iterdir())))
        dist.barrier()
        model = sharded(odd())
        optimizer = make(model)
        sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
        train_together(model, optimizer, 3)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        save(state, storage_writer=FileSystemWriter(place))
        train_together(model, optimizer, 3, start=3)

        other = sharded(odd())
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(0.7)
        resumed = make(other)
        again = Sparsifier(other, resumed, "2:4", lambda_w=LAMBDA)
        state = dict(zip(("model", "optimizer"), get_state_dict(other, resumed), strict=True))
        load(state, storage_reader=FileSystemReader(place))
        set_state_dict(other, resumed, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        assert again.step == 3
        train_together(other, resumed, 3, start=3)
        for name in sparsifier.masks:
            assert torch.equal(whole(again.dense_weight(name)), whole(sparsifier.dense_weight(name)))
            assert torch.equal(whole(again.masks[name]), whole(sparsifier.masks[name]))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(whole(p), whole(q))


@case
def fsdp_checkpoints_go_on_in_one_process(folder: pathlib.Path) -> None:
    """Another world size: whole tensors out, and whole tensors in again."""
    options = StateDictOptions(full_state_dict=True)
    model = sharded(odd())
    optimizer = adam(model)
    sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
    train_together(model, optimizer, 3)
    saved = get_state_dict(model, optimizer, options=options)

    plain = odd()
    resumed = adam(plain)
    again = Sparsifier(plain, resumed, "2:4", lambda_w=LAMBDA, process_group=False)
    everyone = [None] * WORLD
    dist.all_gather_object(everyone, saved)  # full state dicts are rank 0's
    set_state_dict(plain, resumed, model_state_dict=everyone[0][0], optim_state_dict=everyone[0][1])
    assert again.step == 3
    assert_same(
        {name: again.dense_weight(name) for name in again.masks},
        {name: whole(sparsifier.dense_weight(name)) for name in again.masks},
    )
    train(plain, resumed, 2, start=3)
    train_together(model, optimizer, 2, start=3)
    for name in again.masks:
        torch.testing.assert_close(
            again.dense_weight(name), whole(sparsifier.dense_weight(name)), rtol=1e-9, atol=1e-12
        )
        assert torch.equal(again.masks[name], whole(sparsifier.masks[name]))

    # And back to two ranks, from what the one process has made of it.
    saved = copy.deepcopy(get_state_dict(plain, resumed, options=options))  # it aliases what trains on
    back = sharded(odd())
    optimizer = adam(back)
    third = Sparsifier(back, optimizer, "2:4", lambda_w=LAMBDA)
    set_state_dict(back, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
    assert third.step == 5
    for name in again.masks:
        assert torch.equal(whole(third.dense_weight(name)), again.dense_weight(name))
        assert torch.equal(whole(third.masks[name]), again.masks[name])
    train(plain, resumed, 2, start=5)
    train_together(back, optimizer, 2, start=5)
    for name in again.masks:
        torch.testing.assert_close(
            whole(third.dense_weight(name)), again.dense_weight(name), rtol=1e-9, atol=1e-12
        )


@case
def tiles_that_shards_cut_are_refused(folder: pathlib.Path) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)).double()
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    expect(
        ValueError,
        "1.weight is sharded along dim 0 into parts of 2, no multiple of 4",
        lambda: Sparsifier(model, sgd(model), "2:4", transposable=True),
    )
    Sparsifier(model, sgd(model), {"0": "2:4"}, transposable=True)


@case
def fsdp_of_bfloat16_parameters(folder: pathlib.Path) -> None:
    """Float32 behind them, saved and loaded bit for bit; and DDP's hooks still see every gradient."""
    dtype = torch.bfloat16
    model = sharded(odd().to(dtype))
    optimizer = adam(model)
    sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, mine(batch(step, dtype))).backward()
            optimizer.step()

    loop(model, optimizer)
    assert sparsifier.dense_weight("0").dtype == torch.float32
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.float32
    saved = optimizer.state_dict()
    before = {name: whole(sparsifier.dense_weight(name)).clone() for name in sparsifier.masks}
    other = sharded(odd().to(dtype))
    resumed = adam(other)
    again = Sparsifier(other, resumed, "2:4", lambda_w=LAMBDA)
    resumed.load_state_dict(saved)
    for name, dense in before.items():
        assert torch.equal(whole(again.dense_weight(name)), dense)

    replica = DDP(mlp(dtype))
    optimizer = sgd(replica)
    sparsifier = Sparsifier(replica, optimizer, "2:4", lambda_w=LAMBDA)
    loop(replica, optimizer)
    dense = sparsifier.dense_weight("0")
    everyone = [torch.empty_like(dense) for _ in range(WORLD)]
    dist.all_gather(everyone, dense)
    assert torch.equal(*everyone)


@case
def fsdp_own_state_dict(folder: pathlib.Path) -> None:
    model = sharded(odd())
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4")
    train_together(model, optimizer, 3)
    torch.save(
        [model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()], folder / f"{dist.get_rank()}"
    )
    train_together(model, optimizer, 2, start=3)

    other = sharded(odd())
    resumed = sgd(other)
    again = Sparsifier(other, resumed, "2:4")
    saved = torch.load(folder / f"{dist.get_rank()}", weights_only=True)
    for part, state in zip((other, resumed, again), saved, strict=True):
        part.load_state_dict(state)
    train_together(other, resumed, 2, start=3)
    assert again.history == sparsifier.history
    assert again.sad(since=0) == sparsifier.sad(since=0)
    assert torch.equal(whole(again.dense_weight("0")), whole(sparsifier.dense_weight("0")))


def one_pass_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return nms.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def one_pass_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return nms.optim.AdamW(model.parameters(), lr=0.05)


@case
def one_pass_optimizers_under_ddp(folder: pathlib.Path) -> None:
    for make in (one_pass_sgd, one_pass_adamw):
        model = DDP(mlp())
        optimizer = make(model)
        sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
        train_together(model, optimizer, 4)
        compare(model.module, sparsifier, alone(make, 4))


@case
def one_pass_optimizers_on_shards(folder: pathlib.Path) -> None:
    for make in (one_pass_sgd, one_pass_adamw):
        model = sharded(mlp())
        optimizer = make(model)
        sparsifier = Sparsifier(model, optimizer, "2:4", lambda_w=LAMBDA)
        train_together(model, optimizer, 4)
        compare(model, sparsifier, alone(make, 4))


@case
def fsdp_finalizes(folder: pathlib.Path) -> None:
    model = sharded(mlp())
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4")
    train_together(model, optimizer, 2)
    sparsifier.finalize()
    plain = mlp()
    plain.load_state_dict({name: whole(p) for name, p in model.state_dict().items()})
    assert_satisfies(plain, sparsifier.scheme)
    train_together(model, optimizer, 1)


@case
def a_sharded_group_dim_is_refused(folder: pathlib.Path) -> None:
    model = mlp()
    fully_shard(
        model, mesh=init_device_mesh("cpu", (WORLD,)), shard_placement_fn=lambda p: Shard(p.dim() - 1)
    )
    optimizer = sgd(model)
    expect(
        ValueError, "0.weight is sharded along its group dim 1", lambda: Sparsifier(model, optimizer, "2:4")
    )


@case
def sharding_after_the_sparsifier_is_refused(folder: pathlib.Path) -> None:
    model = mlp()
    optimizer = sgd(model)
    Sparsifier(model, optimizer, "2:4")
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    expect(RuntimeError, "0.weight is another parameter", lambda: train_together(model, optimizer, 1))


def expect(error: type[Exception], text: str, do: Callable[[], object]) -> None:
    with pytest.raises(error, match=re.escape(text)):
        do()
