"""Whether our packer writes the blob that this GPU's cuSPARSELt would write.

NVIDIA documents no layout and may change it with every version. So the layouts that were found
(``core/sparse24.h``) are compared, once per device, library version and dtype, with what the library makes of
small random weights; only one that gave the very same bytes is used. Else the library compresses, as ever.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _lt_layout as lt
from . import _ops  # noqa: F401  (registers torch.ops.nmsparse)

#: Library layouts; "cutlass" is PyTorch's, but costs nothing to try.
CANDIDATES = ("sm80", "sm90", "cutlass")

#: Several super-tiles both ways, so that the order of tiles counts too; multiples of every layout's sizes.
SHAPES = ((128, 256), (256, 128), (384, 512))


def random_weight(rows: int, k: int, dtype: torch.dtype, device: torch.device | str, seed: int) -> Tensor:
    """A weight with exactly as many nonzeros in every group as the hardware keeps: 1 to 100, either sign."""
    random = torch.Generator("cpu").manual_seed(seed)
    pattern = lt.hardware_pattern(dtype)
    places = torch.rand(rows, k // pattern.m, pattern.m, generator=random, device="cpu").argsort(-1)
    kept = (places < pattern.n).view(rows, k)
    w = torch.randint(1, 101, (rows, k), generator=random, device="cpu").float()
    sign = torch.randint(0, 2, (rows, k), generator=random, device="cpu") * 2 - 1
    return torch.where(kept, w * sign, 0).to(dtype).to(device)


def find_layout(
    compress: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device | str
) -> str | None:
    """The layout with which `lt_prune_pack` gives the bytes of ``compress`` for every probe, or None.

    Args:
        compress: The library: a weight in, its blob (uint8) out.
        dtype: Of the weights.
        device: Of the weights.
    """
    weights = [random_weight(*shape, dtype, device, seed) for seed, shape in enumerate(SHAPES)]
    blobs = [compress(w) for w in weights]
    for layout in CANDIDATES:
        if lt.layout_multiples(layout, dtype) == (0, 0):
            continue
        ours = (torch.ops.nmsparse.lt_prune_pack(w, layout) for w in weights)
        if all(torch.equal(mine, blob) for mine, blob in zip(ours, blobs, strict=True)):
            return layout
    return None


_found: dict[tuple[torch.device, str, torch.dtype], str | None] = {}


def probed_layout(device: torch.device, version: str, dtype: torch.dtype) -> str | None:
    """`find_layout` of a GPU's cuSPARSELt, found once per device, library version and dtype.

    None, too, while a graph is being captured and nothing was found before: a probe waits for the GPU.
    """
    from .cusparselt import compress_with_library

    key = (device, version, dtype)
    if key not in _found:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        _found[key] = find_layout(compress_with_library, dtype, device)
    return _found[key]


def usable_layout(device: torch.device, version: str, dtype: torch.dtype, rows: int, k: int) -> str | None:
    """`probed_layout`, if a weight ``[rows, k]`` can have it."""
    layout = probed_layout(device, version, dtype)
    if layout is None:
        return None
    row_multiple, k_multiple = lt.layout_multiples(layout, dtype)
    return layout if rows % row_multiple == 0 and k % k_multiple == 0 else None
