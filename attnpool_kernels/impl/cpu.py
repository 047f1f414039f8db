"""C++ kernels for the CPU: all three passes, every dtype, vector width chosen at run time.

Repeatable and batch invariant bit for bit; a NaN stays in its molecule. Sources: csrc/cpu.
"""

from __future__ import annotations

from ..problem import Problem
from .library import OPERATORS, backward, double_backward, forward
from .library import load_cpu as load
from .needs import Needs

__all__ = ["OPERATORS", "backward", "double_backward", "forward", "load", "why_not"]

KIND = "kernel"
NEEDS = Needs(devices=("cpu",), widest=512)


def why_not(problem: Problem) -> list[str]:
    return [reason for reason in (load(),) if reason] + NEEDS.reasons(problem)
