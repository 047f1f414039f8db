"""Cases, oracle and error budget that judge a backend. Shipped, so third parties can use them too.

``check_backend(name)`` runs the cases through the public functions, ``check_kernels(module)`` the
three passes of a kernel module directly; both compare values, gradients and second gradients with
float64 and raise AssertionError naming case, tensor, error and budget.
"""

from __future__ import annotations

from .cases import CASES, Batch, Case, draw
from .oracle import dense, differentiate, run_kernels, run_public
from .verdict import budget, check_backend, check_kernels, judge, measure, violations

__all__ = [
    "CASES",
    "Batch",
    "Case",
    "budget",
    "check_backend",
    "check_kernels",
    "dense",
    "differentiate",
    "draw",
    "judge",
    "measure",
    "run_kernels",
    "run_public",
    "violations",
]
