"""``allocate``: a pattern per weight in one shot, optimal for a criterion within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from ..deploy.example import ExampleInput
from ..pattern import Pattern
from ..scheme import Scheme
from .budget import Amount, Budget
from .constraints import Candidate, Candidates, Constraints, find_candidates
from .costs import Cost, Costs, Latency, amount
from .criteria import CRITERIA, Losses, magnitude_losses, output_losses, taylor_losses
from .latency import priced
from .permute import Permutation, permute_channels
from .solve import Option, choose


@dataclass(frozen=True)
class Allocation:
    """What `allocate` returns.

    Attributes:
        scheme: The pattern of every searched weight that is to be sparse; the others stand in
            ``scheme.dense`` with the reason.
        objective: The loss that was minimised: the sum over the weights of what they lose by the criterion.
        bound: No scheme of these candidates within the budget loses less; up to the solver's tolerance of
            1e-6.
        kept: Which part of everything that could be lost is kept, ``1 - objective / total``.
        costs: What the scheme costs.
        dense: What the dense model costs.
        limits: The budget in absolute numbers.
        losses: ``{name: {candidate: loss}}`` of the searched weights.
        seconds: Wall time of the parts: "costs", "criterion", "solver", and "permutation" if there was one.
        permutation: How channels were reordered, ``None`` if that was not asked for.
    """

    scheme: Scheme
    objective: float
    bound: float
    kept: float
    costs: Cost
    dense: Cost
    limits: Mapping[str, float]
    losses: Mapping[str, Mapping[Pattern, float]]
    seconds: Mapping[str, float]
    permutation: Permutation | None = None

    @property
    def gap(self) -> float:
        """How much of `objective` the best scheme could save at most, relative; 0 where it is optimal."""
        return max(0.0, (self.objective - self.bound) / self.objective) if self.objective > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON types."""
        return {
            "scheme": {name: str(pattern) for name, pattern in self.scheme.items()},
            "stays_dense": dict(self.scheme.dense),
            "objective": self.objective,
            "bound": self.bound,
            "gap": self.gap,
            "kept": self.kept,
            "costs": self.costs.as_dict(),
            "dense": self.dense.as_dict(),
            "limits": dict(self.limits),
            "seconds": dict(self.seconds),
            "permutation": None if self.permutation is None else self.permutation.to_json(),
        }

    def __str__(self) -> str:
        costs, dense = self.costs.as_dict(), self.dense.as_dict()
        lines = [str(self.scheme)]
        for metric, cost in costs.items():
            limit = f", budget {amount(metric, self.limits[metric])}" if metric in self.limits else ""
            share = f" ({cost / dense[metric]:.1%})" if dense[metric] else ""
            of = f"{amount(metric, cost)} of {amount(metric, dense[metric])}"
            lines.append(f"{metric:<8} {of}{share}{limit}")
        lines.append(f"kept     {self.kept:.4%} of the criterion; proven within {self.gap:.2e} of the best")
        lines.append("seconds  " + ", ".join(f"{part} {time:.2f}" for part, time in self.seconds.items()))
        return "\n".join(lines)


def allocate(
    model: nn.Module,
    budget: Budget | Mapping[str, Amount],
    *,
    m: int = 16,
    candidates: Iterable[Candidate] | None = None,
    skip: Iterable[str] = (),
    constraints: Constraints | None = None,
    criterion: str = "magnitude",
    relative: bool | None = None,
    step: Callable[[nn.Module], Tensor] | None = None,
    steps: int = 8,
    calibration: Iterable[ExampleInput] | None = None,
    example_input: object = None,
    latency: Latency | None = None,
    permute: bool = False,
    max_gap: float = 1e-6,
    max_seconds: float = 20.0,
) -> Allocation:
    """Chooses a pattern for every weight: least is lost by a criterion, and the budget holds.

    The losses of all candidates come from one sort of each group, and the choice from branch and bound with a
    proof of how close to the optimum it is. No training is involved, and without ``permute`` the model is not
    changed.

    Args:
        model: The model, dense and trained.
        budget: What may be left; several limits hold all at once. See `Budget` and `Costs`.
        m: The group size.
        candidates: What a weight may become; ``None`` for n a power of two up to ``m``, where ``m:m`` is
            dense, or for 2 and 1 of 4, 8 and so on up to ``m`` where ``constraints`` say ``embeds_in_24``.
            Several m may be mixed. Dense is a candidate only if a pattern with ``n == m`` is.
        skip: What stays dense: names, module names, or globs of either.
        constraints: Further constraints per weight.
        criterion: What a pruned weight loses the model. ``"magnitude"``: its square. ``"taylor"``: the square
            of weight times gradient, the mean over ``steps`` calls of ``step``. ``"output"``: the mean square
            error of the layer's output on ``calibration``, from the second moments of its inputs.
        relative: Whether a weight's loss counts as a part of what it has to lose, so that all weights matter
            alike whatever their scale. By default only with "output", as errors of different layers' outputs
            have no unit in common.
        step: ``step(model) -> loss`` on a batch of its own choice, as for `domino_search`; for "taylor".
            It calls no backward.
        steps: How often it is called.
        calibration: Batches to run the model on, for "output": tensors, tuples of arguments or mappings of
            keyword arguments. For layers with more than 2048 inputs (of a convolution: input channels times
            kernel) the moments are taken in blocks of as many.
        example_input: What the model is called with: a tensor, a tuple of arguments or a mapping of keyword
            arguments. A budget of MACs or latency needs it.
        latency: Seconds of a layer with a pattern, ``latency(name, pattern or None)``. By default a budget of
            latency has them measured; see `measure_latency`.
        permute: Whether channels are reordered, as `permute_channels` does or refuses, so that the chosen
            patterns keep more of the sum of squares; the scheme returned is then chosen anew for that order.
            The model is changed in place, and computes what it did. Needs ``example_input``, and a
            ``calibration`` or ``step`` that can be used twice.
        max_gap: Stop when the scheme is proven to lose no more than the best by this part.
        max_seconds: The longest that the solver may take; the scheme is then the best found, and its gap what
            was proven.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is not allowed, a weight is not finite, or the budget cannot be reached.
        RuntimeError: If ``permute`` changed the model's output; the model is then as it was.
        ModuleNotFoundError: If SciPy is missing (``pip install nmsparse_ext[search]``).

    Example:
        >>> result = nms.allocate(model, nms.Budget(params=0.125), skip=["conv1"])
        >>> nms.Sparsifier(model, optimizer, result.scheme)
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    if permute and example_input is None:
        raise ValueError("permute needs example_input: what the model is called with")
    budget = Budget.parse(budget)
    calibration = list(calibration) if calibration is not None else None
    seconds = dict.fromkeys(("costs", "criterion", "solver"), 0.0)
    with _timed(seconds, "costs"):
        found = find_candidates(model, m=m, candidates=candidates, skip=skip, constraints=constraints)
        costs, limits = priced(model, found, budget, example_input, latency)

    def choice_now() -> tuple[dict[str, Losses], _Choice]:
        with _timed(seconds, "criterion"):
            losses = _losses(model, found, criterion, step, steps, calibration)
        with _timed(seconds, "solver"):
            by_part = criterion == "output" if relative is None else relative
            return losses, _choose(found, losses, costs, limits, by_part, max_gap, max_seconds)

    losses, best = choice_now()
    permutation = None
    if permute:
        with _timed(seconds, "permutation"):
            permutation = permute_channels(
                model,
                {name: pattern for name, pattern in best.chosen.items() if not pattern.is_dense},
                cast(ExampleInput, example_input),
            )
        losses, best = choice_now()
    return Allocation(
        scheme=_complete_scheme(found, best.chosen, costs.unpacked),
        objective=best.loss,
        bound=best.bound,
        kept=1 - best.loss / best.total if best.total else 1.0,
        costs=costs.total(best.chosen),
        dense=costs.dense,
        limits=limits,
        losses={name: loss.of for name, loss in losses.items()},
        seconds=seconds,
        permutation=permutation,
    )


class _Choice(NamedTuple):
    chosen: dict[str, Pattern]
    loss: float
    bound: float
    total: float  # of pruning everything altogether


def _choose(
    found: Candidates,
    losses: Mapping[str, Losses],
    costs: Costs,
    limits: Mapping[str, float],
    relative: bool,
    max_gap: float,
    max_seconds: float,
) -> _Choice:
    """The candidates that lose least within the limits."""
    weigh = {name: 1 / loss.total if relative and loss.total else 1.0 for name, loss in losses.items()}
    options = [
        [
            Option(losses[name].of[pattern] * weigh[name], costs.of(name, pattern).as_dict())
            for pattern in patterns
        ]
        for name, patterns in found.items()
    ]
    fixed = costs.total({name: patterns[0] for name, patterns in found.items()}).as_dict()
    for name, patterns in found.items():
        for metric, cost in costs.of(name, patterns[0]).as_dict().items():
            fixed[metric] -= cost
    left = {metric: limit - fixed[metric] for metric, limit in limits.items()}
    choice = choose(options, left, max_gap=max_gap, max_seconds=max_seconds)
    chosen = {name: patterns[j] for (name, patterns), j in zip(found.items(), choice.chosen, strict=True)}
    total = sum(loss.total * weigh[name] for name, loss in losses.items())
    return _Choice(chosen, choice.loss, choice.bound, total)


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Adds the wall time of what it encloses to ``seconds[part]``."""
    begin = time.perf_counter()
    yield
    seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - begin


def _complete_scheme(
    candidates: Candidates, chosen: Mapping[str, Pattern], unpacked: Mapping[str, str]
) -> Scheme:
    """A complete scheme of chosen patterns; the dense ones go with the weights that had no choice."""
    sparse = {name: pattern for name, pattern in chosen.items() if not pattern.is_dense}
    dense = {
        name: f"no pattern makes it faster: {unpacked[name]}"
        if name in unpacked
        else "dense is worth most here"
        for name in candidates
        if name not in sparse
    }
    return Scheme(sparse, dense={**candidates.dense, **dense}, complete=True)


def _losses(
    model: nn.Module,
    candidates: Candidates,
    criterion: str,
    step: Callable[[nn.Module], Tensor] | None,
    steps: int,
    calibration: Iterable[ExampleInput] | None,
) -> dict[str, Losses]:
    if criterion == "magnitude":
        return magnitude_losses(candidates)
    if criterion == "output":
        if calibration is None:
            raise ValueError('criterion "output" needs calibration: batches to run the model on')
        return output_losses(model, candidates, calibration)
    if step is None:
        raise ValueError('criterion "taylor" needs step: a function step(model) -> loss')
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return taylor_losses(model, candidates, step, steps)
