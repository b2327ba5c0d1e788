"""What every training recipe can be told, and how it is read from TOML files and flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import nmsparse_ext as nms

METHODS = ("dense", "ste", "sr-ste", "static")

# What a resumed run may change: where and how it runs, not what it computes.
FREE_TO_CHANGE = frozenset(
    {
        "out",
        "resume",
        "device",
        "threads",
        "progress",
        "tensorboard",
        "checkpoint_every",
        "workers",
        "stop_after",
    }
)

# SR-STE's lambda for language models by number of parameters, from the released code of "Accelerating
# Transformer Pre-training with 2:4 Sparsity" (GPT-2 small to XL). It is not monotone; these are the published
# values.
LAMBDA_BY_PARAMETERS = {124e6: 6e-5, 350e6: 2e-4, 774e6: 6e-5, 1558e6: 2e-4}


@dataclass(kw_only=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        out: Folder for logs, checkpoint and trained model; made if missing.
        resume: Go on from the checkpoint in `out` if there is one, with the same result as without a break.
        stop_after: Stop after this many epochs with a checkpoint, as if interrupted.
        seed: Seed of initial weights, order of the data and augmentation.
        epochs: Passes over the training data, or parts of the run between two evaluations.
        batch_size: Examples per optimizer step, over all processes and accumulation steps.
        accumulate: Forward and backward passes that an optimizer step's batch is split into.
        method: How to train: dense, ste, sr-ste, or static (the mask is chosen once).
        pattern: n:m, n kept of every m; for dense the one whose mask changes are counted.
        scheme: A scheme file (`nmsparse search`, `Scheme.save`, DominoSearch text): a pattern per weight,
            instead of `pattern` and `skip`.
        start: Start from the weights of this file, as ``model.safetensors`` of a run before, instead of
            random ones: fine-tuning.
        lambda_w: Strength of SR-STE's pull on pruned weights; by default what the recipe says.
        penalty: Whether that pull goes through the optimizer (gradient, as published) or beside it.
        skip: Names of layers that stay dense; globs allowed. By default what the recipe says.
        lr: Peak learning rate.
        weight_decay: Weight decay.
        warmup: Share of the run in which the learning rate rises to its peak.
        clip: Largest norm of the gradient; none by default.
        device: auto, cpu, cuda or cuda:1; auto is a GPU if there is one.
        amp: Forward passes in bf16 or fp16 (with loss scaling), or none.
        threads: PyTorch threads on the CPU.
        checkpoint_every: Epochs between two checkpoints; 0 for none.
        test: Evaluate on the test data, once, at the end. Off while settings are being chosen.
        progress: Show a progress bar.
        tensorboard: Write TensorBoard logs beside the CSV ones.
    """

    out: Path | None = None
    resume: bool = False
    stop_after: int | None = None
    seed: int = 0
    epochs: int = 1
    batch_size: int = 64
    accumulate: int = 1
    method: Literal["dense", "ste", "sr-ste", "static"] = "sr-ste"
    pattern: str = "2:4"
    scheme: Path | None = None
    start: Path | None = None
    lambda_w: float | None = None
    penalty: Literal["gradient", "decoupled"] = "gradient"
    skip: list[str] | None = None
    lr: float = 0.1
    weight_decay: float = 0.0
    warmup: float = 0.05
    clip: float | None = None
    device: str = "auto"
    amp: Literal["none", "bf16", "fp16"] = "none"
    threads: int | None = None
    checkpoint_every: int = 1
    test: bool = True
    progress: bool = True
    tensorboard: bool = True

    def __post_init__(self) -> None:
        self.pattern = str(nms.Pattern.parse(self.pattern))
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a share of the run, 0 <= warmup < 1, got {self.warmup}")
        if self.scheme is not None and self.skip is not None:
            raise ValueError("scheme says which weights stay dense: skip cannot be given beside it")
        for name in ("scheme", "start"):
            if (file := getattr(self, name)) is not None and not Path(file).is_file():
                raise ValueError(f"{name}: there is no file {file}")
        if self.resume and self.out is None:
            raise ValueError("resume needs out, the folder with the checkpoint")

    def settings(self) -> dict[str, Any]:
        """What the result depends on, as plain JSON and TOML types."""
        return {key: value for key, value in plain(self).items() if key not in FREE_TO_CHANGE}


Config = TypeVar("Config", bound=TrainConfig)


def plain(config: TrainConfig) -> dict[str, Any]:
    """A config as plain JSON types."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}


def lambda_for_size(parameters: int) -> float:
    """SR-STE's lambda for a language model of so many parameters: that of the nearest published size."""
    return LAMBDA_BY_PARAMETERS[
        min(LAMBDA_BY_PARAMETERS, key=lambda size: max(size, parameters) / min(size, parameters))
    ]


def parse_config(kind: type[Config], arguments: Sequence[str], *, name: str) -> Config:
    """Read a config from the command line: ``--config FILE.toml``, then flags, the later winning.

    Args:
        kind: The dataclass to fill.
        arguments: The command line after the recipe's name.
        name: The recipe's name, for the usage line.

    Returns:
        The config.

    Raises:
        ValueError: Naming the setting that is unknown or of the wrong type.
    """
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"nmsparse train {name}",
        description=(kind.__doc__ or "").split("\n", 1)[0],
        parser_mode="toml",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="A TOML file with the settings below.")
    parser.add_class_arguments(kind)
    try:
        parsed = parser.parse_args(_with_values(kind, arguments))
    except ArgumentError as error:
        raise ValueError(str(error)) from None
    known = {entry.name for entry in fields(kind)}
    return kind(**{key: value for key, value in parsed.as_dict().items() if key in known})


def _with_values(kind: type[TrainConfig], arguments: Sequence[str]) -> list[str]:
    """Spells out ``--resume`` as ``--resume=true`` and ``--no-progress`` as ``--progress=false``."""
    switches = {entry.name for entry in fields(kind) if entry.type in (bool, "bool")}
    spelled = []
    for i, argument in enumerate(arguments):
        name = argument.removeprefix("--").replace("-", "_")
        has_value = i + 1 < len(arguments) and arguments[i + 1] in ("true", "false")
        if argument.startswith("--") and name in switches and not has_value:
            spelled.append(f"--{name}=true")
        elif argument.startswith("--no-") and name.removeprefix("no_") in switches:
            spelled.append(f"--{name.removeprefix('no_')}=false")
        else:
            spelled.append(argument)
    return spelled
