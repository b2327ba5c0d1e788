"""Fills the tables of the README, docs/benchmarks.md and docs/search.md from the result files of the benches.

    python bench/make_readme_table.py            # rewrite them
    python bench/make_readme_table.py --check    # exit code 1 if it would change

Between ``<!-- table: NAME ... -->`` and ``<!-- end of table -->`` stands what the file
``bench/results/NAME.json`` says; NAME.KEY is another list of rows in that file. Such a file is an object with

- "machine": {"processor", "engine", "threads", "torch", "date"}, all of them text; more is left out;
- "what": one sentence that names the measured call, the baselines, the shape and the caches' state;
- "rows": one object a row of the table, with the same keys in all. A value is a text; a timing {"median",
  "low", "high"} in seconds (low and high: the middle half); or {"ratio": x} or {"share": x}, which print as
  "62x" and "85 %";
- "summary", if there is one: rows of the same kind, which stand in the table instead of all the others.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "search.md")
TABLE = re.compile(r"(<!-- table: ([\w.]+)[^\n]*-->\n)(.*?)(<!-- end of table -->)", flags=re.DOTALL)


def cell(value: Any) -> str:
    """One value of a row as text."""
    if not isinstance(value, dict):
        return str(value)
    if "ratio" in value:
        return f"{value['ratio']:.3g}x"
    if "share" in value:
        return f"{100 * value['share']:.0f} %"
    spread = max(value["high"] - value["median"], value["median"] - value["low"])
    return f"{duration(value['median'])} ± {100 * spread / value['median']:.0f} %"


def duration(seconds: float) -> str:
    """Seconds in the unit a reader would choose."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def table(result: dict[str, Any], key: str = "") -> str:
    """One list of a result file as Markdown."""
    machine, rows = result["machine"], result[key] if key else result.get("summary", result["rows"])
    keys = list(rows[0])
    lines = [
        "| " + " | ".join(keys) + " |",
        "|" + "|".join("---:" if isinstance(rows[0][key], dict) else "---" for key in keys) + "|",
    ]
    lines += ["| " + " | ".join(cell(row[key]) for key in keys) + " |" for row in rows]
    timings = any(isinstance(row[key], dict) and "median" in row[key] for row in rows for key in keys)
    spread = " Medians; ±: the middle half of the rounds." if timings else ""
    threads = f"{machine['threads']} thread{'' if str(machine['threads']) == '1' else 's'}"
    lines += [
        "",
        f"{result['what']}{spread} {machine['processor']}, "
        f"{machine['engine']}, {threads}, torch {machine['torch']}, {machine['date'][:10]}.",
    ]
    return "\n".join(lines) + "\n"


def filled(page: str, results: Path) -> str:
    """The page with every table made anew; where there is no result file, it says so."""

    def one(match: re.Match[str]) -> str:
        opening, name, _, end = match.groups()
        name, _, key = name.partition(".")
        path = results / f"{name}.json"
        if path.exists():
            body = table(json.loads(path.read_text(encoding="utf-8")), key)
        else:
            body = "No measurement is stored here yet; `make bench` makes one of your machine.\n"
        return opening + body + end

    return TABLE.sub(one, page)


def main() -> int:
    """Rewrite or check the pages; returns the exit code."""
    parser = argparse.ArgumentParser(description="Fill the tables of our pages from bench/results/*.json.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if something would")
    parser.add_argument("--page", type=Path, action="append", help="another page than ours")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    arguments = parser.parse_args()
    outdated = []
    for page in arguments.page or PAGES:
        before = page.read_text(encoding="utf-8")
        after = filled(before, arguments.results)
        if after != before:
            outdated.append(page)
            if not arguments.check:
                page.write_text(after, encoding="utf-8")
    if not arguments.check:
        return 0
    for page in outdated:
        print(f"{page} is out of date: run python bench/make_readme_table.py", file=sys.stderr)
    return int(bool(outdated))


if __name__ == "__main__":
    sys.exit(main())
