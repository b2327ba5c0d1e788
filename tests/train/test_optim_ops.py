"""The ops ``sgd_`` and ``adamw_``: every engine gives the bits of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import Engine
from torch import Tensor

from nmsparse_ext import reference

# weight dtype, dtype of gradient and parameter
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
TERMS = ["none", "gradient", "decoupled", "masked"]


class Lists:
    """The arguments of a step: sparse weights of all layouts first, then weights without a pattern."""

    def __init__(self, dtype: torch.dtype, narrow: torch.dtype, states: int, keep: bool = False) -> None:
        torch.manual_seed(1)
        # shape, pattern, dim, order of the dims in memory
        shapes: list[tuple[tuple[int, ...], tuple[int, int], int, tuple[int, ...]]] = [
            ((7, 64), (2, 4), 1, (0, 1)),
            ((40, 96), (1, 4), 0, (0, 1)),  # wide: the group dim is strided
            ((3, 2064), (2, 4), 1, (0, 1)),
            ((5, 24), (3, 8), 1, (0, 1)),
            ((33, 60), (1, 5), 1, (0, 1)),  # no network for this m
            ((6, 32, 3, 3), (2, 4), 1, (0, 1, 2, 3)),  # OIHW along I
            ((6, 32, 3, 3), (4, 16), 1, (0, 2, 3, 1)),  # channels last
            ((64, 40), (8, 32), 0, (1, 0)),  # transposed in memory
            ((4, 4), (4, 4), 1, (0, 1)),
        ]
        self.sparse, self.bits, self.patterns = [], [], []
        self.weights, self.grads = [], []
        for shape, (n, m), dim, order in shapes:
            weight = laid_out(torch.randn(shape), order).to(dtype)
            weight[weight.abs() < 0.2] = 0.5  # ties
            mask = reference.mask_bits(torch.randn(shape), n, m, dim, False)
            self.weights.append(weight)
            self.grads.append(laid_out(torch.randn(shape), order).to(narrow))
            self.bits.append(mask)
            self.sparse.append(torch.full_like(weight, 7, dtype=narrow))
            self.patterns += [0 if keep else n, m, dim]
        self.changes = [torch.full((), -1, dtype=torch.int64) for _ in shapes]
        for shape in [(5,), (3, 17), (130, 33), ()]:
            self.weights.append(torch.randn(shape).to(dtype))
            self.grads.append(torch.randn(shape).to(narrow))
        self.states = [
            [torch.empty_like(w).copy_(torch.randn(w.shape)) for w in self.weights] for _ in range(states)
        ]
        for tensors in self.states[1:]:  # squares
            for tensor in tensors:
                tensor.abs_()
        self.steps = [torch.tensor(float(3 + i)) for i in range(len(self.weights))]

    @property
    def tail(self) -> tuple[Any, ...]:
        return self.sparse, self.bits, self.changes, self.patterns

    def written(self) -> list[Tensor]:
        return [
            *self.weights, *self.sparse, *self.bits, *self.changes,
            *(tensor for tensors in self.states for tensor in tensors),
        ]  # fmt: skip


def laid_out(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """``x`` in memory with its dims in this order, the last one contiguous."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(order).contiguous().permute(inverse)


def assert_equal_bits(got: Lists, want: Lists, rtol: float = 0) -> None:
    for a, b in zip(got.written(), want.written(), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=rtol, atol=rtol, equal_nan=True)


def sgd(ops: Any, lists: Lists, term: str, **kwargs: Any) -> None:
    options = {
        "lr": 0.1, "lr_tensor": None, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01,
        "nesterov": False, "maximize": False, "first": False, "grad_scale": None, "found_inf": None,
    } | kwargs  # fmt: skip
    ops.sgd_(lists.weights, lists.grads, lists.states[0], *lists.tail, term, 0.02, *options.values())


def adamw(ops: Any, lists: Lists, term: str, **kwargs: Any) -> None:
    options = {
        "lr": 0.1, "lr_tensor": None, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01,
        "amsgrad": False, "maximize": False, "grad_scale": None, "found_inf": None,
    } | kwargs  # fmt: skip
    ops.adamw_(
        lists.weights, lists.grads, *lists.states, lists.steps, *lists.tail, term, 0.02, *options.values()
    )


STEPS = {"sgd": (sgd, 1), "adamw": (adamw, 3)}


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize(("dtype", "narrow"), DTYPES, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_same_bits_as_the_reference(
    compiled_engine: Engine, name: str, dtype: torch.dtype, narrow: torch.dtype, term: str
) -> None:
    step, states = STEPS[name]
    got, want = Lists(dtype, narrow, states), Lists(dtype, narrow, states)
    for _ in range(2):
        step(compiled_engine.ops, got, term)
        step(reference, want, term)
        assert_equal_bits(got, want, 1e-15 if (name, dtype) == ("adamw", torch.float64) else 0)
