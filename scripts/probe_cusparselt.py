"""Answers on a GPU what is only known from reading: how cuSPARSELt lays out, plans, captures and chooses.

    python scripts/probe_cusparselt.py [--json FILE] [--quick]

Every question is asked in turn; one that cannot be answered says why and does not stop the others. The
answers go to a JSON file, with the names and versions that they hold for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext import _lt_layout as lt
from nmsparse_ext import cusparselt, reference

HALF = torch.float16
Answer = dict[str, Any]


def weight(rows: int, k: int, dtype: torch.dtype = HALF) -> nms.NMTensor:
    """Random, 2:4 (float32: 1:2)."""
    random = torch.Generator().manual_seed(0)
    w = torch.randn(rows, k, generator=random) * (40 if dtype == torch.int8 else 1)
    return nms.compress(w.to(dtype), lt.hardware_pattern(dtype), prune=True)


def layouts_of(blob: Tensor, w: nms.NMTensor) -> list[str]:
    """Which of our layouts a compressed weight has, byte for byte; the values alone count as "values"."""
    names = []
    for name in lt.LAYOUTS:
        try:
            packed = reference.lt_pack(w.values, w.indices, w.shape[1], name)
        except RuntimeError:  # not for this dtype or shape
            continue
        if torch.equal(blob[: packed.numel()], packed):
            names.append(name)
    values = w.values.flatten().view(torch.uint8)
    if torch.equal(blob[: values.numel()], values):
        names.append("values first")
    return names


# ------------------------------------------------------------------------------------------------- the probes


def layouts(quick: bool) -> Answer:
    """A. Which layout do compressed weights have, for which dtype and size?"""
    found: Answer = {}
    for dtype in (HALF, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.float32):
        for rows, k in ((64, 64), (128, 128), (256, 128), (256, 384), (512, 1024)):
            if dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
                continue
            w = weight(rows, k, dtype)
            blob = cusparselt.compress_with_library(w.to_dense().cuda()).cpu()
            theirs = None
            if hasattr(torch, "_cslt_compress"):
                ours_like = torch._cslt_compress(w.to_dense().cuda()).cpu().flatten().view(torch.uint8)
                size = min(ours_like.numel(), blob.numel())
                theirs = torch.equal(ours_like[:size], blob[:size])
            name = f"{str(dtype).removeprefix('torch.')} {rows}x{k}"
            metadata = blob.numel() - w.values.nbytes
            found[name] = {
                "layouts": layouts_of(blob, w),
                "bytes": blob.numel(),
                "metadata bytes": metadata,
                "bits a weight": 8 * metadata / (rows * k),
                "same as torch's": theirs,
            }
    return found


def kernels(quick: bool) -> Answer:
    """B. Which kernels and copies does one product launch, and how large is the workspace?"""
    from torch.profiler import ProfilerActivity, profile

    found: Answer = {}
    for rows, k, tokens in ((1024, 1024, 64), (4096, 4096, 64), (4096, 4096, 4096)):
        packed = cusparselt.pack(weight(rows, k).cuda())
        x = torch.randn(tokens, k, device="cuda", dtype=HALF)
        cusparselt.linear(x, packed)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            cusparselt.linear(x, packed)
            torch.cuda.synchronize()
        events = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        statistics = cusparselt.statistics()
        found[f"{rows}x{k}, {tokens} tokens"] = {
            "launches": [[event.name[:120], event.device_time_total] for event in events],
            "workspace": statistics[-1].get("workspace_bytes") if statistics else None,
        }
    return found


def bias_pointer(quick: bool) -> Answer:
    """C. Does a plan that was made with one bias multiply right with another?"""
    packed = cusparselt.pack(weight(256, 256).cuda())
    x = torch.randn(64, 256, device="cuda", dtype=HALF)
    biases = [torch.randn(256, device="cuda", dtype=HALF) for _ in range(3)]
    plain = cusparselt.linear(x, packed).float()
    before = _misses()
    right = [
        torch.allclose(cusparselt.linear(x, packed, bias).float(), plain + bias.float(), rtol=1e-2, atol=2e-2)
        for bias in biases
    ]
    return {"right": right, "plans made for three biases": _misses() - before}


def _misses() -> int:
    return sum(one["misses"] for one in cusparselt.statistics())


def capture(quick: bool) -> Answer:
    """D. Can a CUDA graph capture a product, and do replays see new inputs?"""
    packed = cusparselt.pack(weight(512, 512).cuda())
    x = torch.randn(64, 512, device="cuda", dtype=HALF)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        cusparselt.linear(x, packed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = cusparselt.linear(x, packed)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    return {"right": torch.equal(y, cusparselt.linear(x, packed))}


def plans(quick: bool) -> Answer:
    """E. What do a plan and a call of one that is there cost on the host, in microseconds?"""
    packed = cusparselt.pack(weight(1024, 1024).cuda())
    made, called = [], []
    for tokens in range(8, 8 + 8 * (10 if quick else 40), 8):
        x = torch.randn(tokens, 1024, device="cuda", dtype=HALF)
        torch.cuda.synchronize()
        for times in (made, called):
            start = time.perf_counter()
            cusparselt.multiply(x, packed)
            times.append((time.perf_counter() - start) * 1e6)
            torch.cuda.synchronize()
    return {"first call": sorted(made)[len(made) // 2], "next call": sorted(called)[len(called) // 2]}


def algorithms(quick: bool) -> Answer:
    """F. What is the best checked algorithm, and which are wrong?"""
    found: Answer = {}
    shapes = ((4096, 4096), (28672, 4096), (4096, 14336))[: 1 if quick else None]
    dtypes = [HALF, torch.bfloat16, torch.int8]
    if torch.cuda.get_device_capability() >= (8, 9):
        dtypes.append(torch.float8_e4m3fn)
    for dtype in dtypes:
        for rows, k in shapes:
            for tokens in (64, 4096):
                packed = cusparselt.pack(weight(rows, k, dtype).cuda())
                out = {torch.int8: torch.int32, torch.float8_e4m3fn: torch.bfloat16}.get(dtype, dtype)
                name = f"{str(dtype).removeprefix('torch.')} {rows}x{k}, {tokens} tokens"
                try:
                    best = cusparselt.search(packed, tokens, out_dtype=out)
                except RuntimeError as error:
                    found[name] = {"error": str(error)}
                    continue
                found[name] = dataclasses.asdict(best)
    return found


def devices(quick: bool) -> Answer:
    """G. Does a second device multiply right after the first, ours and torch's?"""
    if torch.cuda.device_count() < 2:
        return {"asked": False, "because": "there is one device"}
    w, x = weight(256, 256), torch.randn(64, 256, dtype=HALF)
    expected = (x.double() @ w.to_dense().double().T).float()
    right: Answer = {}
    for index in (0, 1, 0):
        device = torch.device("cuda", index)
        y = cusparselt.linear(x.to(device), cusparselt.pack(w.to(device))).cpu().float()
        right[f"ours on {index}"] = torch.allclose(y, expected, rtol=1e-2, atol=5e-2)
        try:
            blob = torch._cslt_compress(w.to_dense().to(device))
            z = torch._cslt_sparse_mm(blob, x.to(device).t(), transpose_result=True).cpu().float()
            right[f"torch's on {index}"] = torch.allclose(z, expected, rtol=1e-2, atol=5e-2)
        except RuntimeError as error:
            right[f"torch's on {index}"] = str(error).splitlines()[0]
    return right


PROBES: tuple[Callable[[bool], Answer], ...] = (
    layouts, kernels, bias_pointer, capture, plans, devices, algorithms,  # what takes long comes last
)  # fmt: skip


def ask(
    probes: tuple[Callable[[bool], Answer], ...],
    quick: bool,
    keep: Callable[[dict[str, Answer]], object] = lambda answers: None,
) -> dict[str, Answer]:
    """All answers; of a probe that fails, why. After each, ``keep`` gets those there are."""
    answers: dict[str, Answer] = {}
    for probe in probes:
        question = (probe.__doc__ or probe.__name__).splitlines()[0]
        print(question, flush=True)
        try:
            answer = probe(quick)
        except (
            Exception
        ) as error:  # whatever it is, it is an answer, and the next question does not depend on it
            answer = {"failed": f"{type(error).__name__}: {error}"}
        answers[probe.__name__] = {"question": question, "answer": answer}
        print(f"  {json.dumps(answer, default=str)[:400]}", flush=True)
        keep(answers)
    return answers


def main(argv: list[str] | None = None) -> int:
    """Asks everything; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("bench/results/probe_cusparselt.json"))
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    reason = cusparselt.why_not("cuda")
    if reason is not None:
        parser.error(f"there is no cuSPARSELt: {reason}")
    info = nms.build_info()
    record = {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "cusparselt": info.cusparselt_version,
        "torch": torch.__version__,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)

    def keep(answers: dict[str, Answer]) -> None:
        text = json.dumps({**record, "answers": answers}, indent=1, default=str)
        arguments.json.write_text(text + "\n", encoding="utf-8")

    ask(PROBES, arguments.quick, keep)
    print(f"written to {arguments.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
