"""Metadata of sparse tensor cores: every nibble in its place, against PyTorch's conversions and notes."""

from __future__ import annotations

import itertools

import pytest
import torch
from engines import Engine
from torch import Tensor
from torch.sparse import _semi_structured_conversions as conversions

import nmsparse_ext as nms
from nmsparse_ext import _lt_layout as lt
from nmsparse_ext import reference

DTYPES = (torch.float16, torch.bfloat16, torch.int8, torch.float32, torch.float8_e4m3fn)
CONVERTIBLE = DTYPES[:4]  # what PyTorch's conversions take
META_DTYPE = {1: torch.int32, 2: torch.int16, 4: torch.int16}

pack = torch.ops.nmsparse.lt_pack


def sparse(rows: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A weight that holds exactly as many nonzeros in every group as the hardware keeps."""
    random = torch.Generator("cpu").manual_seed(seed)
    w = torch.randint(1, 100, (rows, k), generator=random, device="cpu").float()
    w *= torch.randint(0, 2, (rows, k), generator=random, device="cpu") * 2 - 1
    pattern = lt.hardware_pattern(dtype)
    key = torch.rand(rows, k // pattern.m, pattern.m, generator=random, device="cpu").argsort(-1)
    return (w * (key < pattern.n).view(rows, k)).to(dtype)


def packed(w: Tensor) -> tuple[Tensor, Tensor]:
    pattern = lt.hardware_pattern(w.dtype)
    return reference.compress(w, pattern.n, pattern.m, 1, False)


def pack_on(engine: Engine, values: Tensor, indices: Tensor, k: int, layout: str) -> Tensor:
    device = torch.get_default_device()  # the GPU, where that is the engine
    return engine.ops.lt_pack(values.to(device), indices.to(device), k, layout).cpu()


def split(blob: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Values of ``w``'s dtype and the metadata's bytes."""
    rows, k = w.shape
    size = rows * k // 2 * w.element_size()
    return blob[:size].view(w.dtype).view(rows, k // 2), blob[size:]


# -------------------------------------------------------------------------------------- PyTorch's conversions


@pytest.mark.parametrize("dtype", CONVERTIBLE)
@pytest.mark.parametrize("shape", [(32, 64), (64, 128), (96, 192), (128, 64)])
def test_cutlass_is_what_pytorch_makes(dtype: torch.dtype, shape: tuple[int, int], engine: Engine) -> None:
    w = sparse(*shape, dtype)
    expected_values, expected_meta = conversions.sparse_semi_structured_from_dense_cutlass(w)
    blob = pack_on(engine, *packed(w), shape[1], "cutlass")
    values, meta = split(blob, w)
    assert torch.equal(values, expected_values)
    assert torch.equal(meta.view(META_DTYPE[w.element_size()]), expected_meta.flatten())


@pytest.mark.parametrize("dtype", CONVERTIBLE)
@pytest.mark.parametrize("kept", list(itertools.product((0, 1), repeat=4)))
def test_all_patterns_of_four_come_back(dtype: torch.dtype, kept: tuple[int, ...]) -> None:
    """Groups with 0 to 4 nonzeros, float32 in pairs: PyTorch reads what we chose to keep, zeros included."""
    w = torch.tensor(kept).tile(32, 16).to(dtype)
    pattern = lt.hardware_pattern(dtype)
    meta_dtype = META_DTYPE[w.element_size()]
    blob = pack(*packed(w), w.shape[1], "cutlass")
    values, meta = split(blob, w)
    words = meta.view(meta_dtype).view(32, -1)
    dense = conversions.sparse_semi_structured_to_dense_cutlass(values, words)
    assert torch.equal(dense, nms.nm_prune(w, pattern))


@pytest.mark.parametrize(
    ("kept", "nibble"),
    [((0, 1), 0x4), ((0, 2), 0x8), ((0, 3), 0xC), ((1, 2), 0x9), ((1, 3), 0xD), ((2, 3), 0xE)],
)
def test_the_six_nibbles(kept: tuple[int, int], nibble: int) -> None:
    w = torch.zeros(32, 32, dtype=torch.float16)
    w.view(32, 8, 4)[:, :, list(kept)] = 1
    _, meta = split(pack(*packed(w), 32, "cutlass"), w)
    assert set(meta.tolist()) == {nibble | nibble << 4}


@pytest.mark.parametrize(("kept", "nibble"), [(0, 0x4), (1, 0xE)])
def test_the_two_nibbles_of_float32(kept: int, nibble: int) -> None:
    w = torch.zeros(32, 16)
    w.view(32, 8, 2)[:, :, kept] = 1
    _, meta = split(pack(*packed(w), 16, "cutlass"), w)
    assert set(meta.tolist()) == {nibble | nibble << 4}


def test_negative_zero_is_a_kept_value_where_the_mask_says_so() -> None:
    w = torch.zeros(32, 32, dtype=torch.float16)
    w.view(32, 8, 4)[:, :, 2] = 5
    w.view(32, 8, 4)[:, :, 0] = -0.0
    values, meta = split(pack(*packed(w), 32, "cutlass"), w)
    assert set(meta.tolist()) == {0x88}
    assert values[0, :2].view(torch.int16).tolist() == [-0x8000, 0x4500]


# --------------------------------------------------------------------------------------- cuSPARSELt's layouts


def notes_sm80(r: int, k: int, rows: int) -> int:
    """Which nibble, from the 16-bit words of the notes: 128x64 super-tiles, in them 32x32 tiles."""
    atom = (r % 8) * 8 + ((r % 32) // 16) * 4 + ((r % 16) // 8) + ((k % 32) // 16) * 2
    tile = ((k % 64) // 32) * 256 + ((r % 128) // 32) * 64
    word = (r // 128) * 512 + (k // 64) * 512 * (rows // 128) + tile + atom
    return word * 4 + k % 16 // 4


def notes_sm90(r: int, k: int, cols: int) -> int:
    """Which nibble, from the bytes of the notes: rows r and r + 8 share one."""
    q = (k % 32) // 4
    byte = (r // 64) * 8 * cols + (k // 32) * 256 + ((r % 64) // 16) * 64 + (r % 8) * 8 + (q % 4) * 2 + q // 4
    return byte * 2 + (0 if r % 16 < 8 else 1)


@pytest.mark.parametrize(("layout", "rows", "k"), [("sm80", 256, 384), ("sm90", 192, 256)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_nibble_is_where_the_notes_say(
    layout: str, rows: int, k: int, dtype: torch.dtype, engine: Engine
) -> None:
    w = sparse(rows, k, dtype)
    values, indices = packed(w)
    blob = pack_on(engine, values, indices, k, layout)
    stored_values, meta = split(blob, w)
    assert torch.equal(stored_values, values)
    nibbles = torch.stack([meta & 15, meta >> 4], 1).flatten().tolist()
    codes = torch.stack([indices & 15, indices >> 4], 2).view(rows, k // 4).tolist()
    seen = set()
    for r, q in itertools.product(range(rows), range(k // 4)):
        place = notes_sm80(r, 4 * q, rows) if layout == "sm80" else notes_sm90(r, 4 * q, k)
        assert nibbles[place] == codes[r][q]
        seen.add(place)
    assert seen == set(range(rows * k // 4))


def test_sm90_is_what_shuffling_lanes_gives() -> None:
    """A 16x32 block as a warp reorders it in registers, in three exchanges between lanes."""
    lanes = {
        lane: [[(lane // 2, 4 * (lane % 2) + 2 * b + half) for half in (0, 1)] for b in (0, 1)]
        for lane in range(32)
    }
    halves = {}
    for lane in range(32):
        other, mine = lanes[lane ^ 16], lanes[lane]
        halves[lane] = [[other[b][1], mine[b][1]] if lane & 16 else [mine[b][0], other[b][0]] for b in (0, 1)]
    for lane in range(32):
        other, mine = halves[lane ^ 1], halves[lane]
        word = [other[1], mine[1]] if lane & 1 else [mine[0], other[0]]
        base = lane % 2 * 4 + lane % 16 // 2 * 8 + lane // 16 * 2
        for i in (0, 1):
            (low_row, q), (high_row, high_q) = word[i]
            assert (high_row, high_q) == (low_row + 8, q)
            assert notes_sm90(low_row, 4 * q, 64) == (base + i) * 2
            assert notes_sm90(high_row, 4 * q, 64) == (base + i) * 2 + 1


# ------------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("layout", lt.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_engines_give_the_same_bytes(layout: str, dtype: torch.dtype, compiled_engine: Engine) -> None:
    w = sparse(128, 256, dtype, seed=3)
    values, indices = packed(w)
    arguments = (256, layout)
    if lt.layout_multiples(layout, dtype) == (0, 0):
        with pytest.raises(RuntimeError, match="16-bit"):
            pack_on(compiled_engine, values, indices, *arguments)
        return
    actual = pack_on(compiled_engine, values, indices, *arguments)
    assert torch.equal(actual, reference.lt_pack(values, indices, *arguments))


def test_float8_metadata_is_that_of_int8() -> None:
    w = sparse(32, 128, torch.int8)
    values, indices = packed(w)
    as_int8 = split(pack(values, indices, 128, "cutlass"), w)[1]
    assert torch.equal(split(pack(values.view(torch.float8_e4m3fn), indices, 128, "cutlass"), w)[1], as_int8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layout": "sm75"}, "layout must be"),
        ({"layout": "sm80"}, r"rows in multiples of 128 and k in multiples of 128, got \[64, 128\]"),
        ({"k": 64}, "k / 2"),
        ({"values": torch.zeros(64, 64, dtype=torch.float64)}, "float64"),
        ({"values": torch.zeros(64, 64, 1).half()}, "k / 2"),
        ({"values": torch.zeros(64, 64).half().T}, "contiguous"),
        ({"indices": torch.zeros(64, 15, dtype=torch.uint8)}, "indices"),
        ({"indices": torch.zeros(64, 32)}, "indices"),
    ],
)
def test_wrong_arguments_of_lt_pack(change: dict[str, object], words: str, engine: Engine) -> None:
    values, indices = packed(sparse(64, 128, torch.float16))
    given = {"values": values, "indices": indices, "k": 128, "layout": "sm90", **change}
    with pytest.raises(RuntimeError, match=words):
        pack_on(engine, **given)  # type: ignore[arg-type]


def test_a_weight_without_rows() -> None:
    values = torch.empty(0, 64, dtype=torch.float16)
    assert pack(values, torch.empty(0, 16, dtype=torch.uint8), 128, "sm80").shape == (0,)
