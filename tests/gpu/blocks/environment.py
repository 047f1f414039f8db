"""What machine this is: versions, both libraries, and what the card can do at best."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil

from gpu.case import ROOT, Case, Emit, Outcome, Settings

NAME = "environment"
WEIGHT = 2.0
RATED = ("bfloat16", "float16", "float32", "float64")
TOOLS = ("nvcc", "compute-sanitizer", "ncu", "cuobjdump")


def cases(settings: Settings) -> list[Case]:
    names = [name for name in ("cpu", "cuda", "triton") if settings.wants(name)]
    return [
        Case(NAME, "machine", shard="card"),
        Case(NAME, "copy rate", shard="card"),
        *(Case(NAME, "matmul rate", dtype=dtype, shard="card") for dtype in RATED),
        *(Case(NAME, "library", name, shard="libraries") for name in names),
    ]


def PARALLEL(settings: Settings) -> int:
    return min(4, settings.cores)


def run(case: Case, settings: Settings, emit: Emit) -> None:
    import torch

    from gpu import card

    seconds = 0.4 if settings.device == "cuda" else 0.02
    if case.name == "machine":
        emit(machine(settings))
    elif case.name == "library":
        emit(library(case.backend, settings))
    elif case.name == "copy rate":
        emit({"gb_s": card.copy_rate(settings.device, seconds) / 1e9})
    else:
        rate = card.matmul_rate(getattr(torch, case.dtype), settings.device, seconds)
        emit({"tflop_s": rate / 1e12})


def machine(settings: Settings) -> dict:
    import torch

    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = {
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "tools": {
            name: shutil.which(name) or shutil.which(name, path=f"{cuda}/bin") for name in TOOLS
        },
    }
    if settings.device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": facts.name,
            "capability": f"{facts.major}.{facts.minor}",
            "multiprocessors": facts.multi_processor_count,
            "memory_gb": facts.total_memory / 1e9,
            "l2_mb": getattr(facts, "L2_cache_size", 0) / 1e6,
            "driver": _driver(),
        }
    return found


def _driver() -> str:
    try:
        with open("/proc/driver/nvidia/version") as file:
            return file.readline().strip()
    except OSError:
        return ""


def library(name: str, settings: Settings) -> dict:
    """Loads a kernel backend and asks it for one value."""
    import torch

    from attnpool_kernels import Problem, impl, set_attention

    capability = torch.cuda.get_device_capability() if settings.device == "cuda" else None
    device = "cpu" if name == "cpu" else settings.device
    problem = Problem(device, torch.float32, 16, 16, None if device == "cpu" else capability)
    if reasons := impl.load(name).why_not(problem):
        raise Outcome("missing" if device == settings.device else "refused", "; ".join(reasons))
    x = torch.ones(4, 1, 16, device=device)
    out = set_attention(x, x, x, torch.tensor([0, 4], device=device), backend=name)
    error = (out - 1).abs().max().item()
    found = {"error": error, "budget": 1e-5, "status": "ok" if error <= 1e-5 else "wrong"}
    return found | {"files": built()}


def built() -> dict[str, str]:
    """Hashes of the libraries that were carried here: are they built from these sources?"""
    files = sorted((ROOT / "attnpool_kernels").glob("*.so"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}


def table(rows: list[dict]) -> list[str]:
    """What the card can do, in a line."""
    rates = [f"{row['dtype']} {row['tflop_s']:.4g} TFLOP/s" for row in rows if "tflop_s" in row]
    copies = [f"copy {row['gb_s']:.4g} GB/s" for row in rows if "gb_s" in row]
    names = [row["gpu"] for row in rows if "gpu" in row]
    return [", ".join([*names, *copies, *rates])] if rates or copies else []
