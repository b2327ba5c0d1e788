"""The closed forms of cuSPARSELt's layouts, against formulas written anew; the library is in tests/gpu."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

import nmsparse_ext as nms
from nmsparse_ext.deploy import from_peer, to_peer
from nmsparse_ext.deploy.interchange.cusparselt import from_cusparselt, to_cusparselt
from nmsparse_ext.tensor import NMTensor


def sm80_nibble(r: int, k: int, rows: int) -> int:
    """From the metadata layout of PyTorch's tile kernel: offset of the int16, four nibbles each."""
    atom = (r % 8) * 8 + ((r % 32) // 16) * 4 + ((r % 16) // 8) + ((k % 32) // 16) * 2
    word = (r // 128) * 512 + (k // 64) * 512 * (rows // 128) + ((k % 64) // 32) * 256
    return (word + ((r % 128) // 32) * 64 + atom) * 4 + (k % 16) // 4


def sm90_nibble(r: int, k: int, columns: int) -> int:
    q = (k % 32) // 4
    byte = (
        (r // 64) * 8 * columns + (k // 32) * 256 + ((r % 64) // 16) * 64 + (r % 8) * 8 + (q % 4) * 2 + q // 4
    )
    return byte * 2 + (r % 16) // 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("layout", "size"), [("sm80", (128, 128)), ("sm80", (256, 256)), ("sm90", (64, 64)), ("sm90", (192, 128))]
)
def test_every_element(layout: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    rows, k = size
    w = nms.nm_prune(torch.randint(1, 99, size).to(dtype), "2:4")
    weight = nms.compress(w, "2:4")
    blob = to_cusparselt(weight, layout)
    assert blob.dtype == dtype
    assert blob.shape == (rows, k * 9 // 16)
    raw = blob.flatten().view(torch.uint8).tolist()
    metadata = raw[rows * k :]
    for r in range(0, rows, 5):
        for group in range(0, k, 4):
            at = sm80_nibble(r, group, rows) if layout == "sm80" else sm90_nibble(r, group, k)
            nibble = metadata[at // 2] >> (at % 2 * 4) & 0xF
            kept = w[r, group : group + 4].nonzero().flatten().tolist()
            assert [nibble & 3, nibble >> 2] == kept, (r, group)
    again = from_cusparselt(blob, size, layout)
    assert torch.equal(again.values, weight.values)
    assert torch.equal(again.indices, weight.indices)


def test_semi_structured_tensors(tmp_path: Path) -> None:
    w = nms.nm_prune(torch.randn(128, 128).half(), "2:4")
    tensors = {"w": nms.compress(w, "2:4"), "small": nms.compress(w[:16], "2:4"), "b": torch.ones(2)}
    theirs = to_peer(tensors, tmp_path / "m.pt", format="cusparselt", layout="sm80")
    assert isinstance(theirs["w"], SparseSemiStructuredTensorCUSPARSELT)
    assert torch.equal(theirs["small"], w[:16])  # 16 rows have no known layout
    again = from_peer(tmp_path / "m.pt", layout="sm80")
    assert isinstance(again["w"], NMTensor)
    assert torch.equal(again["w"].to_dense(), w)
    with pytest.raises(ValueError, match="layout must be one of"):
        from_peer(tmp_path / "m.pt")


def test_the_wrong_layout_is_noticed() -> None:
    weight = nms.compress(nms.nm_prune(torch.randn(128, 128).half(), "2:4"), "2:4")
    blob = to_cusparselt(weight, "sm80")
    # Both are permutations of the same nibbles, so every group is legal; only the weight is another one.
    assert not torch.equal(from_cusparselt(blob, (128, 128), "sm90").to_dense(), weight.to_dense())
    for bad, shape, layout, message in (
        (blob[:64], (128, 128), "sm80", "must have at least"),
        (blob, (64, 128), "sm80", r"multiples of \[128, 128\]"),
        (blob.float(), (128, 128), "sm90", "is known for 16-bit weights"),
    ):
        with pytest.raises(nms.FormatError, match=message):
            from_cusparselt(bad, shape, layout)
