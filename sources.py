"""The one list of C++ and CUDA sources. setup.py imports it; CMake runs ``python3 sources.py KIND``.

A new file in one of these folders is built by both without touching either.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def _glob(*patterns: str) -> list[str]:
    """Files under the repository root, relative to it and sorted, so that every build sees the same order."""
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


#: Torch-free: needs no more than a C++ compiler. These are what the sanitizer build tests.
KERNEL_SOURCES = _glob("csrc/cpu/kernels/*.cpp", "csrc/cusparselt/library/*.cpp")

#: The half that sees tensors: schemas, bindings, and each op's checks and parallel loop.
OP_SOURCES = _glob("csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/cusparselt/*.cpp")

#: Everything in a CPU build of ``nmsparse_ext._C``.
CPU_SOURCES = OP_SOURCES + KERNEL_SOURCES

#: Added by a CUDA build.
CUDA_SOURCES = _glob("csrc/cuda/**/*.cu", "csrc/cuda/**/*.cpp", "csrc/cusparselt/*.cu")

#: Rebuild when one of these changes.
HEADERS = _glob("csrc/**/*.h", "csrc/**/*.cuh")

#: Torch-free test programs, one executable each.
TEST_SOURCES = _glob("tests/cpp/*.cpp")

KINDS = {
    "kernels": KERNEL_SOURCES,
    "ops": OP_SOURCES,
    "cpu": CPU_SOURCES,
    "cuda": CUDA_SOURCES,
    "tests": TEST_SOURCES,
}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in KINDS:
        sys.exit(f"usage: python3 sources.py {{{','.join(KINDS)}}}")
    print(";".join(KINDS[sys.argv[1]]))  # ';' separates the items of a CMake list
