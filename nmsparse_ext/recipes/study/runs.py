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
from nmsparse_ext.recipes.loop import Outcome, train
from nmsparse_ext.recipes.study.plan import Job, Plan, Record


def read_records(path: Path, digest: str | None = None) -> dict[str, Record]:
    """Read a file of results.

    Args:
        path: The file; none is as good as an empty one.
        digest: The plan's digest that every result must carry.

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
        if digest is not None and record["plan"] != digest:
            raise ValueError(f"{path}, line {number}: a run of plan {record['plan']}, not of {digest}")
        if record["key"] in records:
            raise ValueError(f"{path}, line {number}: the run {record['key']} is there twice")
        records[record["key"]] = record
    return records


def run_study(
    path: Path,
    plan: Plan,
    *,
    limit: int | None = None,
    report: Callable[[int, int, Record], None] | None = None,
) -> bool:
    """Make the runs that are not in the file yet, adding a line for each.

    A run does not depend on when, or how fast, it is made, nor on the runs before it, except for the lambda
    that the selection stage has chosen.

    Args:
        path: The file of results; made if missing.
        plan: The plan.
        limit: Make no more than this many runs.
        report: Called with (runs there are, runs there will be, result) after each.

    Returns:
        Whether the study is complete.

    Raises:
        ValueError: If the file is of another plan.
        BlockingIOError: If another process is adding to the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _drop_torn_line(file)
        records = read_records(path, plan.digest)
        jobs = list(plan.jobs())
        missing = [job for job in jobs if job.key not in records]
        for job in missing[:limit]:
            record = run_job(job, plan, records)
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
            records[job.key] = record
            if report is not None:
                report(len(records), len(jobs), record)
        return all(job.key in records for job in jobs)


def run_job(job: Job, plan: Plan, records: dict[str, Record]) -> Record:
    """Make one run.

    Args:
        job: The run.
        plan: The plan it is of.
        records: The runs so far, which a chosen lambda is looked up in.

    Returns:
        Its result, as plain JSON types.
    """
    experiment = plan.experiment(job.experiment)
    if job.lambda_w is not None:
        lambda_w = job.lambda_w
    elif job.method == "sr-ste":
        lambda_w = experiment.chosen_lambda(job.arm, job.pattern, records)
    else:
        lambda_w = 0.0
    task = experiment.task(job, lambda_w)
    outcome = train(task)
    return {
        "key": job.key,
        "plan": plan.digest,
        "experiment": job.experiment,
        "stage": job.stage,
        "arm": job.arm,
        "pattern": job.pattern,
        "seed": job.seed,
        "lambda_w": outcome.lambda_w,
        **_figures(outcome),
        "data": task.describe(),
        "cpu_seconds": round(outcome.cpu_seconds, 2),
        "torch": torch.__version__,
        "isa": str(nms.build_info().cpu_isa),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _figures(outcome: Outcome) -> dict[str, Any]:
    """What is kept of a run: the last validation figures, the test figures, and the curves."""
    last = outcome.rows[-1]
    return {
        "validation": {
            name.removeprefix("validation_"): _finite(value)
            for name, value in last.items()
            if name.startswith("validation_")
        },
        "test": {name.removeprefix("test_"): _finite(value) for name, value in outcome.test.items()},
        "curve": [_finite(row["validation_loss"]) for row in outcome.rows],
        "train_loss": [_finite(row["train_loss"]) for row in outcome.rows],
        "sad": [row["sad"] for row in outcome.rows],
        "sad_from_start": outcome.sad_from_start / outcome.prunable,
        "steps": len(outcome.sad),
        "prunable": outcome.prunable,
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity: a run that has diverged says null."""
    return round(value, 6) if math.isfinite(value) else None


def _drop_torn_line(file: IO[str]) -> None:
    """Cuts off a last line that has no end: a process died while writing it."""
    file.seek(0)
    text = file.read()
    if text and not text.endswith("\n"):
        file.truncate(len(text[: text.rfind("\n") + 1].encode()))
        file.seek(0, os.SEEK_END)
