"""Stacks of packed matrices [experts, ...]: products with all of them, and one matrix after the other."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from samples import assert_same_bits
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext import engines
from nmsparse_ext._as_on_a_gpu import as_on_a_gpu
from nmsparse_ext._build import extension
from nmsparse_ext.registry import register_module
from nmsparse_ext.tensor import NMTensor

ENGINES = ("decompress", *(("cpu-expert-panels",) if extension is not None else ()))
GROUPED_MM = getattr(F, "grouped_mm", getattr(torch, "_grouped_mm", None))


def stack(engine: str, shape: tuple[int, int, int], dim: int, keep: str = "both") -> tuple[Tensor, NMTensor]:
    w = nms.nm_prune(torch.randn(shape), "2:4", dim=dim)
    return w, nms.compress(w, "2:4", dim=dim).with_engine(engine, keep=keep)  # type: ignore[arg-type]


def test_no_experts() -> None:
    weight = nms.compress(torch.zeros(0, 8, 16), "2:4", dim=2)
    assert weight.to_dense().shape == (0, 8, 16)
    assert torch.bmm(torch.zeros(0, 3, 16), weight.transpose(1, 2)).shape == (0, 3, 8)
    assert torch.bmm(torch.zeros(0, 3, 8), weight).shape == (0, 3, 16)


@pytest.mark.skipif(extension is None, reason="panels are for the compiled extension")
def test_engine_of_stacks() -> None:
    w = nms.nm_prune(torch.randn(3, 16, 8), "2:4", dim=2)
    assert nms.compress(w, "2:4", dim=2).engine == "cpu-expert-panels"
    # A weight [out, in, k] of a convolution looks like [experts, in, out].
    assert nms.compress(w.mT.contiguous(), "2:4", dim=1).engine != "cpu-expert-panels"
    with pytest.raises(ValueError, match="groups run from one to the next"):
        nms.compress(nms.nm_prune(torch.randn(4, 3, 5), "2:4", dim=0), "2:4", dim=0).with_engine(
            "cpu-expert-panels"
        )
    with pytest.raises(ValueError, match="stacks of matrices"):
        nms.compress(w[0], "2:4").with_engine("cpu-expert-panels")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows", [32, 24])
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_products(engine: str, dim: int, rows: int, grad: bool) -> None:
    shape = (3, 16, rows) if dim == 1 else (3, rows, 16)
    for keep in ("both", "engine"):
        check_products(*stack(engine, shape, dim, keep), grad)


def check_products(w: Tensor, weight: NMTensor, grad: bool) -> None:
    shape = w.shape
    x = torch.randn(3, 5, shape[1], requires_grad=grad)
    y = torch.randn(3, 5, shape[2], requires_grad=grad)
    bias = torch.randn(3, 1, shape[2])
    products = [
        (x, lambda w: torch.bmm(x, w)),
        (x, lambda w: x @ w),
        (x, lambda w: torch.baddbmm(bias, x, w)),
        (x, lambda w: torch.baddbmm(bias, x, w, beta=0.5, alpha=2)),
        (x, lambda w: torch.matmul(x[0], w)),
        (x, lambda w: torch.matmul(x.expand(2, 3, 5, shape[1]), w)),
        (y, lambda w: y @ w.mT),
        (y, lambda w: torch.bmm(y, w.transpose(1, 2))),
        (y, lambda w: torch.bmm(w, y.mT)),
        (x, lambda w: x[1] @ w[1]),
        (y, lambda w: F.linear(y[2], w[2])),
        (y, lambda w: F.linear(y[2], w[torch.tensor(2)])),
        (x, lambda w: torch.stack([a @ b for a, b in zip(x, w.unbind(), strict=True)])),
        (x, lambda w: torch.stack([a @ b for a, b in zip(x, w, strict=True)])),
        (x, lambda w: x[:2] @ w[:2]),
    ]
    for number, (leaf, product) in enumerate(products):
        got, expected = product(weight), product(w)
        torch.testing.assert_close(got, expected, msg=lambda text, n=number: f"{n}: {text}")
        if grad:
            pair = (torch.autograd.grad(out.sin().sum(), leaf)[0] for out in (got, expected))
            # The sine multiplies the rounding of what goes in.
            torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_below_torch_function(engine: str, dim: int) -> None:
    w, weight = stack(engine, (3, 16, 32), dim)
    x, bias = torch.randn(3, 5, 16, requires_grad=True), torch.randn(3, 5, 32)
    with torch._C.DisableTorchFunctionSubclass():
        pairs = [(torch.bmm(x, weight), torch.bmm(x, w)), (torch.baddbmm(bias, x, weight), x @ w + bias)]
    for got, expected in pairs:
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x)[0] for out in (got, expected)))


@pytest.mark.skipif(GROUPED_MM is None, reason="this torch has no grouped_mm")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_grouped_mm(engine: str, transposed: bool, grad: bool) -> None:
    w, weight = stack(engine, (3, 32, 16) if transposed else (3, 16, 32), 2 if transposed else 1)
    x = torch.randn(12, 16, requires_grad=grad)
    for ends in ([4, 4, 12], [0, 5, 9]):
        offs = torch.tensor(ends, dtype=torch.int32)
        starts = [0, *ends[:-1]]
        right = w.mT if transposed else w
        expected = torch.cat([x[a:b] @ right[e] for e, (a, b) in enumerate(zip(starts, ends, strict=True))])
        got = GROUPED_MM(x, weight.mT if transposed else weight, offs=offs)
        torch.testing.assert_close(got[: ends[-1]], expected)
        if grad:
            torch.testing.assert_close(
                *(torch.autograd.grad(out[: ends[-1]].sin().sum(), x)[0] for out in (got, expected))
            )
    with pytest.raises(NotImplementedError, match="mat_b"):
        GROUPED_MM(weight, x.expand(3, 12, 16).mT)


@pytest.mark.skipif(extension is None, reason="panels are for the compiled extension")
@pytest.mark.parametrize("keep", ["both", "engine"])
def test_matrices_share_the_panels(keep: str) -> None:
    for rows in (32, 24):
        w, weight = stack("cpu-expert-panels", (3, rows, 16), 2, keep)
        assert_same_bits(weight.to_dense(), w)
        assert_same_bits(weight.values, nms.compress(w, "2:4", dim=2).values)
        assert_same_bits(weight.indices, nms.compress(w, "2:4", dim=2).indices)
        for index, one in enumerate(weight):
            assert (one.engine, one.keep, one.shape) == ("cpu-panels", keep, (rows, 16))
            for form, whole in zip(one.forms(), weight.forms(), strict=True):
                assert form.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            assert_same_bits(one.to_dense(), w[index])
            # The same panels as of the matrix alone.
            for form, alone in zip(one.forms(), nms.compress(w[index], "2:4").forms(), strict=True):
                assert_same_bits(form.contiguous(), alone)
        weight[1].copy_(w[0])
        assert_same_bits(weight.to_dense()[1], w[0])
        x = torch.randn(3, 4, 16)
        torch.testing.assert_close(x @ weight.mT, x @ torch.stack([w[0], w[0], w[2]]).mT)


@pytest.mark.parametrize("engine", ENGINES)
def test_refusals(engine: str) -> None:
    _, weight = stack(engine, (3, 16, 32), 1)
    x = torch.randn(3, 5, 16)
    with pytest.raises(RuntimeError, match="matrix"):
        F.linear(x, weight)
    with pytest.raises(NotImplementedError, match=r"aten\.select"):
        weight[:, 0]
    with pytest.raises(IndexError, match="out of"):
        weight[3]
    with pytest.raises(NotImplementedError, match="aten"):
        weight[torch.tensor([0, 1])]
    with pytest.raises(RuntimeError, match="stack of 3"):
        torch.randn(2, 5, 16) @ weight
    with pytest.raises(RuntimeError, match="3-D"):
        torch.bmm(x, weight[0])


class Experts(nn.Module):
    """Mixture of experts, each token by one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 32) / 4)
        self.down = nn.Parameter(torch.randn(3, 16, 32) / 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(torch.bmm(x, self.up))
        return torch.stack([F.linear(h[e], self.down[e]) for e in range(3)])


def experts() -> tuple[Experts, Experts]:
    register_module(Experts, {"up": 1, "down": 2})
    dense = Experts().requires_grad_(False)
    nms.nm_prune_(dense.up.data, "2:4", dim=1)
    nms.nm_prune_(dense.down.data, "2:4", dim=2)
    return dense, nms.convert(copy.deepcopy(dense), policy="always")


def test_convert() -> None:
    dense, packed = experts()
    assert isinstance(packed.up, NMTensor)
    assert packed.up.engine == packed.down.engine == ENGINES[-1]
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(packed(x), dense(x))
    torch.testing.assert_close(copy.deepcopy(packed)(x), dense(x))
    other = experts()[1]
    other.load_state_dict(dense.state_dict())
    torch.testing.assert_close(other(x), dense(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(packed(x), dense(x), atol=5e-2, rtol=5e-2)


def test_compile_and_export() -> None:
    torch.compiler.reset()
    dense, packed = experts()
    x = torch.randn(3, 5, 16)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), dense(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), dense(x), atol=5e-2, rtol=5e-2)
    program = torch.export.export(packed, (x,))
    torch.testing.assert_close(program.module()(x), dense(x))


def test_a_stack_that_was_taken_for_a_convolutions_weight() -> None:
    """By its shape alone it could be one; as a stack it multiplies all the same."""
    w = torch.randn(48, 32, 16)
    packed, x = nms.compress(w, "2:4", dim=1, prune=True), torch.randn(48, 5, 32)
    torch.testing.assert_close(torch.bmm(x, packed), torch.bmm(x, packed.to_dense()))
    torch.testing.assert_close(torch.matmul(x, packed), torch.matmul(x, packed.to_dense()))


@pytest.mark.skipif(extension is None, reason="panels are for the compiled extension")
@pytest.mark.parametrize("dim", [1, 2])
def test_a_stack_stays_one_on_a_gpu(dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, what was taken for a convolution's weight would be held dense, too."""
    stack = nms.compress(torch.randn(4, 32, 64), "2:4", dim=dim, prune=True).with_engine("cpu-expert-panels")
    not_there = dataclasses.replace(engines.ENGINES[stack.engine], why_not=lambda weight: "it is on a GPU")
    monkeypatch.setitem(engines.ENGINES, stack.engine, not_there)
    with as_on_a_gpu(tmp_path / "crossovers.json"):
        assert stack.to(torch.bfloat16).engine == "decompress"
        conv = nms.compress(torch.randn(32, 64, 3), "2:4", prune=True)
        assert conv.to(torch.bfloat16).engine == "cuda-conv"
