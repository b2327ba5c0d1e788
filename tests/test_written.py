"""Writes to a packed weight, by whatever way, and what sees them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from samples import assert_same_bits
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext._build import extension
from nmsparse_ext.tensor import NMTensor

ENGINES = ("decompress", "dense", *(("cpu-panels",) if extension is not None else ()))


@pytest.fixture(params=ENGINES)
def weight(request: pytest.FixtureRequest) -> NMTensor:
    return nms.compress(torch.randn(48, 32), "2:4", prune=True).with_engine(request.param)


def double_values(weight: NMTensor) -> None:
    weight.values.mul_(2)


def double_a_piece(weight: NMTensor) -> None:
    for piece in weight.split([8, 40]):  # the first cuts a panel
        piece.values.mul_(2)


def double_through_views(weight: NMTensor) -> None:
    weight.t().detach().values.mul_(2)


def double_rows(weight: NMTensor) -> None:
    weight.values[:24].mul_(2)
    weight[24:].values.mul_(2)


def copy_pieces(weight: NMTensor) -> None:
    dense = 2 * weight.to_dense()
    for piece, source in zip(weight.split([8, 40]), dense.split([8, 40]), strict=True):
        piece.copy_(source)


def copy_aligned_pieces(weight: NMTensor) -> None:
    for piece in weight.split(16):
        piece.copy_(2 * piece.to_dense())


WRITES: tuple[Callable[[NMTensor], None], ...] = (
    double_values,
    double_a_piece,
    double_through_views,
    double_rows,
    copy_pieces,
    copy_aligned_pieces,
)


@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_seen_by_the_weight_and_all_views(
    weight: NMTensor, write: Callable[[NMTensor], None]
) -> None:
    w, x = weight.to_dense(), torch.randn(3, 32)
    views: list[tuple[NMTensor, Callable[[Tensor], Tensor]]] = [
        (weight, lambda w: w),
        (weight.t().t(), lambda w: w),
        (weight.detach(), lambda w: w),
        (weight[16:32], lambda w: w[16:32]),
        (weight[8:40], lambda w: w[8:40]),
        (weight.split(24)[1], lambda w: w[24:]),
    ]
    for view, part in views:
        torch.testing.assert_close(F.linear(x, view), F.linear(x, part(w)))
    with torch.autocast("cpu", torch.bfloat16):
        F.linear(x, weight)
        F.linear(x, weight.t().t())
    with torch.no_grad():
        write(weight)
    for view, part in reversed(views):
        torch.testing.assert_close(F.linear(x, view), F.linear(x, 2 * part(w)))
    with torch.autocast("cpu", torch.bfloat16):
        for view, part in views:
            torch.testing.assert_close(
                F.linear(x, view).float(), F.linear(x, 2 * part(w)).float(), atol=0.3, rtol=5e-2
            )


def test_new_indices_are_seen(weight: NMTensor) -> None:
    other = nms.compress(torch.randn(48, 32), "2:4", prune=True)
    weight.indices.copy_(other.indices)
    weight.values.copy_(other.values)
    x = torch.randn(3, 32)
    torch.testing.assert_close(F.linear(x, weight), F.linear(x, other.to_dense()))


def test_forms_are_built_once_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    if extension is None:
        pytest.skip("panels are for the compiled extension")
    from nmsparse_ext import engines_cpu

    weight, x = nms.compress(torch.randn(48, 32), "2:4", prune=True), torch.randn(3, 32)
    calls: list[int] = []
    pack = engines_cpu.panel_pack
    monkeypatch.setattr(engines_cpu, "panel_pack", lambda *a, **k: calls.append(1) or pack(*a, **k))
    for _ in range(3):
        F.linear(x, weight)
    assert not calls
    weight.values.mul_(2)
    for _ in range(3):
        F.linear(x, weight)
        F.linear(x, weight.t().t())
    assert len(calls) == 1
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            for view in (weight, weight.t().t(), weight.split(16)[1], weight.detach()):
                F.linear(x, view)
            x @ weight.t()
            torch.addmm(torch.zeros(48), x, weight.t())
    assert len(calls) == 2


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        weight = nms.compress(torch.randn(48, 32), "2:4", prune=True)
        x = torch.randn(3, 32)
        torch.testing.assert_close(F.linear(x, weight), F.linear(x, weight.to_dense()))
        other = nms.nm_prune(torch.randn(48, 32), "2:4")
        weight.copy_(other)
        torch.testing.assert_close(F.linear(x, weight), F.linear(x, other))


def test_threads_share_a_weight(weight: NMTensor) -> None:
    """Also while its forms are built anew and cast, which only one of them does."""
    w, x = weight.to_dense(), torch.randn(5, 32)
    errors: list[BaseException] = []
    # PyTorch's own products may differ in the last bit from thread to thread.
    check = assert_same_bits if weight.engine == "cpu-panels" else torch.testing.assert_close

    def multiply() -> None:
        try:
            for _ in range(30):
                check(F.linear(x, weight), expected)
                check(F.linear(x, weight[16:32]), part)
                with torch.autocast("cpu", torch.bfloat16):
                    check(F.linear(x, weight), low)
        except BaseException as error:  # for the main thread
            errors.append(error)

    for factor in (1, 2):
        same = nms.compress(factor * w, "2:4").with_engine(weight.engine)
        expected, part = F.linear(x, same), F.linear(x, same[16:32])
        with torch.autocast("cpu", torch.bfloat16):
            low = F.linear(x, same)
        threads = [threading.Thread(target=multiply) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        weight.values.mul_(2)
