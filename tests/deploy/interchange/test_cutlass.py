"""PyTorch's own conversions and tensors, element by element."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass as theirs_from_dense,
)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_to_dense_cutlass as theirs_to_dense,
)

import nmsparse_ext as nms
from nmsparse_ext._lt_layout import hardware_pattern
from nmsparse_ext.deploy import from_peer, to_peer
from nmsparse_ext.deploy.interchange.cutlass import from_cutlass, to_cutlass

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]
SIZES = [(32, 64), (64, 128), (96, 192)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def full_weight(dtype: torch.dtype, size: tuple[int, int]) -> Tensor:
    """Exactly n nonzeros a group, so that both sides must choose the same places."""
    w = torch.randint(1, 100, size).to(dtype)
    return nms.nm_prune(w, hardware_pattern(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_same_bytes_as_pytorch(dtype: torch.dtype, size: tuple[int, int]) -> None:
    w = full_weight(dtype, size)
    packed, meta = to_cutlass(nms.compress(w, hardware_pattern(dtype)))
    their_packed, their_meta = theirs_from_dense(w)
    assert torch.equal(packed, their_packed)
    assert torch.equal(meta.flatten(), their_meta.flatten())
    assert meta.dtype == their_meta.dtype
    assert meta.shape == their_meta.shape
    again = from_cutlass(their_packed, their_meta)
    assert torch.equal(again.to_dense(), w)
    assert same_bits(again.values, their_packed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_all_patterns_of_a_group(dtype: torch.dtype) -> None:
    """Every choice of up to n nonzeros, whatever PyTorch pads with, in both directions."""
    pattern = hardware_pattern(dtype)
    choices = [c for c in product([0.0, 1.0], repeat=pattern.m) if sum(c) <= pattern.n]
    w = torch.tensor(choices).repeat(32 * 64 // pattern.m, 1)[: 32 * 64 // pattern.m].reshape(32, 64)
    # Coarse values: PyTorch's own way back moves float32 as pairs of halves, and changes those that look like
    # NaN (about 2 % of random values, in their last bits). Ours does not.
    w = (w * torch.randn(32, 64).bfloat16()).to(dtype)
    assert torch.equal(from_cutlass(*theirs_from_dense(w)).to_dense(), w)
    assert torch.equal(theirs_to_dense(*to_cutlass(nms.compress(w, pattern))), w)


def test_negative_zeros() -> None:
    """They are zeros to PyTorch's packer, whose metadata is right; kept ones keep their sign here."""
    w = full_weight(torch.float16, (32, 64))
    w[:, 0] = -0.0
    w[0, :4] = torch.tensor([-0.0, 3.0, -0.0, -0.0])
    theirs = from_cutlass(*theirs_from_dense(w))
    assert torch.equal(theirs.to_dense(), w)
    ours = nms.compress(w, "2:4")
    packed, meta = to_cutlass(ours)
    assert torch.equal(theirs_to_dense(packed, meta), w)
    assert same_bits(theirs_to_dense(packed, meta), ours.to_dense())
    again = from_cutlass(packed, meta)
    assert same_bits(again.values, ours.values)
    assert torch.equal(again.indices, ours.indices)
    assert again.values.signbit().sum() == ours.values.signbit().sum() > 0


def test_metadata_of_kernels_that_prune_on_the_fly() -> None:
    """A group with one survivor has both indices equal, a zero beside it; descending ones are legal too."""
    w = torch.zeros(32, 64, dtype=torch.float16)
    w[:, 1::4] = 5
    packed, meta = to_cutlass(nms.compress(w, "2:4"))  # places 0 and 1 in every group: nibbles 0x4
    values = packed.view(-1, 2)
    assert values.tolist() == [[0, 5]] * len(values)
    equal = torch.full_like(meta.view(torch.uint8), 0x55).view(meta.dtype)  # places 1 and 1
    assert torch.equal(from_cutlass(packed, equal).to_dense(), w)
    assert torch.equal(from_cutlass(values.flip(1).reshape(packed.shape), equal).to_dense(), w)
    descending = torch.full_like(meta.view(torch.uint8), 0x11).view(meta.dtype)  # places 1 and 0
    assert torch.equal(from_cutlass(values.flip(1).reshape(packed.shape), descending).to_dense(), w)
    with pytest.raises(nms.FormatError, match="group 0 of row 0 is no choice"):
        from_cutlass(torch.ones_like(packed), equal)


def test_semi_structured_tensors(tmp_path: Path) -> None:
    w = full_weight(torch.bfloat16, (64, 128))
    packed, meta = theirs_from_dense(w)
    nones = dict.fromkeys(("packed_t", "meta_t", "compressed_swizzled_bitmask"))
    theirs = SparseSemiStructuredTensorCUTLASS(w.shape, packed=packed, meta=meta, **nones)
    torch.save({"fc.weight": theirs, "fc.bias": torch.ones(64)}, tmp_path / "m.pt")
    ours = from_peer(tmp_path / "m.pt")
    assert torch.equal(ours["fc.weight"].to_dense(), w)
    assert ours["fc.bias"].sum() == 64

    back = to_peer(ours, tmp_path / "back.pt", format="pytorch-cutlass")["fc.weight"]
    assert isinstance(back, SparseSemiStructuredTensorCUTLASS)
    assert torch.equal(back.packed, packed)
    assert torch.equal(back.meta, meta)
    assert torch.equal(back.to_dense(), w)
    loaded = torch.load(tmp_path / "back.pt", weights_only=False)["fc.weight"]
    assert torch.equal(loaded.to_dense(), w)


def test_what_cannot_be() -> None:
    packed, meta = theirs_from_dense(full_weight(torch.float16, (32, 64)))
    with pytest.raises(nms.FormatError, match=r"multiples of \[32, 32\], got \[16, 64\]"):
        from_cutlass(packed[:16], meta)
    with pytest.raises(nms.FormatError, match=r"metadata must be 256 bytes of torch\.int16"):
        from_cutlass(packed, meta[:, :1].contiguous())
    with pytest.raises(nms.FormatError, match="no weight that CUTLASS packs"):
        from_cutlass(packed.double(), meta)
    with pytest.raises(nms.FormatError, match="group 0 of row 0"):
        from_cutlass(packed.float(), torch.zeros(32, 8, dtype=torch.int16))
    with pytest.raises(ValueError, match="layout cutlass needs rows in multiples of 32"):
        to_cutlass(nms.compress(torch.zeros(8, 64, dtype=torch.float16), "2:4"))
