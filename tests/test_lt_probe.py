"""The probe that decides whether our packer stands in for cuSPARSELt's, and packing of dense weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext import _lt_layout as lt
from nmsparse_ext import _lt_probe, cusparselt, reference
from nmsparse_ext._lt_probe import CANDIDATES, SHAPES, find_layout, random_weight

DTYPES = tuple(lt.MULTIPLES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", CANDIDATES)
def test_a_library_of_a_known_layout_is_found_out(layout: str, dtype: torch.dtype) -> None:
    if lt.layout_multiples(layout, dtype) == (0, 0):
        with pytest.raises(RuntimeError, match="16-bit"):
            torch.ops.nmsparse.lt_prune_pack(torch.zeros(128, 128).to(dtype), layout)
        return
    assert find_layout(lambda w: reference.lt_prune_pack(w, layout), dtype, "cpu") == layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_other_byte_and_the_library_compresses(dtype: torch.dtype) -> None:
    for changed in range(len(SHAPES)):
        calls: list[Tensor] = []

        def other_library(w: Tensor, changed: int = changed, calls: list[Tensor] = calls) -> Tensor:
            blob = reference.lt_prune_pack(w, "cutlass")
            if len(calls) == changed:
                blob[-1] ^= 1
            calls.append(w)
            return blob

        assert find_layout(other_library, dtype, "cpu") is None


def test_a_library_that_pads_is_not_ours() -> None:
    padded = find_layout(
        lambda w: torch.nn.functional.pad(reference.lt_prune_pack(w, "sm80"), (0, 16)), torch.float16, "cpu"
    )
    assert padded is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probes_keep_exactly_what_the_hardware_keeps(dtype: torch.dtype) -> None:
    """Else the library could fill up a group in another way than we do, and both be right."""
    pattern = lt.hardware_pattern(dtype)
    for seed, shape in enumerate(SHAPES):
        w = random_weight(*shape, dtype, "cpu", seed)
        nonzeros = (w.float() != 0).view(-1, pattern.m).sum(-1)
        assert torch.equal(nonzeros, torch.full_like(nonzeros, pattern.n))


def test_layouts_are_used_for_the_sizes_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lt_probe, "probed_layout", lambda *_: "sm80")
    usable = [
        _lt_probe.usable_layout(torch.device("cpu"), "0.8.0", torch.float16, *shape)
        for shape in ((128, 256), (64, 256), (128, 64))
    ]
    assert usable == ["sm80", None, None]
    monkeypatch.setattr(_lt_probe, "probed_layout", lambda *_: None)
    assert _lt_probe.usable_layout(torch.device("cpu"), "0.8.0", torch.float16, 128, 256) is None


def test_probes_are_made_once_per_device_version_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []

    def library(w: Tensor) -> Tensor:
        calls.append(w.dtype)
        return reference.lt_prune_pack(w, "sm90")

    monkeypatch.setattr(cusparselt, "compress_with_library", library)
    monkeypatch.setattr(_lt_probe, "_found", {})
    cpu = torch.device("cpu")
    for version in ("0.8.0", "0.8.0", "0.8.1"):
        for dtype in (torch.float16, torch.bfloat16):
            assert _lt_probe.probed_layout(cpu, version, dtype) == "sm90"
    assert len(calls) == 2 * 2 * len(SHAPES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pruning_and_packing_at_once(dtype: torch.dtype) -> None:
    w = torch.randn(32, 128).to(dtype)
    pattern = lt.hardware_pattern(dtype)
    pruned = nms.nm_prune(w, pattern)
    packed = reference.compress(pruned, pattern.n, pattern.m, 1, False)
    expected = torch.ops.nmsparse.lt_pack(*packed, 128, "cutlass")
    assert torch.equal(torch.ops.nmsparse.lt_prune_pack(w, "cutlass"), expected)
    assert torch.equal(torch.ops.nmsparse.lt_prune_pack(pruned, "cutlass"), expected)


@pytest.mark.parametrize(
    ("w", "layout", "words"),
    [
        (torch.zeros(64, 128).half(), "sm75", "layout must be"),
        (torch.zeros(64, 128).double(), "cutlass", "w must"),
        (torch.zeros(1, 64, 128).half(), "cutlass", "2 dimensions"),
        (torch.zeros(64, 128).half(), "sm80", r"multiples of 128, got \[64, 128\]"),
    ],
)
def test_wrong_arguments(w: Tensor, layout: str, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        torch.ops.nmsparse.lt_prune_pack(w, layout)


# ------------------------------------------------------------------------- both ways of a transposable mask


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", CANDIDATES)
def test_both_ways_in_one_pass(layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each blob is one of the very weight: with as many nonzeros as are kept there is no other choice."""
    monkeypatch.setattr(cusparselt, "_our_layout", lambda like, rows, k: layout)
    w = torch.randn(256, 384).to(dtype)
    w = torch.where(nms.transposable_mask(w), w, 0)
    both = cusparselt.compress_both_ways(w)
    assert both is not None
    for blob, dense in zip(both, (w, w.T.contiguous()), strict=True):
        assert torch.equal(blob, reference.lt_prune_pack(dense, layout))


def test_when_both_ways_are_packed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.zeros(128, 256, dtype=torch.float16)
    assert cusparselt.compress_both_ways(w) is None  # on the CPU there is no layout
    monkeypatch.setattr(cusparselt, "_our_layout", lambda like, rows, k: "sm80" if rows == 128 else None)
    assert cusparselt.compress_both_ways(w) is None  # only one way
    monkeypatch.setattr(cusparselt, "_our_layout", lambda like, rows, k: "cutlass")
    assert cusparselt.compress_both_ways(w) is not None
    assert cusparselt.compress_both_ways(w.float()) is None  # 1:2
