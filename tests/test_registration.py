"""What the dispatcher knows of every op: schema, kernels, fakes, gradients."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from samples import assert_same_bits, content, lay_out
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._pytree import tree_leaves, tree_map

import nmsparse_ext as nms
from nmsparse_ext import _lt_layout as lt
from nmsparse_ext import _ops, ops, reference
from nmsparse_ext.conv_panels import conv_pack

LIBRARY_CPP = Path(__file__).parents[1] / "csrc" / "library.cpp"
OPS = list(_ops.MUTATED_ARGS)


def normalised(schema: str) -> str:
    """A schema with its alias sets named in order, whatever they were called."""
    names: dict[str, str] = {}
    return re.sub(r"\((\w+)!\)", lambda m: f"({names.setdefault(m[1], chr(97 + len(names)))}!)", schema)


def op(name: str) -> Any:
    return getattr(torch.ops.nmsparse, name).default


# ---------------------------------------------------------------------------------------------------- schemas


def test_library_cpp_and_the_reference_agree() -> None:
    """The same ops with the same schemas in the same order, in C++ and in Python."""
    in_cpp = [
        "".join(re.findall(r'"([^"]*)"', literals))  # C++ joins neighbouring literals, too
        for literals in re.findall(r'm\.def\(((?:\s*"[^"]*")+)\)', LIBRARY_CPP.read_text())
    ]
    assert [normalised(schema) for schema in in_cpp] == [normalised(_ops.schema_of(name)) for name in OPS]


@pytest.mark.parametrize("name", OPS)
def test_registered_schema(name: str) -> None:
    assert normalised(str(op(name)._schema)) == normalised(f"nmsparse::{_ops.schema_of(name)}")


@pytest.mark.parametrize("name", OPS)
def test_every_op_runs_on_devices_without_a_kernel_of_their_own(name: str) -> None:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    assert registered(f"nmsparse::{name}", "CompositeExplicitAutograd")
    assert registered(f"nmsparse::{name}", "Meta")


@pytest.mark.parametrize("name", OPS)
def test_reference_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(reference, name))


# ---------------------------------------------------------------------------------------------------- opcheck


def sample_calls() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for every op: several dtypes, layouts, dims, remainders; some require grad."""
    weights: list[tuple[Tensor, int, int, int, bool]] = [
        (torch.randn(4, 8), 2, 4, 1, False),
        (torch.randn(4, 8, requires_grad=True), 1, 4, 0, False),
        (torch.randn(10, dtype=torch.float64, requires_grad=True), 2, 4, 0, True),
        (lay_out(content((2, 9, 3, 3), torch.bfloat16, "ties", 1), "channels_last"), 4, 8, 1, True),
        (lay_out(content((3, 4, 16), torch.float16, "normal", 2), "every second"), 8, 16, 2, False),
        (content((6, 8), torch.int8, "ties", 3), 3, 4, 1, False),
        (content((2, 2, 2, 2, 8), torch.float8_e4m3fn, "ties", 4).transpose(0, 4), 1, 2, 0, False),
        (torch.randn(1, 8).expand(3, 8), 2, 4, 1, False),
        (torch.empty(0, 8), 2, 4, 1, False),
    ]
    writable = [(w.detach().clone(), *rest) for w, *rest in weights]
    masks = [(torch.rand(w.shape) < 0.5, dim) for w, _, _, dim, _ in writable]
    with_bits = [(w, reference.mask_bits(w.detach(), n, m, dim, pad), dim) for w, n, m, dim, pad in weights]
    packed = [
        (w, *reference.compress(w.detach(), n, m, dim, pad), n, m, dim) for w, n, m, dim, pad in weights
    ]
    floats = [(w.detach(), bits, dim) for w, bits, dim in with_bits if w.dtype.itemsize > 1]
    return {
        "prune": list(weights),
        "prune_out": [
            (w, n, m, dim, pad, torch.empty_like(w), reference.mask_bits(w, n, m, dim, pad) if pad else None)
            for w, n, m, dim, pad in writable
        ],
        "prune_": [
            (w, n, m, dim, pad, reference.mask_bits(w, n, m, dim, pad) if pad else None)
            for w, n, m, dim, pad in writable
        ],
        "mask_bits": list(weights),
        "pack_bits": list(masks),
        "unpack_bits": [(bits, w.shape[dim], dim) for w, bits, dim in with_bits],
        "apply_bits": list(with_bits),
        "apply_bits_": [(w.detach().clone(), bits, dim) for w, bits, dim in with_bits],
        "add_pruned_": [
            (torch.randn(w.shape, dtype=dtype), w, bits, dim, 0.5, scale)
            for w, bits, dim in floats
            for dtype, scale in ((torch.float32, None), (w.dtype, torch.tensor(2.0)))
        ],
        "sad": [(a, ~a) for a, _ in masks if a.is_contiguous()] + [(bits, ~bits) for _, bits, _ in with_bits],
        "sad_out": [(bits, ~bits, torch.tensor(0)) for _, bits, _ in with_bits],
        "find_violation": list(weights),
        "compress": list(weights),
        "decompress": [
            (values.requires_grad_(w.requires_grad), indices, n, m, w.shape[dim], dim)
            for w, values, indices, n, m, dim in packed
        ],
        "check_indices": [(indices, n, m, w.shape[dim]) for w, _, indices, n, m, dim in packed],
        "transposable_bits": [(torch.randn(8, 12),), (torch.randn(12, 4, dtype=torch.bfloat16).T,)],
        "transposable_pack": [
            (torch.randn(8, 12, requires_grad=True),),
            (torch.randn(12, 4, dtype=torch.bfloat16).T,),
            (content((4, 20), torch.int8, "ties", 5),),
            (torch.empty(0, 8),),
        ],
        **list_calls(),
        **panel_calls(),
        **optim_calls(),
        **lt_calls(),
        **product_calls(),
    }


def lt_calls() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for cuSPARSELt's ops: every dtype, ragged tokens, a batch, results of another dtype."""
    random = torch.Generator().manual_seed(0)
    names = ("lt_pack", "lt_prune_pack", "lt_compress", "lt_matmul")
    calls: dict[str, list[tuple[Any, ...]]] = {name: [] for name in names}
    for dtype, out_dtype, activation in (
        (torch.float32, None, "relu"),
        (torch.bfloat16, None, "none"),
        (torch.float16, None, "none"),
        (torch.int8, torch.int32, "none"),
        (torch.int8, None, "gelu"),
        (torch.float8_e4m3fn, torch.float16, "none"),
    ):
        w = torch.randint(-3, 4, (2, 32, 64), generator=random).to(dtype)
        x = torch.randint(-3, 4, (2, 5, 64), generator=random).to(dtype)
        pattern = lt.hardware_pattern(dtype)
        calls["lt_pack"].append((*reference.compress(w[0], pattern.n, pattern.m, 1, False), 64, "cutlass"))
        calls["lt_prune_pack"].append((w[0], "cutlass"))
        bias = torch.ones(32).to(lt.bias_dtype(dtype, out_dtype or dtype))
        scales = torch.full((32,), 0.5) if dtype == torch.int8 else None
        for one_w, one_x in ((w, x), (w[0], x[0])):
            size = lt.portable_bytes(32, 64, dtype, one_w.numel() // (32 * 64))
            calls["lt_compress"].append((one_w, size + 16))
            blob = reference.lt_compress(one_w, size)
            calls["lt_matmul"].append((one_x, blob, bias, scales, 0.5, 32, activation, out_dtype, -1, 1, 0))
    return calls


def product_calls() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for the products of packed weights, and for what follows a product."""
    calls: dict[str, list[tuple[Any, ...]]] = {"small_batch_linear": [], "epilogue": [], "epilogue_": []}
    for n, m, rows, k, dtype, activation in (
        (2, 4, 20, 48, torch.bfloat16, "none"),
        (1, 16, 7, 40, torch.float16, "relu"),
        (3, 5, 5, 33, torch.float16, "none"),
        (2, 4, 6, 16, torch.bfloat16, "silu"),
    ):
        for int8 in (False, True):
            w = torch.randint(-4, 5, (rows, k)).to(torch.int8 if int8 else dtype)
            calls["small_batch_linear"].append(
                (
                    # Small integers: their sums are exact in any order.
                    torch.randint(-4, 5, (2, 3, k)).to(dtype).requires_grad_(),
                    *reference.compress(w, n, m, 1, True),
                    torch.full((rows,), 0.5) if int8 else None,
                    torch.randint(-4, 5, (rows,)).to(dtype).requires_grad_() if n == 2 else None,
                    n,
                    m,
                    k,
                    activation,
                )
            )
    for dtype, activation in ((torch.float32, "gelu"), (torch.bfloat16, "relu"), (torch.float16, "none")):
        y, bias = torch.randn(3, 2, 5).to(dtype), torch.randn(5).to(dtype)
        for scales in (None, torch.rand(5)):
            calls["epilogue"].append(
                (y.clone().requires_grad_(), scales, bias.clone().requires_grad_(), activation)
            )
            calls["epilogue_"].append((y.transpose(0, 1).clone(), scales, bias, activation))
    return calls


def optim_calls() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for the optimizer steps: a sparse weight, with a parameter of its own, and one without."""
    calls: dict[str, list[tuple[Any, ...]]] = {"sgd_": [], "adamw_": []}
    for dtype in (torch.float32, torch.bfloat16):
        weights, *states = ([torch.rand(6, 8), torch.rand(5)] for _ in range(4))
        grads = [torch.randn(6, 8).to(dtype), torch.randn(5)]
        one = torch.tensor(1.0)
        sparse = (
            [torch.zeros(6, 8, dtype=dtype)],
            [torch.ones(6, 1, dtype=torch.uint8)],
            [torch.tensor(0)],
            [2, 4, 1],
            "gradient",
            0.1,
        )
        calls["sgd_"].append(
            (weights, grads, states[0], *sparse, 0.1, one, 0.9, 0.0, 0.0, False, False, False, one, one * 0)
        )
        calls["adamw_"].append(
            (
                weights,
                grads,
                *states,
                [one, one],
                *sparse,
                0.1,
                None,
                0.9,
                0.99,
                1e-8,
                0.0,
                True,
                False,
                None,
                None,
            )
        )
    return calls


def list_calls() -> dict[str, list[tuple[Any, ...]]]:
    """The ops on lists: none, one, and several weights of other shapes and group dims."""
    calls: dict[str, list[tuple[Any, ...]]] = {
        "foreach_add_pruned": [],
        "foreach_apply_bits": [],
        "foreach_reselect": [],
        "foreach_add_kept": [],
        "foreach_vote": [],
        "group_thresholds": [],
    }
    wide = [(torch.randn(8, 16), 1), (torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last), 1)]
    for weights, dtype in (([], None), (wide, torch.float32), (wide, torch.bfloat16)):
        ws, dims = [w for w, _ in weights], [dim for _, dim in weights]
        bits = [reference.mask_bits(w, 2, 4, dim, False) for w, dim in weights]
        grads = [torch.randn_like(w).to(dtype) for w in ws]
        sums = [torch.empty_like(w) for w in ws]
        outs = [torch.empty_like(w, dtype=dtype) for w in ws]
        alphas, ns, ms = [0.5] * len(ws), [1] * len(ws), [4] * len(ws)
        changes, places = torch.zeros(3, dtype=torch.int64), list(range(1, len(ws) + 1))
        calls["foreach_add_pruned"].append((grads, ws, bits, dims, alphas, torch.tensor(2.0), sums))
        calls["foreach_add_kept"].append((grads, ws, bits, dims, alphas, torch.tensor(2.0), sums))
        thresholds = [reference.group_thresholds(w, 4, dim) for w, dim in weights]
        counts = torch.zeros(len(ws), dtype=torch.int64)
        calls["foreach_vote"].append((ws, thresholds, [4] * len(ws), ms, dims, counts))
        calls["group_thresholds"] += [(w, 4, dim) for w, dim in weights]
        calls["foreach_apply_bits"].append((ws, bits, dims, outs))
        calls["foreach_reselect"].append((ws, ns, ms, dims, outs, bits, changes, places, None))
    return calls


def panel_calls() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for the ops of the panel form, whose patterns and dtypes are fewer."""
    packed = [
        (*reference.compress(torch.randn(rows, k).to(dtype), n, m, 1, True), n, m, rows, k)
        for n, m, rows, k, dtype in (
            (2, 4, 20, 48, torch.float32),
            (1, 16, 16, 40, torch.bfloat16),
            (3, 5, 7, 33, torch.float16),
            (4, 8, 5, 8, torch.float64),
            (2, 4, 0, 8, torch.float32),
        )
    ]
    int8 = [
        (*reference.compress(content((rows, k), torch.int8, "ties", k), n, m, 1, True), n, m, rows, k)
        for n, m, rows, k in ((2, 4, 20, 80), (1, 16, 5, 33), (3, 5, 0, 8))
    ]
    packed += int8
    panels = [
        (*reference.panel_pack(values, indices, n, m, k), n, m, rows, k)
        for values, indices, n, m, rows, k in packed
    ]
    return {
        "panel_pack": [(values, indices, n, m, k) for values, indices, n, m, _, k in packed],
        "panel_restore": list(panels),
        "panel_unpack": list(panels),
        "panel_linear": [
            # Small integers: their sums are exact in any order.
            (
                torch.randint(-4, 5, (2, 3, k)).to(values.dtype).requires_grad_(grad),
                values.round(),
                indices,
                bias.to(values.dtype).requires_grad_(grad) if grad else None,
                n,
                m,
                rows,
                k,
                activation,
            )
            for values, indices, n, m, rows, k in panels
            if values.dtype != torch.int8
            for bias in (torch.randint(-4, 5, (rows,)),)
            for grad, activation in ((True, "none"), (False, "relu"))
        ],
        "panel_matmul": [
            (
                torch.randint(-4, 5, (2, 3, rows)).to(values.dtype).requires_grad_(),
                values.round(),
                indices,
                n,
                m,
                rows,
                k,
            )
            for values, indices, n, m, rows, k in panels
            if values.dtype != torch.int8
        ],
        "panel_conv": list(conv_calls()),
        "panel_linear_int8": [
            (
                torch.randn(2, 3, k).to(dtype).requires_grad_(grad),
                *reference.panel_pack(values, indices, n, m, k),
                torch.rand(-(-rows // 16), 16),
                F.pad(values.sum(1, dtype=torch.int32), (0, -rows % 16)).view(-1, 16),
                torch.randn(rows).to(dtype).requires_grad_() if grad else None,
                n,
                m,
                rows,
                k,
                activation,
            )
            for values, indices, n, m, rows, k in int8
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
            for grad, activation in ((True, "none"), (False, "relu"))
        ],
    }


def conv_calls() -> Iterator[tuple[Any, ...]]:
    """Arguments for panel_conv: 1 to 3 dims, groups, all kinds of geometry."""
    for n, m, shape, places, dtype, geometry in (
        (2, 4, (20, 8, 3, 3), (6, 5), torch.float32, ([2, 1], [1, 1, 1, 1], [1, 1], 1)),
        (1, 16, (32, 20, 3), (9,), torch.bfloat16, ([1], [1, 2], [2], 2)),
        (3, 5, (7, 6, 1, 2, 2), (3, 4, 2), torch.float16, ([1, 1, 1], [0, 1, 2, 0, 0, 1], [1, 1, 1], 1)),
        (4, 8, (5, 8, 1, 1), (2, 3), torch.float64, ([1, 1], [0, 0, 0, 0], [1, 1], 1)),
    ):
        rows, k, *kernel = shape
        values, indices = reference.compress(torch.randn(shape).to(dtype), n, m, 1, True)
        panels = conv_pack(values.round(), indices, nms.Pattern(n, m), k=k)
        for grad, activation, batch in ((True, "none", 2), (False, "relu", 2), (False, "none", 0)):
            x = torch.randint(-4, 5, (batch, *places, geometry[-1] * k)).to(dtype).requires_grad_(grad)
            bias = torch.randint(-4, 5, (rows,)).to(dtype).requires_grad_(grad) if grad else None
            y = reference.panel_conv(
                x.detach(), *panels, None, None, n, m, rows, k, kernel, *geometry, "none"
            )
            residual = torch.randint(-4, 5, y.shape).to(dtype).requires_grad_(grad) if n > 1 else None
            yield (x, *panels, bias, residual, n, m, rows, k, kernel, *geometry, activation)


SAMPLES = sample_calls()


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    for arguments in SAMPLES[name]:
        # PyTorch's own check multiplies by a number, which float8 cannot.
        if not any(isinstance(a, Tensor) and a.dtype == torch.float8_e4m3fn for a in arguments):
            torch.library.opcheck(op(name), arguments)


@pytest.mark.parametrize("name", OPS)
def test_fallback_kernel_gives_the_same(name: str) -> None:
    """The kernel of devices without one of their own, reached through the dispatcher."""
    fallback = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    for arguments in SAMPLES[name]:
        mine, theirs = (
            tree_map(lambda a: a.detach().clone() if isinstance(a, Tensor) else a, list(arguments))
            for _ in range(2)
        )
        expected = op(name)(*mine)
        actual = op(name).redispatch(fallback, *theirs)
        for a, b in zip(tree_leaves((actual, theirs)), tree_leaves((expected, mine)), strict=True):
            if isinstance(a, Tensor):
                assert_same_bits(a, b, name)


# -------------------------------------------------------------------------------------------------- gradients


def distinct(*shape: int) -> Tensor:
    """A weight whose magnitudes are so far apart that no small step changes the mask."""
    numel = int(torch.tensor(shape).prod())
    values = torch.randperm(numel).double() + 1
    return (values * torch.where(torch.rand(numel) < 0.5, -1.0, 1.0)).view(shape).requires_grad_()


@pytest.mark.parametrize(("shape", "dim"), [((4, 8), 1), ((8, 3), 0), ((1, 4, 2, 2), 1), ((10,), 0)])
def test_gradcheck(shape: tuple[int, ...], dim: int) -> None:
    w = distinct(*shape)
    bits = ops.mask_bits(w.detach(), "2:4", dim=dim, remainder="pad")
    values, indices = (t.detach() for t in ops.pack(w, "2:4", dim=dim, remainder="pad"))
    values.requires_grad_()
    functions = [
        (lambda w: nms.nm_prune(w, "2:4", dim=dim, remainder="pad"), w),
        (lambda w: nms.nm_prune(w, "2:4", remainder="pad", grouping="flat"), w),
        (lambda w: ops.apply_bits(w, bits, dim=dim), w),
        (lambda w: ops.pack(w, "2:4", dim=dim, remainder="pad")[0], w),
        (lambda v: ops.unpack(v, indices, "2:4", k=shape[dim], dim=dim), values),
    ]
    for function, argument in functions:
        assert gradcheck(function, (argument,))
        assert gradgradcheck(function, (argument,))


@pytest.mark.parametrize("encoding", ["3:4", "4:8", "1:16"])
def test_gradcheck_of_other_encodings(encoding: str) -> None:
    w = distinct(3, 18)
    values, indices = (t.detach() for t in ops.pack(w, encoding, remainder="pad"))
    values.requires_grad_()
    assert gradcheck(lambda w: ops.pack(w, encoding, remainder="pad")[0], (w,))
    assert gradcheck(lambda v: ops.unpack(v, indices, encoding, k=18), (values,))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradcheck_of_conv_layouts(memory_format: torch.memory_format) -> None:
    w = distinct(1, 8, 2, 2).detach().contiguous(memory_format=memory_format).requires_grad_()
    assert gradcheck(lambda w: nms.nm_prune(w, "2:4"), (w,))


# ------------------------------------------------------------------------------------------------ odd tensors


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_tensors_that_are_negated_lazily(dtype: torch.dtype) -> None:
    w = content((4, 8), dtype, "normal", seed=1)
    negative = torch._neg_view(w)
    assert negative.is_neg()
    assert torch.equal(nms.nm_mask(negative, "2:4"), nms.nm_mask(w, "2:4"))
    assert torch.equal(nms.nm_prune(negative, "2:4"), -nms.nm_prune(w, "2:4"))
    values, _ = ops.pack(negative, "2:4")
    assert torch.equal(values, -ops.pack(w, "2:4")[0])


def test_inference_mode() -> None:
    with torch.inference_mode():
        w = torch.randn(4, 8)
        expected = nms.nm_prune(w, "2:4")
        nms.nm_prune_(w, "2:4")
        assert torch.equal(w, expected)


def test_rooms_are_there_without_an_import_of_their_own() -> None:
    source = "import nmsparse_ext as nms; nms.train.Rule; nms.deploy.report; assert 'train' in dir(nms)"
    run = subprocess.run(
        [sys.executable, "-c", source], cwd=LIBRARY_CPP.parents[1], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_parameters_give_plain_tensors() -> None:
    pruned = nms.nm_prune(torch.nn.Parameter(torch.randn(4, 8)), "2:4")
    assert type(pruned) is Tensor


# --------------------------------------------------------------------------------------- without an extension

SCRIPT = """
import torch, nmsparse_ext as nms
from nmsparse_ext import _ops, ops
for name in _ops.MUTATED_ARGS:
    print(getattr(torch.ops.nmsparse, name).default._schema)
w = torch.arange(8.0).view(2, 4).requires_grad_()
nms.nm_prune(w, "2:4").sum().backward()
print(w.grad.tolist())
arguments = (w.detach(), 2, 4, 1, False, torch.empty(2, 4), None)
torch.library.opcheck(torch.ops.nmsparse.prune_out.default, arguments)
print(nms.build_info().reference)
"""


def test_pure_pytorch_registers_the_same_ops() -> None:
    environment = {**os.environ, "NMSPARSE_REFERENCE": "1", "PYTHONPATH": str(LIBRARY_CPP.parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    lines = run.stdout.splitlines()
    assert [normalised(line) for line in lines[: len(OPS)]] == [
        normalised(str(op(name)._schema)) for name in OPS
    ]
    assert lines[len(OPS) :] == ["[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]", "True"]
