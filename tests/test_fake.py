"""Without data: fake and meta tensors, torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DTYPES
from samples import LAYOUTS, assert_same_bits, content, lay_out
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import nmsparse_ext as nms
from nmsparse_ext import ops

# Public functions of one weight; each returns tensors.
FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "nm_mask": lambda w: nms.nm_mask(w, "2:4"),
    "nm_mask bits": lambda w: nms.nm_mask(w, "2:4", bits=True),
    "nm_mask flat": lambda w: nms.nm_mask(w, "2:4", grouping="flat"),
    "nm_mask of a Pattern": lambda w: nms.nm_mask(w, nms.Pattern(1, 4)),
    "nm_prune": lambda w: nms.nm_prune(w, "2:4"),
    "nm_prune dim 0": lambda w: nms.nm_prune(w, "3:7", dim=0, remainder="pad"),
    "nm_prune bits": lambda w: nms.nm_prune(w, "2:4", return_bits=True),
    "nm_prune out": lambda w: nms.nm_prune(w, "2:4", out=torch.empty_like(w)),
    "nm_prune flat": lambda w: nms.nm_prune(w, "2:4", grouping="flat"),
    "nm_prune_": lambda w: nms.nm_prune_(w.clone(), "2:4", return_bits=True),
    "apply": lambda w: ops.apply_bits(w, nms.nm_mask(w, "2:4", bits=True)),
    "pack": lambda w: ops.pack(w, "4:8"),
    "pack and unpack": lambda w: ops.unpack(*ops.pack(w, "2:4"), "2:4", k=w.shape[1]),
    "pack_bits": lambda w: ops.pack_bits(w > 0),
    "unpack_bits": lambda w: ops.unpack_bits(ops.pack_bits(w > 0), w.shape[1]),
    "transposable_mask": lambda w: nms.transposable_mask(w),
    "add_pruned_": lambda w: ops.add_pruned_(
        torch.ones_like(w), w, nms.nm_mask(w, "2:4", bits=True), alpha=0.5, scale=torch.ones(())
    ),
    "sad_into": lambda w: ops.sad_into(w > 0, w > 1, torch.zeros((), dtype=torch.int64)),
}


def leaves(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fake_results_look_like_real_ones(name: str) -> None:
    for layout in LAYOUTS:
        w = lay_out(torch.randn(8, 16), layout)
        real = leaves(FUNCTIONS[name](w))
        with FakeTensorMode() as mode:
            fake = leaves(FUNCTIONS[name](mode.from_tensor(w)))
        for r, f in zip(real, fake, strict=True):
            assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride()), layout


@pytest.mark.parametrize("name", ["nm_mask", "nm_prune", "nm_prune bits", "nm_prune_", "pack"])
def test_fake_cuda_tensors_need_no_gpu(name: str) -> None:
    with FakeTensorMode():
        for result in leaves(FUNCTIONS[name](torch.empty(8, 16, device="cuda"))):
            assert result.device == torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_meta_tensors(dtype: torch.dtype) -> None:
    w = torch.empty(8, 16, dtype=dtype, device="meta")
    pruned, bits = nms.nm_prune(w, "2:4", return_bits=True)
    assert (pruned.shape, pruned.dtype, pruned.device.type) == (w.shape, dtype, "meta")
    assert (bits.shape, bits.dtype) == ((8, 2), torch.uint8)
    assert nms.nm_mask(w, "2:4").dtype == torch.bool


def test_fake_kernels_refuse_what_kernels_refuse() -> None:
    with FakeTensorMode():
        w = torch.empty(4, 6)
        with pytest.raises(RuntimeError, match="multiple of m"):
            torch.ops.nmsparse.prune(w, 2, 4, 1, False)
        with pytest.raises(RuntimeError, match="1 <= n <= m <= 64"):
            torch.ops.nmsparse.mask_bits(w, 5, 4, 1, True)
        with pytest.raises(RuntimeError, match="dim must be in"):
            torch.ops.nmsparse.compress(w, 2, 4, 2, True)
        with pytest.raises(RuntimeError, match="bits must have shape"):
            torch.ops.nmsparse.apply_bits(w, torch.empty(4, 2, dtype=torch.uint8), 1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compile_in_one_graph(name: str) -> None:
    function = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    w = torch.randn(8, 16)
    for actual, expected in zip(leaves(compiled(w)), leaves(function(w)), strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compile_with_dynamic_shapes(name: str) -> None:
    function = FUNCTIONS[name]
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(function, fullgraph=True, backend=count, dynamic=True)
    for shape in ((8, 16), (12, 24), (20, 40)):
        w = torch.randn(shape)
        for actual, expected in zip(leaves(compiled(w)), leaves(function(w)), strict=True):
            assert_same_bits(actual, expected)
    assert graphs == 1, "another shape must not mean another graph"


def test_compile_differentiates() -> None:
    weight = torch.randn(8, 16)

    def loss(w: Tensor) -> Tensor:
        values, indices = ops.pack(w, "2:4")
        dense = ops.unpack(values, indices, "2:4", k=16)
        return ((nms.nm_prune(w, "1:4") + dense) * weight).sum()

    eager, traced = torch.randn(8, 16, requires_grad=True), None
    traced = eager.detach().clone().requires_grad_()
    loss(eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(traced).backward()
    assert_same_bits(traced.grad, eager.grad)


def test_compile_sees_writes() -> None:
    def step(w: Tensor) -> Tensor:
        before = w.sum()
        nms.nm_prune_(w, "2:4")
        return w.sum() - before

    eager = torch.ones(4, 8)
    traced = eager.clone()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert compiled(traced).item() == step(eager).item() == -16.0
    assert_same_bits(traced, eager)


def test_compile_with_the_default_backend() -> None:
    def forward(w: Tensor) -> tuple[Tensor, Tensor]:
        # No arithmetic of its own: code for that would first be compiled, and take longer than all the rest.
        return nms.nm_prune(w.t(), "2:4", return_bits=True)

    w = torch.randn(16, 8)
    compiled = torch.compile(forward, fullgraph=True)
    for actual, expected in zip(compiled(w), forward(w), strict=True):
        assert_same_bits(actual, expected)


class Masked(torch.nn.Module):
    """A linear layer that prunes its weight in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, nms.nm_prune(self.weight, "2:4"))


def test_export() -> None:
    model, x = Masked(), torch.randn(3, 16)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    assert any("nmsparse.prune" in str(node.target) for node in program.graph.nodes)
    for batch in (3, 5):
        x = torch.randn(batch, 16)
        torch.testing.assert_close(program.module()(x), model(x))


def test_export_with_a_dynamic_weight() -> None:
    class Pack(torch.nn.Module):
        def forward(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            values, indices = ops.pack(w, "2:4")
            return values, indices, ops.unpack(values, indices, "2:4", k=w.shape[1])

    groups = torch.export.Dim("groups", min=2)
    program = torch.export.export(Pack(), (torch.randn(4, 16),), dynamic_shapes={"w": {1: 4 * groups}})
    w = content((4, 40), torch.float32, "normal", seed=1)
    for actual, expected in zip(program.module()(w), Pack()(w), strict=True):
        assert_same_bits(actual, expected)
