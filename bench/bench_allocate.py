"""How long `nms.allocate` takes, and how close to the optimum it is proven to be.

    python bench/bench_allocate.py

ResNet-50 and a Llama of 1B parameters, both from transformers and with random weights: what is read and
solved does not depend on what they say. Losses of all candidates and the choice among them are timed apart.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import Report, arguments, threads
from torch import Tensor, nn

import nmsparse_ext as nms


@dataclass(frozen=True)
class Case:
    """A model, and what it is allocated by."""

    name: str
    build: Callable[[], nn.Module]
    budgets: tuple[dict[str, float], ...]
    criteria: tuple[str, ...]
    example: Callable[[], dict[str, Tensor]]
    goal: float  # seconds at most, by any criterion


def resnet(dry: bool) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    small: dict[str, Any] = {"hidden_sizes": [32, 64], "depths": [1, 1], "embedding_size": 16} if dry else {}
    return ResNetForImageClassification(ResNetConfig(num_labels=1000, **small)).eval()


def llama(dry: bool) -> nn.Module:
    """The shapes of Llama-3.2-1B, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, vocabulary = (64, 2, 100) if dry else (2048, 16, 128_256)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    # A block of noise, repeated: to draw a billion numbers would take longer than everything else.
    noise = (0.02 * torch.randn(1 << 20, generator=generator)).bfloat16()
    for i, parameter in enumerate(model.parameters()):
        flat = parameter.data.view(-1)
        block = noise.roll(i)[: flat.numel()]
        whole = flat.numel() // block.numel() * block.numel()
        flat[:whole].view(-1, block.numel()).copy_(block.expand(whole // block.numel(), -1))
        flat[whole:] = block[: flat.numel() - whole]
    for name, buffer in model.named_buffers():
        if "inv_freq" in name:
            buffer.copy_(1e4 ** -(torch.arange(buffer.numel()) / buffer.numel()))
    return model


def step_on(batch: dict[str, Tensor]) -> Callable[[nn.Module], Tensor]:
    """A step that knows one batch."""

    def step(model: nn.Module) -> Tensor:
        logits = model(**batch).logits.flatten(0, -2)  # of images, or of all tokens
        return torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))

    return step


def cases(dry: bool) -> list[Case]:
    side, tokens = (32, 16) if dry else (224, 256)
    return [
        Case(
            "ResNet-50",
            lambda: resnet(dry),
            ({"params": 0.125}, {"params": 0.25, "macs": 0.9 if dry else 0.25, "bytes": 0.26}),
            ("magnitude", "taylor", "output"),
            lambda: {"pixel_values": torch.randn(4, 3, side, side)},
            10.0,
        ),
        Case(
            "Llama, 1B parameters, bfloat16",
            lambda: llama(dry),
            ({"params": 0.125}, {"params": 0.25, "bytes": 0.3}),
            ("magnitude", "taylor", "output"),
            lambda: {"input_ids": torch.randint(100, (1, tokens))},
            60.0,
        ),
    ]


def measure(case: Case, report: Report) -> None:
    """The rows of one model."""
    model = case.build()
    weights = sum(weight.parameter.numel() for weight in nms.search.find_candidates(model).weights.values())
    for criterion in case.criteria:
        for budget in case.budgets:
            example = case.example()
            given: dict[str, Any] = {"example_input": example if "macs" in budget else None}
            if criterion == "taylor":
                given |= {"step": step_on(example), "steps": 2}
            if criterion == "output":
                given["calibration"] = [example] * 2
            start = time.perf_counter()
            result = nms.allocate(model, budget, criterion=criterion, **given)
            seconds = time.perf_counter() - start
            text = ", ".join(f"{metric} {value:g}" for metric, value in budget.items())
            report.rows.append(
                {
                    "model": case.name,
                    "weights": f"{weights / 1e6:.0f}M",
                    "criterion": criterion,
                    "budget": text,
                    "losses": f"{result.seconds['criterion']:.2f} s",
                    "solver": f"{result.seconds['solver']:.2f} s",
                    "in all": f"{seconds:.2f} s",
                    "gap": f"{result.gap:.0e}" if result.gap > 1e-9 else "0",
                }
            )
            print("  ".join(str(value) for value in report.rows[-1].values()), flush=True)
            if seconds > case.goal:
                report.missed.append(f"{case.name}, {criterion}: {seconds:.1f} s, goal {case.goal:g} s")


def main(argv: list[str] | None = None) -> int:
    """Measures all models; returns the exit code."""
    parser = arguments(__doc__ or "", "allocate_cpu.json")
    parser.add_argument("--only", help="only models whose name holds this")
    parser.add_argument("--dry-run", action="store_true", help="small models: does everything run?")
    options = parser.parse_args(argv)
    report = Report(
        "nms.allocate over n:16 with n a power of two, in wall time. Losses of all candidates: for taylor "
        "with 2 steps, forward and backward included, for output with 2 batches, each of 4 images or 256 "
        "tokens. Gap: how much less the best scheme could lose at most, relative; 0 is proven optimal."
    )
    with threads(options.threads):
        for case in cases(options.dry_run):
            if options.only is None or options.only in case.name:
                measure(case, report)
        return report.finish(options.json)  # which notes the threads


if __name__ == "__main__":
    sys.exit(main())
