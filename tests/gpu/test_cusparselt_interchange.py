"""Blobs of the library itself, through PyTorch's semi-structured tensors. Needs a GPU that has cuSPARSELt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

import nmsparse_ext as nms
from nmsparse_ext.deploy import from_peer, to_peer
from nmsparse_ext.deploy.interchange.cusparselt import from_cusparselt, to_cusparselt
from nmsparse_ext.tensor import NMTensor

pytestmark = pytest.mark.needs_cuda


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_library_reads_and_writes_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    w = nms.nm_prune(torch.randn(256, 256, device="cuda").to(dtype), "2:4")
    theirs = SparseSemiStructuredTensorCUSPARSELT.from_dense(w)
    ours = from_peer({"w": theirs})
    assert isinstance(ours["w"], NMTensor)
    assert torch.equal(ours["w"].to_dense(), w)
    back = to_peer(ours, format="cusparselt")["w"]
    assert torch.equal(back.packed.flatten().view(torch.uint8), theirs.packed.flatten().view(torch.uint8))
    x = torch.randn(64, 256, device="cuda").to(dtype)
    torch.testing.assert_close(
        torch.nn.functional.linear(x, back), torch.nn.functional.linear(x, w), rtol=2e-2, atol=2e-1
    )


def test_the_closed_form_of_this_gpu_is_known() -> None:
    major = torch.cuda.get_device_capability()[0]
    layout = {8: "sm80", 9: "sm90"}.get(major)
    assert layout is not None, f"no layout is known for compute capability {major}.x"
    w = nms.nm_prune(torch.randn(256, 256, device="cuda").half(), "2:4")
    blob = torch._cslt_compress(w)
    assert torch.equal(from_cusparselt(blob.cpu(), (256, 256), layout).to_dense(), w.cpu())
    mine = to_cusparselt(nms.compress(w.cpu(), "2:4"), layout).flatten().view(torch.uint8)
    assert torch.equal(mine, blob.cpu().flatten().view(torch.uint8)[: mine.numel()])
