"""Where figures were taken: versions and machine, as every page and every evidence states them."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Return the versions that figures depend on."""
    packages = ("effuse", "torch", "diffusers", "transformers")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}}


def machine() -> dict[str, Any]:
    """Return what kind of machine this is, without its name."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    models = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": platform.system(),
    }
