"""DominoSearch (Sun et al. 2021): a mixed N:M scheme for a pretrained model, found while training it on."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..pattern import Pattern
from ..scheme import Scheme, as_scheme
from .budget import Amount, Budget
from .constraints import Candidate, Constraints, find_candidates, powers_of_two
from .costs import Latency
from .domino_game import Game, Rules
from .domino_loop import Search, Training
from .erk import Erk
from .latency import priced

#: The steps at which the authors' code doubles the pull, where a search has not ended by then.
DOUBLINGS = (30_000, 40_000, 50_000, 60_000, 70_000, 80_000)


@dataclass(frozen=True)
class DominoResult:
    """What `domino_search` has found.

    Attributes:
        scheme: The scheme. Weights that the search leaves dense are in `Scheme.dense`.
        reached: Whether it meets the budget. If not, ``max_steps`` were over before, and the scheme is what
            there was by then.
        steps: How many steps the search took.
        trace: The dominoes: ``(step, parameter name, n)`` of every candidate that a weight came to.
        moves: The same of every level, candidate or not.
        shares: What the scheme leaves of the dense model: ``{metric: fraction}``.
        erk: The ERK distribution that it steered to.
        losses: The mean loss between each check and the next.
    """

    scheme: Scheme
    reached: bool
    steps: int
    trace: list[tuple[int, str, int]]
    moves: list[tuple[int, str, int]]
    shares: dict[str, float]
    erk: Erk
    losses: list[float] = field(repr=False)


def domino_search(
    model: nn.Module,
    step: Callable[[nn.Module], Tensor],
    *,
    budget: Budget | Mapping[str, Amount] | Iterable[str],
    m: int = 16,
    candidates: Iterable[Candidate] | None = None,
    skip: Iterable[str] = (),
    constraints: Constraints | None = None,
    start: Mapping[str, Pattern | str] | None = None,
    example_input: object = None,
    latency: Latency | None = None,
    lr: float = 0.01,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    pull: float = 0.1,
    pull_every: int = 5,
    doublings: Sequence[int] = DOUBLINGS,
    check_every: int = 100,
    vote: float = 0.75,
    erk_weight: float = 0.5,
    macs_weight: float = 0.5,
    tolerance: float = 0.001,
    negative_factors: bool = True,
    max_steps: int = 100_000,
    restore: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    progress: bool = True,
    process_group: Any = None,
) -> DominoResult:
    """Finds a pattern for each weight of a pretrained model, as DominoSearch does.

    The model is trained on with plain SGD. Every weight starts dense, at level n = m, and is masked to the n
    largest ``|w|`` of each group. Every few steps the kept weights are pulled towards zero, and every
    ``check_every`` steps a weight goes down to n - 1 if most of its groups have fewer than n weights above a
    threshold of their own: the mean of the ``m / 2`` smallest at the start. When a level is a candidate, a
    domino falls: costs and the strength of the pulls are reckoned anew, and if the budget is met, that is
    the scheme. What is pulled hardest is what has many MACs left, and what is furthest from the sparsity
    that ERK would give it at the same size.

    The scheme is the result; the weights are not. As published, fine-tuning starts from the dense weights,
    ``Sparsifier(model, optimizer, result.scheme, lambda_w=5e-4)``, so those are put back in the end.

    All constants have the authors' values by default, and the order of events is that of their code. In a
    step: forward, backward, check (in the first step and every ``check_every`` thereafter), optimizer. A
    new level masks what the next step computes with; so it is with new factors. Two things differ: numbers
    are summed in a stated order, so that every machine finds the same; and groups never cross filters, so a
    weight whose group dim is no multiple of ``m`` (the first convolution of an image model) stays dense.

    Args:
        model: The pretrained model, wrapped (``DistributedDataParallel``, ``torch.compile``) or not, in the
            mode (``train()``) that it is to be trained in. Any layers that the registry knows; what cannot
            be searched stays dense, with the reason in ``scheme.dense``.
        step: ``step(model) -> loss``: takes the next batch, runs the model on it, and returns the scalar loss
            with its graph. It calls neither ``backward`` nor an optimizer. May use autocast with bfloat16. If
            it has ``state_dict`` and ``load_state_dict``, such as to know which batch comes next, a
            checkpoint keeps its state.
        budget: What is to be left of the model, such as ``Budget(params=0.125)``; of several limits all
            hold in the end. A limit on MACs or latency needs ``example_input``.
        m: The group size.
        candidates: What a weight may become: patterns, or n of ``m``; ``None`` for powers of two, and dense.
            All candidates of a weight must have the same m.
        skip: What stays dense: names, or globs of names, as in `Scheme.uniform`.
        constraints: Further constraints, weight by weight.
        start: Where weights start instead of dense, such as the scheme of `allocate` for a looser budget,
            which this search then makes sparser. Thresholds are those of the dense weights all the same.
        example_input: What the model is called with to count MACs. Without it they are counted in the first
            step, which is enough to compare the weights.
        latency: What layers cost in time. By default a budget of latency has them measured; see
            `measure_latency`.
        lr: The learning rate.
        momentum: SGD's momentum.
        weight_decay: SGD's weight decay.
        pull: The strength of the pull: where it acts, ``pull * factor * w`` is added to the gradient.
        pull_every: It acts in the first step and every ``pull_every`` thereafter.
        doublings: The steps, from 1, with which the pull becomes twice as strong.
        check_every: Steps from one check to the next.
        vote: The part of its groups that must agree for a weight to go down a level.
        erk_weight: How much ERK counts in the factors.
        macs_weight: How much MACs count.
        tolerance: By how much of the dense model's cost the result may exceed the budget.
        negative_factors: Whether a weight that is already sparser than ERK would have it may be pushed away
            from zero, as in the authors' code. If not, it is left alone: its factor is 0.
        max_steps: After so many steps the search ends, with a warning if the budget is not met.
        restore: Whether the model gets its dense weights (and all its buffers) back. If not, it is left with
            the trained weights, masked by the scheme.
        checkpoint: A file to write to every ``checkpoint_every`` steps. If it exists, the search goes on from
            there, to the same result bit for bit; with distributed ranks all must see it.
        checkpoint_every: Steps from one checkpoint to the next.
        progress: Whether to show a progress bar, on a terminal and if tqdm is installed.
        process_group: The ranks that search together: ``None`` for all, ``False`` for this one alone.

    Returns:
        The scheme, and how it came about.

    Raises:
        TypeError: If an argument is of the wrong type, or ``step`` returns no loss.
        ValueError: If an argument is out of range, the budget cannot be met by any candidates, or the
            checkpoint is of another search.
        RuntimeError: If ranks do not train the same model.

    Example:
        >>> def step(model):
        ...     images, labels = next(batches)
        ...     return F.cross_entropy(model(images), labels)
        >>> result = nms.domino_search(model, step, budget=nms.Budget(params=0.125))
        >>> result.scheme.save("scheme.json")
    """
    budget = Budget.parse(budget)
    _check_numbers(
        positive={"lr": lr},
        not_negative={
            "momentum": momentum,
            "weight_decay": weight_decay,
            "pull": pull,
            "erk_weight": erk_weight,
            "macs_weight": macs_weight,
            "tolerance": tolerance,
        },
        fractions={"vote": vote},
        counts={
            "pull_every": pull_every,
            "check_every": check_every,
            "max_steps": max_steps,
            "checkpoint_every": checkpoint_every,
            **{f"doublings[{i}]": at for i, at in enumerate(doublings)},
        },
    )
    if not callable(step):
        raise TypeError(f"step must be a function of the model that returns the loss, got {step!r}")
    if candidates is None:
        candidates = powers_of_two(m)  # of one m, whatever the constraints
    found = find_candidates(model, m=m, candidates=candidates, skip=skip, constraints=constraints)
    frozen = {
        name: "requires_grad is False" for name, w in found.weights.items() if not w.parameter.requires_grad
    }
    found = found.without(frozen)
    costs, limits = priced(model, found, budget, example_input, latency)
    rules = Rules(vote, erk_weight, macs_weight, tolerance, negative_factors)
    game = Game(found, costs, limits, rules, _levels(start, model))
    training = Training(lr, momentum, weight_decay, pull, pull_every, tuple(doublings), check_every)
    search = Search(model, step, game, training, costs, process_group)
    reached = search.run(
        limits=limits,
        max_steps=max_steps,
        restore=restore,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        progress=progress,
    )
    if not reached:
        shares = ", ".join(f"{100 * game.shares[metric]:.1f} % of {metric}" for metric in limits)
        warnings.warn(
            f"{budget} is not reached after {search.steps} steps: the scheme leaves {shares}; "
            f"raise max_steps or pull",
            RuntimeWarning,
            stacklevel=2,
        )
    left = "dense in the scheme that DominoSearch has found"
    return DominoResult(
        scheme=Scheme(
            {name: pattern for name, pattern in game.patterns.items() if not pattern.is_dense},
            dense={**{n: left for n, p in game.patterns.items() if p.is_dense}, **found.dense},
            complete=True,
        ),
        reached=reached,
        steps=search.steps,
        trace=list(game.trace),
        moves=list(game.moves),
        shares=game.shares,
        erk=game.erk,
        losses=search.losses,
    )


def _levels(start: Mapping[str, Pattern | str] | None, model: nn.Module) -> dict[str, Pattern]:
    """A scheme to start from by the names of the model's weights; dense ones need not be named."""
    if start is None:
        return {}
    return {name: weight.pattern for name, weight in as_scheme(start, model).resolve(model).items()}


def _check_numbers(
    positive: Mapping[str, Any],
    not_negative: Mapping[str, Any],
    fractions: Mapping[str, Any],
    counts: Mapping[str, Any],
) -> None:
    """Refuses arguments that are no numbers, or out of range."""
    for name, value in {**positive, **not_negative, **fractions}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if name in not_negative:
            allowed, wanted = value >= 0 and math.isfinite(value), "at least 0 and finite"
        elif name in positive:
            allowed, wanted = value > 0 and math.isfinite(value), "more than 0 and finite"
        else:
            allowed, wanted = 0 < value <= 1, "more than 0 and at most 1"
        if not allowed:
            raise ValueError(f"{name} must be {wanted}, got {value}")
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
