"""CUDA C++ kernels: all three passes, made for molecules of 1 to 256 atoms. Sources: csrc/cuda.

Tiles of up to 64 rows of one molecule, its keys from its own start; tensor cores for every dtype
(float32 keeps its accuracy: eight bfloat16 products). Pooling with at most eight shared seeds has
kernels of its own, which stream keys and values once, a warp a head and molecule; there a molecule
of more than 512 keys is cut into parts that are merged in order, so one huge set fills the chip.
Any size is correct; the sizes of molecules are not known without waiting for the device, so large
sets are not refused, only slower than elsewhere. Repeatable and batch invariant bit for bit by
construction: no atomics, and the order of every sum is fixed by the molecule (d(seeds): by the
number of molecules and of keys).

Nothing of it has been timed on a GPU yet; see csrc/cuda/resources.json for what the compiler says.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..dispatch import Problem

KIND = "kernel"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_DIM = 128
# Capabilities whose blocks have 99 KiB of shared memory; the others from 8.0 on have 163 or more.
SMALL_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))


@cache
def load() -> str:
    """Loads the library once. Returns "" or the reason why there is none."""
    folder = Path(__file__).parent.parent
    found = sorted(folder.glob("_C_cuda*.so"))
    if not found:
        return "the CUDA library is not built (ATTNPOOL_BUILD=cuda, nvcc 12.8 or later)"
    if torch.version.cuda is None:
        return f"the CUDA library is not loaded: torch {torch.__version__} has no CUDA"
    try:
        for schemas in sorted(folder.glob("_C_cpu*.so")):
            torch.ops.load_library(schemas)
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"the CUDA library cannot be loaded: {error}"
    return ""


def why_not(problem: Problem) -> list[str]:
    reasons = [load()] if load() else []
    if problem.device != "cuda":
        reasons.append(f"tensors on {problem.device}: needs cuda")
    capability = problem.capability
    if capability is not None and capability < (8, 0):
        reasons.append(f"compute capability {capability[0]}.{capability[1]}: needs 8.0")
    if problem.dtype not in DTYPES:
        reasons.append(f"{problem.dtype}: needs one of {', '.join(map(str, DTYPES))}")
    for name, dim in (("head", problem.head_dim), ("value", problem.value_dim)):
        if not 1 <= dim <= MAX_DIM:
            reasons.append(f"{name} dimension {dim}: needs 1 to {MAX_DIM}")
    wide = max(problem.head_dim, problem.value_dim) > 32
    second = problem.dtype == torch.float64 and problem.grad_order > 1
    if second and wide and capability in SMALL_SHARED_MEMORY:
        reasons.append("second derivative in float64: needs dimensions up to 32 on this chip")
    return reasons


@cache
def _operators() -> torch._ops._OpNamespace:
    """The library's operators. A saved graph comes here without a call of ``why_not``."""
    if reason := load():
        raise RuntimeError(f"backend 'cuda' cannot run: {reason}")
    return torch.ops.attnpool_c


def forward(*arguments):
    return _operators().forward.default(*arguments)


def backward(*arguments):
    return _operators().backward.default(*arguments)


def double_backward(*arguments):
    return _operators().double_backward.default(*arguments)
