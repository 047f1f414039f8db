"""Kernel backends on a device: which can run, and their passes one by one."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from attnpool_kernels import BackendError, Problem, backends
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


def load(name: str, batch: Batch, dtype: torch.dtype) -> ModuleType:
    """The module of a backend, or BackendError with all its reasons against this batch."""
    module = backends.load(name)
    device = batch.k.device
    problem = Problem(
        device.type, dtype, batch.q.shape[-1], batch.v.shape[-1],
        torch.cuda.get_device_capability() if device.type == "cuda" else None,
        seeds=batch.case.seeds, bias=batch.bias is not None, dropout=batch.case.dropout > 0,
        grad_order=2, return_lse=True,
    )  # fmt: skip
    if reasons := module.why_not(problem):
        raise BackendError(f"backend {name!r}: {'; '.join(reasons)}")
    return module


def one(name: str, batch: Batch, module: ModuleType, known: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results of one pass; those behind the first get out and lse of the oracle."""
    problem = (
        batch.q, batch.k, batch.v, batch.bias, batch.q_ptr, batch.k_ptr, batch.pair_ptr, batch.seed,
    )  # fmt: skip
    options = batch.scale, batch.case.dropout
    if name == "forward":
        return dict(zip(("out", "lse"), module.forward(*problem, *options)))
    like = {key: known[key].to(batch.k.device, kind) for key, kind in _kinds(batch).items()}
    known_too = (*problem, like["out"], like["lse"], batch.dout, batch.dlse)
    if name == "backward":
        names = ("dq", "dk", "dv", "dbias")
        found = module.backward(*known_too, *options, batch.bias is not None)
    else:
        names = ("gq", "gk", "gv", "gbias", "gdout", "gdlse")
        seconds = batch.ddq, batch.ddk, batch.ddv, batch.ddbias
        found = module.double_backward(*known_too, *seconds, *options)
    result = dict(zip(names, found))
    if batch.bias is None:
        result = {key: x for key, x in result.items() if not key.endswith("bias")}
    if batch.dlse is None:
        result.pop("gdlse", None)
    return result


def _kinds(batch: Batch) -> dict[str, torch.dtype]:
    wide = torch.float64 if batch.q.dtype == torch.float64 else torch.float32
    return {"out": batch.q.dtype, "lse": wide}
