"""Importing this registers all of ``torch.ops.nmsparse``: schemas and kernels, fake kernels, gradients."""

from __future__ import annotations

from . import _op_fakes, _op_gradients  # noqa: F401
from ._op_library import MUTATED_ARGS, schema_of, schemas

__all__ = ["MUTATED_ARGS", "schema_of", "schemas"]
