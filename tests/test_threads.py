"""Several Python threads at once, and several threads within an op, give what one gives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import DTYPES
from samples import assert_same_bits, content
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext import ops


def everything(w: Tensor) -> list[Tensor]:
    """Results of all ops on one weight."""
    pruned, bits = nms.nm_prune(w, "2:4", return_bits=True)
    values, indices = ops.pack(w, "4:8")
    inplace = w.clone()
    nms.nm_prune_(inplace, "1:16", dim=0)
    return [
        pruned,
        bits,
        values,
        indices,
        inplace,
        ops.unpack(values, indices, "4:8", k=w.shape[1]),
        nms.nm_mask(w, "8:32", dim=0),
        nms.transposable_mask(w, bits=True),
        torch.tensor(nms.sad(bits, nms.nm_mask(w, "1:4", bits=True))),
        torch.tensor(nms.find_violation(w, "2:4").index),
    ]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def at_once(functions: list[Callable[[], Any]]) -> list[Any]:
    """Runs every function in its own thread, all starting together."""
    barrier = threading.Barrier(len(functions))

    def wait_and_run(function: Callable[[], Any]) -> Any:
        barrier.wait()
        return [function() for _ in range(5)]

    with ThreadPoolExecutor(len(functions)) as pool:
        return [result for results in pool.map(wait_and_run, functions) for result in results]


@pytest.mark.usefixtures("two_threads")
def test_two_callers_at_once() -> None:
    weights = [content((256, 512), dtype, "any bits", seed) for seed, dtype in enumerate(DTYPES[:4])]
    for w in weights:
        expected = everything(w)
        for result in at_once([lambda w=w: everything(w)] * 2):
            for a, b in zip(result, expected, strict=True):
                assert_same_bits(a, b, str(w.dtype))


def test_two_callers_with_different_work() -> None:
    first = content((256, 512), torch.float32, "normal", 1)
    second = content((512, 256), torch.bfloat16, "normal", 2)
    expected = [everything(first), everything(second)]
    results = at_once([lambda: everything(first), lambda: everything(second)])
    for i, result in enumerate(results):
        for a, b in zip(result, expected[i // 5], strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_number_of_threads_changes_nothing(dtype: torch.dtype) -> None:
    w = content((512, 1024), dtype, "ties", 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = everything(w)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            for a, b in zip(everything(w), expected, strict=True):
                assert_same_bits(a, b, f"{threads} threads")
    finally:
        torch.set_num_threads(before)


def test_gradients_from_two_threads() -> None:
    def gradient(seed: int) -> Tensor:
        w = content((64, 128), torch.float32, "normal", seed).requires_grad_()
        nms.nm_prune(w, "2:4").square().sum().backward()
        return w.grad

    expected = [gradient(1), gradient(2)]
    for i, result in enumerate(at_once([lambda: gradient(1), lambda: gradient(2)])):
        assert_same_bits(result, expected[i // 5])
