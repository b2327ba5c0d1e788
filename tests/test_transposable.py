"""transposable_mask: the best of the 90 masks that are 2:4 along rows and along columns, per 4x4 tile."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from cases import DTYPES, FLOATS, TILES, Tile, mask, tensor
from engines import Engine
from samples import KINDS, LAYOUTS, assert_same_bits, content, lay_out
from torch import Tensor

import nmsparse_ext as nms

ROWS = list(combinations(range(4), 2))
ALL = [rows for rows in product(ROWS, repeat=4) if all(sum(c in row for row in rows) == 2 for c in range(4))]


def tiles_of(w: Tensor) -> Tensor:
    """``[R, C]`` -> ``[R / 4 * C / 4, 4, 4]``."""
    rows, cols = w.shape
    return w.reshape(rows // 4, 4, cols // 4, 4).permute(0, 2, 1, 3).reshape(-1, 4, 4)


def score(tiles: Tensor, rows: tuple[tuple[int, int], ...]) -> Tensor:
    """Sum of the kept magnitudes in the stated order: pairs, halves, whole."""
    r = [tiles[:, i, a] + tiles[:, i, b] for i, (a, b) in enumerate(rows)]
    return (r[0] + r[1]) + (r[2] + r[3])


def magnitudes(w: Tensor) -> Tensor:
    w = w.to(torch.float64).abs()
    capped = torch.where(w == float("inf"), 2.0**1010, w.clamp(max=2.0**1000))
    return torch.where(w.isnan(), 2.0**1020, capped)


def chosen_scores(w: Tensor, kept: Tensor) -> Tensor:
    tiles, kept = tiles_of(magnitudes(w)), tiles_of(kept)
    columns = [
        kept[:, i].int().sort(dim=-1, descending=True, stable=True).indices[:, :2].sort(-1).values
        for i in range(4)
    ]
    r = [tiles[:, i].gather(1, columns[i]).unbind(1) for i in range(4)]
    r = [a + b for a, b in r]
    return (r[0] + r[1]) + (r[2] + r[3])


def test_there_are_90() -> None:
    assert len(ALL) == 90


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TILES, ids=lambda case: case.name)
def test_truth_table(engine: Engine, case: Tile, dtype: torch.dtype) -> None:
    kept = nms.transposable_mask(tensor(case.w, dtype))
    assert kept.flatten().tolist() == mask(case.kept).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_brute_force_in_score(engine: Engine, dtype: torch.dtype, kind: str) -> None:
    w = content((64, 128), dtype, kind, seed=11)
    kept = nms.transposable_mask(w)
    tiles = tiles_of(magnitudes(w))
    best = torch.stack([score(tiles, rows) for rows in ALL]).amax(0)
    assert torch.equal(chosen_scores(w, kept), best)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_in_every_row_and_column(engine: Engine, dtype: torch.dtype) -> None:
    for kind in KINDS:
        tiles = tiles_of(nms.transposable_mask(content((20, 36), dtype, kind, seed=3)))
        assert (tiles.sum(1) == 2).all()
        assert (tiles.sum(2) == 2).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_masked_weight_is_2_4_both_ways(engine: Engine, dtype: torch.dtype) -> None:
    w = content((16, 24), dtype, "normal", seed=4)
    sparse = torch.where(nms.transposable_mask(w), w, 0)
    assert nms.find_violation(sparse, "2:4", dim=0) is None
    assert nms.find_violation(sparse, "2:4", dim=1) is None


def test_many_nans_and_infinities_first(engine: Engine) -> None:
    nan, inf = float("nan"), float("inf")
    w = torch.tensor([[1.0, nan, 1, nan], [nan, 1, nan, 1], [1, nan, 1, nan], [inf, 1, -inf, 1]])
    assert nms.transposable_mask(w).tolist() == [
        [False, True, False, True],
        [True, False, True, False],
        [False, True, False, True],
        [True, False, True, False],
    ]


def test_bits(engine: Engine) -> None:
    for cols in (4, 8, 12, 36):
        w = torch.randn(8, cols)
        bits = nms.transposable_mask(w, bits=True)
        assert bits.shape == (8, -(-cols // 8))
        assert_same_bits(nms.ops.pack_bits(nms.transposable_mask(w)), bits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(engine: Engine, layout: str) -> None:
    for dtype in DTYPES:
        w = lay_out(content((12, 20), dtype, "normal", seed=8), layout)
        assert torch.equal(nms.transposable_mask(w), nms.transposable_mask(w.clone().contiguous()))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty(engine: Engine, shape: tuple[int, int]) -> None:
    assert nms.transposable_mask(torch.empty(shape)).shape == shape
