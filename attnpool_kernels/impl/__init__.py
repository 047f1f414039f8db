"""The backends by name, in the order in which the automatic choice tries them.

A backend is a module that follows one of the protocols below: ``KernelBackend`` where its passes
are registered operators, to which ``autograd`` gives derivatives, or ``CompositeBackend`` where it
calls other functions of torch. ``why_not`` lists every reason against a ``Problem``; none means
that it can. Modules are imported at the first question about them; none may import an optional
package before it is asked to run.
"""

from __future__ import annotations

from importlib import import_module
from typing import Literal, Protocol, cast

from torch import Tensor

from ..operands import (
    Cotangents,
    Gradients,
    Operands,
    Options,
    Result,
    SecondGradients,
    Tangents,
)
from ..problem import Problem
from ..ragged import Sets
from .needs import Needs

# Native kernels first: they are exact to second order. cpu stands before the two for CUDA, so that
# Triton's interpreter serves CPU tensors by name only; which of those two comes first, ``order``
# says. The automatic choice ends at reference, which serves everything; flex is used by name only.
PRIORITY = (
    "cpu",
    "triton",
    "cuda",
    "flash_attn",
    "varlen",
    "xformers",
    "sdpa",
    "reference",
    "flex",
)


def order(problem: Problem) -> tuple[str, ...]:
    """The names of all backends, in the order in which they are tried for a problem.

    Small sets go to the CUDA kernels, which issue 2 to 3 times fewer instructions for them, others
    to Triton, whose tiles of long sets issue about 3 times fewer (counted from machine code, see
    csrc/cuda/README.md and impl/triton/PREDICTED.md; no GPU has timed them). The two round
    differently, so where results must repeat, sizes have no say.
    """
    if not _for_small_kernels(problem) or problem.deterministic:
        return PRIORITY
    return tuple({"triton": "cuda", "cuda": "triton"}.get(name, name) for name in PRIORITY)


def _for_small_kernels(problem: Problem) -> bool:
    """Whether csrc/cuda/small_*.cu would serve every set."""
    widths, element = (problem.head_dim, problem.value_dim), problem.dtype.itemsize
    few = problem.seeds is not None and problem.seeds <= 8  # these have kernels of their own
    by_16_bytes = all(width * element % 16 == 0 for width in widths)  # how they read rows
    return problem.small_sets and element <= 4 and max(widths) <= 64 and by_16_bytes and not few


class KernelBackend(Protocol):
    """Three passes that are registered as operators of the namespace ``OPERATORS``."""

    KIND: Literal["kernel"]
    NEEDS: Needs
    OPERATORS: str
    __name__: str

    def why_not(self, problem: Problem) -> list[str]: ...

    def forward(self, x: Operands, options: Options) -> Result: ...

    def backward(
        self, x: Operands, y: Result, dy: Cotangents, options: Options, need_dbias: bool
    ) -> Gradients: ...

    def double_backward(
        self, x: Operands, y: Result, dy: Cotangents, tangents: Tangents, options: Options
    ) -> SecondGradients: ...


class CompositeBackend(Protocol):
    """One function that torch differentiates, exact to the derivative of order ``NEEDS.order``."""

    KIND: Literal["composite"]
    NEEDS: Needs
    __name__: str

    def why_not(self, problem: Problem) -> list[str]: ...

    def attention(
        self, x: Operands, options: Options, sets: Sets | None
    ) -> tuple[Tensor, Tensor | None]: ...


Backend = KernelBackend | CompositeBackend

_loaded: dict[str, Backend] = {}


def load(name: str) -> Backend:
    """The module of a backend."""
    module = _loaded.get(name)
    if module is None:
        module = _loaded[name] = cast(Backend, import_module(f"{__name__}.{name}"))
    return module


def name_of(backend: Backend) -> str:
    return backend.__name__.rpartition(".")[2]
