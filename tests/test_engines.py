"""Every compiled engine gives the reference's bits, for every op, on everything a weight can hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, FLOATS
from engines import CPU_ISAS, Engine
from properties import Weight, for_any, integers, patterns, seeds, weights
from samples import KINDS, LAYOUTS, assert_same_bits, content, lay_out
from torch import Tensor

from nmsparse_ext import reference
from nmsparse_ext._build import extension

pytestmark = pytest.mark.skipif(extension is None, reason="the reference is all there is")


def assert_same(engine: Engine, name: str, *arguments: Any, label: str = "") -> Any:
    """Runs an op on the engine and on the reference; compares results and written arguments."""
    expected_arguments = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    # A clone has another layout where memory overlaps; the ops must not care.
    expected = getattr(reference, name)(*expected_arguments)
    actual = getattr(engine.ops, name)(*arguments)
    label = f"{engine.name} {name} {label}"
    actual_all = [*(actual if isinstance(actual, tuple) else (actual,)), *arguments]
    expected_all = [*(expected if isinstance(expected, tuple) else (expected,)), *expected_arguments]
    for a, b in zip(actual_all, expected_all, strict=True):
        if isinstance(b, Tensor):
            assert_same_bits(a, b, label)
    return actual


def run_all(engine: Engine, w: Tensor, n: int, m: int, dim: int, label: str) -> None:
    """Every op that a weight can be given to."""
    grouping = (n, m, dim, True)
    pruned, bits = assert_same(engine, "prune", w, *grouping, label=label)
    assert pruned.stride() == torch.empty_like(w).stride(), label
    assert_same(engine, "mask_bits", w, *grouping, label=label)
    assert_same(engine, "apply_bits", w, ~bits, dim, label=label)
    mask = assert_same(engine, "unpack_bits", bits, w.shape[dim], dim, label=label)
    assert_same(engine, "pack_bits", mask, dim, label=label)
    assert_same(engine, "sad", bits, bits.flip(0).contiguous(), label=label)
    assert_same(engine, "find_violation", w, *grouping, label=label)
    assert_same(engine, "find_violation", pruned, *grouping, label=label)
    values, indices = assert_same(engine, "compress", w, *grouping, label=label)
    assert_same(engine, "decompress", values, indices, n, m, w.shape[dim], dim, label=label)
    assert_same(engine, "check_indices", indices, n, m, w.shape[dim], label=label)
    out = torch.empty(w.shape, dtype=w.dtype)
    assert_same(engine, "prune_out", w, *grouping, out, torch.empty_like(bits), label=label)
    assert_same(engine, "prune_out", w, *grouping, torch.empty_like(w), None, label=label)
    writable = w.clone()
    assert_same(engine, "prune_", writable, *grouping, torch.empty_like(bits), label=label)
    writable = w.clone()
    assert_same(engine, "apply_bits_", writable, bits, dim, label=label)


@for_any(case=weights())
def test_any_weight(compiled_engine: Engine, case: Weight) -> None:
    run_all(compiled_engine, case.w, case.n, case.m, case.dim, case.label)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_every_vector_width(compiled_engine: Engine, dtype: torch.dtype) -> None:
    for k in range(1, 131):
        kind = KINDS[k % len(KINDS)]
        for n, m in ((2, 4), (4, 8), (1, 16), (8, 32)):
            w = content((3, k), dtype, kind, seed=k)
            for dim, w_dim in ((1, w), (0, w.T), (0, w.T.contiguous())):
                label = f"{dtype} {n}:{m} k={k} dim={dim} {kind}"
                for name in ("prune", "compress", "mask_bits"):
                    assert_same(compiled_engine, name, w_dim, n, m, dim, True, label=label)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pattern(compiled_engine: Engine, dtype: torch.dtype) -> None:
    for m in range(1, 65):
        w = content((4, 2 * m + m // 2), dtype, KINDS[m % len(KINDS)], seed=m)
        # All n for the small m, a few for the others: every kernel changes its ways at most there.
        for n in range(1, m + 1) if m <= 8 else sorted({1, 2, m // 4, m // 2, m // 2 + 1, m - 1, m}):
            label = f"{dtype} {n}:{m}"
            assert_same(compiled_engine, "prune", w, n, m, 1, True, label=label)
            assert_same(compiled_engine, "prune", w.T.contiguous(), n, m, 0, True, label=label)
            assert_same(compiled_engine, "compress", w, n, m, 1, True, label=label)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv_weights_of_every_layout(compiled_engine: Engine, layout: str) -> None:
    for i, dtype in enumerate(DTYPES):
        for dim in range(4):
            kind = KINDS[(i + dim) % len(KINDS)]
            w = lay_out(content((5, 36, 3, 3), dtype, kind, seed=17), layout)
            run_all(compiled_engine, w, 2, 4, dim, f"{dtype} {layout} {kind} dim {dim}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_weights(compiled_engine: Engine, dtype: torch.dtype) -> None:
    """Large enough for several threads, tiles and streaming stores."""
    for n, m, shape in ((2, 4, (300, 1028)), (8, 32, (100, 2080)), (1, 16, (1, 1 << 18))):
        w = content(shape, dtype, "any bits", seed=m)
        for dim, w_dim in ((1, w), (0, w.T.contiguous())):
            for name in ("prune", "compress"):
                assert_same(compiled_engine, name, w_dim, n, m, dim, True, label=f"{dtype} {n}:{m} {dim}")


@pytest.mark.parametrize("n_m", [(2, 4), (1, 16), (8, 32)], ids=str)
def test_weights_larger_than_the_caches(compiled_engine: Engine, n_m: tuple[int, int]) -> None:
    """Large enough for stores that bypass the caches, which want alignment; rows here have every one."""
    n, m = n_m
    for dtype, shape in ((torch.float32, (2049, 2053)), (torch.bfloat16, (2049, 4101))):
        base = torch.empty(shape, dtype=torch.float32).uniform_(-1, 1).to(dtype)
        w = base[1:, 5:]
        out = torch.empty_like(base)[1:, 5:]
        # Computed without writing weights, which other tests compare with the reference.
        bits = compiled_engine.ops.mask_bits(w, n, m, 1, True)
        written = torch.zeros_like(bits)
        compiled_engine.ops.prune_out(w, n, m, 1, True, out, written)
        assert_same_bits(written, bits)
        assert_same_bits(out, reference.apply_bits(w, bits, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposable(compiled_engine: Engine, dtype: torch.dtype, kind: str) -> None:
    for shape in ((4, 4), (8, 60), (64, 132)):
        for layout in LAYOUTS:
            w = lay_out(content(shape, dtype, kind, seed=5), layout)
            assert_same(compiled_engine, "transposable_bits", w, label=f"{dtype} {layout} {kind}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("w_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("grad_dtype", FLOATS, ids=str)
def test_add_pruned(
    compiled_engine: Engine, grad_dtype: torch.dtype, w_dtype: torch.dtype, kind: str
) -> None:
    """Numbers agree to the bit; where the sum is NaN, which NaN is the processor's choice."""
    for k in (1, 7, 8, 33, 130):
        w = content((3, k), w_dtype, kind, seed=k)
        grad = content((3, k), grad_dtype, "normal", seed=k + 1)
        bits = reference.mask_bits(w, 2, 4, 1, True)
        for alpha, scale in ((2e-4, None), (-3.0, torch.tensor([0.1]))):
            expected = grad.clone()
            reference.add_pruned_(expected, w, bits, 1, alpha, scale)
            actual = grad.clone()
            compiled_engine.ops.add_pruned_(actual, w, bits, 1, alpha, scale)
            assert torch.equal(actual.isnan(), expected.isnan())
            finite = ~expected.isnan()
            assert_same_bits(actual[finite], expected[finite], f"{grad_dtype} {w_dtype} {kind} k={k}")


@for_any(pattern=patterns, k=integers(0, 200), seed=seeds)
def test_damaged_indices(compiled_engine: Engine, pattern: tuple[int, int], k: int, seed: int) -> None:
    n, m = pattern
    _, good = reference.compress(content((3, k), torch.float32, "normal", seed), n, m, 1, True)
    noise = content(tuple(good.shape), torch.int8, "any bits", seed).view(torch.uint8)
    for damaged in (noise, good ^ (1 << (noise % 8)) * (noise > 240)):
        assert_same(compiled_engine, "check_indices", damaged.contiguous(), n, m, k, label=f"{n}:{m} k={k}")


def test_every_instruction_set_of_the_host_is_tested() -> None:
    assert CPU_ISAS[0] == "scalar"
    flags = torch.backends.cpu.get_cpu_capability()
    if "AVX2" in flags or "AVX512" in flags:
        assert "avx2" in CPU_ISAS
    if "AVX512" in flags:
        assert "avx512" in CPU_ISAS
