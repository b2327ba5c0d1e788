"""Views of packed weights: what shares memory, what is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from packed_samples import ENGINES, packed, packed_copy, pruned_net, sparse
from torch import Tensor

from nmsparse_ext.tensor import NMTensor


@pytest.mark.parametrize("engine", ENGINES)
def test_views_share_memory(engine: str) -> None:
    w = sparse(12, 16)
    weight = packed(w, engine=engine)
    views = [
        (weight.t(), w.t()),
        (weight.T.T, w),
        (weight.permute(1, 0), w.t()),
        (weight.transpose(-1, 0), w.t()),
        (weight.view(12, -1), w),
        (weight.reshape(12, 16), w),
        (weight.contiguous(), w),
        (weight.expand(3, 12, 16), w.expand(3, 12, 16)),
        (weight.expand(2, 3, 12, 16).reshape(6, 12, 16), w.expand(6, 12, 16)),
        (weight[2:5], w[2:5]),
        (weight.t()[:, 2:5], w.t()[:, 2:5]),
        *zip(weight.split(5), w.split(5), strict=True),
        *zip(weight.split([3, 9]), w.split([3, 9]), strict=True),
        *zip(weight.chunk(3), w.chunk(3), strict=True),
        *zip(weight.t().split(4, dim=1), w.t().split(4, dim=1), strict=True),
        (weight.detach(), w),
        (weight.data, w),
    ]
    x = torch.randn(2, 3, 5)
    for view, expected in views:
        assert isinstance(view, NMTensor)
        assert view.engine == engine
        assert view.shape == expected.shape
        assert torch.equal(view.to_dense(), expected)
        assert view.values.untyped_storage().data_ptr() == weight.values.untyped_storage().data_ptr()
        for form, source in zip(view.forms(), weight.forms(), strict=True):
            assert form.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
        if view.dim() == 2:
            x = torch.randn(3, expected.shape[1])
            torch.testing.assert_close(F.linear(x, view), F.linear(x, expected))


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.split(4, dim=1),
        lambda w: w[:, 2:8],
        lambda w: w[::2],
        lambda w: w.view(24, 8),
        lambda w: w.reshape(-1),
        lambda w: w.expand(2, 24, 16),
        lambda w: w.expand(2, 12, 16).permute(1, 0, 2),
        lambda w: w.unsqueeze(0),
    ],
)
def test_other_views_are_refused_by_name(view: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotImplementedError, match=r"NMTensor does not support aten\..*to_dense"):
        view(packed(sparse(12, 16)))


UNSUPPORTED: dict[str, Callable[[Tensor], object]] = {
    "aten.add": lambda w: w + 1,
    "aten.mul_": lambda w: w.mul_(2),
    "aten.zero_": lambda w: w.zero_(),
    "aten.abs": lambda w: w.abs(),
    "aten.sum": lambda w: w.sum(),
    "aten.eq": lambda w: w == w,
    "aten.equal": lambda w: torch.equal(w, w),
    "aten.select": lambda w: w[0],
    "aten.unbind": list,
    "aten.empty_like": torch.empty_like,
    "aten.cat": lambda w: torch.cat([w, w]),
    "aten.embedding": lambda w: F.embedding(torch.tensor([1]), w),
    "aten._to_copy.default to torch.int32": lambda w: w.int(),
    "aten._to_sparse": lambda w: w.to_sparse(),
    "aten.mm": lambda w: w @ w.t(),
    "F.linear": lambda w: F.linear(w, torch.randn(3, 8)),
    "F.conv1d": lambda w: F.conv1d(w, torch.randn(3, 4, 1)),
    "numpy": lambda w: w.numpy(),
    "tolist": lambda w: w.tolist(),
    "share_memory_": lambda w: w.share_memory_(),
    "pinned": lambda w: w.pin_memory(),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_nothing_densifies_silently(name: str) -> None:
    with pytest.raises(NotImplementedError) as caught:
        UNSUPPORTED[name](packed(sparse(4, 8)))
    message = str(caught.value)
    if name != "pinned":
        assert name in message
    assert "to_dense" in message


def test_share_memory_of_a_module_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="share_memory_"):
        packed_copy(pruned_net()).share_memory()
