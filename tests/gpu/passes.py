"""Kernel backends on a device: which can run, and their passes one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from attnpool_kernels import BackendError, Problem, impl
from attnpool_kernels.impl import KernelBackend
from attnpool_kernels.operands import Result, accumulator
from attnpool_kernels.testing import Batch

from .case import Settings

KERNELS = ("cuda", "triton", "cpu")
DTYPES = ("bfloat16", "float32", "float16", "float64")  # what matters most comes first
PASSES = ("forward", "backward", "double_backward")
BESIDE = 8  # processes that share the GPU where nothing is timed


def kernels(settings: Settings) -> list[str]:
    """Kernel backends that are asked about on this device: cpu only where it is the device."""
    names = [name for name in KERNELS if settings.wants(name)]
    return [name for name in names if (name == "cpu") == (settings.device == "cpu")] + [
        name for name in names if name == "triton" and settings.device == "cpu"
    ]


def parallel(settings: Settings) -> int:
    return max(1, min(BESIDE, settings.cores // 2)) if settings.device == "cuda" else 1


def load(name: str, batch: Batch, dtype: torch.dtype) -> KernelBackend:
    """The module of a backend, or BackendError with all its reasons against this batch."""
    module = impl.load(name)
    problem = Problem.of(batch.operands, batch.options, grad_order=2, return_lse=True)
    if reasons := module.why_not(problem):
        raise BackendError(f"backend {name!r}: {'; '.join(reasons)}")
    return module


def one(
    name: str, batch: Batch, module: KernelBackend, known: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The results of one pass; those behind the first get out and lse of the oracle."""
    x, dy, options = batch.operands, batch.cotangents, batch.options
    if name == "forward":
        return module.forward(x, options)._asdict()
    device, wide = batch.k.device, accumulator(batch.q.dtype)
    y = Result(known["out"].to(device, batch.q.dtype), known["lse"].to(device, wide))
    if name == "backward":
        result = module.backward(x, y, dy, options, batch.bias is not None)._asdict()
    else:
        result = module.double_backward(x, y, dy, batch.tangents, options)._asdict()
    for kind in ("bias", "key_bias"):
        if getattr(batch, kind) is None:
            result = {key: x for key, x in result.items() if key.lstrip("dg") != kind}
    if batch.dlse is None:
        result.pop("gdlse", None)
    return result
