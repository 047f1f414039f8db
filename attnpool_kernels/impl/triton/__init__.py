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
import sys
from dataclasses import replace

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
from ...problem import Problem
from ..needs import Needs

KIND = "kernel"
OPERATORS = "attnpool_triton"

NEEDS = Needs(devices=("cuda",), widest=256, capability=(8, 0))

_OLDEST = (3, 6)
_FLOAT64 = (3, 9)  # 3.6 and 3.7 accumulate a float64 tl.dot in float32, 3.8 is untried


def why_not(problem: Problem) -> list[str]:
    """Every reason against running a problem, from its facts alone."""
    missing = _why_no_triton()
    reasons = [missing] if missing else []
    interpreted = problem.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    reasons += (replace(NEEDS, devices=("cpu",)) if interpreted else NEEDS).reasons(problem)
    if problem.device == "cuda" and torch.version.hip is not None:
        reasons.append("an AMD GPU: compiles for gfx942, but never ran there")
    if problem.dtype == torch.float64 and not missing and version() < _FLOAT64:
        reasons.append(f"float64: tl.dot needs triton >= {_dotted(_FLOAT64)}")
    return reasons


@functools.cache
def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if version() < _OLDEST:
        return f"needs triton >= {_dotted(_OLDEST)}, got {importlib.metadata.version('triton')}"
    return None


@functools.cache
def version() -> tuple[int, ...]:
    """Of the installed Triton, (major, minor)."""
    found = importlib.metadata.version("triton")  # importing it would take half a second
    return tuple(int(part) for part in found.split(".")[:2])


def _dotted(parts: tuple[int, ...]) -> str:
    return ".".join(map(str, parts))


def _module(pass_name: str, x: Operands):
    """Where a pass is: few seeds have a schedule of their own, where there are tiles for it."""
    from . import launch, tile_table

    module = f"_{pass_name}"
    few = x.shared and x.q.shape[0] <= tile_table.FEW
    if few and launch.tile(f"few_seeds_{pass_name}", x) is not None:
        module = "_few_seeds_double" if pass_name == "double_backward" else "_few_seeds"
    name = f"{__name__}.{module}"
    return sys.modules.get(name) or importlib.import_module(name)


def _near(group):
    """A tuple of tensors; one whose units lie 2^31 elements apart or more is copied, because the
    kernels count offsets inside a row in 32 bits."""
    for x in group:
        if x is not None and _spreads_far(x):
            return group._make(x if x is None else x.contiguous() for x in group)
    return group


def _spreads_far(x: torch.Tensor) -> bool:
    return x.stride(-1) > 1 and x.dim() > 2 and (x.shape[-1] - 1) * x.stride(-1) >= 2**31


def forward(x: Operands, options: Options) -> Result:
    """See attnpool_kernels.autograd for the equations."""
    return _module("forward", x).forward(_near(x), options)


def backward(
    x: Operands, y: Result, dy: Cotangents, options: Options, need_dbias: bool
) -> Gradients:
    return _module("backward", x).backward(_near(x), _near(y), _near(dy), options, need_dbias)


def double_backward(
    x: Operands, y: Result, dy: Cotangents, tangents: Tangents, options: Options
) -> SecondGradients:
    given = map(_near, (x, y, dy, tangents))
    return _module("double_backward", x).double_backward(*given, options)
