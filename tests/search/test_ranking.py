"""Ranking: one sort per group, and any number of scores summed by it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nmsparse_ext as nms
from nmsparse_ext.search.ranking import Ranking
from nmsparse_ext.search.scores import lost_scores

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 16, 24, 64, 256, 257])
def test_order_is_that_of_a_stable_sort(m, dtype):
    weight = torch.randn(3, 4 * m, 5).round(decimals=1).to(dtype)  # with ties
    flat = weight.view(-1)
    chosen = torch.randperm(len(flat))[:6]
    flat[chosen] = torch.tensor([0.0, -0.0, 1e-30, float("inf"), float("-inf"), float("nan")]).to(dtype)
    before = weight.clone()
    order = Ranking(weight, m, dim=1).order
    groups = weight.movedim(1, -1).reshape(-1, m).double().abs()
    expected = torch.argsort(groups, stable=True, dim=-1, descending=True)
    assert torch.equal(order.long().t(), expected)
    torch.testing.assert_close(weight, before, rtol=0, atol=0, equal_nan=True)  # not written to


def test_order_of_float8():
    weight = torch.randn(6, 32).to(torch.float8_e4m3fn)
    order = Ranking(weight, 16, dim=1).order
    wide = Ranking(weight.float(), 16, dim=1).order
    assert torch.equal(order, wide)
    assert order.dtype == torch.uint8  # a byte a weight


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(1, 20),
    groups=st.integers(1, 5),
    rows=st.integers(1, 5),
    dim=st.sampled_from([0, 1, 2]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_every_n_loses_what_its_mask_loses(m, groups, rows, dim, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = [rows, 3, 2]
    shape[dim] = m * groups
    weight = torch.randn(shape, generator=generator).round(decimals=1).to(dtype)  # with ties
    gradient = torch.randn(shape, generator=generator).to(dtype)
    ranking = Ranking(weight, m, dim=dim)
    one = lost_scores(ranking.squares(gradient))
    both = lost_scores(ranking.squares(weight, gradient))
    for n in range(1, m + 1):
        pruned = ~nms.nm_mask(weight, nms.Pattern(n, m), dim=dim)
        torch.testing.assert_close(one[n - 1], gradient.double()[pruned].square().sum().item())
        product = (weight.double() * gradient.double())[pruned]
        torch.testing.assert_close(both[n - 1], product.square().sum().item())


@pytest.mark.parametrize("m", [4, 512])
def test_many_chunks(m):
    weight, gradient = torch.randn(2, 3 << 9, 1 << 10)
    sums = Ranking(weight, m, dim=1).squares(weight, gradient)
    groups = weight.view(-1, m)
    order = torch.argsort(groups.abs(), stable=True, dim=-1, descending=True)
    expected = (weight * gradient).view(-1, m).double().square().gather(1, order).sum(0)
    torch.testing.assert_close(sums, expected)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_gradients_count(scale):
    """Their squares are no float32."""
    gradient = torch.full((2, 4), scale)
    sums = Ranking(torch.ones(2, 4), 4, dim=1).squares(gradient)
    torch.testing.assert_close(sums, torch.full((4,), 2 * scale**2, dtype=torch.float64), rtol=1e-6, atol=0)
