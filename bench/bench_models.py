"""Whole models with packed weights against the same models dense: eager, and compiled with freezing.

    python bench/bench_models.py                         # all of it; about ten minutes
    python bench/bench_models.py bert --dtype bfloat16
    python bench/bench_models.py llama --pattern 1:4
    python bench/bench_models.py resnet --pattern 1:8 --batch 8
    python bench/bench_models.py bert --dry-run          # tiny, stores nothing: does it still run?

One call measures one model, and puts its row into the result file, in the place of an earlier one of the same
model. Models come from ``transformers``, with random weights that are pruned to the pattern; nothing is
downloaded. The dense model holds the same zeros as the packed one, and both give the same outputs, which is
checked.

- bert: the encoder of BERT-base on 8 x 128 tokens, all linear layers of the encoder pruned;
- llama: one token through a decoder of 8 layers (hidden 2048, intermediate 5632) with a filled cache, all
  linear layers pruned;
- resnet: ResNet-50 in channels_last, all convolutions but the first pruned. Its batch normalisations are
  folded before packing; the compiled dense model has them folded by freezing.

``nms.convert(policy="auto")`` chooses which weights are packed: for the eager model against eager layers, for
the compiled one against the strongest ones, and in the end against the compiled model. Four variants take
turns, one call each a round: the dense and the packed model, eager and compiled (``torch.compile`` with
inductor's freezing, so that oneDNN packs dense weights beforehand; for the packed model with
``nms.deploy.inductor_options()``, which fuse activations as inductor does itself for dense layers). Ratios
compare like with like and are of lower quartiles.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from common import RESULTS, Timing, alternate, machine, require_kernels
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    StaticCache,
)

import nmsparse_ext as nms
from nmsparse_ext.deploy import inductor_options, report

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: (model, pattern) -> how many times as fast as each dense variant it is to be.
GOALS = {
    ("bert", "2:4"): 1.25,
    ("llama", "2:4"): 1.5,
    ("llama", "1:4"): 2.5,
    ("resnet", "2:4"): 1.2,
    ("resnet", "1:8"): 2.0,
}
#: Largest difference of outputs, relative to the largest output: another order of summation in each layer.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
VARIANTS = ("eager", "packed", "compiled", "packed compiled")


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and how it is run.

    Attributes:
        model: The dense model, in eval mode.
        skip: Modules that stay dense.
        example: What `convert` times the layers on.
        caller: Model -> what runs it once and returns its outputs.
        fold: Whether batch normalisations are folded before packing.
    """

    model: nn.Module
    skip: tuple[str, ...]
    example: Mapping[str, Any]
    caller: Callable[[nn.Module], Callable[[], Tensor]]
    fold: bool = False


# ---------------------------------------------------------------------------------------------------- models


def bert(dtype: torch.dtype, batch: int, tiny: bool) -> Workload:
    """BERT-base as an encoder."""
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    config = BertConfig(**small, vocab_size=100) if tiny else BertConfig()
    model = BertModel(config, add_pooling_layer=False).eval().to(dtype)
    example = {"input_ids": torch.randint(0, config.vocab_size, (batch, 16 if tiny else 128))}
    return Workload(model, (), example, lambda m: lambda: m(**example).last_hidden_state)


def llama(dtype: torch.dtype, batch: int, tiny: bool) -> Workload:
    """A decoder that makes one more token for each sequence."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 128}
    large = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "vocab_size": 32000}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} if tiny else {"num_attention_heads": 32}
    config = LlamaConfig(**(small if tiny else large), **({"num_key_value_heads": 4} | heads))
    model = LlamaForCausalLM(config).eval().to(dtype)
    prompt = torch.randint(0, config.vocab_size, (batch, 64))
    token = torch.randint(0, config.vocab_size, (batch, 1))

    def caller(m: nn.Module) -> Callable[[], Tensor]:
        cache = StaticCache(config=config, max_cache_len=128)
        model(prompt, past_key_values=cache, use_cache=True)
        position = torch.full((batch, 1), prompt.shape[1])
        lengths = [layer.cumulative_length for layer in cache.layers]

        def call() -> Tensor:
            for length in lengths:  # the same token again
                length.fill_(prompt.shape[1])
            return m(token, past_key_values=cache, position_ids=position, use_cache=True).logits

        return call

    return Workload(model, (), {"input_ids": token, "use_cache": False}, caller)


def resnet(dtype: torch.dtype, batch: int, tiny: bool) -> Workload:
    """ResNet-50 as a classifier of images."""
    small = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1]}
    model = ResNetForImageClassification(ResNetConfig(**small) if tiny else ResNetConfig())
    _settle(model)
    model = model.eval().to(dtype=dtype, memory_format=torch.channels_last)
    side = 32 if tiny else 224
    images = torch.randn(batch, 3, side, side, dtype=dtype).to(memory_format=torch.channels_last)
    skip = ("resnet.embedder.embedder.convolution", "classifier.1")
    return Workload(model, skip, {"pixel_values": images}, lambda m: lambda: m(images).logits, fold=True)


def _settle(model: nn.Module) -> None:
    """Gives batch normalisations statistics as training leaves them: none of them does nothing."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)


MODELS: dict[str, Callable[[torch.dtype, int, bool], Workload]] = {
    "bert": bert,
    "llama": llama,
    "resnet": resnet,
}
BATCH = {"bert": 8, "llama": 1, "resnet": 1}
#: What is measured if nothing is named.
RUNS = (
    *(f"bert --dtype {dtype} --rounds 7" for dtype in DTYPES),
    *(f"llama --dtype {dtype} --pattern {pattern}" for dtype in DTYPES for pattern in ("2:4", "1:4")),
    *(f"resnet --batch {batch} --pattern {pattern}" for batch in (1, 8) for pattern in ("2:4", "1:8")),
)

# ------------------------------------------------------------------------------------------------- measuring


def measure(name: str, dtype: str, pattern: str, batch: int, rounds: int, tiny: bool) -> dict[str, Any]:
    """One row of the result."""
    work = MODELS[name](DTYPES[dtype], batch, tiny)
    scheme = nms.Scheme.uniform(work.model, pattern, skip=work.skip)
    for weight, spec in scheme.resolve(work.model).items():
        nms.nm_prune_(work.model.get_parameter(weight).data, pattern, dim=spec.group_dim)
    packed = copy.deepcopy(work.model)
    if work.fold:
        nms.fold_batch_norm(packed, work.example)
    to_compile = copy.deepcopy(packed)
    policy = "always" if tiny else "auto"
    nms.convert(packed, scheme, example_input=work.example, policy=policy, against="eager")
    nms.convert(to_compile, scheme, example_input=work.example, policy=policy, against="compiled")
    print(report(to_compile), "\n")
    # As an option of torch.compile it would come too late: weights would be inputs, not constants.
    with torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(work.model)
        models = (work.model, packed, compiled, torch.compile(to_compile, options=inductor_options()))
        calls = {variant: work.caller(model) for variant, model in zip(VARIANTS, models, strict=True)}
        _check({variant: call() for variant, call in calls.items()}, TOLERANCE[dtype])
        timings = alternate({variant: _ignoring(call) for variant, call in calls.items()}, rounds=rounds)
    chosen = [str(len(report(model).packed)) for model in (packed, to_compile)]
    share = f"{' / '.join(dict.fromkeys(chosen))} of {len(scheme)}"
    return _row(name, dtype, pattern, batch, share, timings)


def _ignoring(call: Callable[[], Tensor]) -> Callable[[int], Tensor]:
    return lambda _number: call()


def _check(outputs: Mapping[str, Tensor], tolerance: float) -> None:
    """Ends the program unless all variants compute the same."""
    expected = outputs["eager"].float()
    for variant, output in outputs.items():
        error = ((output.float() - expected).abs().max() / expected.abs().max()).item()
        if not error <= tolerance:
            sys.exit(f"{variant} differs from eager by {error:.3g} of the largest output")


def _row(
    name: str, dtype: str, pattern: str, batch: int, share: str, timings: Mapping[str, Timing]
) -> dict[str, Any]:
    over_eager = timings["eager"].low / timings["packed"].low
    over_compiled = timings["compiled"].low / timings["packed compiled"].low
    least, goal = min(over_eager, over_compiled), GOALS.get((name, pattern))
    verdict = "lost" if least < 1 else "-" if goal is None else "met" if least >= goal else f"{goal:g}"
    if any(timing.disturbed for timing in timings.values()):
        print("disturbed: the machine was not quiet")
    return {
        "model": name,
        "dtype": dtype,
        "pattern": pattern,
        "batch": str(batch),
        "weights packed": share,
        **{variant: timing.to_json() for variant, timing in timings.items()},
        "over eager": {"ratio": over_eager},
        "over compiled": {"ratio": over_compiled},
        "goal": verdict,
    }


# --------------------------------------------------------------------------------------------------- results


def merged(path: Path, row: dict[str, Any]) -> dict[str, Any]:
    """What to store: the rows of the file, with ``row`` new or in the place of its earlier self."""
    keys = ("model", "dtype", "pattern", "batch")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = [other for other in rows if any(other[key] != row[key] for key in keys)]
    rows = sorted([*rows, row], key=lambda r: (r["model"], r["dtype"] != "float32", r["batch"], r["pattern"]))
    return {
        "machine": machine(),
        "what": (
            "Models of `transformers` with random weights, pruned, and packed by `nms.convert` where that "
            "was measured to pay (eager / compiled); compiled: `torch.compile` with freezing, so that oneDNN "
            "packs dense weights beforehand. bert: BERT-base, 8 x 128 tokens; llama: one token, 8 layers, "
            "hidden 2048, 64 tokens in the cache; resnet: ResNet-50, 224 x 224, channels_last. "
            "Ratios compare eager with eager and compiled with compiled, of lower quartiles."
        ),
        "rows": rows,
    }


def line(row: Mapping[str, Any]) -> str:
    """A row for the terminal."""
    head = (
        f"{row['model']} {row['dtype']} {row['pattern']} batch {row['batch']}, {row['weights packed']} packed"
    )
    times = [
        f"  {variant:16} {timing['low'] * 1e3:9.2f} ms, median {timing['median'] * 1e3:.2f} "
        f"(± {(timing['high'] - timing['low']) / timing['median'] * 50:.0f} %)"
        for variant in VARIANTS
        for timing in [row[variant]]
    ]
    over = [f"{base} {row[base]['ratio']:.2f}x" for base in ("over eager", "over compiled")]
    return "\n".join([head, *times, f"  {', '.join(over)}, goal: {row['goal']}"])


def _in_its_own_process(run: str, options: list[str]) -> int:
    """Exit code of one run: compiled code and weights of one model would burden the next."""
    print(f"\n{run}", flush=True)
    return subprocess.run([sys.executable, __file__, *run.split(), *options], check=False).returncode


def main() -> int:
    """Measure, print, store; returns the exit code."""
    parser = argparse.ArgumentParser(description="Whole models with packed weights against dense ones.")
    parser.add_argument("model", nargs="?", choices=list(MODELS), help="default: everything that has a goal")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path, default=RESULTS / "models_cpu.json", help="where the row goes")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, two rounds, nothing stored")
    arguments = parser.parse_args()
    if arguments.model is None:
        return max(_in_its_own_process(run, sys.argv[1:]) for run in RUNS)
    if not arguments.dry_run:
        require_kernels()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    batch = arguments.batch or BATCH[arguments.model]
    rounds = 2 if arguments.dry_run else arguments.rounds
    with torch.no_grad():
        row = measure(arguments.model, arguments.dtype, arguments.pattern, batch, rounds, arguments.dry_run)
    print(line(row))
    if not arguments.dry_run:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        record = json.dumps(merged(arguments.json, row), indent=1)
        arguments.json.write_text(record + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
