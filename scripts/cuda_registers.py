"""Writes the table of registers per kernel into csrc/cuda/README.md.

    python scripts/cuda_registers.py nmsparse_ext/_C*.so            # a library built for sm_80 and sm_90
    python scripts/cuda_registers.py nmsparse_ext/_C*.so --check    # only fails if a kernel spills

Object files of the kernels will do, too, all that there are.

A spilled register lives in local memory, which is much slower; registers limit how many threads a
multiprocessor can hold. Needs `cuobjdump`, as list_archs.py does, and `c++filt`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from list_archs import find_cuobjdump

README = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "README.md"
BEGIN, END = "<!-- registers: written by scripts/cuda_registers.py -->\n", "<!-- registers: end -->\n"
DTYPES = ("float64", "float32", "bfloat16", "float16", "int8", "float8_e4m3fn")

#: These keep an array on purpose in memory that each thread has for itself: the old mask of a span.
WITH_STACK = ("StepStrided",)

Usage = dict[str, dict[str, int]]  # kernel -> architecture -> registers


def resource_usage(library: Path) -> tuple[Usage, list[str]]:
    """Registers of every kernel in the library, and the kernels that have a stack frame and should not."""
    command = [find_cuobjdump(), "--dump-resource-usage", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    text = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    usage: Usage = defaultdict(dict)
    spilling = []
    arch = kernel = ""
    for line in text.splitlines():
        if found := re.match(r"arch = (sm_\d+)", line.strip()):
            arch = found[1]
        elif found := re.match(r"Function (?:void )?(.*):$", line.strip()):
            kernel = readable(found[1])
        elif found := re.match(r"REG:(\d+) STACK:(\d+)", line.strip()):
            usage[kernel][arch] = int(found[1])
            if int(found[2]) and not kernel.startswith(WITH_STACK):
                spilling.append(f"{kernel} ({arch})")
    return usage, spilling


def readable(name: str) -> str:
    """``staged_kernel<SelectStaged<(DType)1, 4>>(...)`` -> ``SelectStaged<float32, 4>``."""
    name = re.sub(r"\(?\(nms::DType\)(\d)\)?", lambda m: DTYPES[int(m[1])], name).replace("nms::", "")
    found = re.match(r"(?!reduce)\w+_kernel<(.*?)>\s*\(|reduce_kernel<\w+, (.*?)>\s*\(|(\w+)\(", name)
    body = next(filter(None, found.groups())) if found else name
    for unsigned, bits in (("char", 8), ("short", 16), ("int", 32), ("long", 64)):
        body = body.replace(f"unsigned {unsigned}", f"{bits} bits")
    return body.replace(" >", ">").strip()


def row_of(kernel: str) -> str:
    """The row of the table that a kernel belongs to."""
    name, _, arguments = kernel.partition("<")
    if name in {"SelectStaged", "CompressStaged"}:
        m = re.search(r"(\d+)>$", arguments)
        assert m is not None
        row = f"{name}, m = {m[1]}" if m[1] != "0" else f"{name}, any m"
    elif name == "SmallBatch":
        tokens = re.search(r", (\d+), (\w+)<", arguments)
        assert tokens is not None
        row = f"{name}, T = {tokens[1]}" + (", any pattern" if tokens[2] == "AnyUnit" else "")
    elif name == "SparseCoreBatch":
        row = f"{name}, {8 * int(arguments[:-1].rpartition(', ')[2])} tokens"
    else:
        row = name
    return row + ("; float64" if "float64" in arguments or "64 bits" in arguments else "")


def table(usage: Usage) -> str:
    """One row per kernel; the dtypes that need equally many registers, and all others, show as a range."""
    archs = sorted({arch for per_arch in usage.values() for arch in per_arch})
    rows: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for kernel, per_arch in usage.items():
        for arch, registers in per_arch.items():
            rows[row_of(kernel)][arch].append(registers)
    lines = [f"| kernel | {' | '.join(archs)} |", f"|---|{'---|' * len(archs)}"]

    def natural(row: str) -> list[str | int]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", row)]

    for row in sorted(rows, key=natural):
        cells = []
        for arch in archs:
            low, high = min(rows[row][arch]), max(rows[row][arch])
            cells.append(str(low) if low == high else f"{low} to {high}")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Checks for spills and rewrites the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true", help="leave the table as it is")
    arguments = parser.parse_args()
    usage: Usage = {}
    spilling: list[str] = []
    for library in arguments.library:
        found, with_stack = resource_usage(library)
        usage |= found
        spilling += with_stack
    if not usage:
        sys.exit("no kernels in " + ", ".join(map(str, arguments.library)))
    if spilling:
        sys.exit("kernels with a stack frame: " + ", ".join(sorted(spilling)))
    if not arguments.check:
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(before + BEGIN + table(usage) + END + rest.partition(END)[2])
    print(f"{len(usage)} kernels, none of them with a stack frame")


if __name__ == "__main__":
    main()
