"""Builds and installs nmsparse_ext; the only packaging path. Metadata is in pyproject.toml.

    pip install --no-build-isolation -e .      # against the torch that is already installed

What is built depends on three things and never on whether this machine has a GPU:

=====================================  ===============================================================
``NMSPARSE_REFERENCE=1``               pure Python, no extension
no C++ compiler                        the same
``NMSPARSE_CUDA=0``                    CPU extension
``NMSPARSE_CUDA=1``, ``FORCE_CUDA=1``  CPU + CUDA extension, an error where there is no CUDA toolkit
unset                                  CUDA if this torch is a CUDA build and a toolkit is found
=====================================  ===============================================================

``TORCH_CUDA_ARCH_LIST`` chooses the architectures, ``MAX_JOBS`` the number of parallel compiles, ``DEBUG=1``
an unoptimised build with assertions, ``NMSPARSE_SANITIZE=address`` one under GCC's or Clang's sanitizers
(Python then needs their runtime preloaded: see ``scripts/fuzz_sanitized.sh``).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))  # pip runs this file with another sys.path

from sources import CPU_SOURCES, CUDA_SOURCES, HEADERS, ROOT

MIN_TORCH = (2, 11)
TORCH_TARGET = "0x020b000000000000"  # MIN_TORCH as the stable ABI spells it; newer APIs then do not compile
CXX_STANDARD = "-std=c++20"
DEFAULT_ARCHS = (
    "8.0;9.0+PTX"  # torch's own default asks the build machine's GPUs, and fails if there are none
)


def flag(name: str) -> bool | None:
    """Environment switch: None if unset or empty, else whether it is on."""
    value = os.environ.get(name, "").strip().lower()
    return None if not value else value not in {"0", "false", "off", "no"}


def has_compiler() -> bool:
    command = shlex.split(os.environ.get("CXX", ""))
    return any(shutil.which(name) for name in (command[-1:] if command else ("c++", "g++", "clang++")))


def decide() -> tuple[str, str]:
    """What to build ("reference", "cpu" or "cuda") and why."""
    if flag("NMSPARSE_REFERENCE"):
        return "reference", "NMSPARSE_REFERENCE=1"
    if not has_compiler():
        return "reference", "no C++ compiler found (set CXX or install g++ or clang++ for the fast kernels)"
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME
    except ImportError as error:
        sys.exit(
            f"nmsparse_ext: cannot import torch while building ({error}). The extension is compiled against "
            "the torch you have: install torch first, then run `pip install --no-build-isolation .`"
        )
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < MIN_TORCH:
        sys.exit(f"nmsparse_ext: torch >= {MIN_TORCH[0]}.{MIN_TORCH[1]} is needed, found {torch.__version__}")

    forced = flag("NMSPARSE_CUDA")
    if forced is None and flag("FORCE_CUDA"):
        forced = True
    if forced is False:
        return "cpu", "NMSPARSE_CUDA=0"
    missing = None
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is built without CUDA"
    elif CUDA_HOME is None or not (Path(CUDA_HOME) / "include" / "cuda_runtime_api.h").exists():
        missing = f"no CUDA toolkit found (CUDA_HOME={CUDA_HOME})"
    if missing is None:
        return "cuda", f"torch {torch.__version__}, CUDA toolkit in {CUDA_HOME}"
    if forced:
        sys.exit(f"nmsparse_ext: a CUDA build was asked for, but {missing}")
    return "cpu", missing


def nvcc_version() -> tuple[int, ...]:
    """Version of the CUDA compiler."""
    from torch.utils.cpp_extension import CUDA_HOME

    text = subprocess.run(
        [f"{CUDA_HOME}/bin/nvcc", "--version"], capture_output=True, text=True, check=True
    ).stdout
    return tuple(int(part) for part in re.findall(r"release (\d+)\.(\d+)", text)[0])


def extension(kind: str) -> dict[str, Any]:
    """Arguments of setup() that build the extension module ``nmsparse_ext._C``."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, include_paths

    debug = bool(flag("DEBUG"))
    # Torch's include folders once more, as system folders: the compiler then keeps their warnings quiet.
    isystem = [argument for path in include_paths() for argument in ("-isystem", path)]
    common = [
        CXX_STANDARD,
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        *(["-O0", "-g", "-UNDEBUG"] if debug else ["-O3"]),
    ]
    # Errors name the source files, which do not lie where they were compiled.
    prefix = f"-fmacro-prefix-map={ROOT}/="
    # No contraction: the same source must round alike on every instruction set. Fused multiply-adds
    # are written where they are wanted.
    cxx = [*common, prefix, "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", *isystem]
    sanitize = os.environ.get("NMSPARSE_SANITIZE", "").strip()
    checks = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"] if sanitize else []
    if sanitize:  # optimised as little as the intrinsics' templates allow, as in CMakeLists.txt
        cxx += ["-O1", "-g1", "-fno-omit-frame-pointer", *checks]
    elif not debug:
        cxx.append("-g0")  # many Pythons add -g to every extension's flags: ten times the size
    # The stable ABI's current-stream call is declared only under USE_CUDA.
    nvcc = [*common, "-DUSE_CUDA", "-Xcompiler=-fvisibility=hidden", *(["-G"] if debug else ["-lineinfo"])]

    if kind == "cuda":
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)
        if nvcc_version() >= (12, 8):
            nvcc.append("--compress-mode=size")  # an eighth of the size
        module = CUDAExtension(
            "nmsparse_ext._C",
            CPU_SOURCES + CUDA_SOURCES,
            define_macros=[("NMSPARSE_WITH_CUDA", None)],
            extra_compile_args={"cxx": cxx, "nvcc": [*nvcc, "--threads=2"]},
        )
    else:
        module = CppExtension(
            "nmsparse_ext._C", CPU_SOURCES, extra_compile_args={"cxx": cxx}, extra_link_args=checks
        )
    module.depends = HEADERS
    module.libraries.remove("torch_python")  # no tensor crosses pybind11; the rest is libtorch's stable ABI
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        # Always hand over to ninja, which sees changed flags; setuptools would only compare file times.
        "options": {"build_ext": {"force": True}},
    }


kind, reason = decide()
archs = f" for {os.environ.get('TORCH_CUDA_ARCH_LIST', DEFAULT_ARCHS)}" if kind == "cuda" else ""
built = {"reference": "no extension, pure Python", "cpu": "CPU extension", "cuda": "CPU and CUDA extension"}
print(f"nmsparse_ext: building {built[kind]}{archs}: {reason}", flush=True)
setup(**({} if kind == "reference" else extension(kind)))
