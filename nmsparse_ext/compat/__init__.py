"""Names that others removed, or that are alive elsewhere, on this library's functions.

For code that has to go on running: each is a few lines on the public API, and says what differs from the
original. docs/migration.md shows what the same job looks like without them.

- torchao (deleted in August 2026): `sparsify_`, `semi_sparse_weight`, `SemiSparseWeightConfig`,
  `apply_fake_sparsity`, `SemiSparseLinear`, `swap_linear_with_semi_sparse_linear`,
  `swap_semi_sparse_linear_with_linear`, `WandaSparsifier`;
- ``torch.ao.pruning``: `WeightNormSparsifier`;
- NVIDIA apex: `ASP`.
"""

from __future__ import annotations

from .apex import ASP
from .semi_sparse import (
    SemiSparseLinear,
    SemiSparseWeightConfig,
    apply_fake_sparsity,
    semi_sparse_weight,
    sparsify_,
    swap_linear_with_semi_sparse_linear,
    swap_semi_sparse_linear_with_linear,
)
from .sparsifiers import WandaSparsifier, WeightNormSparsifier

__all__ = [
    "ASP",
    "SemiSparseLinear",
    "SemiSparseWeightConfig",
    "WandaSparsifier",
    "WeightNormSparsifier",
    "apply_fake_sparsity",
    "semi_sparse_weight",
    "sparsify_",
    "swap_linear_with_semi_sparse_linear",
    "swap_semi_sparse_linear_with_linear",
]
