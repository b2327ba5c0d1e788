"""Wrong arguments: each has its own error, which names the argument, what came and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import nmsparse_ext as nms
from nmsparse_ext import ops

W = torch.randn(4, 8)
CONV = torch.randn(4, 8, 3, 3)
BITS = nms.nm_mask(W, "2:4", bits=True)
VALUES, INDICES = ops.pack(W, "2:4")
MASK = nms.nm_mask(W, "2:4")
GRAD = torch.randn(4, 8, requires_grad=True)
META = torch.empty(4, 8, device="meta")


class Wrong(NamedTuple):
    """A call, and words that its error must hold in this order."""

    call: Callable[[], Any]
    error: type[Exception]
    words: str


def grouping_errors(function: Callable[..., Any]) -> dict[str, Wrong]:
    """What every function that groups a weight refuses."""
    return {
        "w no tensor": Wrong(
            lambda: function([1.0], "2:4"), TypeError, r"w must be a torch\.Tensor, got list"
        ),
        "w int32": Wrong(lambda: function(W.int(), "2:4"), TypeError, r"w must be one of .*got torch\.int32"),
        "w bool": Wrong(lambda: function(MASK, "2:4"), TypeError, r"w must be one of .*got torch\.bool"),
        "w complex": Wrong(
            lambda: function(W.to(torch.complex64), "2:4"),
            TypeError,
            r"w must be one of .*got torch\.complex64",
        ),
        "w sparse": Wrong(
            lambda: function(W.to_sparse(), "2:4"), TypeError, r"w must be a dense .*sparse_coo"
        ),
        "w 0-D": Wrong(
            lambda: function(torch.tensor(1.0), "2:4"), ValueError, "w must have 1 to 5 dim.*got 0"
        ),
        "w 6-D": Wrong(
            lambda: function(torch.zeros(1, 4, 1, 1, 1, 1), "2:4"),
            ValueError,
            "w must have 1 to 5 dim.*got 6",
        ),
        "pattern None": Wrong(
            lambda: function(W, None), TypeError, "pattern must be a Pattern or text.*None"
        ),
        "pattern tuple": Wrong(lambda: function(W, (2, 4)), TypeError, r"pattern must be .*\(2, 4\)"),
        "pattern text": Wrong(lambda: function(W, "2/4"), ValueError, "pattern must look like.*'2/4'"),
        "pattern n > m": Wrong(lambda: function(W, "5:4"), ValueError, "pattern '5:4'.*n must be"),
        "pattern n = 0": Wrong(lambda: function(W, "0:4"), ValueError, "pattern '0:4'.*n must be"),
        "pattern m > 64": Wrong(lambda: function(W, "2:65"), ValueError, "pattern '2:65'.*m must be.*64"),
        "dim too large": Wrong(
            lambda: function(W, "2:4", dim=2), ValueError, r"dim must be in \[-2, 1\] .*got 2"
        ),
        "dim too small": Wrong(
            lambda: function(CONV, "2:4", dim=-5), ValueError, r"dim must be in \[-4, 3\] .*got -5"
        ),
        "dim of a vector": Wrong(
            lambda: function(W[0], "2:4", dim=2), ValueError, r"dim must be in \[-1, 0\] .*got 2"
        ),
        "dim text": Wrong(lambda: function(W, "2:4", dim="1"), TypeError, "dim must be an int, got '1'"),
        "dim bool": Wrong(lambda: function(W, "2:4", dim=True), TypeError, "dim must be an int, got True"),
        "remainder": Wrong(
            lambda: function(W, "2:4", remainder="drop"),
            ValueError,
            "remainder must be 'error' or 'pad', got 'drop'",
        ),
        "no multiple": Wrong(
            lambda: function(W, "2:5"),
            ValueError,
            "w has 8 weights along dim 1, .*m = 5; pass remainder='pad'",
        ),
        "no multiple along dim 0": Wrong(
            lambda: function(CONV, "2:8", dim=0), ValueError, "w has 4 weights along dim 0, .*m = 8"
        ),
    }


def flat_errors(function: Callable[..., Any]) -> dict[str, Wrong]:
    """What every function with a ``grouping`` refuses."""
    return {
        "grouping": Wrong(
            lambda: function(W, "2:4", grouping="rows"),
            ValueError,
            "grouping must be 'channel' or 'flat', got 'rows'",
        ),
        "no multiple when flat": Wrong(
            lambda: function(W, "2:5", grouping="flat"),
            ValueError,
            "w has 32 weights when flattened, .*m = 5",
        ),
    }


def expanded() -> torch.Tensor:
    return torch.randn(1, 8).expand(4, 8)


def overlapping() -> tuple[torch.Tensor, torch.Tensor]:
    base = torch.randn(5, 8)
    return base[:4], base[1:]


PRUNE_OUT = {
    "out no tensor": Wrong(
        lambda: nms.nm_prune(W, "2:4", out=1), TypeError, r"out must be a torch\.Tensor, got int"
    ),
    "out dtype": Wrong(
        lambda: nms.nm_prune(W, "2:4", out=W.double()),
        TypeError,
        r"out must be one of torch\.float32, got torch\.float64",
    ),
    "out shape": Wrong(
        lambda: nms.nm_prune(W, "2:4", out=W.T),
        ValueError,
        r"out must have the shape of w, \[4, 8\], got \[8, 4\]",
    ),
    "out device": Wrong(
        lambda: nms.nm_prune(W, "2:4", out=META), ValueError, "out must be on the device of w, cpu, got meta"
    ),
    "out expanded": Wrong(
        lambda: nms.nm_prune(W, "2:4", out=expanded()), ValueError, "out is written to, but several.*memory"
    ),
    "out overlaps": Wrong(
        lambda: (lambda w, out: nms.nm_prune(w, "2:4", out=out))(*overlapping()), ValueError, "out overlaps w"
    ),
    "out transposed": Wrong(
        lambda: (lambda w: nms.nm_prune(w, "2:4", out=w.T))(torch.randn(8, 8)), ValueError, "out overlaps w"
    ),
    "out and gradients": Wrong(
        lambda: nms.nm_prune(GRAD, "2:4", out=torch.empty(4, 8)),
        ValueError,
        r"out cannot be given where gradients are recorded.*no_grad",
    ),
    "out requires grad": Wrong(
        lambda: nms.nm_prune(W, "2:4", out=GRAD), ValueError, "out cannot be given where gradients"
    ),
}

PRUNE_IN_PLACE = {
    "requires grad": Wrong(
        lambda: nms.nm_prune_(GRAD, "2:4"), ValueError, r"w requires grad .*in place; use torch\.no_grad"
    ),
    "expanded": Wrong(
        lambda: nms.nm_prune_(expanded(), "2:4"), ValueError, r"w is written to, but .*strides \[0, 1\]"
    ),
}

TRANSPOSABLE = {
    "no tensor": Wrong(
        lambda: nms.transposable_mask(None), TypeError, r"w must be a torch\.Tensor, got None"
    ),
    "dtype": Wrong(
        lambda: nms.transposable_mask(W.long()), TypeError, r"w must be one of .*got torch\.int64"
    ),
    "4-D": Wrong(
        lambda: nms.transposable_mask(CONV), ValueError, r"w must be 2-dim.*got shape \[4, 8, 3, 3\]"
    ),
    "1-D": Wrong(lambda: nms.transposable_mask(W[0]), ValueError, r"w must be 2-dim.*got shape \[8\]"),
    "rows": Wrong(lambda: nms.transposable_mask(W[:3]), ValueError, r"multiples of 4, got shape \[3, 8\]"),
    "columns": Wrong(
        lambda: nms.transposable_mask(W[:, :6]), ValueError, r"multiples of 4, got shape \[4, 6\]"
    ),
}

SAD = {
    "no tensor": Wrong(lambda: nms.sad([True], MASK), TypeError, r"mask_a must be a torch\.Tensor, got list"),
    "second no tensor": Wrong(
        lambda: nms.sad(MASK, 0), TypeError, r"mask_b must be a torch\.Tensor, got int"
    ),
    "dtype": Wrong(
        lambda: nms.sad(W, W),
        TypeError,
        r"mask_a must be one of torch\.bool, torch\.uint8, got torch\.float32",
    ),
    "mixed": Wrong(
        lambda: nms.sad(MASK, BITS),
        TypeError,
        r"mask_a and mask_b must both.*got torch\.bool and torch\.uint8",
    ),
    "shape": Wrong(
        lambda: nms.sad(MASK, MASK.T),
        ValueError,
        r"mask_b must have the shape of mask_a, \[4, 8\], got \[8, 4\]",
    ),
    "device": Wrong(
        lambda: nms.sad(MASK, MASK.to("meta")),
        ValueError,
        "mask_b must be on the device of mask_a, cpu, got meta",
    ),
    "out dtype": Wrong(
        lambda: ops.sad_into(MASK, MASK, torch.zeros(())),
        TypeError,
        r"out must be one of torch\.int64, got torch\.float32",
    ),
    "out size": Wrong(
        lambda: ops.sad_into(MASK, MASK, torch.zeros(2, dtype=torch.int64)),
        ValueError,
        r"out must hold one number, got shape \[2\]",
    ),
}

BIT_OPS = {
    "pack: dtype": Wrong(
        lambda: ops.pack_bits(W), TypeError, r"mask must be one of torch\.bool, got torch\.fl"
    ),
    "pack: dim": Wrong(lambda: ops.pack_bits(MASK, dim=3), ValueError, r"dim must be in \[-2, 1\] for mask"),
    "pack: 0-D": Wrong(
        lambda: ops.pack_bits(MASK[0, 0]), ValueError, "mask must have 1 to 5 dimensions, got 0"
    ),
    "unpack: dtype": Wrong(lambda: ops.unpack_bits(W, 8), TypeError, r"bits must be one of torch\.uint8"),
    "unpack: k": Wrong(lambda: ops.unpack_bits(BITS, 9), ValueError, "k must fit the 1 bytes a row.*got 9"),
    "unpack: k < 0": Wrong(
        lambda: ops.unpack_bits(BITS[:, :0], -1),
        ValueError,
        "k must be an int >= 0, got -1",
    ),
    "apply: bits": Wrong(
        lambda: ops.apply_bits(W, MASK), TypeError, r"bits must be one of torch\.uint8, got"
    ),
    "apply: shape": Wrong(
        lambda: ops.apply_bits(W, BITS, dim=0),
        ValueError,
        r"bits must have shape \[8, 1\] for a weight of shape \[4, 8\] and dim 0, got \[4, 1\]",
    ),
    "apply: strides": Wrong(
        lambda: ops.apply_bits(W, torch.zeros(4, 2, dtype=torch.uint8)[:, ::2]),
        ValueError,
        "bits must be contig",
    ),
    "apply: device": Wrong(
        lambda: ops.apply_bits(W, BITS.to("meta")),
        ValueError,
        "bits must be on the device of w, cpu, got meta",
    ),
    "apply_: grad": Wrong(lambda: ops.apply_bits_(GRAD, BITS), ValueError, "w requires grad"),
    "prune_into: bits": Wrong(
        lambda: ops.prune_into(W, "2:4", out=torch.empty(4, 8), bits=MASK), TypeError, "bits must be one of"
    ),
    "add: grad dtype": Wrong(
        lambda: ops.add_pruned_(W.to(torch.int8), W, BITS, alpha=1), TypeError, r"grad must be one of .*int8"
    ),
    "add: w dtype": Wrong(
        lambda: ops.add_pruned_(W.clone(), W.to(torch.int8), BITS, alpha=1),
        TypeError,
        r"w must be one of .*int8",
    ),
    "add: shape": Wrong(
        lambda: ops.add_pruned_(W.T, W, BITS, alpha=1), ValueError, "grad must have the shape of w"
    ),
    "add: bits": Wrong(
        lambda: ops.add_pruned_(W.clone(), W, BITS[:2], alpha=1), ValueError, r"bits must have shape \[4, 1\]"
    ),
    "add: scale size": Wrong(
        lambda: ops.add_pruned_(W.clone(), W, BITS, alpha=1, scale=torch.ones(2)),
        ValueError,
        r"scale must hold one number, got shape \[2\]",
    ),
    "add: scale dtype": Wrong(
        lambda: ops.add_pruned_(W.clone(), W, BITS, alpha=1, scale=torch.ones((), dtype=torch.float64)),
        TypeError,
        r"scale must be one of torch\.float32, got torch\.float64",
    ),
}

PACKED = {
    "values dtype": Wrong(
        lambda: ops.unpack(VALUES.int(), INDICES, "2:4", k=8), TypeError, r"values must be one of .*int32"
    ),
    "indices dtype": Wrong(
        lambda: ops.unpack(VALUES, INDICES.char(), "2:4", k=8), TypeError, r"indices must be one of .*int8"
    ),
    "k": Wrong(
        lambda: ops.unpack(VALUES, INDICES, "2:4", k=20),
        ValueError,
        "indices must have 3 bytes a row for 2:4 and k = 20, got 1",
    ),
    "values size": Wrong(
        lambda: ops.unpack(VALUES[:, :2], INDICES, "2:4", k=8),
        ValueError,
        "values must have 4 entries a row for 2:4 and k = 8, got 2",
    ),
    "rows": Wrong(
        lambda: ops.unpack(VALUES, INDICES[:2], "2:4", k=8),
        ValueError,
        r"indices must agree with values, of shape \[4, 4\], .*got shape \[2, 1\]",
    ),
    "device": Wrong(
        lambda: ops.unpack(VALUES, INDICES.to("meta"), "2:4", k=8),
        ValueError,
        "indices must be on the device of",
    ),
    "check: k": Wrong(
        lambda: ops.check_indices(INDICES, "2:4", k=-4), ValueError, "k must be an int >= 0, got -4"
    ),
    "check: k text": Wrong(
        lambda: ops.check_indices(INDICES, "2:4", k="8"), TypeError, "k must be an int >= 0, got '8'"
    ),
}

FUNCTIONS = {
    "nm_mask": {**grouping_errors(nms.nm_mask), **flat_errors(nms.nm_mask)},
    "nm_prune": {**grouping_errors(nms.nm_prune), **flat_errors(nms.nm_prune)},
    "nm_prune out": PRUNE_OUT,
    "nm_prune_": {**grouping_errors(nms.nm_prune_), **flat_errors(nms.nm_prune_), **PRUNE_IN_PLACE},
    "find_violation": {**grouping_errors(nms.find_violation), **flat_errors(nms.find_violation)},
    "transposable_mask": TRANSPOSABLE,
    "sad": SAD,
    "bits": BIT_OPS,
    "mask_bits": grouping_errors(ops.mask_bits),
    "pack": grouping_errors(ops.pack),
    "unpack": PACKED,
}
ALL = {f"{function}: {name}": wrong for function, table in FUNCTIONS.items() for name, wrong in table.items()}


@pytest.mark.parametrize("wrong", ALL.values(), ids=list(ALL))
def test_public_functions(wrong: Wrong) -> None:
    before = W.clone()
    with pytest.raises(wrong.error, match=wrong.words):
        wrong.call()
    assert torch.equal(W, before), "nothing may be written before the arguments are known to be right"


def test_unknown_attribute_of_the_package() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nm_prunes'"):
        _ = nms.nm_prunes


# ----------------------------------------------------------------------- direct callers of torch.ops.nmsparse

OP_CALLS: dict[str, Callable[[Any], Any]] = {
    "n > m": lambda op: op.prune(W, 5, 4, 1, True),
    "m > 64": lambda op: op.mask_bits(W, 2, 65, 1, True),
    "n = 0": lambda op: op.compress(W, 0, 4, 1, True),
    "dim": lambda op: op.prune(W, 2, 4, 2, True),
    "negative dim": lambda op: op.prune(W, 2, 4, -1, True),
    "no multiple": lambda op: op.prune(W, 2, 5, 1, False),
    "no multiple of compress": lambda op: op.compress(W, 2, 5, 1, False),
    "no multiple of find_violation": lambda op: op.find_violation(W, 2, 5, 1, False),
    "dtype": lambda op: op.prune(W.int(), 2, 4, 1, False),
    "0-D": lambda op: op.mask_bits(torch.tensor(1.0), 2, 4, 0, True),
    "out shape": lambda op: op.prune_out(W, 2, 4, 1, False, torch.empty(8, 4), None),
    "out dtype": lambda op: op.prune_out(W, 2, 4, 1, False, W.double(), None),
    "bits shape": lambda op: op.prune_(W.clone(), 2, 4, 1, False, BITS[:2].clone()),
    "bits dtype": lambda op: op.prune_(W.clone(), 2, 4, 1, False, BITS.char()),
    "bits strides": lambda op: op.apply_bits(W, torch.zeros(4, 2, dtype=torch.uint8)[:, ::2], 1),
    "mask dtype": lambda op: op.pack_bits(W, 1),
    "unpack k": lambda op: op.unpack_bits(BITS, 9, 1),
    "apply shape": lambda op: op.apply_bits(W, BITS, 0),
    "apply_ shape": lambda op: op.apply_bits_(W.clone(), BITS, 0),
    "grad dtype": lambda op: op.add_pruned_(W.to(torch.int8), W, BITS, 1, 1.0, None),
    "grad shape": lambda op: op.add_pruned_(W[:2].clone(), W, BITS, 1, 1.0, None),
    "scale": lambda op: op.add_pruned_(W.clone(), W, BITS, 1, 1.0, torch.ones(2)),
    "sad dtypes": lambda op: op.sad(MASK, BITS),
    "sad shapes": lambda op: op.sad(MASK, MASK[:2]),
    "sad out": lambda op: op.sad_out(MASK, MASK, torch.zeros(())),
    "values size": lambda op: op.decompress(VALUES[:, :2].clone(), INDICES, 2, 4, 8, 1),
    "values strides": lambda op: op.decompress(VALUES.T.contiguous().T, INDICES, 2, 4, 8, 1),
    "indices bytes": lambda op: op.decompress(VALUES, INDICES, 2, 4, 20, 1),
    "indices dtype": lambda op: op.check_indices(INDICES.char(), 2, 4, 8),
    "indices rows": lambda op: op.decompress(VALUES, INDICES[:2].clone(), 2, 4, 8, 1),
    "negative k": lambda op: op.check_indices(INDICES, 2, 4, -8),
    "transposable sizes": lambda op: op.transposable_bits(W[:, :6]),
    "transposable dims": lambda op: op.transposable_bits(CONV),
}


@pytest.mark.parametrize("name", OP_CALLS)
def test_ops_check_for_themselves(name: str) -> None:
    with pytest.raises(RuntimeError):
        OP_CALLS[name](torch.ops.nmsparse)
