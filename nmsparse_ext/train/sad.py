"""SAD over time: counted on the device that holds the weight, read only when somebody asks.

Sparse Architecture Divergence is the number of weights whose kept/pruned state differs between two steps.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from torch.utils.tensorboard import SummaryWriter

_RING_ROWS = 1024  # steps between two copies to the host


@dataclass(frozen=True)
class SadHistory:
    """How many weights changed state at each step.

    Attributes:
        steps: The steps' numbers, ascending.
        counts: ``{parameter name: counts}``, one count a step.
        sizes: ``{parameter name: number of weights}``.
    """

    steps: list[int]
    counts: dict[str, list[int]]
    sizes: dict[str, int]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, name: str) -> list[int]:
        return self.counts[name]

    @property
    def total(self) -> list[int]:
        """Counts summed over the weights, one a step."""
        if not self.counts:
            return [0] * len(self.steps)
        return [sum(row) for row in zip(*self.counts.values(), strict=True)]

    @property
    def rates(self) -> dict[str, list[float]]:
        """Counts divided by the number of weights."""
        return {name: [count / (self.sizes[name] or 1) for count in row] for name, row in self.counts.items()}

    @property
    def total_rate(self) -> list[float]:
        """`total` divided by the number of weights of all of them."""
        size = sum(self.sizes.values()) or 1
        return [count / size for count in self.total]

    def rows(self) -> list[dict[str, int]]:
        """One ``{"step": ..., "total": ..., name: count, ...}`` a step; what ``csv`` and ``pandas`` take."""
        columns = zip(self.steps, self.total, *self.counts.values(), strict=True)
        names = ("step", "total", *self.counts)
        return [dict(zip(names, column, strict=True)) for column in columns]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes `rows` as a table with a header line."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["step", "total", *self.counts])
            writer.writeheader()
            writer.writerows(self.rows())

    def to_pandas(self) -> pandas.DataFrame:
        """`rows` as a data frame whose index is the step; needs pandas."""
        import pandas

        return pandas.DataFrame.from_records(
            self.rows(), columns=["step", "total", *self.counts], index="step"
        )

    def to_tensorboard(self, writer: SummaryWriter, tag: str = "sad") -> None:
        """Adds the rates as scalars: ``tag/total``, and ``tag/NAME`` for every weight.

        Args:
            writer: A ``torch.utils.tensorboard.SummaryWriter``, or whatever has its ``add_scalar``.
            tag: What they are filed under.
        """
        for name, rates in {"total": self.total_rate, **self.rates}.items():
            for step, rate in zip(self.steps, rates, strict=True):
                writer.add_scalar(f"{tag}/{name}", rate, step)

    def plot(self, axes: Axes | None = None, *, every_weight: bool = True) -> Axes:
        """Draws the rates over the steps, that of all weights together in black; needs matplotlib.

        Args:
            axes: Where to; new ones by default.
            every_weight: Whether each weight gets a line of its own.

        Returns:
            The axes.
        """
        if axes is None:
            from matplotlib.figure import Figure

            axes = Figure(layout="constrained").subplots()
        for name, rates in self.rates.items() if every_weight else ():
            axes.plot(self.steps, rates, linewidth=0.8, label=name)
        axes.plot(self.steps, self.total_rate, color="black", label="all")
        axes.set_xlabel("step")
        axes.set_ylabel("SAD rate")
        axes.legend(fontsize="small")
        return axes


class SadLog:
    """Counters in a ring on each device, one row a step, copied to the host when the ring is full.

    A row has one column a weight and a last one that is nonzero if the step turned out to be skipped (a fused
    optimizer under a GradScaler knows only on the device); such rows are dropped when they are read.

    Args:
        names: The weights' names.
        devices: Where each of them lives.
        step: The number of the last step made.
        reduce: Turns a table of counts [rows, weights] of this rank into that of all ranks.
    """

    def __init__(
        self,
        names: Sequence[str],
        devices: Sequence[torch.device],
        step: int = 0,
        reduce: Callable[[Tensor], Tensor] = lambda table: table,
    ) -> None:
        self._names = list(names)
        self._reduce = reduce
        self._first = step + 1
        self._chunks: list[Tensor] = []  # host tables [rows, weights], skipped steps dropped
        self._made = step  # steps, if none of those in the ring was skipped
        self._may_skip = False
        self._row = 0
        self._rings = {
            device: _Ring({i: name for i, name in enumerate(names) if devices[i] == device}, device)
            for device in dict.fromkeys(devices)
        }
        self._devices = list(devices)
        self._sent: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._sent_rows = 0

    @property
    def step(self) -> int:
        """The number of the last step made. Waits for the device only if that may have skipped some."""
        if self._may_skip:
            self._flush()
        return self._made

    @property
    def next_step(self) -> int:
        """The number of the step being made, without waiting; too high if the device has skipped some."""
        return self._made + 1

    def row(self, device: torch.device) -> tuple[Tensor, dict[str, int]]:
        """Where the step being made writes its counts of the weights on a device: int64, and where in it."""
        ring = self._rings[device]
        return ring.table[self._row], ring.places

    def clear(self) -> None:
        """Forgets what was written of a step that is not going to be one."""
        for ring in self._rings.values():
            ring.table[self._row].zero_()

    def commit(self, skipped: Tensor | None = None) -> None:
        """Closes the row of a step.

        Args:
            skipped: One number on a device, nonzero if the step was none after all.
        """
        if self._rings and skipped is not None:
            next(iter(self._rings.values())).table[self._row, -1].copy_(skipped.view(()), non_blocking=True)
            self._may_skip = True
        self._made += 1
        self._row += 1
        if self._row == _RING_ROWS:
            # The copy before this one is done by now, so taking it in waits for nothing.
            self._take_in()
            self._send()

    def last(self) -> dict[str, int]:
        """Counts of the last step; zeros before the first."""
        self._flush()
        table = self._reduce(self._chunks[-1][-1:]) if self._chunks else torch.zeros(1, len(self._names))
        return dict(zip(self._names, map(int, table[0].tolist()), strict=True))

    def table(self) -> tuple[int, Tensor]:
        """The number of the first step that is known, and the counts [steps, weights] from there on."""
        self._flush()
        if len(self._chunks) > 1:
            self._chunks = [torch.cat(self._chunks)]
        if not self._chunks:
            return self._first, torch.zeros(0, len(self._names), dtype=torch.int64)
        return self._first, self._chunks[0]

    def history(self, sizes: dict[str, int]) -> SadHistory:
        """All that is known, over all ranks."""
        first, table = self.table()
        columns = self._reduce(table).t().tolist() if self._names else []
        return SadHistory(
            list(range(first, first + len(table))), dict(zip(self._names, columns, strict=True)), sizes
        )

    def load(self, step: int, first: int | None = None, table: Tensor | None = None) -> None:
        """Starts anew after ``step``, with what is known of earlier steps (by default nothing)."""
        for ring in self._rings.values():
            ring.table.zero_()
        self._row, self._made, self._may_skip = 0, step, False
        self._sent, self._sent_rows = [], 0
        self._first = step + 1 if first is None else first
        self._chunks = [] if table is None or not len(table) else [table.to("cpu", torch.int64)]

    def move(self, devices: Sequence[torch.device]) -> None:
        """Follows weights to other devices."""
        if list(devices) != self._devices:
            first, table = self.table()
            moved = SadLog(self._names, devices, self._made, self._reduce)
            moved.load(self._made, first, table)
            self.__dict__.update(moved.__dict__)

    def _flush(self) -> None:
        """Brings everything to the host; waits for it."""
        self._take_in()
        if self._row:
            self._send()
            self._take_in()
        if len(self._chunks) > _RING_ROWS:
            self._chunks = [torch.cat(self._chunks)]

    def _send(self) -> None:
        """Starts to copy the rings to the host, and empties them."""
        self._sent = [ring.send(self._row) for ring in self._rings.values()]
        self._sent_rows, self._row = self._row, 0

    def _take_in(self) -> None:
        """Files what `_send` has sent."""
        if not self._sent_rows:
            return
        table = torch.zeros(self._sent_rows, len(self._names), dtype=torch.int64)
        skipped = torch.zeros(self._sent_rows, dtype=torch.bool)
        for ring, (rows, arrival) in zip(self._rings.values(), self._sent, strict=True):
            if arrival is not None:
                arrival.synchronize()
            table[:, ring.columns] = rows[:, :-1]
            skipped |= rows[:, -1] != 0
        self._made -= int(skipped.sum())
        table = table[~skipped]
        if len(table):
            self._chunks.append(table)
        self._sent, self._sent_rows = [], 0
        self._may_skip = self._may_skip and self._row > 0

    def __getstate__(self) -> dict[str, Any]:
        self._flush()
        return self.__dict__


class _Ring:
    """The counters of the weights on one device.

    Args:
        names: Which weights, by number.
        device: The device.
    """

    def __init__(self, names: dict[int, str], device: torch.device) -> None:
        self.columns = list(names)
        self.places = {name: place for place, name in enumerate(names.values())}
        self.table = torch.zeros(_RING_ROWS, len(names) + 1, dtype=torch.int64, device=device)

    def send(self, rows: int) -> tuple[Tensor, torch.cuda.Event | None]:
        """Copies the first rows to the host and empties them; from a GPU, comes with an event to wait for."""
        on_gpu = self.table.is_cuda
        copy = torch.empty(rows, self.table.shape[1], dtype=torch.int64, pin_memory=on_gpu)
        copy.copy_(self.table[:rows], non_blocking=on_gpu)
        self.table[:rows].zero_()
        if not on_gpu:
            return copy, None
        arrival = torch.cuda.Event()
        arrival.record(torch.cuda.current_stream(self.table.device))
        return copy, arrival
