"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def hardware() -> str:
    """Processor, cores, Python and torch, in one line."""
    import torch

    cores = os.cpu_count()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if torch.cuda.is_available():
        versions += f", {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return f"{_processor()}, {cores} cores, {platform.system()}, {versions}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
