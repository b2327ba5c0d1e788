"""Lists the GPU architectures whose machine code or PTX a shared library holds.

    python scripts/list_archs.py nmsparse_ext/_C*.so --expect "8.0;9.0"

Fails if machine code for an expected architecture is missing. Needs `cuobjdump`, from the CUDA toolkit or
from the PyPI package nvidia-cuda-cuobjdump.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path


def find_cuobjdump() -> str:
    """Path of cuobjdump; exits with a hint if there is none."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    for package in nvidia.submodule_search_locations or () if nvidia else ():
        folders += Path(package).glob("*/bin")
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    found = shutil.which("cuobjdump", path=path)
    return found or sys.exit("cuobjdump not found: pip install nvidia-cuda-cuobjdump")


def count_archs(cuobjdump: str, option: str, library: Path) -> Counter[str]:
    """How many images of each architecture `cuobjdump OPTION` lists."""
    done = subprocess.run([cuobjdump, option, str(library)], capture_output=True, text=True, check=False)
    return Counter(re.findall(r"\.(sm_\w+)\.", done.stdout))


def main() -> None:
    """Prints the list and checks it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument(
        "--expect", default="", help='architectures as in TORCH_CUDA_ARCH_LIST, e.g. "8.0;9.0+PTX"'
    )
    arguments = parser.parse_args()

    cuobjdump = find_cuobjdump()
    code = count_archs(cuobjdump, "--list-elf", arguments.library)
    ptx = count_archs(cuobjdump, "--list-ptx", arguments.library)
    print(f"{arguments.library.name}: {arguments.library.stat().st_size / 1e6:.1f} MB")
    for arch in sorted(code):
        print(f"  {arch}: machine code in {code[arch]} images")
    for arch in sorted(ptx):
        print(f"  {arch}: PTX in {ptx[arch]} images")

    names = re.split(r"[; ]+", arguments.expect.strip()) if arguments.expect.strip() else []
    expected = {"sm_" + name.removesuffix("+PTX").replace(".", "") for name in names}
    missing = sorted(expected - set(code))
    if missing:
        sys.exit(f"no machine code for {', '.join(missing)}")


if __name__ == "__main__":
    main()
