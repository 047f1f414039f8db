"""The compiled libraries: loaded once, when the package is imported, and the passes they register.

``_C_cpu`` holds the schemas of ``torch.ops.attnpool`` and the CPU kernels, ``_C_cuda`` the CUDA
kernels for the same operators: a torch without CUDA cannot load it. Tensors decide by their device
which of them runs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..operands import (
    Cotangents,
    Gradients,
    Operands,
    Options,
    Result,
    SecondGradients,
    Tangents,
    split,
)
from ..ragged import longest_of

OPERATORS = "attnpool"
_FOLDER = Path(__file__).parent.parent
# What is left of an allocation that failed once torch's stable interface has passed it on.
_ALLOCATIONS = ("aten::new_empty", "torch_parallel_for", "bad_alloc")


@cache
def load_cpu() -> str:
    """Loads the CPU library once. Returns "" or the reason why there is none."""
    found = sorted(_FOLDER.glob("_C_cpu*.so"))
    if not found:
        return "the C++ library is not built (reinstall where a C++ compiler and torch are present)"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"the C++ library cannot be loaded: {error}"
    if not hasattr(torch.ops.attnpool, "attention"):
        return "the C++ library is of an older version: reinstall"
    return ""


@cache
def load_cuda() -> str:
    """Loads the CUDA library once. Returns "" or the reason why there is none."""
    found = sorted(_FOLDER.glob("_C_cuda*.so"))
    if not found:
        return "the CUDA library is not built (ATTNPOOL_BUILD=cuda, nvcc 12.8 or later)"
    if torch.version.cuda is None:
        return f"the CUDA library is not loaded: torch {torch.__version__} has no CUDA"
    if reason := load_cpu():
        return f"the CUDA library needs the schemas of the CPU one, but {reason}"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"the CUDA library cannot be loaded: {error}"
    return ""


def call(operator: Any, flat: tuple) -> tuple[Tensor, ...]:
    """Runs a registered pass on flat arguments.

    CUDA kernels are told the longest molecule where it is known, which saves launches for molecules
    that are not there. Schemas are a contract with saved programs and have no place for it, so it
    goes ahead by itself, for the next pass of this thread.
    """
    longest = _longest(operator, flat)
    try:
        if longest is None:
            return operator(*flat)
        torch.ops.attnpool._expect(longest)
        try:
            return operator(*flat)
        finally:  # nor for a later one, where this one was refused
            torch.ops.attnpool._expect(0)
    except RuntimeError as error:
        if not any(text in str(error) for text in _ALLOCATIONS):
            raise
        raise torch.OutOfMemoryError(
            f"out of memory on {flat[0].device}: no place for the results of {operator.name()} or "
            "for its work"
        ) from error


def _longest(operator: Any, flat: tuple) -> int | None:
    if not flat[0].is_cuda or operator.namespace != OPERATORS:
        return None
    if torch._C._len_torch_dispatch_stack():  # a recorded graph runs with other contents
        return None
    x, *_ = split(flat, Operands)
    return longest_of(x.q_ptr, x.k_ptr, x.q.shape[0])


def forward(x: Operands, options: Options) -> Result:
    return Result(*torch.ops.attnpool.attention.default(*x, *options))


def backward(
    x: Operands, y: Result, dy: Cotangents, options: Options, need_dbias: bool
) -> Gradients:
    operator = torch.ops.attnpool.attention_backward.default
    return Gradients(*operator(*x, *y, *dy, *options, need_dbias))


def double_backward(
    x: Operands, y: Result, dy: Cotangents, tangents: Tangents, options: Options
) -> SecondGradients:
    operator = torch.ops.attnpool.attention_double_backward.default
    return SecondGradients(*operator(*x, *y, *dy, *tangents, *options))
