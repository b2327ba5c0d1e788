"""rank_sums: one sort gives what every n keeps."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nmsparse_ext as nms
from nmsparse_ext.search.scores import lost_scores, rank_sums, sorting_network


@pytest.mark.parametrize("n", range(1, 13))
def test_network_sorts_all_zeros_and_ones(n):
    """The 0-1 principle: a network that sorts these sorts everything."""
    for bits in itertools.product((0, 1), repeat=n):
        values = list(bits)
        for high, low in sorting_network(n):
            values[high], values[low] = max(values[high], values[low]), min(values[high], values[low])
        assert values == sorted(bits, reverse=True)


@pytest.mark.parametrize("m", [16, 24, 31, 32, 64])
def test_network_sorts_numbers(m):
    weight = torch.randn(300, m, dtype=torch.float64)
    expected = weight.square().sort(-1, descending=True).values.sum(0)
    torch.testing.assert_close(rank_sums(weight, m, dim=1), expected)


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(1, 20),
    groups=st.integers(1, 5),
    rows=st.integers(1, 5),
    dim=st.sampled_from([0, 1, 2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 99),
)
def test_every_n_loses_what_its_mask_loses(m, groups, rows, dim, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = [rows, 3, 2]
    shape[dim] = m * groups
    weight = torch.randn(shape, generator=generator).round(decimals=1).to(dtype)  # with ties
    squares = lost_scores(rank_sums(weight, m, dim=dim))
    for n in range(1, m + 1):
        pruned = ~nms.nm_mask(weight, nms.Pattern(n, m), dim=dim)
        torch.testing.assert_close(squares[n - 1], weight.double().square()[pruned].sum().item())


def test_small_losses_survive_large_ones():
    weight = torch.tensor([[1e6, 1e-6, 2e-6, 0.0]])
    assert lost_scores(rank_sums(weight, 4, dim=1)) == pytest.approx([5e-12, 1e-12, 0, 0])


def test_many_chunks():
    weight = torch.randn(1 << 11, 1 << 10)
    expected = weight.square().view(-1, 4).sort(-1, descending=True).values.sum(0, dtype=torch.float64)
    torch.testing.assert_close(rank_sums(weight, 4, dim=1), expected)
