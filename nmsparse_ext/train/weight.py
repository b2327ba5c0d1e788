"""``SparseWeight``: one sparse parameter, the dense weight behind it, and the exchange of the two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import foreach, ops
from .dtensor import (
    assign,
    check_placement,
    is_dtensor,
    local_of,
    same_placement,
    shard_groups,
    wrap_bits,
    wrap_like,
)
from .transposable import PATTERN, any_in_group, holds, spread_over_tiles, tile_dim, transposable_bits

if TYPE_CHECKING:
    from ..pattern import Pattern
    from ..scheme import ResolvedWeight
    from .rules import Rule, Step

# What a weight keeps in `optimizer.state[parameter]`, next to the optimizer's own entries.
DENSE_KEY = "nm_dense"
BITS_KEY = "nm_bits"


def dense_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the dense weight behind a parameter: 16-bit ones would swallow small updates."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class SparseWeight:
    """A sparse parameter and the dense weight behind it.

    Between optimizer steps the parameter holds ``where(mask, dense, 0)``, rounded to its dtype, unless a rule
    or a schedule lets pruned weights fade out. During a step the optimizer is given another parameter instead
    (`master`), which is the dense weight; afterwards the new sparse weight is written to the parameter's own
    storage. That storage never moves, which is what CUDA graphs, FSDP's all-gather and compiled graphs count
    on; and while it lies idle during a step, it holds the gradient that the optimizer sees.

    What rules may read (tensors are this rank's part of a sharded weight):

    Attributes:
        name: Canonical parameter name.
        parameter: The parameter.
        dim: Its group dim.
        pattern: The pattern that the next mask is chosen with.
        final_pattern: The pattern of the scheme, where a schedule ends.
        mask_pattern: The pattern that the current mask was chosen with; ``None`` before the first.
        renews: Whether the schedule has the next mask chosen anew; a mask of another pattern always is.
        share: Of every pruned weight, the part that still takes part in the forward pass.
        dense: The dense weight: the parameter's shape and layout; float32 behind a 16-bit parameter.
        bits: The packed mask, 1 = kept: uint8 [other dims..., ceil(K / 8)].
        master: What the optimizer updates: a parameter that is the dense weight.
        tile_dim: For transposable masks: the dim that spans the tiles together with the group dim.
    """

    dense: Tensor
    bits: Tensor
    master: nn.Parameter

    def __init__(self, resolved: ResolvedWeight, span: int, transposable: bool = False) -> None:
        self.name = resolved.name
        self.parameter = resolved.parameter
        self.dim = resolved.group_dim
        self.pattern = self.final_pattern = resolved.pattern
        self.mask_pattern: Pattern | None = None
        self.renews = True
        self.share = 0.0
        self._span = span  # groups must not cross multiples of this
        self._sharded = is_dtensor(self.parameter)
        check_placement(self.name, self.parameter, self.dim)
        self.tile_dim = tile_dim(resolved) if transposable else None

        local = self._local.detach()
        self._dense = wrap_like(local.to(dense_dtype_of(local.dtype), copy=True), self.parameter)
        self._bits = wrap_bits(_new_bits(local, self.dim), self.parameter, self.dim)
        self._spare_bits: Tensor | None = None
        self._wide_grad: Tensor | None = None
        self._rebind()

    # ---------------------------------------------------------------------------------- what rules may use

    @property
    def mask(self) -> Tensor:
        """The mask, True = kept: bool, the weight's shape. Unpacked anew at every access."""
        return ops.unpack_bits(self.bits, self.dense.shape[self.dim], dim=self.dim)

    def new_mask(self, out: Tensor, bits: Tensor) -> None:
        """Chooses the mask anew from the dense weight: the largest ``|w|`` of each group."""
        if self.in_tiles:
            assert self.tile_dim is not None
            bits.copy_(transposable_bits(self.dense, self.dim, self.tile_dim))
        elif out.dtype == self.dense.dtype:
            ops.prune_into(self.dense, self.pattern, dim=self.dim, out=out, bits=bits)
            return
        else:
            bits.copy_(ops.mask_bits(self.dense, self.pattern, dim=self.dim))
        foreach.apply_bits([self.dense], [bits], dims=[self.dim], outs=[out])

    def keep_mask(self, out: Tensor, bits: Tensor) -> None:
        """Masks the dense weight with the mask that it has."""
        bits.copy_(self.bits)
        foreach.apply_bits([self.dense], [bits], dims=[self.dim], outs=[out])

    @property
    def in_tiles(self) -> bool:
        """Whether the next mask is a transposable one."""
        return self.tile_dim is not None and self.pattern == PATTERN

    # ---------------------------------------------------------------------------------- one optimizer step

    def check_grad(self) -> None:
        """Refuses a gradient that the exchange cannot serve.

        Raises:
            RuntimeError: Naming the weight, for a gradient of sparse layout or sharded unlike its parameter.
        """
        grad = self.parameter.grad
        if grad is None:
            return
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"{self.name} has a gradient of layout {grad.layout}; N:M training needs strided ones "
                f"(for an embedding: sparse=False)"
            )
        if self._sharded and not same_placement(grad, self.parameter):
            raise RuntimeError(f"the gradient of {self.name} is sharded unlike the parameter itself")

    def check_pattern(self, pattern: Pattern, step: int) -> None:
        """Refuses a scheduled pattern whose groups the weight cannot be divided into.

        Raises:
            ValueError: Naming weight, step and pattern.
        """
        if self._span % pattern.m:
            raise ValueError(
                f"the schedule gives {self.name} the pattern {pattern} at step {step}, but it has "
                f"{self._span} weights along dim {self.dim}, which are no multiple of {pattern.m}"
            )

    @property
    def widens(self) -> bool:
        """Whether the dense weight has another dtype than the parameter."""
        return self.dense.dtype != self.sparse.dtype

    def lend_grad(self) -> Tensor:
        """Gives the master a gradient of its own, and returns it, to be filled in.

        It lies in the parameter's idle storage, so it costs no memory, except behind a 16-bit parameter: that
        has no room for a float32 gradient.
        """
        if not self.widens:
            self.master.grad = self._scratch
            return self.sparse
        if self._wide_grad is None:
            self._wide_grad = torch.empty_like(self.dense)
        self.master.grad = wrap_like(self._wide_grad, self.parameter)
        return self._wide_grad

    def cancel(self, rule: Rule, step: Step) -> None:
        """Ends a step that went wrong: the dense weight stays as it is by now, the mask as it was."""
        self.master.grad = None
        self.write_back(rule, step)

    def choose(self, rule: Rule, step: Step, changes: Tensor | None = None) -> None:
        """Chooses the next mask, and writes the new sparse weight to the parameter's own storage.

        ``changes`` (one int64) receives the number of weights that are kept in one of old and new mask only.
        """
        if self._spare_bits is None:
            self._spare_bits = torch.empty_like(self.bits)
        if self.is_due(rule):
            rule.choose(self, self.sparse, self._spare_bits, step)
        else:
            self.keep_mask(self.sparse, self._spare_bits)
        if changes is not None:
            ops.sad_into(self.bits, self._spare_bits, changes)
        # A copy, not an exchange of pointers: a CUDA graph would go on to read the old mask for ever.
        self.bits.copy_(self._spare_bits)
        self.mask_pattern = self.pattern
        self.soften(self.sparse, rule, step)
        self.mark()

    def release(self) -> None:
        """Frees working memory that may not be needed again."""
        self._spare_bits = None

    def is_due(self, rule: Rule) -> bool:
        """Whether the next mask is chosen anew."""
        return self.pattern != self.mask_pattern or (self.renews and rule.renews)

    def soften(self, out: Tensor, rule: Rule, step: Step) -> None:
        """Adds to the masked weight what pruned weights contribute all the same."""
        if self.share:
            ops.add_pruned_(out, self.dense, self.bits, dim=self.dim, alpha=self.share)
        rule.soften(self, out, step)

    # --------------------------------------------------------------------------------- writes from outside

    def mark(self) -> None:
        """Remembers the parameter as it is now; `touched` compares with that."""
        self._stamp = self._current_stamp()

    def touched(self) -> bool:
        """Whether somebody may have written to the parameter, or moved it, since `mark`; reads no data."""
        return self._stamp != self._current_stamp()

    def adopt(self, rule: Rule, step: Step) -> bool:
        """Takes what was written to the parameter into the dense weight; returns whether there was anything.

        A group of weights in which any value differs from what the last step left there is taken as it
        stands, zeros included, and gets a new mask. Groups that were written to with the values they had
        (DDP's broadcast, an average that is swapped in and out again) keep the dense weights behind them.

        Raises:
            ValueError: If the parameter has changed its shape.
        """
        local = self._local.detach()
        if local.shape != self.dense.shape:
            raise ValueError(
                f"{self.name} has changed its shape from {list(self.dense.shape)} to {list(local.shape)} "
                f"under its Sparsifier; finalize() it first, then make a new optimizer and a new Sparsifier"
            )
        # What the last step left, moved and rounded as the parameter has been.
        expected = torch.empty_like(self.dense, dtype=self.sparse.dtype)
        self._render(expected, rule, step)
        expected = expected.to(local.device, local.dtype)
        if not self._fits(self._dense):
            self._move(local)
        assert self.mask_pattern is not None  # it has a mask from the start
        written = (local != expected) & ~(local.isnan() & expected.isnan())
        changed = bool(written.any())
        if changed:
            values = local.to(self.dense.dtype)
            if self.tile_dim is not None and self.mask_pattern == PATTERN:
                groups = spread_over_tiles(written, self.dim, self.tile_dim)
                bits = transposable_bits(values, self.dim, self.tile_dim).contiguous()
                chosen = ops.unpack_bits(bits, values.shape[self.dim], dim=self.dim)
            else:
                groups = any_in_group(written, self.mask_pattern.m, self.dim)
                chosen = ops.nm_mask(values, self.mask_pattern, dim=self.dim)
            self.dense.copy_(torch.where(groups, values, self.dense))
            self.bits.copy_(ops.pack_bits(torch.where(groups, chosen, self.mask), dim=self.dim))
        self._rebind()
        if changed:
            self.write_back(rule, step)
        return changed

    def write_back(self, rule: Rule, step: Step) -> None:
        """Makes the parameter hold the sparse weight."""
        self._render(self.sparse, rule, step)
        self.mark()

    # ----------------------------------------------------------------------------------------------- state

    @property
    def state(self) -> dict[str, Tensor]:
        """What must be saved, as optimizer state: DTensors for a sharded weight. The tensors are live."""
        return {DENSE_KEY: self._dense, BITS_KEY: self._bits}

    def check_state(self, dense: Tensor, bits: Tensor) -> None:
        """Refuses state that is not this weight's.

        Raises:
            ValueError: Naming the weight and what does not fit.
        """
        for what, tensor, own in (("dense weight", dense, self._dense), ("packed mask", bits, self._bits)):
            if tensor.shape != own.shape:
                raise ValueError(
                    f"the saved {what} of {self.name} has shape {list(tensor.shape)}, "
                    f"expected {list(own.shape)}"
                )

    @torch.no_grad()
    def load_state(self, dense: Tensor, bits: Tensor, rule: Rule, step: Step) -> None:
        """Takes over saved state, and makes the parameter hold the sparse weight."""
        self.check_state(dense, bits)
        if not self._fits(self._dense):
            self._move(self._local)
        assign(self._dense, dense)
        assign(self._bits, bits)
        self._rebind()
        masked = ops.apply_bits(self.dense, self.bits, dim=self.dim)
        if self._holds(masked):
            self.mask_pattern = self.pattern
            self.write_back(rule, step)
        else:  # saved under another pattern: the weight carries over, the mask cannot
            self.mask_pattern = None
            self.choose(rule, step)

    def take_state(self, entries: dict[str, Any]) -> None:
        """Takes our entries out of ``entries``; and takes them over if somebody has replaced (moved) them."""
        dense, bits = entries.pop(DENSE_KEY, self._dense), entries.pop(BITS_KEY, self._bits)
        if dense is self._dense and bits is self._bits:
            return
        if self._fits(dense):
            self._dense = dense
        if bits.device == self.parameter.device:
            self._bits = bits.to(torch.uint8)
        self._rebind()

    @property
    def shard_groups(self) -> list[Any]:
        """The process groups that the weight is split over: counts must be summed over each."""
        return shard_groups(self.parameter)

    @property
    def whole_mask(self) -> Tensor:
        """`mask` of the whole weight: a DTensor if it is sharded."""
        return wrap_like(self.mask, self.parameter)

    @property
    def whole_dense(self) -> Tensor:
        """`dense` of the whole weight: a DTensor if it is sharded."""
        return self._dense

    def __getstate__(self) -> dict[str, Any]:
        # Aliases would become tensors of their own in a copy.
        dropped = ("sparse", "_scratch", "_stamp", "dense", "bits", "master", "_wide_grad", "_spare_bits")
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._wide_grad = self._spare_bits = None
        self._rebind()

    # ------------------------------------------------------------------------------------------- internals

    @property
    def _local(self) -> Tensor:
        return self.parameter._local_tensor if self._sharded else self.parameter  # type: ignore[attr-defined]

    def _render(self, out: Tensor, rule: Rule, step: Step) -> None:
        """Writes the sparse weight to ``out``, which must not be the dense one."""
        foreach.apply_bits([self.dense], [self.bits], dims=[self.dim], outs=[out])
        self.soften(out, rule, step)

    def _holds(self, masked: Tensor) -> bool:
        """Whether a masked weight has the pattern of the next mask."""
        if self.in_tiles:
            assert self.tile_dim is not None
            return holds(masked, self.dim, self.tile_dim)
        return ops.find_violation(masked, self.pattern, dim=self.dim) is None

    def _current_stamp(self) -> tuple[int, int, int]:
        # A DTensor counts writes to itself; those to its local part are counted there.
        local = self._local
        return self.parameter._version, local._version, local.data_ptr()

    def _fits(self, dense: Tensor) -> bool:
        """Whether ``dense`` can be the dense weight behind the parameter as it is now."""
        wanted = (dense_dtype_of(self.parameter.dtype), self.parameter.device, self.parameter.shape)
        return (dense.dtype, dense.device, dense.shape) == wanted and same_placement(dense, self.parameter)

    @torch.no_grad()
    def _rebind(self) -> None:
        """Takes the parameter's present storage for its own, and the dense weight's for the master's."""
        # Not `.data`: writes must count as writes to the parameter, for autograd and for us.
        self.sparse = self._local.detach()
        self._scratch = wrap_like(self.sparse, self.parameter)
        self.dense, self.bits = local_of(self._dense), local_of(self._bits)
        self.master = nn.Parameter(self._dense, requires_grad=self.parameter.requires_grad)
        for key, value in self.parameter.__dict__.items():  # what optimizers may tell parameters apart by
            self.master.__dict__.setdefault(key, value)
        self.mark()

    def _move(self, like: Tensor) -> None:
        """Follows the parameter to another device or dtype."""
        dense = self.dense.to(like.device, dense_dtype_of(like.dtype))
        self._dense = wrap_like(dense, self.parameter)
        self._bits = wrap_bits(self.bits.to(like.device), self.parameter, self.dim)
        self.dense, self.bits = local_of(self._dense), local_of(self._bits)
        self._wide_grad = self._spare_bits = None


def _new_bits(weight: Tensor, dim: int) -> Tensor:
    shape = [size for d, size in enumerate(weight.shape) if d != dim]
    return torch.zeros([*shape, -(-weight.shape[dim] // 8)], dtype=torch.uint8, device=weight.device)
