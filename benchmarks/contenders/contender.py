"""What a contender is: what can run where, how to call it, and which kernel of which version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..workloads.batch import WorkloadBatch
from ..workloads.workload import PASSES, Workload

Call = Callable[..., Tensor]  # call(*batch.inputs) -> out
Reasons = Callable[[Workload, str, str], list[str]]
Kernel = Callable[[Workload, str], str]


@dataclass(frozen=True)
class Contender:
    """why_not(workload, pass, device) lists every reason; kernel(workload, device): what runs."""

    name: str
    title: str
    prepare: Callable[[WorkloadBatch], Call]
    why_not: Reasons
    kernel: Kernel
    ours: bool = False
    module: bool = False
    key_bias: bool = False  # whether it takes one


def fits(order: int = 2, devices: tuple[str, ...] = ("cpu", "cuda")) -> Reasons:
    """The reasons against what has derivatives up to ``order`` and runs on ``devices``."""

    def why_not(work: Workload, what: str, device: str) -> list[str]:
        reasons = []
        if PASSES.index(what) > order:
            reasons.append("torch has no second derivative of this kernel")
        if device not in devices:
            reasons.append(f"needs {' or '.join(devices)}, the device is {device}")
        return reasons

    return why_not


def torch_kernel(text: str) -> Kernel:
    """The same kernel of torch, whatever the workload and the device."""
    return lambda work, device: f"torch {torch.__version__}: {text}"
