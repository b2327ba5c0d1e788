"""What a run shows while it goes: progress bar, CSV, TensorBoard."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nmsparse_ext.recipes.config import TrainConfig

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm


class Logs:
    """Progress bar, ``log.csv`` (one row an epoch) and TensorBoard.

    Args:
        config: The run's settings.
        rows: Rows of earlier epochs, if the run goes on from a checkpoint; what a broken-off run had logged
            beyond them is dropped.
        steps: Optimizer steps of the whole run.
        main: Whether this process logs at all.
    """

    def __init__(self, config: TrainConfig, rows: list[dict[str, Any]], steps: int, main: bool) -> None:
        out = config.out if main else None
        self._path: Path | None = None if out is None else out / "log.csv"
        self._bar: tqdm[Any] | None = None
        self._board: SummaryWriter | None = None
        done = rows[-1]["step"] if rows else 0
        if main and config.progress:
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, disable=None)
        if self._path is not None:
            write_csv(self._path, rows)
        if out is not None and config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)

    def step(self, loss: float) -> None:
        """One optimizer step is made."""
        if self._bar is not None:
            self._bar.update()
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch is made."""
        if self._path is not None:
            append_csv(self._path, row)
        if self._board is not None:
            for name, value in row.items():
                if name not in ("epoch", "step"):
                    self._board.add_scalar(name.replace("_", "/", 1), value, row["step"])
        if self._bar is not None:
            shown = ", ".join(f"{k} {v:.4f}" for k, v in row.items() if k.startswith("validation_"))
            line = f"epoch {row['epoch']}: train_loss {row['train_loss']:.4f}, {shown}"
            self._bar.write(line, file=sys.stderr)  # standard output is for results

    def __enter__(self) -> Logs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of the same columns; no rows, no file."""
    path.unlink(missing_ok=True)
    for row in rows:
        append_csv(path, row)


def append_csv(path: Path, row: dict[str, Any]) -> None:
    """Add a row, below a header if it is the first."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
