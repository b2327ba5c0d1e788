"""FSDP2 on two ranks: cases of workers.py."""

from __future__ import annotations

import copy
import pathlib
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel as DDP
from train.common import assert_same, assert_satisfies, batch, loss_of, mlp, sgd, train
from train.ranks import (
    LAMBDA,
    WORLD,
    adam,
    alone,
    case,
    compare,
    expect,
    fused_adam,
    mine,
    one_pass_adamw,
    one_pass_sgd,
    train_together,
    whole,
)

from nmsparse_ext.train import Sparsifier


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
