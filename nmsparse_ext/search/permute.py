"""``permute_channels``: reorders a model's channels so that its N:M patterns keep more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..deploy.example import ExampleInput, example_call
from ..deploy.table import table
from ..pattern import Pattern
from ..scheme import ResolvedWeight, Scheme, as_scheme
from ..tensor import NMTensor
from .channels import Space, find_spaces, reorder
from .column_order import Scored, best_order, kept

#: By how much outputs may differ afterwards, relative to the largest: sums in another order.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 2e-2}


@dataclass(frozen=True)
class PermutedSpace:
    """One set of channels that was reordered, or would not have gained.

    Attributes:
        weights: Names of the sparse weights that sum over them.
        channels: How many.
        kept_before: Which part of the sum of squares their patterns kept, as the channels were.
        kept: Which part they keep now.
    """

    weights: tuple[str, ...]
    channels: int
    kept_before: float
    kept: float


@dataclass(frozen=True)
class Permutation:
    """What `permute_channels` did.

    Attributes:
        spaces: The sets of channels that could be reordered.
        refused: ``{name: reason}`` of the sparse weights whose input channels must stay where they are.
    """

    spaces: tuple[PermutedSpace, ...]
    refused: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON types."""
        spaces = [{**vars(space), "weights": list(space.weights)} for space in self.spaces]
        return {"spaces": spaces, "refused": dict(self.refused)}

    def __str__(self) -> str:
        body = [
            [", ".join(s.weights), str(s.channels), f"{s.kept_before:.3%}", f"{s.kept:.3%}"]
            for s in self.spaces
        ]
        lines = [table(["weights", "channels", "kept before", "kept"], body, words=(0,))] if body else []
        lines += [f"{name}: stays as it is, {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines) or "no sparse weights"


def permute_channels(
    model: nn.Module,
    scheme: Scheme | Mapping[str, Pattern | str] | Pattern | str,
    example_input: ExampleInput,
    *,
    restarts: int = 4,
    seed: int = 0,
) -> Permutation:
    """Reorders channels inside a dense model, so that its patterns keep more of the sum of squares.

    Which weights share a group is a matter of the order of the input channels, and that order is free inside
    a model: what produces the channels (rows of the layer before, its bias, norms in between) and all that
    consume them are reordered alike. The model computes the same as before, up to the rounding of sums in
    another order, and its layers keep their names and shapes. So reorder first, then prune or train. A
    checkpoint of the model holds the new order; optimizers are to be made after it.

    Only channels that are seen to be free are touched: between layers in a part of the model that
    ``torch.fx`` can trace, and through operations that treat all channels alike. What a residual stream
    carries has one order for all who add to it, so it is reordered only if none of it leaves the traced part.
    All others are refused, with the reason. In the end the model runs once more; if its output is not what it
    was, everything is put back.

    Args:
        model: The model, dense; its parameters are changed in place.
        scheme: The patterns that it will have.
        example_input: A tensor, a tuple of arguments or a mapping of keyword arguments.
        restarts: How many optima are tried beyond the first, for each set of channels. More keep a little
            more, and take as much longer.
        seed: Of the search.

    Returns:
        What was reordered, with the part that is kept before and after; never less after.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``scheme`` does not match the model.
        RuntimeError: If the output was not the same, and the model was put back.
    """
    resolved = as_scheme(scheme, model).resolve(model)
    by_place = {(id(m), attr): weight for weight in resolved.values() for m, attr in weight.places}
    refused = dict.fromkeys(resolved, "it takes in channels that are not seen to be free")
    before = _outputs(model, example_input)
    done: list[tuple[Space, Tensor]] = []
    rows: list[PermutedSpace] = []
    for space in find_spaces(model, example_input):
        sparse = {w.name: w for part in space.consumers if (w := by_place.get((id(part.module), part.attr)))}
        if not sparse:
            continue
        reason = space.pinned or _why_not(space, sparse, by_place)
        if reason is not None:
            refused |= dict.fromkeys(sparse, f"what it takes in {reason}")
            continue
        for name in sparse:
            del refused[name]
        matrices = [_matrix(weight) for weight in sparse.values()]
        whole = sum(float(matrix.scores.sum(dtype=torch.float64)) for matrix in matrices) or 1.0
        order = best_order(matrices, restarts=restarts, seed=seed)
        first, now = (sum(kept(matrix, o) for matrix in matrices) / whole for o in (None, order))
        if now > first:
            reorder(space, order)
            done.append((space, order))
        rows.append(PermutedSpace(tuple(sparse), space.size, first, max(first, now)))
    if done and not _same(before, _outputs(model, example_input)):
        for space, order in reversed(done):
            reorder(space, order.argsort())
        raise RuntimeError("the model's output changed with the order of its channels; it was put back")
    return Permutation(tuple(rows), refused)


def _why_not(space: Space, sparse: Mapping[str, ResolvedWeight], by_place: Mapping[Any, Any]) -> str | None:
    for part in space.consumers:
        weight = by_place.get((id(part.module), part.attr))
        if weight is not None and weight.group_dim != part.dim:
            return "is not what its groups run along"
    if any(space.size % weight.pattern.m for weight in sparse.values()):
        return "has a size that its pattern does not divide"
    packed = any(isinstance(getattr(m, attr), NMTensor) for m, attr, _ in (*space.parts, *space.consumers))
    return "meets a packed weight" if packed else None


def _matrix(weight: ResolvedWeight) -> Scored:
    rows = weight.parameter.detach().movedim(weight.group_dim, -1).flatten(0, -2)
    return Scored(rows.float().square().cpu(), weight.pattern)


def _outputs(model: nn.Module, example_input: ExampleInput) -> list[Tensor]:
    with example_call(model, example_input, None) as call:
        leaves = tree_leaves(call(model))
    return [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    def close(a: Tensor, b: Tensor) -> bool:
        if not a.is_floating_point():
            return True  # such as the index of the largest, which rounding may change
        scale = float(a.abs().max()) if a.numel() else 0.0
        return torch.allclose(a, b, rtol=0.0, atol=_ROUNDING.get(a.dtype, 0.1) * scale, equal_nan=True)

    return len(before) == len(after) and all(map(close, before, after))
