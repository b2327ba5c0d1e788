"""Writing a study's page with its plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nmsparse_ext._atomic import atomic_write
from nmsparse_ext.recipes.study.plan import Plan
from nmsparse_ext.recipes.study.runs import read_records


def write_report(results: Path, plan: Plan[Any, Any], folder: Path) -> Path:
    """Write the study's page, and its plots below ``images/``.

    Args:
        results: The file of results.
        plan: The plan that it is of.
        folder: Where to write; made if missing.

    Returns:
        The page's path.

    Raises:
        ValueError: If there are no results, or they are of another plan.
    """
    records = read_records(results, plan.digest, *plan.extends)
    if not records:
        raise ValueError(f"{results} holds no results")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    plan.draw(records, folder / "images")
    path = folder / f"{plan.page}.md"
    with atomic_write(path) as file:
        file.write(plan.render(records).encode())
    return path
