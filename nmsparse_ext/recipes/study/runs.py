"""Making a study's runs, one after the other, and the file that they are kept in."""

from __future__ import annotations

import datetime
import fcntl
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

import nmsparse_ext as nms
from nmsparse_ext.recipes.loop import Outcome
from nmsparse_ext.recipes.study.plan import Plan, Record


def read_records(path: Path, *digests: str) -> dict[str, Record]:
    """Read a file of results.

    Args:
        path: The file; none is as good as an empty one.
        digests: Of the plan, and of those that it extends: every result must carry one. None: any will do.

    Returns:
        ``{key of the run: result}``. A last line that was cut short is left out.

    Raises:
        ValueError: If a result is of another plan, or a run is there twice.
    """
    records: dict[str, Record] = {}
    if not path.exists():
        return records
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        record = json.loads(line)
        if digests and record["plan"] not in digests:
            wanted = " or ".join(digests)
            raise ValueError(f"{path}, line {number}: a run of plan {record['plan']}, not of {wanted}")
        if record["key"] in records:
            raise ValueError(f"{path}, line {number}: the run {record['key']} is there twice")
        records[record["key"]] = record
    return records


def run_study(
    path: Path,
    plan: Plan[Any, Any],
    *,
    limit: int | None = None,
    only: str | None = None,
    report: Callable[[int, int, Record], None] | None = None,
) -> bool:
    """Make the runs that are not in the file yet, adding a line for each.

    A run does not depend on when, or how fast, it is made, nor on the runs before it, except for what the
    plan chooses by them.

    Args:
        path: The file of results; made if missing.
        plan: The plan.
        limit: Make no more than this many runs.
        only: Make the runs of this experiment alone. Files of several experiments may be strung together.
        report: Called with (runs there are, runs there will be, result) after each.

    Returns:
        Whether the study, or the experiment, is complete.

    Raises:
        ValueError: If the file is of another plan, or there is no such experiment.
        BlockingIOError: If another process is adding to the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _drop_torn_line(file)
        records = read_records(path, plan.digest, *plan.extends)
        wanted = None if only is None else plan.experiment(only).name
        jobs = [job for job in plan.jobs() if wanted in (None, job.experiment)]
        missing = [job for job in jobs if job.key not in records]
        for job in missing[:limit]:
            record = {"key": job.key, "plan": plan.digest, **plan.run(job, records), **_circumstances()}
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
            records[job.key] = record
            if report is not None:
                report(sum(job.key in records for job in jobs), len(jobs), record)
        return all(job.key in records for job in jobs)


def _circumstances() -> dict[str, str]:
    """What a run was made with, and when."""
    return {
        "torch": torch.__version__,
        "isa": str(nms.build_info().cpu_isa),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def figures_of(outcome: Outcome) -> dict[str, Any]:
    """What is kept of a run: the last validation figures, the test figures, and the curves."""
    last = outcome.rows[-1]
    return {
        "validation": {
            name.removeprefix("validation_"): finite_or_none(value)
            for name, value in last.items()
            if name.startswith("validation_")
        },
        "test": {name.removeprefix("test_"): finite_or_none(value) for name, value in outcome.test.items()},
        "curve": [finite_or_none(row["validation_loss"]) for row in outcome.rows],
        "train_loss": [finite_or_none(row["train_loss"]) for row in outcome.rows],
        "sad": [row["sad"] for row in outcome.rows],
        "sad_from_start": outcome.sad_from_start / outcome.prunable,
        "steps": len(outcome.sad),
        "prunable": outcome.prunable,
    }


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN and no infinity: a run that has diverged says null."""
    return round(value, 6) if math.isfinite(value) else None


def _drop_torn_line(file: IO[str]) -> None:
    """Cuts off a last line that has no end: a process died while writing it."""
    file.seek(0)
    text = file.read()
    if text and not text.endswith("\n"):
        file.truncate(len(text[: text.rfind("\n") + 1].encode()))
        file.seek(0, os.SEEK_END)
