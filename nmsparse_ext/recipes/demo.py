"""The whole job once: train dense and 2:4, check, pack, save, load back, run, compare, and report.

``nmsparse demo`` calls :func:`run_demo`. Each step is one function below, in the order they run; each returns
a plain dictionary that ends up in ``result.json``, from which :mod:`nmsparse_ext.report` draws.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import nmsparse_ext as nms
from nmsparse_ext import report
from nmsparse_ext._machine import machine
from nmsparse_ext.recipes import digits
from nmsparse_ext.recipes.timing import alternate, threads

if TYPE_CHECKING:
    from rich.console import Console

# How far packed outputs may be from dense ones, relative to the largest output: room for another order of
# summation in float32, none for a wrong weight.
TOLERANCE = 1e-4

STATISTICS_NOTE = (
    "Mean and sample standard deviation over the seeds. This is a demonstration, not a comparison of "
    "methods: saying that one beats another takes at least five seeds and a paired test over the same splits."
)


@dataclass(frozen=True)
class Settings:
    """What ``nmsparse demo`` can be told.

    Attributes:
        out: Folder for the report, the picture, the model files and the numbers; made if missing.
        pattern: The pattern trained with; the report's prose speaks of 2:4.
        epochs: Epochs of every training run.
        seeds: How many seeds each method is trained with.
        seed: The first seed; the others follow it.
        threads: PyTorch threads. The network is so small that more than one gain little, and lose much on a
            machine that is doing something else.
        quick: A narrower network and few timing rounds: shows that everything runs, in seconds.
    """

    out: Path = Path("demo_out")
    pattern: str = "2:4"
    epochs: int = 20
    seeds: int = 3
    seed: int = 0
    threads: int = 1
    quick: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "seeds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def width(self) -> int:
        """Channels of the network's first block."""
        return 16 if self.quick else 32

    @property
    def command(self) -> str:
        """The command line that repeats this run."""
        parts = ["nmsparse demo", f"--epochs {self.epochs}", f"--seeds {self.seeds}", f"--seed {self.seed}"]
        parts += [f"--threads {self.threads}"] if self.threads != 1 else []
        parts += ["--quick"] if self.quick else []
        return " ".join(parts)


@dataclass(frozen=True)
class Outcome:
    """What a demo run left behind: its numbers, the files it wrote, and whether every check held."""

    result: dict[str, Any]
    files: dict[str, Path]
    ok: bool


def run_demo(settings: Settings | None = None, console: Console | None = None) -> Outcome:
    """Run the whole job and write the report.

    Args:
        settings: Default: three seeds, 20 epochs.
        console: A ``rich.console.Console``; progress bars appear only where it is a terminal. Default:
            standard output.

    Returns:
        The numbers, the paths and whether all checks held.
    """
    from rich.console import Console

    settings = settings or Settings()
    console = console or Console()
    wall, cpu = time.perf_counter(), time.process_time()
    settings.out.mkdir(parents=True, exist_ok=True)
    with threads(settings.threads):
        with _progress(console, settings) as step:
            runs = train_all(settings, step)
            chosen = next(run for run in runs if run.method == "sr-ste")
            model = chosen.model
            assert model is not None  # train_digits always leaves it
            scheme = nms.Scheme.uniform(model, settings.pattern, skip=digits.DENSE_LAYERS)
            split = digits.load_split(chosen.seed)

            step("pruning the dense networks")
            one_shot = prune_afterwards(runs, settings)
            step("checking every group")
            layers = check_layers(model, scheme)
            step("packing, saving, loading")
            packed, sizes, files = pack_and_reload(model, scheme, settings)
            compared = compare_outputs(model, packed, split)
            step("timing dense and packed")
            forward = time_forward(model, packed, split, rounds=3 if settings.quick else 15)
            step("timing the mask selection")
            selection = time_selection(settings.pattern, rounds=3 if settings.quick else 9)

        result = {
            "version": 1,
            "command": settings.command,
            "settings": describe_training(settings, chosen),
            "machine": machine(),
            "runs": [run.to_json() for run in runs],
            "statistics_note": STATISTICS_NOTE,
            "one_shot": one_shot,
            "deployed": {"method": chosen.method, "seed": chosen.seed},
            "layers": layers,
            "packed": compared,
            "bytes": sizes,
            "forward": forward,
            "forward_note": forward_note(packed, scheme),
            "selection": selection,
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
        }
    files["result"] = settings.out / "result.json"
    files["result"].write_text(json.dumps(result, indent=1), encoding="utf-8")
    files |= report.write_report(result, settings.out)
    ok = all(layer["violation"] is None for layer in layers) and compared["within_tolerance"]
    print_summary(console, result, files)
    return Outcome(result, files, ok)


# ------------------------------------------------------------------------------------------------ the steps


def train_all(settings: Settings, step: Callable[[str], None]) -> list[digits.TrainResult]:
    """Train every method with every seed; the runs of one seed share their split, weights and image order."""
    runs = []
    for method in digits.METHODS:
        for seed in range(settings.seed, settings.seed + settings.seeds):
            label = f"training {report.LABELS[method]}, seed {seed}"
            runs.append(
                digits.train_digits(
                    method,
                    settings.pattern,
                    seed,
                    settings.epochs,
                    width=settings.width,
                    on_epoch=_showing(step, label),
                )
            )
    return runs


def _showing(step: Callable[[str], None], label: str) -> Callable[[digits.TrainResult], None]:
    return lambda run: step(f"{label}: {run.accuracy[-1]:.1%}")


def prune_afterwards(runs: list[digits.TrainResult], settings: Settings) -> dict:
    """Accuracy of the dense networks when they are pruned after training and not trained again."""
    scores = []
    for run in runs:
        if run.method == "dense" and run.model is not None:
            model = copy.deepcopy(run.model)
            weights = dict(model.named_parameters())
            scheme = nms.Scheme.uniform(model, settings.pattern, skip=digits.DENSE_LAYERS)
            for name, pattern in scheme.items():
                nms.nm_prune_(weights[name].data, pattern, dim=1)
            split = digits.load_split(run.seed)
            scores.append(digits.accuracy(model, split.test_x, split.test_y))
    mean, spread = report.mean_and_spread(scores)
    return {"accuracy": scores, "mean": mean, "spread": spread}


def check_layers(model: nn.Module, scheme: nms.Scheme) -> list[dict]:
    """Look at every group of every layer of the scheme; "violation" is None where the pattern holds."""
    weights = dict(model.named_parameters())
    rows = []
    for name, pattern in scheme.items():
        weight = weights[name].detach()
        violation = nms.find_violation(weight, pattern, dim=1)
        rows.append(
            {
                "name": name,
                "shape": list(weight.shape),
                "pattern": str(pattern),
                "weights": weight.numel(),
                "nonzero": int(weight.count_nonzero()),
                "violation": violation and {"at": list(violation.index), "kept": violation.kept},
            }
        )
    return rows


def pack_and_reload(
    model: nn.Module, scheme: nms.Scheme, settings: Settings
) -> tuple[nn.Module, dict, dict[str, Path]]:
    """Pack a copy of the model, save it, and load the file into a freshly made network.

    Returns:
        The network loaded back, the byte counts, and the two model files (dense and packed).
    """
    from safetensors.torch import save_file as save_dense

    files = {"dense": settings.out / "dense.safetensors", "packed": settings.out / "packed.safetensors"}
    save_dense({name: t.contiguous() for name, t in model.state_dict().items()}, files["dense"])
    packed = nms.convert(copy.deepcopy(model), scheme, policy="always")
    nms.save_file(packed, files["packed"])

    # Other initial weights than any run's: whatever agrees afterwards came from the file.
    fresh = digits.build_model(seed=settings.seed + 1_000_003, width=settings.width)
    nms.load_into(fresh, files["packed"]).eval()

    weights, loaded = dict(model.named_parameters()), dict(fresh.named_parameters())
    sizes = {
        "layers_dense": sum(weights[name].nbytes for name in scheme),
        "layers_packed": sum(loaded[name].nbytes for name in scheme),
        "file_dense": files["dense"].stat().st_size,
        "file_packed": files["packed"].stat().st_size,
    }
    return fresh, sizes, files


@torch.no_grad()
def compare_outputs(model: nn.Module, packed: nn.Module, split: digits.Split) -> dict:
    """Run the masked dense and the packed network on all test images."""
    dense_out, packed_out = model(split.test_x), packed(split.test_x)
    largest = dense_out.abs().max().item()
    difference = (dense_out - packed_out).abs().max().item()
    return {
        "images": len(split.test_x),
        "max_abs_diff": difference,
        "max_abs_output": largest,
        "same_labels": int((dense_out.argmax(1) == packed_out.argmax(1)).sum()),
        "within_tolerance": difference <= TOLERANCE * largest,
    }


@torch.inference_mode()
def time_forward(model: nn.Module, packed: nn.Module, split: digits.Split, *, rounds: int) -> list[dict]:
    """Time one forward pass of both networks, for one image and for a batch."""
    groups = []
    for count in (1, 256):
        x = split.test_x[:count].contiguous(memory_format=torch.channels_last)
        timings = alternate(
            {"dense": partial(model, x), "packed": partial(packed, x)},
            rounds=rounds,
            repeats={"dense": 5, "packed": 5},
        )
        groups.append(
            {
                "title": f"Forward pass, {count} image{'' if count == 1 else 's'}",
                "rounds": rounds,
                "entries": [timing.to_json() for timing in timings.values()],
            }
        )
    return groups


def argsort_scatter(weight: Tensor, n: int, m: int) -> Tensor:
    """Masked weight as the published training code computes it: sort groups, scatter zeros, multiply."""
    groups = weight.abs().reshape(-1, m)
    pruned = groups.argsort(dim=1)[:, : m - n]
    mask = torch.ones_like(groups).scatter_(1, pruned, 0.0).reshape(weight.shape)
    return weight * mask


@torch.inference_mode()
def time_selection(pattern: str, *, rounds: int, shape: tuple[int, int] = (1024, 2048)) -> dict:
    """Time our masked copy with its mask as bits against the composition of PyTorch calls it replaces."""
    parsed = nms.Pattern.parse(pattern)
    nm = parsed.n, parsed.m
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(weight)
    calls = {
        "argsort + scatter": lambda: argsort_scatter(weight, *nm),
        "nm_prune, new output": lambda: nms.nm_prune(weight, parsed, dim=1, return_bits=True),
        "nm_prune, out=": lambda: nms.nm_prune(weight, parsed, dim=1, out=out, return_bits=True),
    }
    fast = {"nm_prune, new output": 5, "nm_prune, out=": 5}
    timings = alternate(calls, rounds=rounds, repeats=fast)
    return {
        "title": "Selecting and masking one weight",
        "what": f"Masked copy of a {shape[0]}x{shape[1]} float32 weight and its {pattern} mask.",
        "shape": f"{shape[0]}x{shape[1]}",
        "rounds": rounds,
        "equal": torch.equal(argsort_scatter(weight, *nm), nms.nm_prune(weight, parsed, dim=1)),
        "entries": [timing.to_json() for timing in timings.values()],
    }


def forward_note(packed: nn.Module, scheme: nms.Scheme) -> str:
    """What to think of the packed timings: which engines computed them."""
    weights = dict(packed.named_parameters())
    engines = sorted({getattr(weights[name], "engine", "dense") for name in scheme})
    note = f"Engine of the packed layers: {', '.join(engines)}. "
    if engines == ["decompress"]:
        note += (
            "It unpacks a layer at every call and computes it densely: packing saves bytes here, not time. "
        )
    return note + (
        "nms.convert with an example_input times each layer and keeps it dense where packed is not faster."
    )


# ----------------------------------------------------------------------------------------------- around them


def describe_training(settings: Settings, run: digits.TrainResult) -> dict:
    """The settings of the training runs, for the report."""
    assert run.model is not None
    return {
        "pattern": run.pattern,
        "epochs": settings.epochs,
        "seeds": list(range(settings.seed, settings.seed + settings.seeds)),
        "quick": settings.quick,
        "width": settings.width,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "batch_size": digits.BATCH_SIZE,
        "lr": digits.LR,
        "momentum": digits.MOMENTUM,
        "weight_decay": digits.WEIGHT_DECAY,
        "lambda_w": run.lambda_w,
    }


@contextmanager
def _progress(console: Console, settings: Settings) -> Iterator[Callable[[str], None]]:
    """A progress bar over all epochs and the five steps after them; yields step(description)."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    total = len(digits.METHODS) * settings.seeds * settings.epochs + 5
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=total)
        yield lambda text: progress.update(task, advance=1, description=text)


def print_summary(console: Console, result: dict, files: dict[str, Path]) -> None:
    """The result as tables on the terminal, then the paths."""
    from rich.table import Table

    settings, compared, sizes = result["settings"], result["packed"], result["bytes"]
    training = Table(title=f"{settings['pattern']} on handwritten digits, {len(settings['seeds'])} seed(s)")
    training.add_column("method")
    for header in ("accuracy, mean ± sd", "final SAD", "s / run"):
        training.add_column(header, justify="right")
    for row in report.method_rows(result):
        training.add_row(
            row["label"],
            f"{report.percent(row['accuracy'], 2)} ± {100 * row['spread']:.2f}",
            f"{row['sad_tail']:.1f} a step",
            f"{row['seconds']:.1f}",
        )
    shot = result["one_shot"]
    training.add_row(
        "dense, pruned afterwards",
        f"{report.percent(shot['mean'], 2)} ± {100 * shot['spread']:.2f}",
        "-",
        "-",
    )
    console.print(training)
    console.print(result["statistics_note"], style="dim")

    rest = Table(title="The sparse network, deployed")
    rest.add_column("what")
    rest.add_column("result", justify="right")
    held = sum(layer["violation"] is None for layer in result["layers"])
    rest.add_row(f"layers that hold {settings['pattern']} exactly", f"{held} of {len(result['layers'])}")
    rest.add_row(
        "packed against masked dense output",
        f"max difference {compared['max_abs_diff']:.1e}, "
        f"{compared['same_labels']} of {compared['images']} labels equal",
    )
    for what, key in (("sparse layers", "layers"), ("model file", "file")):
        dense, packed = sizes[f"{key}_dense"], sizes[f"{key}_packed"]
        rest.add_row(
            f"{what}, dense to packed",
            f"{report.byte_size(dense)} -> {report.byte_size(packed)} ({packed / dense:.2f}x)",
        )
    for group in [*result["forward"], result["selection"]]:
        first = group["entries"][0]
        for entry in group["entries"][1:]:
            rest.add_row(
                f"{group['title']}: {entry['name']} against {first['name']}",
                f"{report.duration(entry['median'])} against {report.duration(first['median'])}: "
                f"{report.ratio_text(first, entry)}",
            )
    console.print(rest)
    console.print(result["forward_note"], style="dim")
    for name in ("report", "picture", "result", "dense", "packed"):
        console.print(f"{name:>8}  {files[name]}", highlight=False, soft_wrap=True)
    console.print(f"{'time':>8}  {result['seconds']:.0f} s ({result['cpu_seconds']:.0f} s of processor time)")
