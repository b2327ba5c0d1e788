"""The training loop of DominoSearch: steps, checks, checkpoints, and putting the dense weights back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import foreach, ops
from ..macs import counting_macs
from ..train import Sparsifier
from ..train.dtensor import is_dtensor, local_of
from ..train.exchange import by_device
from . import domino_file
from .costs import Costs
from .domino_game import Game
from .domino_rule import Levels, Pull

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..train import SparseWeight


class Training(NamedTuple):
    """The constants of the training; see `domino_search`."""

    lr: float
    momentum: float
    weight_decay: float
    pull: float
    pull_every: int
    doublings: tuple[int, ...]
    check_every: int

    def pull_at(self, step: int) -> float:
        """The strength of the pull in a step, counted from 1; 0 for none."""
        if (step - 1) % self.pull_every:
            return 0.0
        return self.pull * 2.0 ** sum(step >= doubling for doubling in self.doublings)

    def checks_at(self, step: int) -> bool:
        """Whether there is a check in a step."""
        return (step - 1) % self.check_every == 0


class Search:
    """A DominoSearch in progress: the model in training, and the game that it decides.

    Args:
        model: The model.
        step: ``step(model) -> loss``.
        game: The game.
        training: The constants.
        costs: Has the MACs, if there was an example input.
        process_group: As of `domino_search`.

    Attributes:
        steps: How many steps have begun.
        losses: The mean loss between each check and the next.
    """

    def __init__(
        self,
        model: nn.Module,
        step: Callable[[nn.Module], Tensor],
        game: Game,
        training: Training,
        costs: Costs,
        process_group: Any,
    ) -> None:
        self._model, self._step, self._game, self._training = model, step, game, training
        self._process_group = process_group
        self._macs: dict[str, int] | None = None
        if costs.dense.macs is not None:
            self._macs = _known_macs(
                {name: None if name in costs.unknown_macs else costs.of(name).macs for name in game.n}, game
            )
        self._factors: dict[str, float] = {}
        self._thresholds: dict[str, Tensor] = {}
        self._counts: dict[torch.device, Tensor] = {}
        self._sum: Tensor | None = None  # of the losses since the last check
        self._summed = 0
        self.steps = 0
        self.losses: list[float] = []

    def run(
        self,
        *,
        limits: Mapping[str, float],
        max_steps: int,
        restore: bool,
        checkpoint: str | os.PathLike[str] | None,
        checkpoint_every: int,
        progress: bool,
    ) -> bool:
        """Searches; returns whether the budget is met."""
        settings = self._settings(limits)
        self._check_settings(settings)
        state = None if checkpoint is None else domino_file.load(checkpoint, settings)
        tensors = _tensors(self._model)
        start = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        if checkpoint is not None and any(map(is_dtensor, tensors.values())):
            raise ValueError(
                "checkpoint cannot hold sharded parameters; search without one, or without sharding"
            )
        if state is not None:
            self._check_ranks(state)
            _assign(start, state["start"], checkpoint)
            self._game.load_state_dict(state["game"])
            self.steps = state["steps"]
            _assign(tensors, state["tensors"], checkpoint)
        optimizer = torch.optim.SGD(
            [p for p in self._model.parameters() if p.requires_grad],
            lr=self._training.lr,
            momentum=self._training.momentum,
            weight_decay=self._training.weight_decay,
            fused=_can_fuse(tensors.values()) or None,
        )
        rule = Pull()
        sparsest = {name: self._game.sparsest(name) for name in self._game.n}
        sparsifier = Sparsifier(
            self._model,
            optimizer,
            sparsest,
            method=rule,
            schedule=Levels(self._game.n),
            process_group=self._process_group,
        )
        try:
            self._weights = sparsifier.weights
            if state is None:
                self._thresholds = {
                    name: foreach.group_thresholds(weight.dense, self._game.m[name], dim=weight.dim)
                    for name, weight in self._weights.items()
                }
                if self._macs is not None:
                    self._factors = self._game.factors(self._macs)
            else:
                self._resume(state, optimizer)

            def save() -> None:
                if checkpoint is not None:
                    ranks = self._gather(self._rank_state())
                    if self._rank == 0:
                        own = self._state(optimizer, start, tensors)
                        domino_file.save(checkpoint, settings, {**own, "ranks": ranks})

            with _bar(progress and self._rank == 0, self.steps) as bar:
                done = self.steps
                reached = self._game.met or self._train(
                    optimizer, rule, max_steps, checkpoint_every, save, bar
                )
            if self.steps > done:
                save()
            return reached
        finally:
            dense = {name: weight.dense for name, weight in sparsifier.weights.items()}
            sparsifier.finalize()
            optimizer.zero_grad()
            with torch.no_grad():
                if restore:
                    for name, tensor in tensors.items():
                        tensor.copy_(start[name])
                else:
                    self._apply_scheme(dense, sparsifier.weights)

    # ------------------------------------------------------------------------------------------------ steps

    def _train(
        self,
        optimizer: torch.optim.Optimizer,
        rule: Pull,
        max_steps: int,
        checkpoint_every: int,
        save: Callable[[], None],
        bar: tqdm[Any] | None,
    ) -> bool:
        game, training = self._game, self._training
        while self.steps < max_steps and not game.over:
            self.steps += 1
            optimizer.zero_grad()
            self._forward_and_backward()
            fallen = len(game.trace)
            if training.checks_at(self.steps):
                reached = game.play(self.steps, *self._count_votes())
                self._close_losses()
                if bar is not None:
                    self._show(bar)
                if reached:
                    return True
            pull = training.pull_at(self.steps)
            rule.strengths = {name: pull * factor for name, factor in self._factors.items()} if pull else {}
            optimizer.step()
            if len(game.trace) > fallen:
                assert self._macs is not None
                self._factors = game.factors(self._macs)
            if bar is not None:
                bar.update()
            if self.steps % checkpoint_every == 0:
                save()
        return False

    def _forward_and_backward(self) -> None:
        if self._macs is None:
            with counting_macs(self._model) as macs:
                loss = self._step(self._model)
            self._macs = _known_macs(macs, self._game)
            self._factors = self._game.factors(self._macs)
        else:
            loss = self._step(self._model)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shown = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise TypeError(f"step must return the loss, a tensor with one number, got {shown}")
        if not loss.requires_grad:
            raise TypeError(
                "step must return the loss with its graph: it must not call backward or detach it"
            )
        loss.backward()
        loss = loss.detach().float().reshape(())
        self._sum = loss.clone() if self._sum is None else self._sum + loss
        self._summed += 1

    def _close_losses(self) -> None:
        """The mean loss since the last check."""
        assert self._sum is not None
        mean = float(self._sum) / self._summed
        self._sum, self._summed = None, 0
        self.losses.append(mean)
        if not torch.isfinite(torch.tensor(mean)):
            raise RuntimeError(
                f"the loss is {mean} at step {self.steps} or before: lower lr or pull, or look into step"
            )

    # ------------------------------------------------------------------------------------------------ votes

    @torch.no_grad()
    def _count_votes(self) -> tuple[dict[str, int], dict[str, int]]:
        """How many groups of each weight vote for going down a level, and of how many."""
        game = self._game
        below: dict[str, int] = dict.fromkeys(game.n, 0)
        members = [(weight, 0) for name, weight in self._weights.items() if game.can_move(name)]
        for device, of_device in by_device(members):
            weights = [weight for weight, _ in of_device]
            counts = self._counts_on(device, len(weights))
            foreach.vote(
                [weight.dense for weight in weights],
                [self._thresholds[weight.name] for weight in weights],
                ns=[game.n[weight.name] for weight in weights],
                ms=[game.m[weight.name] for weight in weights],
                dims=[weight.dim for weight in weights],
                counts=counts,
            )
            for weight, count in zip(weights, counts, strict=True):
                for group in weight.shard_groups:
                    torch.distributed.all_reduce(count, group=group)
            below.update(zip((weight.name for weight in weights), counts.tolist(), strict=True))
        self._check_agreement(below)
        groups = {name: weight.parameter.numel() // game.m[name] for name, weight in self._weights.items()}
        return below, groups

    def _counts_on(self, device: torch.device, length: int) -> Tensor:
        if device not in self._counts:
            self._counts[device] = torch.empty(len(self._game.n), dtype=torch.int64, device=device)
        return self._counts[device][:length]

    def _check_agreement(self, below: dict[str, int]) -> None:
        """Ranks that train the same weights count the same votes."""
        for rank, theirs in enumerate(self._gather(below)):
            if theirs != below:
                name = next(name for name in below if below[name] != theirs[name])
                raise RuntimeError(
                    f"ranks have come to train different weights: at step {self.steps}, {theirs[name]} "
                    f"groups of {name} are below on rank {rank}, {below[name]} on rank {self._rank}; wrap "
                    f"the model in DistributedDataParallel, or give process_group=False for searches of "
                    f"their own"
                )

    # ------------------------------------------------------------------------------------------------ ranks

    @property
    def _distributed(self) -> bool:
        dist = torch.distributed
        return self._process_group is not False and dist.is_available() and dist.is_initialized()

    @property
    def _rank(self) -> int:
        return torch.distributed.get_rank(self._process_group) if self._distributed else 0

    def _gather(self, mine: Any) -> list[Any]:
        """``mine`` of every rank."""
        if not self._distributed:
            return [mine]
        everyone = [None] * torch.distributed.get_world_size(self._process_group)
        torch.distributed.all_gather_object(everyone, mine, group=self._process_group)
        return everyone

    def _check_settings(self, settings: dict[str, Any]) -> None:
        for rank, theirs in enumerate(self._gather(settings)):
            other = sorted(key for key in settings if theirs.get(key) != settings[key])
            if other:
                raise RuntimeError(
                    f"ranks must search with the same settings, but rank {rank} has other {', '.join(other)}"
                    f" than rank {self._rank}; a budget of latency needs one table of times for all ranks"
                )

    # ------------------------------------------------------------------------------------------- checkpoints

    def _settings(self, limits: Mapping[str, float]) -> dict[str, Any]:
        training = {
            key: list(v) if isinstance(v, tuple) else v for key, v in self._training._asdict().items()
        }
        return {**training, **self._game.settings, "limits": dict(limits)}

    def _rank_state(self) -> dict[str, Any]:
        device = next(iter(self._weights.values())).dense.device
        state: dict[str, Any] = {
            "random": domino_file.random_state(device),
            "losses": self.losses,
            "sum": None if self._sum is None else float(self._sum),
            "summed": self._summed,
        }
        if hasattr(self._step, "state_dict"):
            state["step"] = self._step.state_dict()
        return state

    def _state(
        self, optimizer: torch.optim.Optimizer, start: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "game": self._game.state_dict(),
            "macs": self._macs,
            "factors": self._factors,
            "thresholds": self._thresholds,
            "optimizer": optimizer.state_dict(),
            "start": dict(start),
            "tensors": {name: tensor.detach() for name, tensor in tensors.items()},
        }

    def _resume(self, state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
        optimizer.load_state_dict(state["optimizer"])
        self._thresholds = {
            name: threshold.to(self._weights[name].dense.device)
            for name, threshold in state["thresholds"].items()
        }
        self._macs, self._factors = state["macs"], state["factors"]
        device = next(iter(self._weights.values())).dense.device
        mine = state["ranks"][self._rank]
        self.losses, self._summed = list(mine["losses"]), mine["summed"]
        self._sum = None if mine["sum"] is None else torch.tensor(mine["sum"], device=device)
        domino_file.set_random_state(mine["random"], device)
        if "step" in mine and hasattr(self._step, "load_state_dict"):
            self._step.load_state_dict(mine["step"])

    def _check_ranks(self, state: Mapping[str, Any]) -> None:
        world = len(self._gather(None))
        if len(state["ranks"]) != world:
            raise ValueError(f"checkpoint is of {len(state['ranks'])} ranks, but there are {world}")

    # ------------------------------------------------------------------------------------------- the outside

    def _apply_scheme(self, dense: Mapping[str, Tensor], weights: Mapping[str, SparseWeight]) -> None:
        """Leaves the trained weights in the model, masked by the patterns found."""
        for name, weight in weights.items():
            pruned = ops.nm_prune(dense[name], self._game.patterns[name], dim=weight.dim)
            local_of(weight.parameter.detach()).copy_(pruned)

    def _show(self, bar: tqdm[Any]) -> None:
        game = self._game
        last = "none yet"
        if game.trace:
            _, name, n = game.trace[-1]
            last = f"{name.removesuffix('.weight')} {n}:{game.m[name]}"
        kept = ", ".join(f"{metric} {100 * share:.1f} %" for metric, share in game.shares.items())
        bar.set_postfix_str(f"{kept}; loss {self.losses[-1]:.3f}; last domino {last}", refresh=False)


def _known_macs(macs: Mapping[str, int | None], game: Game) -> dict[str, int]:
    unknown = [name for name in game.n if macs[name] is None]
    if unknown and game.needs_macs:
        raise ValueError(f"MACs of {', '.join(unknown)} cannot be counted: skip them, or give macs_weight=0")
    return {name: macs[name] or 0 for name in game.n}


def _can_fuse(tensors: Iterable[Tensor]) -> bool:
    """Whether torch has an optimizer step of one kernel for them."""
    return all(tensor.device.type in ("cpu", "cuda") and not is_dtensor(tensor) for tensor in tensors)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(chain(model.named_parameters(), model.named_buffers()))


@torch.no_grad()
def _assign(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: object) -> None:
    shapes, found = ({name: tensor.shape for name, tensor in table.items()} for table in (tensors, saved))
    wrong = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"checkpoint {path} is of another model: it differs in {', '.join(wrong[:3])}")
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])


@contextlib.contextmanager
def _bar(wanted: bool, done: int) -> Iterator[tqdm[Any] | None]:
    """A progress bar, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        wanted = False
    if not wanted:
        yield None
        return
    with tqdm(disable=None, initial=done, unit="step", desc="DominoSearch", dynamic_ncols=True) as bar:
        yield bar
