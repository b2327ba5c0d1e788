"""``SparseWeight``: one sparse parameter, the dense weight behind it, and the exchange of the two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from .dtensor import assign, check_placement, is_dtensor, local_of, same_placement, wrap_bits, wrap_like

if TYPE_CHECKING:
    from ..pattern import Pattern
    from ..scheme import ResolvedWeight
    from .rules import Rule, Step

# What a weight keeps in `optimizer.state[parameter]`, next to the optimizer's own entries.
DENSE_KEY = "nm_dense"
BITS_KEY = "nm_bits"


class SparseWeight:
    """A sparse parameter and the dense weight behind it.

    Between optimizer steps the parameter's own storage holds ``where(mask, dense, 0)``, unless
    `Rule.soften` has it otherwise. During a step the parameter points at the dense weight instead (`enter`),
    the optimizer updates that, and afterwards the new sparse weight is written to the parameter's storage
    (`leave`). The storage never moves, which is what CUDA graphs, FSDP's all-gather and compiled graphs count
    on; and while it lies idle during a step, it serves as the scratch copy of the gradient.

    What rules may read (tensors are this rank's part of a sharded weight):

    Attributes:
        name: Canonical parameter name.
        parameter: The parameter.
        dim: Its group dim.
        pattern: The pattern that the next mask is chosen with.
        final_pattern: The pattern of the scheme, where a schedule ends.
        mask_pattern: The pattern that the current mask was chosen with; ``None`` before the first.
    """

    def __init__(self, resolved: ResolvedWeight, span: int) -> None:
        self.name = resolved.name
        self.parameter = resolved.parameter
        self.dim = resolved.group_dim
        self.pattern = self.final_pattern = resolved.pattern
        self.mask_pattern: Pattern | None = None
        self._span = span  # groups must not cross multiples of this
        self._sharded = is_dtensor(self.parameter)
        check_placement(self.name, self.parameter, self.dim)

        self._dense = self.parameter.detach().clone()
        self._bits = wrap_bits(_new_bits(self.dense, self.dim), self.parameter, self.dim)
        self._next_bits = torch.empty_like(self.bits)
        self._lent: Tensor | None = None
        self._rebind()

    # ---------------------------------------------------------------------------------- what rules may use

    @property
    def dense(self) -> Tensor:
        """The dense weight; the parameter's shape, dtype and layout."""
        return local_of(self._dense)

    @property
    def bits(self) -> Tensor:
        """The packed mask, 1 = kept: uint8 [other dims..., ceil(K / 8)]."""
        return local_of(self._bits)

    @property
    def mask(self) -> Tensor:
        """The mask, True = kept: bool, the weight's shape. Unpacked anew at every access."""
        return ops.unpack_bits(self.bits, self.dense.shape[self.dim], dim=self.dim)

    def new_mask(self, out: Tensor, bits: Tensor) -> None:
        """Chooses the mask anew from the dense weight: the largest ``|w|`` of each group, one pass."""
        ops.prune_into(self.dense, self.pattern, dim=self.dim, out=out, bits=bits)

    def keep_mask(self, out: Tensor, bits: Tensor) -> None:
        """Masks the dense weight with the mask that it has."""
        bits.copy_(self.bits)
        out.copy_(self.dense)
        ops.apply_bits_(out, bits, dim=self.dim)

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

    def enter(self) -> None:
        """Points the parameter at the dense weight. Its own storage lies idle until `leave`."""
        self._local.data = self.dense

    def lend_grad(self) -> Tensor | None:
        """Puts a copy of the gradient in its place, for a rule to change, and returns it.

        The copy lies in the parameter's idle storage, so it costs no memory. ``None`` without a gradient.
        """
        grad = self.parameter.grad
        if grad is None:
            return None
        self._sparse.copy_(local_of(grad))
        self._lent, self.parameter.grad = grad, self._scratch
        return self._sparse

    def leave(self, rule: Rule, step: Step, changes: Tensor) -> None:
        """Points the parameter at its own storage again, with the next mask and the new sparse weight."""
        self._take_back_grad()
        self.choose(rule, step, changes)
        self._local.data = self._sparse
        self.mark()

    def cancel(self, rule: Rule, step: Step) -> None:
        """Ends a step that went wrong: the dense weight stays as it is by now, the mask as it was."""
        self._take_back_grad()
        self._local.data = self._sparse
        self.write_back(rule, step)

    def choose(self, rule: Rule, step: Step, changes: Tensor | None = None) -> None:
        """Chooses the next mask, and writes the new sparse weight to the parameter's own storage.

        ``changes`` (one int64) receives the number of weights that are kept in one of old and new mask only.
        """
        rule.choose(self, self._sparse, self._next_bits, step)
        if changes is not None:
            ops.sad_into(self.bits, self._next_bits, changes)
        # A copy, not an exchange of pointers: a CUDA graph would go on to read the old mask for ever.
        self.bits.copy_(self._next_bits)
        self.mask_pattern = self.pattern
        rule.soften(self, self._sparse, step)
        self.mark()

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
        if not _alike(self._dense, self.parameter):
            self._move(local)
        assert self.mask_pattern is not None  # it has a mask from the start
        expected = torch.empty_like(self.dense)
        self._render(expected, rule, step)
        written = (local != expected) & ~(local.isnan() & expected.isnan())
        changed = bool(written.any())
        if changed:
            groups = _any_in_group(written, self.mask_pattern.m, self.dim)
            chosen = ops.nm_mask(local, self.mask_pattern, dim=self.dim)
            self.dense.copy_(torch.where(groups, local, self.dense))
            self.bits.copy_(ops.pack_bits(torch.where(groups, chosen, self.mask), dim=self.dim))
        self._rebind()
        if changed:
            self.write_back(rule, step)
        return changed

    def write_back(self, rule: Rule, step: Step) -> None:
        """Makes the parameter hold the sparse weight."""
        self._render(self._sparse, rule, step)
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
        if not _alike(self._dense, self.parameter):
            self._move(self._local)
        assign(self._dense, dense)
        assign(self._bits, bits)
        self._rebind()
        masked = ops.apply_bits(self.dense, self.bits, dim=self.dim)
        if ops.find_violation(masked, self.pattern, dim=self.dim) is None:
            self.mask_pattern = self.pattern
            self.write_back(rule, step)
        else:  # saved under another pattern: the weight carries over, the mask cannot
            self.mask_pattern = None
            self.choose(rule, step)

    def take_state(self, entries: dict[str, Any]) -> None:
        """Takes our entries out of ``entries``; and takes them over if somebody has replaced (moved) them."""
        dense, bits = entries.pop(DENSE_KEY, self._dense), entries.pop(BITS_KEY, self._bits)
        if dense is not self._dense and _alike(dense, self.parameter):
            self._dense = dense
        if bits is not self._bits and bits.device == self.parameter.device:
            self._bits = bits.to(torch.uint8)
            self._next_bits = torch.empty_like(self.bits)

    @property
    def whole_mask(self) -> Tensor:
        """`mask` of the whole weight: a DTensor if it is sharded."""
        return wrap_like(self.mask, self.parameter)

    @property
    def whole_dense(self) -> Tensor:
        """`dense` of the whole weight: a DTensor if it is sharded."""
        return self._dense

    def __getstate__(self) -> dict[str, Any]:
        # The alias of the parameter's storage would become a tensor of its own in a copy.
        dropped = ("_sparse", "_scratch", "_stamp", "_lent")
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rebind()

    # ------------------------------------------------------------------------------------------- internals

    @property
    def _local(self) -> Tensor:
        return self.parameter._local_tensor if self._sharded else self.parameter  # type: ignore[attr-defined]

    def _render(self, out: Tensor, rule: Rule, step: Step) -> None:
        """Writes the sparse weight to ``out``, which must not be the dense one."""
        out.copy_(self.dense)
        ops.apply_bits_(out, self.bits, dim=self.dim)
        rule.soften(self, out, step)

    def _take_back_grad(self) -> None:
        if self._lent is not None:
            self.parameter.grad, self._lent = self._lent, None

    def _current_stamp(self) -> tuple[int, int, int]:
        # A DTensor counts writes to itself; those to its local part are counted there.
        local = self._local
        return self.parameter._version, local._version, local.data_ptr()

    def _rebind(self) -> None:
        """Takes the parameter's present storage for its own."""
        self._lent = None
        self._sparse = self._local.data
        self._scratch = wrap_like(self._sparse, self.parameter)
        self.mark()

    def _move(self, like: Tensor) -> None:
        """Follows the parameter to another device or dtype."""
        self._dense = wrap_like(self.dense.to(like.device, like.dtype), self.parameter)
        self._bits = wrap_bits(self.bits.to(like.device), self.parameter, self.dim)
        self._next_bits = torch.empty_like(self.bits)


def _new_bits(weight: Tensor, dim: int) -> Tensor:
    shape = [size for d, size in enumerate(weight.shape) if d != dim]
    return torch.zeros([*shape, -(-weight.shape[dim] // 8)], dtype=torch.uint8, device=weight.device)


def _any_in_group(flags: Tensor, m: int, dim: int) -> Tensor:
    """Spreads a flag (bool) to all weights of its group of ``m`` along ``dim``."""
    last = flags.movedim(dim, -1)
    groups = last.unflatten(-1, (-1, m)) if last.numel() else last.unsqueeze(-1)
    return groups.any(-1, keepdim=True).expand(groups.shape).reshape(last.shape).movedim(-1, dim)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape) and same_placement(a, b)
