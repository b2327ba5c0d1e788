"""What bench_linear.py times: dense and packed calls of one layer, in turn, and what becomes of the times."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext.engines import unpack_rows
from nmsparse_ext.panels import panel_pack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLD_BYTES = 160 << 20  # several times what the last-level cache holds
MAX_COPIES = 48
MIN_ROUNDS, MAX_ROUNDS = 9, 400

Call = Callable[[int], object]  # the argument chooses the copy of the weight
Times = dict[str, list[float]]
Row = dict[str, Any]


def copies(nbytes: int) -> int:
    """How many copies of a weight are needed for it to be cold."""
    return min(MAX_COPIES, COLD_BYTES // nbytes + 2)


class Dense:
    """The dense candidates that this torch has: ``F.linear``, and oneDNN and MKL with a prepacked weight.

    The latter two are what a model calls that inductor compiled and froze.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weights = [weight.clone() for _ in range(copies(weight.nbytes))]

    def calls(self, x: Tensor) -> dict[str, Call]:
        """Those that work for ``x``; weights are packed for its number of rows."""
        calls: dict[str, Call] = {}
        for name, make in (
            ("F.linear", plain_call),
            ("oneDNN prepacked", onednn_call),
            ("MKL prepacked", mkl_call),
        ):
            try:
                call = make(x, self.weights)
                call(0)
            except RuntimeError:  # not for this dtype or processor
                continue
            calls[name] = call
        return calls


def plain_call(x: Tensor, weights: Sequence[Tensor]) -> Call:
    """``F.linear``."""
    return lambda i: F.linear(x, weights[i % len(weights)])


def onednn_call(x: Tensor, weights: Sequence[Tensor]) -> Call:
    """OneDNN's product with weights in its own layout."""
    multiply = torch.ops.mkldnn._linear_pointwise
    packed = [torch.ops.mkldnn._reorder_linear_weight(w, x.shape[0]) for w in weights]
    return lambda i: multiply(x, packed[i % len(packed)], None, "none", [], "")


def mkl_call(x: Tensor, weights: Sequence[Tensor]) -> Call:
    """MKL's product with weights in its own layout."""
    if x.dtype != torch.float32 or not torch.backends.mkl.is_available():
        raise RuntimeError("MKL packs float32 only")
    rows = x.shape[0]
    packed = [torch.ops.mkl._mkl_reorder_linear_weight(w, rows) for w in weights]

    def call(i: int) -> Tensor:
        i %= len(packed)
        return torch.ops.mkl._mkl_linear(x, packed[i], weights[i], None, rows)

    return call


def packed_weights(weight: Tensor, pattern: str) -> list[Tensor]:
    """The packed weight, as often as it takes to be cold; every copy has panels of its own."""
    first = nms.compress(weight, pattern, prune=True)
    number = copies(first.engine_nbytes or first.nbytes)
    return [first] + [first.with_engine(first.engine) for _ in range(number - 1)]


def packed_call(x: Tensor, weights: Sequence[Tensor]) -> Call:
    """``F.linear`` with the packed weight."""
    return plain_call(x, weights)


def take_turns(calls: Mapping[str, Call], seconds: float, rounds: int | None = None) -> Times:
    """Seconds of each call in each round: one call each a round, so that a slow moment hits all alike.

    Args:
        calls: Name -> call.
        seconds: How long to go on, within the limits of the number of rounds.
        rounds: Exactly so many rounds instead.
    """
    times: Times = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    least, most = (rounds, rounds) if rounds else (MIN_ROUNDS, MAX_ROUNDS)
    begin, done = time.perf_counter(), 0
    while done < least or (done < most and time.perf_counter() - begin < seconds):
        done += 1
        for name, call in calls.items():
            start = time.perf_counter()
            call(done)
            times[name].append(time.perf_counter() - start)
    return times


def spread(times: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return {"median": ordered[last // 2], "low": ordered[last // 4], "high": ordered[math.ceil(last * 3 / 4)]}


def compared(times: Times, patterns: Sequence[str], dense: Sequence[str]) -> dict[str, Row]:
    """Pattern -> F and D, ratios of lower quartiles, and the times they are made of."""
    spreads = {name: spread(values) for name, values in times.items()}
    best = min(dense, key=lambda name: spreads[name]["low"])
    return {
        pattern: {
            "F": {"ratio": spreads["F.linear"]["low"] / spreads[pattern]["low"]},
            "D": {"ratio": spreads[best]["low"] / spreads[pattern]["low"]},
            "packed": spreads[pattern],
            "F.linear": spreads["F.linear"],
            "best dense": spreads[best],
            "which": best,
        }
        for pattern in patterns
    }


def measure_layer(
    dtype: str,
    shape: tuple[int, int],
    batches: Sequence[int],
    patterns: Sequence[str],
    *,
    seconds: float,
    rounds: int | None,
) -> list[Row]:
    """All rows of one layer: batches outside, patterns inside."""
    weight = torch.randn(shape).to(DTYPES[dtype])
    dense = Dense(weight)
    packed = {pattern: packed_weights(weight, pattern) for pattern in patterns}
    rows = []
    for batch in batches:
        x = torch.randn(batch, shape[1]).to(DTYPES[dtype])
        calls = dense.calls(x)
        names = list(calls)
        calls |= {pattern: packed_call(x, weights) for pattern, weights in packed.items()}
        for pattern, row in compared(take_turns(calls, seconds, rounds), patterns, names).items():
            layer = {"dtype": dtype, "pattern": pattern, "weight": f"{shape[0]}x{shape[1]}", "batch": batch}
            rows.append(layer | row)
    return rows


def measure_gradient(
    dtype: str,
    shape: tuple[int, int],
    batches: Sequence[int],
    patterns: Sequence[str],
    *,
    seconds: float,
    rounds: int | None,
) -> list[Row]:
    """The gradient of a layer's input, ``g @ W``: packed, dense, and with a weight made dense for it."""
    weight = torch.randn(shape).to(DTYPES[dtype])
    dense = [weight.clone() for _ in range(copies(weight.nbytes))]
    packed = {pattern: packed_weights(weight, pattern) for pattern in patterns}
    rows = []
    for batch in batches:
        g = torch.randn(batch, shape[0]).to(DTYPES[dtype])
        calls = {"dense": right_call(g, dense)}
        calls |= {pattern: right_call(g, weights) for pattern, weights in packed.items()}
        calls |= {f"{p} unpacked": unpacked_call(g, weights) for p, weights in packed.items()}
        spreads = {name: spread(values) for name, values in take_turns(calls, seconds, rounds).items()}
        for pattern in patterns:
            low = spreads[pattern]["low"]
            over_dense = spreads["dense"]["low"] / low
            rows.append(
                {
                    "dtype": dtype,
                    "pattern": pattern,
                    "weight": f"{shape[0]}x{shape[1]}",
                    "batch": batch,
                    "g @ W": spreads[pattern],
                    "over dense": {"ratio": over_dense},
                    "over unpacking": {"ratio": spreads[f"{pattern} unpacked"]["low"] / low},
                    "dense": spreads["dense"],
                    "goal": "faster" if over_dense >= 1 else "lost",
                }
            )
    return rows


def right_call(g: Tensor, weights: Sequence[Tensor]) -> Call:
    """``g @ W``."""
    return lambda i: g @ weights[i % len(weights)]


def unpacked_call(g: Tensor, weights: Sequence[Tensor]) -> Call:
    """``g @ W`` with the weight made dense in every call."""
    return lambda i: g @ unpack_rows(weights[i % len(weights)])


def measure_packing(
    dtype: str, shape: tuple[int, int], patterns: Sequence[str], *, seconds: float, rounds: int | None
) -> list[Row]:
    """How long panels take to make, against ``F.linear`` with one row of x."""
    weight = torch.randn(shape).to(DTYPES[dtype])
    weights = [weight.clone() for _ in range(copies(weight.nbytes))]
    x = torch.randn(1, shape[1]).to(DTYPES[dtype])
    calls = {"F.linear": plain_call(x, weights)}
    for pattern in patterns:
        calls[pattern] = packing_call(weight, pattern)
    times = take_turns(calls, seconds, rounds)
    linear = spread(times["F.linear"])
    rows = []
    for pattern in patterns:
        pack = spread(times[pattern])
        share = pack["low"] / linear["low"]
        rows.append(
            {
                "dtype": dtype,
                "pattern": pattern,
                "weight": f"{shape[0]}x{shape[1]}",
                "packing": pack,
                "F.linear, batch 1": linear,
                "F.linears": {"ratio": share},
                "goal": "met" if share < 3 else "below 3",
            }
        )
    return rows


def packing_call(weight: Tensor, pattern: str) -> Call:
    """Panels from the packed form; their memory is given back every time."""
    packed = nms.compress(weight, pattern, prune=True)
    values, indices = packed.packed_values, packed.packed_indices
    return lambda i: panel_pack(values, indices, packed.pattern, k=weight.shape[1])
