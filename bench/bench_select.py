"""How fast weights are chosen: selection, compression and mask differences on the CPU.

    python bench/bench_select.py                 # everything; takes minutes and wants a quiet machine
    python bench/bench_select.py --only rows --patterns 2:4 --dtypes float32

A and B are how N:M masks are made in plain PyTorch: by sorting each group (as the code that came with the
N:M training papers does) and by ``topk``. Ours writes the masked copy and the packed mask in one call. The
ceiling is a copy of the same weight past the cache; its time is scaled to the traffic of weight, copy and
mask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from common import (
    Ceiling,
    Report,
    Rotation,
    Timing,
    alternate,
    arguments,
    cpu_isa,
    require_kernels,
    reused_memory,
    threads,
)
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext import ops

SIZE = 4096
PATTERNS = ("2:4", "1:4", "4:8", "2:8", "1:16", "4:16", "8:16", "8:32")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PARTS = ("rows", "strided", "compress", "sad")


class Goals(NamedTuple):
    """How much faster than A and B, and which share of the ceiling."""

    over_a: float
    over_b: float
    share: float


def goals_of(dtype: str, pattern: str) -> Goals:
    if dtype == "float32":
        return Goals(60, 45, 0.80 if pattern == "8:32" else 0.85)
    return Goals(110, 75, 0.80)


# ------------------------------------------------------------------------ plain PyTorch, for comparison


def prune_by_argsort(w: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """A: sort every group, clear the mask at the smallest."""
    groups = w.detach().abs().reshape(-1, m)
    smallest = torch.argsort(groups, dim=1)[:, : m - n]
    mask = torch.ones(groups.shape, dtype=w.dtype).scatter_(1, smallest, 0).reshape(w.shape)
    return w * mask, mask


def prune_by_topk(w: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """B: ask for the largest of every group, set the mask there."""
    groups = w.detach().abs().reshape(-1, m)
    largest = groups.topk(n, dim=1).indices
    mask = torch.zeros(groups.shape, dtype=w.dtype).scatter_(1, largest, 1).reshape(w.shape)
    return w * mask, mask


def compress_24(w: Tensor) -> tuple[Tensor, Tensor]:
    """2:4 values and two-bit indices."""
    kept = w.abs().reshape(-1, 4).topk(2, dim=1).indices.sort(1).values
    values = w.reshape(-1, 4).gather(1, kept)
    nibbles = (kept[:, 0] | (kept[:, 1] << 2)).to(torch.uint8).reshape(-1, 2)
    return values, nibbles[:, 0] | (nibbles[:, 1] << 4)


# ------------------------------------------------------------------------------------------------ parts


def prune_calls(
    weights: Rotation, outputs: Rotation, bits: Tensor, pattern: str, dim: int = 1
) -> Callable[[int], object]:
    """Masked copy and packed mask into memory that is there already."""
    return lambda number: ops.prune_into(weights[number], pattern, dim=dim, out=outputs[number], bits=bits)


def with_isa(isa: str, call: Callable[[int], object]) -> Callable[[int], object]:
    def run(number: int) -> None:
        with cpu_isa(isa):
            call(number)

    return run


def bench_rows(report: Report, ceiling: Ceiling, dtype: str, patterns: list[str], rounds: int) -> None:
    """The table: contiguous groups, cold weight, preallocated outputs."""
    weights = Rotation(lambda: torch.randn(SIZE, SIZE).to(DTYPES[dtype]))
    outputs = Rotation(lambda: torch.zeros(SIZE, SIZE, dtype=DTYPES[dtype]))
    bits = torch.empty(SIZE, SIZE // 8, dtype=torch.uint8)
    data = weights[0].numel() * weights[0].element_size()
    copy_traffic = (2 * data + bits.numel()) / (2 * data)
    read_traffic = (data + bits.numel()) / data
    isas = nms.build_info().cpu_isas
    for pattern in patterns:
        n, m = (int(part) for part in pattern.split(":"))
        prune = prune_calls(weights, outputs, bits, pattern)
        calls: dict[str, Callable[[int], object]] = {
            "ours": prune,
            "streaming copy": lambda number: ceiling.copy(weights[number], outputs[number]),
            "copy_": lambda number: outputs[number].copy_(weights[number]),
            "bits only": lambda number, pattern=pattern: ops.mask_bits(weights[number], pattern),
            "read": lambda number: ceiling.read(weights[number]),
            "new output": lambda number, pattern=pattern: ops.nm_prune(
                weights[number], pattern, return_bits=True
            ),
            "A": lambda number, n=n, m=m: prune_by_argsort(weights[number], n, m),
            "B": lambda number, n=n, m=m: prune_by_topk(weights[number], n, m),
        }
        calls |= {isa: with_isa(isa, prune) for isa in isas[:-1]}
        times = alternate(calls, rounds=rounds, rare={"A": 2, "B": 3, "scalar": 5, "new output": 5})
        report.watch({name: times[name] for name in ("ours", "streaming copy")})
        add_row(report, dtype, pattern, times, copy_traffic, read_traffic, isas)


def add_row(
    report: Report,
    dtype: str,
    pattern: str,
    times: dict[str, Timing],
    copy_traffic: float,
    read_traffic: float,
    isas: tuple[str, ...],
) -> None:
    ours = times["ours"].low
    over_a, over_b = times["A"].best / ours, times["B"].best / ours
    share = times["streaming copy"].low * copy_traffic / ours
    read_share = times["read"].low * read_traffic / times["bits only"].low
    goals = goals_of(dtype, pattern)
    name = f"{dtype} {pattern}"
    print(
        f"{name:14} {ours * 1e3:6.2f} ms | over A {report.goal(name + ' over A', over_a, goals.over_a)}"
        f" | over B {report.goal(name + ' over B', over_b, goals.over_b)}"
        f" | of a streaming copy {report.goal(name + ' of a streaming copy', share, goals.share)}"
        f" | of copy_ {times['copy_'].low / ours:4.2f} | bits only {times['bits only'].low * 1e3:5.2f} ms,"
        f" {read_share:4.0%} of reading | new output {times['new output'].low * 1e3:6.2f} ms"
    )
    by_isa = {isa: times[isa].low for isa in isas[:-1]}
    if "avx2" in by_isa:
        print(
            f"{'':14} avx2 {report.goal(name + ' avx2 of ' + isas[-1], ours / by_isa['avx2'], 1 / 3)}", end=""
        )
    if "scalar" in by_isa:
        over = times["A"].best / by_isa["scalar"]
        print(f" | scalar over A {report.goal(name + ' scalar over A', over, 10)}", end="")
    print(flush=True)
    report.rows.append(
        {
            "pattern": pattern,
            "dtype": dtype,
            "argsort + scatter": times["A"].to_json(),
            "topk + scatter": times["B"].to_json(),
            "nm_prune, out=": times["ours"].to_json(),
            "over argsort": {"ratio": over_a},
            "over topk": {"ratio": over_b},
            "of a streaming copy": {"share": share},
        }
    )
    report.others.setdefault("rows", []).append(
        {"pattern": pattern, "dtype": dtype, "bits of a read": {"share": read_share}}
        | {name: timing.to_json() for name, timing in times.items()}
    )


def bench_strided(report: Report, dtype: str, patterns: list[str], rounds: int) -> None:
    """A strided group dim against the same weights with contiguous groups."""

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape).to(DTYPES[dtype])

    cases: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], int]] = {
        "conv [512, 512, 3, 3] along I": (
            lambda: weight(512, 512, 3, 3),
            lambda: weight(512, 512, 3, 3).contiguous(memory_format=torch.channels_last),
            1,
        ),
        "matrix [4096, 4096] along its first dim": (
            lambda: weight(SIZE, SIZE),
            lambda: weight(SIZE, SIZE).t(),
            0,
        ),
    }
    for case, (make_strided, make_contiguous, dim) in cases.items():
        strided, contiguous = Rotation(make_strided), Rotation(make_contiguous)
        strided_out, contiguous_out = Rotation(make_strided), Rotation(make_contiguous)
        for pattern in patterns:
            bits = ops.mask_bits(strided[0], pattern, dim=dim)
            times = alternate(
                {
                    "strided": prune_calls(strided, strided_out, bits, pattern, dim),
                    "contiguous": prune_calls(contiguous, contiguous_out, bits, pattern, dim),
                },
                rounds=2 * rounds,
            )
            report.watch(times)
            name = f"{dtype} {pattern}, {case}"
            share = times["contiguous"].low / times["strided"].low
            print(
                f"{name}: {times['strided'].low * 1e3:.2f} ms,"
                f" contiguous {times['contiguous'].low * 1e3:.2f} ms, speed {report.goal(name, share, 0.5)}",
                flush=True,
            )
            report.others.setdefault("strided", []).append(
                {"dtype": dtype, "pattern": pattern, "case": case, "of contiguous": {"share": share}}
                | {key: timing.to_json() for key, timing in times.items()}
            )


def bench_compress(report: Report, dtype: str, rounds: int) -> None:
    """2:4 to values and indices, which are new tensors every time; with new memory and with reused."""
    weights = Rotation(lambda: torch.randn(SIZE, SIZE).to(DTYPES[dtype]))
    calls: dict[str, Callable[[int], object]] = {
        "ours": lambda number: ops.pack(weights[number], "2:4"),
        "PyTorch": lambda number: compress_24(weights[number]),
    }
    for memory in ("new", "reused"):
        with reused_memory() if memory == "reused" else nullcontext():
            times = alternate(calls, rounds=rounds, rare={"PyTorch": 3})
        report.watch({"ours": times["ours"]})
        over = times["PyTorch"].best / times["ours"].low
        name = f"{dtype} 2:4 compress into {memory} memory over PyTorch"
        shown = report.goal(name, over, 120) if memory == "reused" else f"{over:7.3g}"
        print(f"{name} {shown}, {times['ours'].low * 1e3:.2f} ms", flush=True)
        report.others.setdefault("compress", []).append(
            {"dtype": dtype, "memory": memory, "over PyTorch": {"ratio": over}}
            | {key: timing.to_json() for key, timing in times.items()}
        )


def bench_sad(report: Report, rounds: int) -> None:
    """Differing bits of two packed masks, one thread, against bool masks in PyTorch."""
    masks = Rotation(lambda: torch.rand(SIZE, SIZE) < 0.5, at_least=4)
    packed = [ops.pack_bits(masks[index]) for index in range(len(masks))]
    count = torch.zeros((), dtype=torch.int64)
    with threads(1):
        times = alternate(
            {
                "ours": lambda number: ops.sad_into(
                    packed[number % len(packed)], packed[(number + 1) % len(packed)], count
                ),
                "xor and sum": lambda number: (masks[number] ^ masks[number + 1]).sum(),
                "count_nonzero": lambda number: torch.count_nonzero(masks[number] != masks[number + 1]),
            },
            rounds=2 * rounds,
            rare={"xor and sum": 5},
        )
    report.watch({"ours": times["ours"]})
    for baseline, goal in (("xor and sum", 200.0), ("count_nonzero", 16.0)):
        name = f"SAD over {baseline} of bools, one thread"
        over = times[baseline].best / times["ours"].low
        print(f"{name} {report.goal(name, over, goal)}", flush=True)
    report.others["sad"] = [{name: timing.to_json() for name, timing in times.items()}]


def main() -> int:
    parser = arguments("Selection, compression and mask differences on the CPU.", "bench_select.json")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), metavar="N:M")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    options = parser.parse_args()
    require_kernels()
    torch.manual_seed(0)
    report = Report(
        f"Masked copy and packed mask of a cold {SIZE} x {SIZE} weight, against two ways to do it in plain"
        " PyTorch."
    )
    with threads(options.threads):
        ceiling = Ceiling()
        for dtype in options.dtypes:
            if "rows" in options.only:
                bench_rows(report, ceiling, dtype, options.patterns, options.rounds)
            if "strided" in options.only:
                bench_strided(
                    report, dtype, [p for p in options.patterns if p in ("2:4", "4:16")], options.rounds
                )
            if "compress" in options.only:
                bench_compress(report, dtype, options.rounds)
        if "sad" in options.only:
            bench_sad(report, options.rounds)
        return report.finish(options.json)


if __name__ == "__main__":
    sys.exit(main())
