"""What a measurement was made on: stored beside every figure."""

from __future__ import annotations

import datetime
import os
import platform

import torch

from ._build import build_info


def cpu_model() -> str:
    """Name of the processor, as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, str]:
    """Processor, instruction set, threads, versions, date and time, and the load when asked."""
    info = build_info()
    return {
        "processor": cpu_model(),
        "engine": "pure PyTorch" if info.reference else f"{info.cpu_isa} kernels",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "load": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "",
    }
