"""``prune_model``: a trained model pruned in one shot, layer by layer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .._arguments import check_choice
from ..deploy.example import ExampleInput
from ..pattern import Pattern
from ..scheme import Scheme, as_scheme
from ..search.permute import Permutation, permute_channels
from ..weights import Weight
from ..weights import weights as list_weights
from .batch_norm import batch_norms, recalibrate_norms
from .calibration import Calibrated, Calibration, Passes, plan
from .checks import check_numbers, check_weights
from .criteria import CRITERIA, NEED_CALIBRATION, block_of, kept_part, output_error, pruned_values
from .report import PrunedWeight, PruneReport
from .snapshot import as_before_on_error

Criterion = Literal["magnitude", "wanda", "sparsegpt"]
Sequential = Literal["block", "layer"]

#: ``progress(name, number, total)``: before each weight.
Progress = Callable[[str, int, int], None]


class _Job(NamedTuple):
    """What is asked for."""

    model: nn.Module
    weights: dict[str, tuple[Weight, Pattern]]
    criterion: str
    sequential: str | None
    dampening: float
    memory: int
    progress: Progress


def prune_model(
    model: nn.Module,
    scheme: Scheme | Mapping[str, Pattern | str] | Pattern | str,
    *,
    criterion: Criterion = "magnitude",
    calibration: Iterable[ExampleInput] | None = None,
    permute: bool = False,
    recalibrate: bool = True,
    sequential: Sequential | None = "block",
    uncalibrated: Literal["skip", "magnitude", "error"] = "skip",
    remainder: Literal["error", "pad"] = "error",
    dampening: float = 0.01,
    memory: int = 1 << 30,
    progress: Progress | None = None,
) -> PruneReport:
    """Prunes a trained model in one shot, in place: every weight of a scheme gets its N:M pattern.

    No training is involved. Three criteria say which weights of a group stay:

    - ``"magnitude"``: the largest ``|w|``. Needs no data. The same bits as `nm_prune`.
    - ``"wanda"``: the largest ``|w| * |x|``, with the norm of the inputs that a weight is multiplied with
      (Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models"). The weights that
      stay keep their bits. Inputs that are nearly never there count a millionth of the mean.
    - ``"sparsegpt"``: those whose loss changes the layer's outputs least, and the weights that stay are
      changed to make up for the others (Frantar & Alistarh 2023, "SparseGPT").

    With calibration data the model is pruned in the order of execution, and each block is calibrated with
    what reaches it from the pruned ones before. Held in memory at a time are a copy of the weights that are
    pruned (on the CPU, to go back to), and second moments of ``memory`` bytes, or of one weight where those
    are more: inputs squared times 4 bytes for SparseGPT, which takes twice as much again to factorise them.
    For the other criteria moments are taken in blocks of 2048 inputs, and tell the error in the report.

    Pruning a layer shifts what batch norms after it see, so their statistics are taken anew.

    The model runs in eval mode without gradients. Its training flags, ``requires_grad``, dtypes and devices,
    and the names of its parameters stay. If anything goes wrong, an interruption from the keyboard included,
    it is as it was before. Of several processes that train one model, prune in one and send the weights to
    the others: what reaches them differs in the last bits.

    Args:
        model: The model, trained; wrapped or not, in any dtype. Moments of 16-bit layers are float32.
        scheme: A `Scheme`, a mapping ``{name: pattern}``, or a pattern for everything that can be pruned.
        criterion: Which weights stay.
        calibration: Batches that the model is called with: tensors, tuples of arguments, or mappings of
            keyword arguments. A list or a ``DataLoader`` is gone through several times; an iterator is read
            once and kept. Wanda and SparseGPT need it; with magnitude it is for batch norms, channels and the
            error in the report.
        permute: Reorder channels before, so that the patterns keep more; see `permute_channels`. Needs
            calibration.
        recalibrate: Take the statistics of batch norms anew, where there are any, with the calibration data
            that is given.
        sequential: What is calibrated with all before it pruned. ``"block"``: each element of a module list
            (such as the blocks of a transformer), or of an ``nn.Sequential`` outside of such lists, and
            layers that are in neither; ``"layer"``: every single layer. With ``None`` all are calibrated with
            the dense model. Each step runs the model up to there, so ``"layer"`` takes longest.
        uncalibrated: What to do with weights whose inputs the calibration does not show: of layers that are
            never called, LSTMs, embeddings. ``"skip"`` leaves them dense and warns, ``"magnitude"`` prunes
            them by that, ``"error"`` refuses.
        remainder: ``"pad"`` allows a short last group where a group dim is no multiple of ``m``.
        dampening: For SparseGPT: what is added to the diagonal of the second moments, as a part of its mean.
        memory: Bytes of second moments that are held at a time.
        progress: Called before each weight with its name, its number from 1, and how many there are.

    Returns:
        A row for every weight of the model: pattern, criterion, relative output error, kept part, seconds, or
        why it stays dense; and the scheme that the model has now.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is not allowed, the scheme does not fit the model, a weight or its inputs
            are not finite, or a weight is packed, sharded or without storage.

    Equivalent to, for ``"magnitude"`` and a linear layer: ``nms.nm_prune_(layer.weight, pattern)``.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> batches = [torch.randn(64, 16) for _ in range(4)]
        >>> report = prune_model(model, "2:4", criterion="sparsegpt", calibration=batches)
        >>> report.pruned
        ('0.weight', '2.weight')
    """
    begin = time.perf_counter()
    check_choice("criterion", criterion, CRITERIA)
    check_choice("uncalibrated", uncalibrated, ("skip", "magnitude", "error"))
    if sequential not in ("block", "layer", None):
        raise ValueError(f"sequential must be 'block', 'layer' or None, got {sequential!r}")
    check_numbers(dampening, memory)
    for what, asked in ((f"criterion {criterion!r}", criterion in NEED_CALIBRATION), ("permute", permute)):
        if asked and calibration is None:
            raise ValueError(f"{what} needs calibration: batches to run the model on")
    chosen = as_scheme(scheme, model, remainder)
    resolved = chosen.resolve(model, remainder=remainder)
    listed = {weight.name: weight for weight in list_weights(model)}
    job = _Job(
        model,
        {name: (listed[name], weight.pattern) for name, weight in resolved.items()},
        criterion,
        None if criterion == "magnitude" else sequential,
        dampening,
        memory,
        progress or (lambda name, number, total: None),
    )
    check_weights({name: weight for name, (weight, _) in job.weights.items()}, criterion)
    passes = None if calibration is None else Passes(model, Calibration(calibration))
    norms = batch_norms(model) if recalibrate and passes is not None and job.weights else {}

    written: list[Tensor] = [weight.parameter for weight, _ in job.weights.values()]
    written += [buffer for norm in norms.values() for buffer in norm.buffers(recurse=False)]
    if permute:  # which also moves biases and norms
        written = [*model.parameters(), *model.buffers()]
    permutation = None
    recalibrated: list[str] = []
    unseen: dict[str, str] = {}
    with torch.no_grad(), as_before_on_error(written):
        if permute and passes is not None:
            permutation = _permute(job, passes.calibration)
        if passes is None:
            rows = _by_magnitude(job, job.weights, 0)
        else:
            rows, unseen = _calibrated(job, passes, norms)
            if unseen and uncalibrated == "error":
                raise ValueError("\n  ".join(["some weights cannot be calibrated:", *_lines(unseen)]))
            if unseen and (uncalibrated == "magnitude" or criterion == "magnitude"):
                rows |= _by_magnitude(job, unseen, len(rows))
                unseen = {}
            if norms:
                recalibrated = recalibrate_norms(model, norms, passes.calibration)
    if unseen:
        warnings.warn("\n  ".join(["these weights stay dense:", *_lines(unseen)]), stacklevel=2)
    reasons = {**chosen.dense, **unseen}
    return _report(listed, job, rows, reasons, permutation, recalibrated, time.perf_counter() - begin)


def _permute(job: _Job, calibration: Calibration) -> Permutation:
    fitting = {name: p for name, (weight, p) in job.weights.items() if weight.misfit(p) is None}
    return permute_channels(job.model, Scheme(fitting), next(iter(calibration)))


def _by_magnitude(job: _Job, names: Iterable[str], done: int) -> dict[str, PrunedWeight]:
    rows = {}
    for number, name in enumerate(names, start=done + 1):
        weight, pattern = job.weights[name]
        job.progress(name, number, len(job.weights))
        begin = time.perf_counter()
        before = weight.parameter.detach()
        after = pruned_values(weight, pattern, "magnitude", None, job.dampening)
        kept = kept_part(before, after)
        before.copy_(after)
        rows[name] = _row(name, pattern, "magnitude", None, kept, time.perf_counter() - begin)
    return rows


def _calibrated(
    job: _Job, passes: Passes, norms: dict[str, nn.modules.batchnorm._BatchNorm]
) -> tuple[dict[str, PrunedWeight], dict[str, str]]:
    """Prunes what has calibration; returns the rows, and why other weights have none."""
    found = passes.find(
        {name: (weight, block_of(job.criterion)) for name, (weight, _) in job.weights.items()}
    )
    rows: dict[str, PrunedWeight] = {}
    later: list[tuple[Tensor, Tensor]] = []
    groups = plan(job.model, found.values(), job.sequential, job.memory)
    for number, group in enumerate(groups, start=1):
        passes.gather(group)
        for item in group:
            if item.why_not is not None:
                continue
            name = item.weight.name
            job.progress(name, len(rows) + 1, len(job.weights))
            rows[name], values = _prune(job, item)
            item.moments = None
            parameter = item.weight.parameter.detach()
            if job.sequential is None:
                later.append((parameter, values))  # the next pass is to see the dense model still
            else:
                parameter.copy_(values)
        if norms and job.sequential is not None and number < len(groups):
            recalibrate_norms(job.model, norms, passes.calibration)
    for parameter, values in later:
        parameter.copy_(values)
    return rows, {name: item.why_not for name, item in found.items() if item.why_not is not None}


def _prune(job: _Job, item: Calibrated) -> tuple[PrunedWeight, Tensor]:
    weight, moments = item.weight, item.moments
    assert moments is not None
    pattern = job.weights[weight.name][1]
    if not all(bool(torch.isfinite(block).all()) for block in moments.blocks):
        raise ValueError(f"the inputs of {weight.name} are NaN or infinite on the calibration data")
    begin = time.perf_counter()
    try:
        values = pruned_values(weight, pattern, job.criterion, moments, job.dampening)
    except ValueError as problem:
        raise ValueError(f"{weight.name}: {problem}") from None
    seconds = time.perf_counter() - begin
    before = weight.parameter.detach()
    error = output_error(weight, before, values, moments)
    return _row(weight.name, pattern, job.criterion, error, kept_part(before, values), seconds), values


def _row(
    name: str, pattern: Pattern, criterion: str, error: float | None, kept: float, seconds: float
) -> PrunedWeight:
    return PrunedWeight(name, str(pattern), criterion, error, kept, seconds, None)


def _report(
    listed: Mapping[str, Weight],
    job: _Job,
    rows: Mapping[str, PrunedWeight],
    reasons: Mapping[str, str],
    permutation: Permutation | None,
    recalibrated: list[str],
    seconds: float,
) -> PruneReport:
    all_rows = []
    dense = {}
    for name, weight in listed.items():
        row = rows.get(name)
        if row is None:
            because = (reasons[alias] for alias in _aliases(weight) if alias in reasons)
            why = next(because, weight.dense_because or "not in the scheme")
            dense[name] = why
            row = PrunedWeight(name, None, None, None, 1.0, 0.0, why)
        all_rows.append(row)
    scheme = Scheme({name: job.weights[name][1] for name in rows}, dense=dense, complete=True)
    return PruneReport(tuple(all_rows), scheme, permutation, tuple(recalibrated), seconds)


def _aliases(weight: Weight) -> list[str]:
    return [alias for name in weight.names for alias in (name, name.removesuffix(".weight"))]


def _lines(reasons: Mapping[str, str]) -> list[str]:
    return [why if name in why else f"{name}: {why}" for name, why in reasons.items()]
