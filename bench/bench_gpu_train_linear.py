"""A training step of one linear layer on a GPU: dense against packed once a step, in the same run.

    python bench/bench_gpu_train_linear.py [--quick] [--json FILE]
    python bench/bench_gpu_train_linear.py --dry-run

A step is the forward product, the gradients of input and weight, and for the packed one what packing costs:
the library's form of the weight, and with a transposable mask that of its transposed. Choosing the mask is
not part of it: the Sparsifier does that either way. Random data, candidates in turns, medians.

The gradient of the weight stays dense, so with sparse products g times as fast as dense a step is at most
3 / (2 / g + 1) times as fast (1.29 for g = 1.5), less packing: it pays for many tokens only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_layers as layers
import torch
import torch.nn.functional as F
from bench_gpu_linear import clocks, host_batch
from gpu_layers import Layer
from torch import Tensor

import nmsparse_ext as nms
from nmsparse_ext import _cuda_timing as timing
from nmsparse_ext import cusparselt
from nmsparse_ext._machine import machine
from nmsparse_ext.train import masked_linear

TOKENS = (1024, 4096, 16384, 65536)
LAYERS = [layer for layer in (*layers.VIT, *layers.LLAMA) if layer.name in ("fc1", "fc2", "gate_up", "down")]
QUICK = [Layer("ViT-L", "fc1", 4096, 1024, (16384,)), Layer("Llama-3-8B", "down", 4096, 14336, (4096, 16384))]
TINY = [Layer("ViT-L", "tiny", 64, 32, (48,))]


def step(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, grad: Tensor) -> None:
    """Forward and backward."""
    x.grad = w.grad = None
    product(x, w).backward(grad)


def measure(layer: Layer, tokens: int, transposable: bool, dry: bool) -> dict[str, Any]:
    """One row."""
    device = "cpu" if dry else "cuda"
    dense = torch.randn(layer.rows, layer.k, device=device).bfloat16()
    if transposable:
        dense = torch.where(nms.transposable_mask(dense), dense, 0)
    else:
        nms.nm_prune_(dense, "2:4")
    w = dense.requires_grad_()
    x = torch.randn(tokens, layer.k, device=device).bfloat16().requires_grad_()
    grad = torch.randn(tokens, layer.rows, device=device).bfloat16()

    def packed_step(_: int) -> None:
        masked_linear.vouch(w, nms.Pattern(2, 4), transposable=transposable)  # forgets what was packed
        step(masked_linear.masked_linear, x, w, grad)

    def packing(_: int) -> None:
        if not transposable or cusparselt.compress_both_ways(w.detach()) is None:
            cusparselt.compress(w.detach())
            if transposable:
                cusparselt.compress(w.detach().T.contiguous())

    calls = {
        "dense": lambda _: step(F.linear, x, w, grad),
        "packed": packed_step,
        "packing": packing,
    }
    options: dict[str, Any] = (
        {"rounds": 2, "milliseconds": 0.0, "batch": host_batch} if dry else {"milliseconds": 5.0}
    )
    median = timing.medians(timing.alternate(calls, **options))
    masked_linear.disown(w)
    return {
        "layer": f"{layer.group} {layer.name}",
        "weight": f"{layer.rows}x{layer.k}",
        "tokens": str(tokens),
        "transposable": "yes" if transposable else "no",
        "dense us": median["dense"],
        "packed us": median["packed"],
        "packing": median["packing"],
        "over dense": {"ratio": median["dense"] / median["packed"]},
        "clocks": clocks(),
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=None, help="where the results go")
    parser.add_argument("--quick", action="store_true", help="three rows")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, on tiny layers")
    arguments = parser.parse_args(argv)
    dry = arguments.dry_run
    if not dry:
        if not torch.cuda.is_available():
            parser.error("needs an NVIDIA GPU; --dry-run needs none")
        reason = cusparselt.why_not("cuda")
        if reason is not None:
            parser.error(f"there is no cuSPARSELt: {reason}")
    gpu = "no GPU: a dry run" if dry else torch.cuda.get_device_name()
    print(f"{gpu}, torch {torch.__version__}", flush=True)
    rows: list[dict[str, Any]] = []

    def keep(rows: list[dict[str, Any]]) -> None:  # after each row: whatever comes later, it is there
        record = {
            "machine": {**machine(), "processor": gpu},
            "what": "A training step of one linear layer, bfloat16 2:4: forward, gradients of input and "
            "weight; packed: with packing once a step.",
            "dry_run": dry,
            "rows": rows,
        }
        if arguments.json is not None:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    chosen = (
        TINY if dry else QUICK if arguments.quick else [layer._replace(tokens=TOKENS) for layer in LAYERS]
    )
    real = masked_linear._why_not_on
    with mock.patch.object(masked_linear, "_why_not_on", (lambda device: None) if dry else real):
        for layer in chosen:
            for tokens in layer.tokens:
                for transposable in (False, True):
                    try:
                        row = measure(layer, tokens, transposable, dry)
                    except torch.cuda.OutOfMemoryError:
                        print(f"{layer.group} {layer.name}, {tokens} tokens: not enough memory", flush=True)
                        continue
                    rows.append(row)
                    keep(rows)
                    print(
                        f"{row['layer']:22} {row['weight']:12} {tokens:6} tokens, transposable "
                        f"{row['transposable']:3}: dense {row['dense us']:9.1f} us, packed "
                        f"{row['packed us']:9.1f} us ({row['over dense']['ratio']:.2f}x), of which packing "
                        f"{row['packing']:.1f} us",
                        flush=True,
                    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
