"""``torch.ao.pruning``-style sparsifiers: ``prepare``, ``step``, ``squash_mask``.

From ``prepare`` to ``squash_mask`` a weight is a parametrization, mask times dense weight, as in the
original: names of the state dict change (``parametrizations.weight.original``), and no gradient reaches
pruned weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import ops
from ..pattern import Pattern
from ..prune.criteria import score_by_inputs
from ..scheme import Scheme
from ..search.inputs import find_sources
from ..search.matrices import matrices_of
from ..search.moments import Moments, hooks_for
from ..weights import Weight, prunable_weights
from ..weights import weights as list_weights


class _Mask(nn.Module):
    """``where(mask, weight, 0)``."""

    mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


class _Sparsifier:
    """What both share.

    Args:
        pattern: n **kept** of every m.
    """

    def __init__(self, pattern: Pattern | str) -> None:
        self.pattern = Pattern.parse(pattern)
        self._weights: dict[str, Weight] = {}

    def prepare(self, model: nn.Module, config: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Adds masks, which keep everything at first.

        Args:
            model: The model, changed in place.
            config: ``[{"tensor_fqn": "0.weight"}, ...]``; ``None`` for the weights of all linear layers.

        Raises:
            RuntimeError: If it has been called before.
            ValueError: If the model has no such weights, or one cannot have the pattern.
        """
        if self._weights:
            raise RuntimeError("prepare has been called: call squash_mask before")
        listed = {weight.name: weight for weight in list_weights(model)}
        if config is None:
            names = [w.name for w in prunable_weights(model) if isinstance(w.module, nn.Linear)]
        else:
            names = [entry["tensor_fqn"] for entry in config]
        resolved = Scheme(dict.fromkeys(names, self.pattern)).resolve(model)
        self._weights = {name: listed[name] for name in resolved}
        self._watch(model)
        for weight in self._weights.values():
            mask = _Mask(weight.parameter)
            for module, attr in weight.places:
                parametrize.register_parametrization(module, attr, mask)

    def step(self) -> None:
        """Chooses the masks anew, by the dense weights as they are.

        Raises:
            RuntimeError: If `prepare` has not been called.
        """
        if not self._weights:
            raise RuntimeError("step needs masks: call prepare before")
        for weight in self._weights.values():
            found: Any = weight.module.parametrizations[weight.attr]  # type: ignore[index]
            scores = self._scores(weight, found.original.detach())
            assert weight.group_dim is not None
            found[0].mask.copy_(ops.nm_mask(scores, self.pattern, dim=weight.group_dim))

    def squash_mask(self) -> None:
        """Writes the masks into the weights, and removes them; the model is a plain one again."""
        for weight in self._weights.values():
            for module, attr in weight.places:
                parametrize.remove_parametrizations(module, attr, leave_parametrized=True)
        self._weights = {}

    def _watch(self, model: nn.Module) -> None:
        """Looks at inputs, if need be."""

    def _scores(self, weight: Weight, values: Tensor) -> Tensor:
        return values


class WeightNormSparsifier(_Sparsifier):
    """``torch.ao.pruning.WeightNormSparsifier``, as far as it makes an N:M pattern.

    Note:
        The original counts what is **pruned**: ``zeros_per_block`` of every block. ``sparse_block_shape=(1,
        4), zeros_per_block=1`` is the pattern 3:4 here, n **kept** of every m.

    Differs from the original: convolutions and attention are fine too, groups run along their input channels;
    of equal weights the first is kept. Blocks of more than one row, and fewer than all blocks, are no N:M
    pattern, and refused.

    Args:
        sparsity_level: Must be 1.0: every block is pruned. (The original's default is 0.5.)
        sparse_block_shape: ``(1, m)``.
        zeros_per_block: How many of every block are pruned.

    Raises:
        ValueError: If that is no N:M pattern.
    """

    def __init__(
        self,
        sparsity_level: float = 1.0,
        sparse_block_shape: tuple[int, int] = (1, 4),
        zeros_per_block: int = 2,
    ) -> None:
        rows, m = sparse_block_shape
        if sparsity_level != 1.0:
            raise ValueError(
                f"sparsity_level must be 1.0, for a pattern in every block, got {sparsity_level}"
            )
        if rows != 1:
            raise ValueError(f"sparse_block_shape must be (1, m), got {sparse_block_shape}")
        if not 1 <= zeros_per_block < m:
            raise ValueError(
                f"zeros_per_block must be between 1 and {m - 1}, the weights of every {m} that are pruned, "
                f"got {zeros_per_block}"
            )
        super().__init__(Pattern(m - zeros_per_block, m))


class WandaSparsifier(_Sparsifier):
    """``torchao.sparsity.WandaSparsifier``: the model is run on data between ``prepare`` and ``step``.

    Differs from the original: any pattern, convolutions and attention too; models with embeddings do not
    crash, their linear layers are pruned. Unstructured pruning, its default, is refused.

    Equivalent to ``nms.prune_model(model, pattern, criterion="wanda", calibration=..., sequential=None)``.

    Args:
        sparsity_level: What the original takes for unstructured pruning; only 0.5 goes with a block size.
        semi_structured_block_size: m: of every m weights ``m // 2`` are **pruned**.
        pattern: In place of a block size: n **kept** of every m.

    Raises:
        ValueError: If that is no N:M pattern.
    """

    def __init__(
        self,
        sparsity_level: float = 0.5,
        semi_structured_block_size: int | None = None,
        *,
        pattern: Pattern | str | None = None,
    ) -> None:
        if (semi_structured_block_size is None) == (pattern is None):
            raise ValueError(
                "give semi_structured_block_size or pattern, one of them: unstructured pruning is not here"
            )
        if sparsity_level != 0.5:
            raise ValueError(f"sparsity_level must be 0.5, as the pattern says it all, got {sparsity_level}")
        m = semi_structured_block_size
        super().__init__(Pattern(m - m // 2, m) if m is not None else Pattern.parse(pattern))  # type: ignore[arg-type]
        self._moments: dict[str, Moments] = {}
        self._hooks: list[Any] = []

    def _watch(self, model: nn.Module) -> None:
        self._moments = {name: Moments(matrices_of(weight)) for name, weight in self._weights.items()}
        sources = {name: find_sources(model, weight) for name, weight in self._weights.items()}
        self._hooks = [
            module.register_forward_pre_hook(torch.no_grad()(hook), with_kwargs=True)
            for module, hook in hooks_for(sources, self._moments).items()
        ]

    def _scores(self, weight: Weight, values: Tensor) -> Tensor:
        moments = self._moments[weight.name]
        if not moments.count:
            raise RuntimeError(f"nothing has reached {weight.name}: run the model on data before step")
        return score_by_inputs(weight, values, moments)

    def squash_mask(self) -> None:
        """Writes the masks into the weights, and removes them and what watched the inputs."""
        super().squash_mask()
        for hook in self._hooks:
            hook.remove()
        self._moments, self._hooks = {}, []
