"""Triton kernels for NVIDIA GPUs: set attention and seed pooling, exact to second order.

Triton is imported by the submodules only, and those only by a call. In Triton's interpreter
(TRITON_INTERPRET=1) the same kernels run on CPU tensors: so they are tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os

import torch

from ...operands import (
    Cotangents,
    Gradients,
    Operands,
    Options,
    Result,
    SecondGradients,
    Tangents,
)

KIND = "kernel"
OPERATORS = "attnpool_triton"

_OLDEST = (3, 6)
_FLOAT64 = (3, 9)  # 3.6 and 3.7 accumulate a float64 tl.dot in float32, 3.8 is untried
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WIDEST = 256


def why_not(problem) -> list[str]:
    """Every reason against running a problem, from its facts alone."""
    reasons = []
    if missing := _why_no_triton():
        reasons.append(missing)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if problem.device != "cuda" and not (interpreted and problem.device == "cpu"):
        reasons.append(f"device {problem.device}: needs cuda")
    if problem.device == "cuda" and torch.version.hip is not None:
        reasons.append("an AMD GPU: compiles for gfx942, but never ran there")
    if problem.capability is not None and problem.capability < (8, 0):
        reasons.append("sm_{}{}: needs sm_80 or newer".format(*problem.capability))
    if problem.dtype == torch.float64 and not missing and _version() < _FLOAT64:
        reasons.append(f"float64: tl.dot needs triton >= {_dotted(_FLOAT64)}")
    if problem.dtype not in _DTYPES:
        reasons.append(f"{problem.dtype}: needs float16, bfloat16, float32 or float64")
    for name, width in (("head dim", problem.head_dim), ("value dim", problem.value_dim)):
        if not 1 <= width <= _WIDEST:
            reasons.append(f"{name} {width}: needs 1 to {_WIDEST}")
    if problem.grad_order > 2:
        reasons.append(f"derivatives to second order only, got grad_order={problem.grad_order}")
    return reasons


@functools.cache
def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _version() < _OLDEST:
        return f"needs triton >= {_dotted(_OLDEST)}, got {importlib.metadata.version('triton')}"
    return None


@functools.cache
def _version() -> tuple[int, ...]:
    version = importlib.metadata.version("triton")  # importing it would take half a second
    return tuple(int(part) for part in version.split(".")[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _module(pass_name: str, x: Operands):
    """Where a pass is: few seeds have a schedule of their own, where there are tiles for it."""
    from . import launch, tile_table

    module = f"_{pass_name}"
    few = x.shared and x.q.shape[0] <= tile_table.FEW
    if few and launch.tile(f"few_seeds_{pass_name}", x) is not None:
        module = "_few_seeds_double" if pass_name == "double_backward" else "_few_seeds"
    return importlib.import_module(f"{__name__}.{module}")


def _near(group):
    """A tuple of tensors; one whose units lie 2^31 elements apart or more is copied, because the
    kernels count offsets inside a row in 32 bits."""
    return group._make(x.contiguous() if x is not None and _spreads_far(x) else x for x in group)


def _spreads_far(x: torch.Tensor) -> bool:
    return x.dim() > 2 and (x.shape[-1] - 1) * x.stride(-1) >= 2**31


def forward(x: Operands, options: Options) -> Result:
    """See attnpool_kernels.autograd for the equations."""
    return _module("forward", x).forward(_near(x), options)


def backward(
    x: Operands, y: Result, dy: Cotangents, options: Options, need_dbias: bool
) -> Gradients:
    return _module("backward", x).backward(_near(x), _near(y), _near(dy), options, need_dbias)


def double_backward(
    x: Operands, y: Result, dy: Cotangents, t: Tangents, options: Options
) -> SecondGradients:
    given = map(_near, (x, y, dy, t))
    return _module("double_backward", x).double_backward(*given, options)
