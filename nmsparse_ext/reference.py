"""The ops in pure PyTorch: the truth that compiled kernels are tested against, and the fallback without them.

Each function is the kernel of the op of the same name in ``torch.ops.nmsparse``; its annotations are the op's
schema. They aim to be short and obviously right rather than fast. ``dim`` is >= 0 here. In shapes, ``...``
are the dimensions other than the group dim, in order; ``K`` is the size of the group dim and
``groups = ceil(K / m)``.

All work is done on integer views, so that a kept NaN keeps its payload and dtypes without arithmetic (float8)
work.
"""

from __future__ import annotations

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks as checks
from ._checks import ceil_div
from .pattern import Pattern
from .reference_lists import foreach_add_pruned, foreach_apply_bits, foreach_reselect  # noqa: F401
from .reference_rule import as_int, grouped, magnitude_key, ranking
from .reference_search import foreach_add_kept, foreach_vote, group_thresholds  # noqa: F401

# ----------------------------------------------------------------------------------------- the selection rule


def _kept(w: Tensor, n: int, m: int, dim: int) -> Tensor:
    """The bool mask of ``w``, group dim last: ``[..., K]``."""
    order = ranking(w, m, dim)
    mask = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return mask.flatten(-2)[..., : w.shape[dim]]


def _write_masked(w: Tensor, mask: Tensor, out: Tensor) -> None:
    """``out = where(mask, w, +0)``, bit for bit; ``out`` may be ``w`` itself."""
    as_int(out).copy_(torch.where(mask, as_int(w), 0))


# -------------------------------------------------------------------------------------------- bits and fields


def _pack_last(bits: Tensor) -> Tensor:
    """Packs 0/1 along the last dim into bytes, low bits first: ``[..., L] -> uint8 [..., ceil(L / 8)]``."""
    weight = 1 << torch.arange(8, device=bits.device, dtype=torch.uint8)
    # Sums keep the order of their input's strides; the packed form is contiguous.
    return (grouped(bits.to(torch.uint8), 8, bits.dim() - 1) * weight).sum(-1, dtype=torch.uint8).contiguous()


def _unpack_last(packed: Tensor, length: int) -> Tensor:
    """Inverse of ``_pack_last``: ``uint8 [..., B] -> uint8 0/1 [..., length]``, ``length <= 8 * B``."""
    shift = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> shift) & 1).flatten(-2)[..., :length]


def group_bits_of(indices: Tensor, n: int, m: int, k: int) -> Tensor:
    """The packed bits of each group: ``uint8 0/1 [..., groups, bits_per_group]``."""
    groups, width = ceil_div(k, m), Pattern(n, m).bits_per_group
    bits = _unpack_last(indices, groups * width)
    return bits.reshape(*bits.shape[:-1], groups, width)


def index_fields(group_bits: Tensor, n: int, m: int) -> Tensor:
    """The index fields of each group of an "index" encoding: ``int64 [..., groups, n]``."""
    width = Pattern(n, m).index_bits
    weight = 1 << torch.arange(width, device=group_bits.device)
    return (group_bits.reshape(*group_bits.shape[:-1], n, width) * weight).sum(-1)


def _positions(indices: Tensor, n: int, m: int, k: int) -> Tensor:
    """Where in its group each value stands: ``int64 [..., groups, n]``, ``m`` for nowhere.

    Fields that point outside the group or past ``k`` stand nowhere, so that no damaged input can reach
    outside memory.
    """
    group_bits = group_bits_of(indices, n, m, k)
    if Pattern(n, m).encoding == "bitmask":
        # A stable sort of "not set" lists the set positions first, in order; what is not set stands nowhere.
        unset, position = (1 - group_bits).sort(dim=-1, stable=True)
        fields = position.masked_fill(unset.bool(), m)[..., :n]
    else:
        fields = index_fields(group_bits, n, m)
    start = m * torch.arange(fields.shape[-2], device=indices.device).unsqueeze(-1)
    return fields.masked_fill((fields >= m) | (start + fields >= k), m)


# ------------------------------------------------------------------------------------------ masks and pruning


def prune(w: Tensor, n: int, m: int, dim: int, pad: bool) -> tuple[Tensor, Tensor]:
    """Keeps the ``n`` largest ``|w|`` of every ``m`` along ``dim``.

    Returns:
        The pruned weight in ``w``'s shape, dtype and layout, and its packed mask.
    """
    checks.check_weight(w, n, m, dim, pad)
    out = torch.empty_like(w)
    mask = _kept(w, n, m, dim)
    _write_masked(w, mask.movedim(-1, dim), out)
    return out, _pack_last(mask)


def prune_out(w: Tensor, n: int, m: int, dim: int, pad: bool, out: Tensor, bits: Tensor | None) -> None:
    """``prune`` into ``out`` (which may be ``w``) and, if given, ``bits``."""
    checks.check_weight(w, n, m, dim, pad)
    checks.check_out(w, out)
    if bits is not None:
        checks.check_bits(bits, w, dim)
    mask = _kept(w, n, m, dim)
    _write_masked(w, mask.movedim(-1, dim), out)
    if bits is not None:
        bits.copy_(_pack_last(mask))


def prune_(w: Tensor, n: int, m: int, dim: int, pad: bool, bits: Tensor | None) -> None:
    """``prune`` in place and, if given, into ``bits``."""
    prune_out(w, n, m, dim, pad, w, bits)


def mask_bits(w: Tensor, n: int, m: int, dim: int, pad: bool) -> Tensor:
    """The packed mask of ``w``: ``uint8 [..., ceil(K / 8)]``."""
    checks.check_weight(w, n, m, dim, pad)
    return _pack_last(_kept(w, n, m, dim))


def pack_bits(mask: Tensor, dim: int) -> Tensor:
    """A bool mask as bits: group dim moved last, eight weights a byte."""
    checks.check_mask(mask, dim)
    return _pack_last(mask.movedim(dim, -1))


def unpack_bits(bits: Tensor, k: int, dim: int) -> Tensor:
    """Bits as a contiguous bool mask with a group dim of size ``k`` put back at ``dim``."""
    checks.check_unpack_bits(bits, k, dim)
    return _unpack_last(bits, k).bool().movedim(-1, dim).contiguous()


def apply_bits(w: Tensor, bits: Tensor, dim: int) -> Tensor:
    """``where(mask, w, 0)`` in ``w``'s layout."""
    checks.check_apply_bits(w, bits, dim)
    out = torch.empty_like(w)
    _write_masked(w, unpack_bits(bits, w.shape[dim], dim), out)
    return out


def apply_bits_(w: Tensor, bits: Tensor, dim: int) -> None:
    """``apply_bits`` in place."""
    checks.check_apply_bits(w, bits, dim)
    checks.check_writable(w, "w")
    _write_masked(w, unpack_bits(bits, w.shape[dim], dim), w)


def add_pruned_(grad: Tensor, w: Tensor, bits: Tensor, dim: int, alpha: float, scale: Tensor | None) -> None:
    """``grad += alpha * scale * w`` where ``w`` is pruned; the other gradients keep their bits.

    Term and sum are taken in float32, or in float64 for a float64 ``grad``, and rounded once to its dtype.
    """
    checks.check_add_pruned(grad, w, bits, dim, scale)
    compute = torch.promote_types(torch.float32, grad.dtype)
    factor = torch.full((), alpha, dtype=torch.float64, device=grad.device)
    if scale is not None:
        factor = factor * scale.reshape(())
    stepped = (grad.to(compute) + factor.to(compute) * w.to(compute)).to(grad.dtype)
    grad.copy_(torch.where(unpack_bits(bits, w.shape[dim], dim), grad, stepped))


def sad(a: Tensor, b: Tensor) -> Tensor:
    """How many bits differ between two masks: 0-dim int64."""
    checks.check_sad(a, b)
    differing = a ^ b
    return (
        differing.sum()
        if a.dtype == torch.bool
        else _unpack_last(differing.unsqueeze(-1), 8).sum(dtype=torch.int64)
    )


def sad_out(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``sad`` into ``out``, a tensor of one int64."""
    checks.check_sad(a, b)
    checks.check_sad_out(a, out)
    out.fill_(sad(a, b))


def find_violation(w: Tensor, n: int, m: int, dim: int, pad: bool) -> Tensor:
    """The first group with over ``n`` nonzeros: ``[row * groups + group, nonzeros]``, else ``[-1, 0]``."""
    checks.check_weight(w, n, m, dim, pad)
    nonzeros = (grouped(magnitude_key(w), m, dim) != 0).sum(-1).flatten()
    none = torch.tensor([-1, 0], device=w.device)
    if nonzeros.numel() == 0:
        return none
    violates = nonzeros > n
    first = violates.int().argmax()  # the first of several maxima
    return torch.where(violates.any(), torch.stack([first, nonzeros[first]]), none)


# ------------------------------------------------------------------------------------------ the packed weight


def compress(w: Tensor, n: int, m: int, dim: int, pad: bool) -> tuple[Tensor, Tensor]:
    """Prunes and packs ``w``.

    Returns:
        ``values [..., groups * n]``: the kept weights of each group by position, and ``indices uint8 [...,
        bytes]``: where in its group each stood. Virtual positions past the end of ``w`` are kept, as zeros,
        only where a short last group has fewer than ``n`` weights.
    """
    checks.check_weight(w, n, m, dim, pad)
    position = ranking(w, m, dim)[..., :n].sort(dim=-1).values
    values = grouped(as_int(w), m, dim).gather(-1, position).flatten(-2).contiguous().view(w.dtype)
    return values, encode_group(position, n, m)


def encode_group(position: Tensor, n: int, m: int) -> Tensor:
    """The packed indices of ascending positions ``[..., groups, n]`` in their groups."""
    if Pattern(n, m).encoding == "bitmask":
        empty = position.new_zeros(*position.shape[:-1], m)
        group_bits = empty.scatter_(-1, position, 1)
    else:
        shift = torch.arange(Pattern(n, m).index_bits, device=position.device)
        group_bits = ((position.unsqueeze(-1) >> shift) & 1).flatten(-2)
    return _pack_last(group_bits.flatten(-2))


def decompress(values: Tensor, indices: Tensor, n: int, m: int, k: int, dim: int) -> Tensor:
    """The dense weight: contiguous, a group dim of size ``k`` put back at ``dim``.

    Fields that point outside their group or past ``k`` are ignored.
    """
    checks.check_packed(values, indices, n, m, k, dim)
    position = _positions(indices, n, m, k)
    # One more slot a group takes the values that stand nowhere.
    slots = as_int(values).new_zeros(*position.shape[:-1], m + 1)
    slots.scatter_(-1, position, as_int(values).reshape(position.shape))
    dense = slots[..., :m].flatten(-2)[..., :k].movedim(-1, dim)
    # clone, because contiguous() leaves odd strides of dims of size 1, and convolutions go by strides.
    return dense.clone(memory_format=torch.contiguous_format).view(values.dtype)


def gather_packed(dense: Tensor, indices: Tensor, n: int, m: int, dim: int) -> Tensor:
    """What stands in ``dense`` where ``indices`` point, 0 where they point nowhere: ``[..., groups * n]``.

    The transpose of ``decompress``, which is linear in its values; no op of its own, as PyTorch
    differentiates it.
    """
    position = _positions(indices, n, m, dense.shape[dim])
    slots = F.pad(grouped(dense, m, dim), (0, 1))
    return slots.gather(-1, position).flatten(-2)


def check_indices(indices: Tensor, n: int, m: int, k: int) -> Tensor:
    """The first illegal group (``row * groups + group``), else -1: 0-dim int64.

    Legal are ascending, distinct indices below ``m``, or a bitmask with ``n`` bits set, and zeros in the
    unused high bits of a row's last byte (which count as part of its last group).
    """
    checks.check_indices_shape(indices, n, m, k)
    group_bits = group_bits_of(indices, n, m, k)
    if Pattern(n, m).encoding == "bitmask":
        bad = group_bits.sum(-1) != n
    else:
        fields = index_fields(group_bits, n, m)
        bad = (fields >= m).any(-1) | (fields[..., 1:] <= fields[..., :-1]).any(-1)
    none = torch.tensor(-1, device=indices.device)
    if bad.numel() == 0:
        return none
    rest = _unpack_last(indices, 8 * indices.shape[-1])[..., bad.shape[-1] * group_bits.shape[-1] :]
    bad[..., -1] |= (rest != 0).any(-1)
    bad = bad.flatten()
    return torch.where(bad.any(), bad.int().argmax(), none)


# ------------------------------------------------------------------------------------------- 4x4 transposable

# The six ways to keep two of four columns; _ROWS[5 - p] keeps the other two.
_ROWS = tuple(combinations(range(4), 2))
_COMPLEMENTS = tuple((p, 5 - p) for p in range(6))


def _column_classes() -> list[tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]]:
    """Which two-row halves fit together, as (row patterns of the top half, those of the bottom half).

    A 4x4 tile keeps two in every row and column exactly if its bottom half uses each column as often as the
    top half leaves it free. Twice {p} leaves twice the complement; {p, q} in either order leaves the
    complements in either order; a pair of complements uses each column once and leaves any pair of
    complements.
    """
    classes: list[tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]] = []
    classes += [(((p, p),), ((5 - p, 5 - p),)) for p in range(6)]
    for p, q in combinations(range(6), 2):
        if p + q != 5:
            classes.append((((p, q), (q, p)), ((5 - q, 5 - p), (5 - p, 5 - q))))
    classes.append((_COMPLEMENTS, _COMPLEMENTS))
    return classes


def _first_best(scores: list[Tensor], patterns: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    """The largest of ``scores`` and its pattern pair as ``6 * upper + lower``; the first of equal ones."""
    best, choice = (
        scores[0],
        torch.full_like(scores[0], 6 * patterns[0][0] + patterns[0][1], dtype=torch.int64),
    )
    for score, (upper, lower) in zip(scores[1:], patterns[1:], strict=True):
        better = score > best
        best = torch.where(better, score, best)
        choice = torch.where(better, 6 * upper + lower, choice)
    return best, choice


def transposable_bits(w: Tensor) -> Tensor:
    """Packed mask of the best 2:4-in-rows-and-columns pattern of every 4x4 tile: ``[R, ceil(C / 8)]``.

    Best is the largest sum of kept ``|w|`` in float64, over all 90 patterns. So that a sum can neither
    overflow nor be NaN, magnitudes are capped at 2^1000, and above that rank infinity and then NaN.
    """
    checks.check_transposable(w)
    rows, cols = w.shape
    magnitude = w.to(torch.float64).abs()
    capped = magnitude.clamp(max=2.0**1000)
    capped = torch.where(magnitude == float("inf"), 2.0**1010, capped)
    capped = torch.where(magnitude.isnan(), 2.0**1020, capped)
    tiles = capped.reshape(rows // 4, 4, cols // 4, 4)

    kept = [[tiles[:, i, :, a] + tiles[:, i, :, b] for a, b in _ROWS] for i in range(4)]  # kept[row][pattern]
    best = torch.full((rows // 4, cols // 4), -1.0, dtype=torch.float64, device=w.device)
    top = bottom = torch.zeros_like(best, dtype=torch.int64)
    for top_patterns, bottom_patterns in _column_classes():
        top_score, top_choice = _first_best([kept[0][p] + kept[1][q] for p, q in top_patterns], top_patterns)
        bottom_score, bottom_choice = _first_best(
            [kept[2][p] + kept[3][q] for p, q in bottom_patterns], bottom_patterns
        )
        score = top_score + bottom_score
        better = score > best
        best = torch.where(better, score, best)
        top = torch.where(better, top_choice, top)
        bottom = torch.where(better, bottom_choice, bottom)

    row_pattern = torch.stack([top // 6, top % 6, bottom // 6, bottom % 6], dim=1)  # [R / 4, 4, C / 4]
    row_masks = torch.tensor([[c in pair for c in range(4)] for pair in _ROWS], device=w.device)
    return _pack_last(row_masks[row_pattern].reshape(rows, cols))


def transposable_pack(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``w`` and ``w.T`` in 2:4, both packed with the mask of `transposable_bits`.

    Returns:
        ``values [R, C / 2]`` and ``indices [R, ceil(C / 8)]`` of ``w``, ``values_t [C, R / 2]`` and
        ``indices_t [C, ceil(R / 8)]`` of ``w.T``, and the mask's ``bits [R, ceil(C / 8)]``.
    """
    bits = transposable_bits(w)
    mask = unpack_bits(bits, w.shape[1], 1)

    def pack(w: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        # The mask as a weight: its groups have two nonzeros, so that just those are kept.
        _, indices = compress(mask.to(torch.int8).contiguous(), 2, 4, 1, False)
        return gather_packed(as_int(w.contiguous()), indices, 2, 4, 1).view(w.dtype), indices

    return (*pack(w, mask), *pack(w.T, mask.T), bits)


# Panels, the optimizer steps and cuSPARSELt's ops, which use what stands above, have files of their own.
from ._reference_lt import lt_compress, lt_matmul, lt_pack, lt_prune_pack  # noqa: E402, F401
from ._reference_optim import adamw_, sgd_  # noqa: E402, F401
from ._reference_panels import (  # noqa: E402, F401
    panel_conv,
    panel_linear,
    panel_linear_int8,
    panel_matmul,
    panel_pack,
    panel_restore,
    panel_unpack,
    quantize_rows,
)
from ._reference_products import epilogue, epilogue_, small_batch_linear  # noqa: E402, F401
