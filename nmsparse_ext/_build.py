"""Loads the compiled part, if there is one, and reports what runs and why.

Importing this module decides between compiled kernels and pure PyTorch; `_op_library.py` reads `extension`.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import platform
import warnings
from types import ModuleType

import torch

import nmsparse_ext


def _load() -> tuple[ModuleType | None, str]:
    """The compiled module and "", or None and why there is none."""
    if os.environ.get("NMSPARSE_REFERENCE", "").strip().lower() not in {"", "0", "false", "off", "no"}:
        return None, "NMSPARSE_REFERENCE is set"
    try:
        # torch is imported above: its libraries have to be loaded before ours can find them.
        return importlib.import_module("nmsparse_ext._C"), ""
    except ModuleNotFoundError as error:
        return None, f"the extension was not built: {error}"
    except ImportError as error:
        reason = f"the extension was built but cannot be loaded: {error}"
        warnings.warn(
            f"nmsparse_ext runs in pure PyTorch, which is slow: {reason}", RuntimeWarning, stacklevel=2
        )
        return None, reason


#: The module `nmsparse_ext._C`, or None in reference mode.
extension, reference_reason = _load()


@dataclasses.dataclass(frozen=True)
class BuildInfo:
    """What was compiled in and what runs. `str()` of it is meant for people and bug reports.

    Attributes:
        version: Version of nmsparse_ext.
        python: Version of the running Python.
        torch: Version of the running torch.
        reference: True when every op runs in pure PyTorch.
        reference_reason: Why; empty when the compiled ops are in use.
        torch_target: Oldest torch the binary loads into; None in reference mode, like the next four.
        torch_built_with: The torch whose headers it was compiled with.
        compiler: Compiler name and version.
        debug: Whether it is an unoptimised build.
        cpu_isa: Instruction set whose kernels run now.
        cpu_isas: Instruction sets this CPU can run, slowest first; each can be given to `set_cpu_isa`.
        cuda: Whether CUDA kernels were compiled in.
        cuda_version: CUDA compiler they were built with; None without them.
        cuda_archs: Architectures with machine code in the binary, e.g. (80, 90).
        cuda_devices: Names of the GPUs that torch sees.
        cuda_reason: Why CUDA tensors do not run compiled kernels here; empty when they do.
        cusparselt_version: cuSPARSELt that was found and loaded, e.g. "0.8.0"; None without one.
        cusparselt_reason: Why there is none; empty when there is.
    """

    version: str
    python: str
    torch: str
    reference: bool
    reference_reason: str
    torch_target: str | None
    torch_built_with: str | None
    compiler: str | None
    debug: bool | None
    cpu_isa: str | None
    cpu_isas: tuple[str, ...]
    cuda: bool
    cuda_version: str | None
    cuda_archs: tuple[int, ...]
    cuda_devices: tuple[str, ...]
    cuda_reason: str
    cusparselt_version: str | None
    cusparselt_reason: str

    def as_dict(self) -> dict[str, object]:
        """The fields as a dict of JSON types (tuples become lists), e.g. for a file of measurements."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    def __str__(self) -> str:
        """One fact a line."""
        if self.reference:
            engine = f"pure PyTorch ({self.reference_reason})"
        else:
            others = ", ".join(self.cpu_isas)
            engine = f"compiled, {self.cpu_isa} kernels (this CPU runs: {others})"
        lines = [
            ("nmsparse_ext", f"{self.version}, Python {self.python}, torch {self.torch}"),
            ("CPU ops", engine),
        ]
        if not self.reference:
            debug = ", DEBUG" if self.debug else ""
            built = f"{self.compiler}, torch {self.torch_built_with}{debug}"
            lines.append(("built with", f"{built}; loads into torch >= {self.torch_target}"))
        if self.cuda:
            archs = ", ".join(f"sm_{arch}" for arch in self.cuda_archs)
            cuda = f"compiled with CUDA {self.cuda_version} for {archs}"
            cuda += f"; {self.cuda_reason or 'runs on ' + ', '.join(self.cuda_devices)}"
        else:
            cuda = f"pure PyTorch: {self.cuda_reason}"
        lines.append(("CUDA ops", cuda))
        lines.append(("cuSPARSELt", self.cusparselt_version or f"none: {self.cusparselt_reason}"))
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _cuda_devices() -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _cuda_reason(compiled: bool, devices: tuple[str, ...]) -> str:
    if extension is None:
        return "reference mode"
    if not compiled:
        return (
            "this is a CPU build (reinstall with NMSPARSE_CUDA=1 to get CUDA kernels or the reason why not)"
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not devices:
        return "torch finds no GPU"
    return ""


def build_info() -> BuildInfo:
    """What was compiled in, which instruction set runs, CUDA and cuSPARSELt versions or why there are none.

    Returns:
        A `BuildInfo`; print it to read it, `.as_dict()` to store it.
    """
    from ._lt_library import library  # which needs this module

    compiled = extension.build_info() if extension is not None else {}
    devices = _cuda_devices()
    cuda = bool(compiled.get("cuda", False))
    cusparselt_version, cusparselt_reason = library()
    return BuildInfo(
        version=nmsparse_ext.__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        reference=extension is None,
        reference_reason=reference_reason,
        torch_target=compiled.get("torch_target"),
        torch_built_with=compiled.get("torch_built_with"),
        compiler=compiled.get("compiler"),
        debug=compiled.get("debug"),
        cpu_isa=extension.cpu_isa() if extension is not None else None,
        cpu_isas=tuple(extension.cpu_isas()) if extension is not None else (),
        cuda=cuda,
        cuda_version=compiled.get("cuda_version"),
        cuda_archs=tuple(compiled.get("cuda_archs", ())),
        cuda_devices=devices,
        cuda_reason=_cuda_reason(cuda, devices),
        cusparselt_version=cusparselt_version,
        cusparselt_reason=cusparselt_reason,
    )
