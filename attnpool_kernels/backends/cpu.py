"""C++ kernels for the CPU: all three passes, every dtype, vector width chosen at run time.

Repeatable and batch invariant bit for bit; a NaN stays in its molecule. Sources: csrc/cpu.
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


@cache
def load() -> str:
    """Loads the library once. Returns "" or the reason why there is none."""
    found = sorted(Path(__file__).parent.parent.glob("_C_cpu*.so"))
    if not found:
        return "the C++ library is not built (reinstall where a C++ compiler and torch are present)"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"the C++ library cannot be loaded: {error}"
    return ""


def why_not(problem: Problem) -> list[str]:
    reasons = [load()] if load() else []
    if problem.device != "cpu":
        reasons.append(f"tensors on {problem.device}: needs cpu")
    if problem.dtype not in DTYPES:
        reasons.append(f"{problem.dtype}: needs one of {', '.join(map(str, DTYPES))}")
    for name, dim in (("head", problem.head_dim), ("value", problem.value_dim)):
        if not 1 <= dim <= 256:
            reasons.append(f"{name} dimension {dim}: needs 1 to 256")
    return reasons


@cache
def _operators() -> torch._ops._OpNamespace:
    """The library's operators. A saved graph comes here without a call of ``why_not``."""
    if reason := load():
        raise RuntimeError(f"backend 'cpu' cannot run: {reason}")
    return torch.ops.attnpool_c


def forward(*arguments):
    return _operators().forward.default(*arguments)


def backward(*arguments):
    return _operators().backward.default(*arguments)


def double_backward(*arguments):
    return _operators().double_backward.default(*arguments)
