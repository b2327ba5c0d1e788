"""Registers ``torch.ops.nmsparse``: schemas, fallback kernels and version counters.

The compiled module ``nmsparse_ext._C`` brings the schemas and the CPU (and CUDA) kernels. Without it the same
schemas are inferred from the annotations in ``reference.py``. Either way the reference functions serve every
device that has no compiled kernel.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from typing import Any

import torch

from . import reference
from ._build import extension

NAMESPACE = "nmsparse"

# op -> the arguments that it writes to, in the order of csrc/library.cpp
MUTATED_ARGS: dict[str, tuple[str, ...]] = {
    "prune": (),
    "prune_out": ("out", "bits"),
    "prune_": ("w", "bits"),
    "mask_bits": (),
    "pack_bits": (),
    "unpack_bits": (),
    "apply_bits": (),
    "apply_bits_": ("w",),
    "add_pruned_": ("grad",),
    "sad": (),
    "sad_out": ("out",),
    "find_violation": (),
    "compress": (),
    "decompress": (),
    "check_indices": (),
    "transposable_bits": (),
    "sgd_": ("weights", "momenta", "sparse", "bits", "changes"),
    "adamw_": (
        "weights",
        "exp_avgs",
        "exp_avg_sqs",
        "max_exp_avg_sqs",
        "sparse",
        "bits",
        "changes",
    ),
    "foreach_add_pruned": ("outs",),
    "foreach_apply_bits": ("outs",),
    "foreach_reselect": ("outs", "bits", "changes", "work"),
    "foreach_add_kept": ("outs",),
    "foreach_vote": ("counts",),
    "group_thresholds": (),
    "panel_pack": (),
    "panel_restore": (),
    "panel_unpack": (),
    "panel_linear": (),
    "panel_matmul": (),
    "panel_conv": (),
    "panel_linear_int8": (),
    "lt_pack": (),
    "lt_compress": (),
    "lt_matmul": (),
    "small_batch_linear": (),
    "epilogue": (),
    "epilogue_": ("y",),
    "lt_prune_pack": (),
    "transposable_pack": (),
}


#: Ops that are Python on every device, which engines register; packed weights in graphs call them.
ENGINE_OPS = ("tuned_linear", "eight_bit_linear")


def schema_of(name: str) -> str:
    """The schema of an op, from the annotations of its reference function.

    ``infer_schema`` makes every int symbolic. Only sizes can be: a pattern or a dim that changes changes the
    shapes, and a kernel is part of the program.
    """
    mutated = MUTATED_ARGS[name]
    schema = torch.library.infer_schema(getattr(reference, name), mutates_args=mutated, op_name=name)
    return re.sub(r"SymInt(\[\])? (?!(k|rows|size)\b)", r"int\1 ", schema)


@functools.cache
def schemas() -> str:
    """The schemas of all ops, in a few letters."""
    ops = getattr(torch.ops, NAMESPACE)
    names = (*MUTATED_ARGS, *ENGINE_OPS)
    text = "".join(str(getattr(ops, name).default._schema) for name in names)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# The registrations live as long as this object.
library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _bump_versions(name: str, mutated: tuple[str, ...]) -> Callable[..., None]:
    """A kernel that makes autograd and everybody else who watches ``_version`` see what the op overwrites."""
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    positions = [i for i, argument in enumerate(op._schema.arguments) if argument.name in mutated]
    below = torch._C._after_ADInplaceOrView_keyset

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> None:
        for position in positions:
            if args[position] is not None:  # a tensor or a list of them
                torch.autograd.graph.increment_version(args[position])
        op.redispatch(keyset & below, *args)

    return kernel


#: An overload of panel_linear that autograd passes over, for calls that have made sure that no gradients are
#: wanted: the kernel that records them is Python, and takes as long as the product of a small layer.
WITHOUT_GRADIENTS = "panel_linear.without_gradients"
library.define(
    schema_of("panel_linear").replace("panel_linear(", f"{WITHOUT_GRADIENTS}("),
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.impl(WITHOUT_GRADIENTS, reference.panel_linear, "CompositeExplicitAutograd")
library.impl(WITHOUT_GRADIENTS, torch.library.fallthrough_kernel, "Autograd")

for _name, _mutated in MUTATED_ARGS.items():
    if extension is None:
        library.define(schema_of(_name), tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    if _mutated:
        library.impl(_name, _bump_versions(_name, _mutated), "ADInplaceOrView", with_keyset=True)
