"""CUDA C++ kernels: all three passes, made for molecules of 1 to 256 atoms. Sources: csrc/cuda.

Sets of at most 64 rows have kernels without a search or a copy stage: rows go straight into
registers, one block a set, one warp (or a few) a head. Larger ones are tiles of up to 64 rows of
one molecule, its keys from its own start. Tensor cores for every dtype (float32 keeps its accuracy:
three TF32 or eight bfloat16 products). Pooling with at most eight shared seeds has kernels of its
own, which stream keys and values once, a warp a head and molecule; there a molecule of more than
512 keys is cut into parts that are merged in order, so one huge set fills the chip.
Any size is correct; where no ``Ragged`` knows the sizes of molecules they would take waiting for
the device, so large sets are not refused, only slower than elsewhere. Repeatable and batch
invariant bit for bit by construction: no atomics, and the order of every sum is fixed by the
molecule (d(seeds): by the number of molecules and of keys).

Nothing of it has been timed on a GPU yet; see csrc/cuda/resources.json for what the compiler says.
"""

from __future__ import annotations

import torch

from ..problem import Problem
from .library import OPERATORS, backward, double_backward, forward
from .library import load_cuda as load
from .needs import Needs

__all__ = ["OPERATORS", "backward", "double_backward", "forward", "load", "why_not"]

KIND = "kernel"
NEEDS = Needs(devices=("cuda",), widest=128, capability=(8, 0))
# Capabilities whose blocks have 99 KiB of shared memory; the others from 8.0 on have 163 or more.
SMALL_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))


def why_not(problem: Problem) -> list[str]:
    reasons = [reason for reason in (load(),) if reason] + NEEDS.reasons(problem)
    wide = max(problem.head_dim, problem.value_dim) > 32
    second = problem.dtype == torch.float64 and problem.grad_order > 1
    if second and wide and problem.capability in SMALL_SHARED_MEMORY:
        reasons.append("second derivative in float64: needs dimensions up to 32 on this chip")
    return reasons
