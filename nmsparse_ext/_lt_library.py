"""Where cuSPARSELt lies, whether it is loaded, and why not. ``csrc/cusparselt`` loads it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from ._build import extension, reference_reason

SONAME = "libcusparseLt.so.0"


def candidates() -> list[str]:
    """Files to try in turn; ``NMSPARSE_CUSPARSELT=/path/to/libcusparseLt.so.0`` names the only one.

    First the bare name: that is the copy which torch has loaded, or one of the system. Then the wheels
    ``nvidia-cusparselt-cu12`` and ``-cu13``, which install below the package ``nvidia``.
    """
    chosen = os.environ.get("NMSPARSE_CUSPARSELT", "").strip()
    if chosen:
        return [chosen]
    paths = [SONAME]
    wheels = importlib.util.find_spec("nvidia")
    for folder in (wheels.submodule_search_locations or ()) if wheels else ():
        paths += sorted(str(path) for path in Path(folder).glob(f"*/lib/{SONAME}"))
    return paths


def library() -> tuple[str | None, str]:
    """Version of the loaded library and "", or None and why there is none. Loads it if need be."""
    if extension is None:
        return None, f"pure PyTorch: {reference_reason}"
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} has no CUDA"
    if not extension.build_info()["cuda"]:
        return None, "this is a CPU build"
    loaded = extension.cusparselt_open(candidates())
    return loaded["version"], loaded["reason"]


def why_not(device: torch.device | str) -> str | None:
    """Why tensors of this device do not run on cuSPARSELt; None if they do."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"{device.type} tensors run in plain PyTorch"
    version, reason = library()
    if version is None:
        return reason
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return "sparse tensor cores begin at compute capability 8.0, this GPU has {}.{}".format(*capability)
    return None


def require(device: torch.device) -> None:
    """Refuses a device that `why_not` has a reason for."""
    reason = why_not(device)
    if reason is not None:
        raise ValueError(f"cuSPARSELt cannot run on {device}: {reason}")
