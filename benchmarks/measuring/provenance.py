"""Where results come from: machine, versions, commit and date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

import attnpool_kernels

from ..contenders.packages import version


def provenance(device: str, options: dict) -> dict:
    """Machine, versions, commit and date of a run."""
    packages = ("torch", "triton", "numpy", "flash_attn", "xformers", "torch_geometric")
    versions = {name: version(name) for name in packages}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device_name(device),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: x for name, x in versions.items() if x},
        "attnpool_kernels": attnpool_kernels.__version__,
        "commit": commit(),
        "malloc": {
            name: x
            for name, x in os.environ.items()
            if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"
        },
        "options": options,
    }


def cores() -> int | None:
    """Of the machine that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                isa = torch.backends.cpu.get_cpu_capability()
                return f"{name} ({isa})"
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """Short hash of the checkout, with a + where files differ from it; "" outside of one."""
    here = Path(__file__).resolve().parent
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        found = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()
