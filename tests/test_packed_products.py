"""`small_batch_linear`, `epilogue` and `transposable_pack`: what they mean, and what they refuse."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from samples import assert_same_bits, content
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext import reference

nmsparse = torch.ops.nmsparse


# ---------------------------------------------------------------------------------------- small_batch_linear


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "1:16", "3:5", "8:32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_product_of_the_packed_form(pattern: str, dtype: torch.dtype) -> None:
    p = nms.Pattern.parse(pattern)
    for rows, k, shape in ((7, 70, (1,)), (20, 64, (2, 3)), (1, 5, ())):
        w, x = torch.randn(rows, k).to(dtype), torch.randn(*shape, k).to(dtype)
        packed = reference.compress(w, p.n, p.m, 1, True)
        dense = reference.decompress(*packed, p.n, p.m, k, 1)
        bias = torch.randn(rows).to(dtype)
        y = nmsparse.small_batch_linear(x, *packed, None, bias, p.n, p.m, k, "silu")
        assert torch.equal(y, F.silu(F.linear(x.float(), dense.float()) + bias.float()).to(dtype))


def test_int8_values_are_scaled() -> None:
    w, x, scales = content((9, 40), torch.int8, "ties", 1), torch.randn(3, 40).half(), torch.rand(9)
    packed = reference.compress(w, 2, 4, 1, False)
    y = nmsparse.small_batch_linear(x, *packed, scales, None, 2, 4, 40, "none")
    dense = reference.decompress(*packed, 2, 4, 40, 1)
    assert torch.equal(y, (x.float() @ dense.float().T * scales).half())


def test_input_gradient_is_that_of_the_dense_weight() -> None:
    w = torch.randint(-3, 4, (6, 16)).half()
    packed = reference.compress(w, 2, 4, 1, False)
    dense = reference.decompress(*packed, 2, 4, 16, 1)
    x, bias = (torch.randint(-3, 4, shape).half().requires_grad_() for shape in ((2, 5, 16), (6,)))
    y = nmsparse.small_batch_linear(x, *packed, None, bias, 2, 4, 16, "relu")
    expected = F.relu(F.linear(x, dense, bias))
    assert torch.equal(y, expected)
    grad = torch.randint(-3, 4, y.shape).half()
    for mine, theirs in zip(
        torch.autograd.grad(y, (x, bias), grad), torch.autograd.grad(expected, (x, bias), grad), strict=True
    ):
        assert torch.equal(mine, theirs)


def product(**change: Any) -> Tensor:
    values, indices = reference.compress(torch.ones(6, 16).half(), 2, 4, 1, False)
    given = {"x": torch.ones(2, 16).half(), "values": values, "indices": indices, "n": 2, "m": 4, "k": 16}
    given |= {"scales": None, "bias": None, "activation": "none", **change}
    return nmsparse.small_batch_linear(**given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.ones(2, 16)}, "x must be one of"),
        ({"x": torch.ones(2, 15).half()}, "last size of x"),
        ({"x": torch.ones(2, 16).bfloat16()}, "values must have the dtype of x"),
        ({"values": torch.ones(6, 8, dtype=torch.int8)}, "scales go with int8"),
        ({"scales": torch.ones(6)}, "scales go with int8"),
        ({"values": torch.ones(6, 8, dtype=torch.int8), "scales": torch.ones(5)}, r"scales must be \[6\]"),
        ({"values": torch.ones(6, 9).half()}, "values must have 8"),
        ({"indices": torch.ones(6, 3, dtype=torch.uint8)}, "indices must have 2"),
        ({"bias": torch.ones(6)}, r"bias must be \[6\] of torch.float16"),
        ({"n": 5}, "1 <= n <= m"),
        ({"activation": "tanh"}, "activation must be"),
    ],
)
def test_wrong_arguments_of_a_product(change: dict[str, Any], words: str) -> None:
    assert product().shape == (2, 6)
    with pytest.raises(RuntimeError, match=words):
        product(**change)


# -------------------------------------------------------------------------------------------------- epilogue


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_epilogue(dtype: torch.dtype) -> None:
    y, scales, bias = torch.randn(3, 4, 11).to(dtype), torch.rand(11), torch.randn(11).to(dtype)
    for s, b, activation in itertools.product((None, scales), (None, bias), ("none", "relu", "gelu", "silu")):
        expected = y.float() if s is None else y.float() * s
        expected = expected if b is None else expected + b.float()
        expected = expected if activation == "none" else getattr(F, activation)(expected)
        assert torch.equal(nmsparse.epilogue(y, s, b, activation), expected.to(dtype))
        for own in (y.clone(), y.transpose(0, 2).clone().transpose(0, 2)):
            nmsparse.epilogue_(own, s, b, activation)
            assert torch.equal(own, expected.to(dtype))


def test_epilogue_has_pytorchs_gradients() -> None:
    y, bias, scales = torch.randn(5, 7), torch.randn(7), torch.rand(7)
    for activation in ("none", "relu", "gelu", "silu"):
        mine, theirs = ([t.clone().requires_grad_() for t in (y, bias)] for _ in range(2))
        nmsparse.epilogue(mine[0], scales, mine[1], activation).square().sum().backward()
        before = theirs[0] * scales + theirs[1]
        (before if activation == "none" else getattr(F, activation)(before)).square().sum().backward()
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_wrong_arguments_of_an_epilogue() -> None:
    y = torch.ones(3, 4)
    for arguments, words in (
        ((y.double(), None, None, "none"), "y must be one of"),
        ((y, torch.ones(3), None, "none"), r"scales must be \[4\]"),
        ((y, None, torch.ones(4).half(), "none"), r"bias must be \[4\] of torch.float32"),
        ((y, None, None, "elu"), "activation must be"),
    ):
        for op in (nmsparse.epilogue, nmsparse.epilogue_):
            with pytest.raises(RuntimeError, match=words):
                op(*arguments)


# ----------------------------------------------------------------------------------------- transposable_pack


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_both_weights_come_back(dtype: torch.dtype, kind: str) -> None:
    for shape in ((4, 4), (8, 20), (12, 8)):
        w = content(shape, dtype, kind, seed=shape[1])
        values, indices, values_t, indices_t, bits = nmsparse.transposable_pack(w)
        assert_same_bits(bits, nmsparse.transposable_bits(w), "bits")
        pruned = nmsparse.apply_bits(w, bits, 1)
        assert_same_bits(nmsparse.decompress(values, indices, 2, 4, shape[1], 1), pruned, "w")
        back = nmsparse.decompress(values_t, indices_t, 2, 4, shape[0], 1)
        assert_same_bits(back, pruned.T.contiguous(), "w.T")


def test_zeros_keep_their_places() -> None:
    """The mask decides, not what is zero: a tile of zeros is packed as one of ones is."""
    of_zeros, of_ones = (nmsparse.transposable_pack(f(4, 8)) for f in (torch.zeros, torch.ones))
    for i in (1, 3, 4):
        assert torch.equal(of_zeros[i], of_ones[i])


def test_transposable_pack_passes_gradients_where_weights_are_kept() -> None:
    w = torch.randn(8, 12, requires_grad=True)
    values, _, values_t, _, bits = nmsparse.transposable_pack(w)
    (values.sum() + 2 * values_t.sum()).backward()
    assert torch.equal(w.grad, 3.0 * nmsparse.unpack_bits(bits, 12, 1))
