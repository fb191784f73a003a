"""Which machine a profile belongs to."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def fingerprint(device: str) -> dict[str, Any]:
    """Return device, processor, cores, memory, torch, threads and (on CUDA) the GPU and the version of CUDA."""
    import torch

    facts: dict[str, Any] = {
        "device": device,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": 1,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device == "cuda":
        facts |= _gpu()
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _gpu() -> dict[str, Any]:
    import torch

    facts = torch.cuda.get_device_properties(0)
    return {
        "gpu": facts.name,
        "gpu_memory_bytes": facts.total_memory,
        "gpu_multiprocessors": facts.multi_processor_count,
        "cuda": torch.version.cuda,
    }
