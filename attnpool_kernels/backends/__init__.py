"""The backends by name, in the order in which the automatic choice tries them.

A backend is a module with ``KIND`` and ``why_not(problem) -> list[str]`` (every reason against a
``dispatch.Problem``; empty = it can). KIND "kernel": plain functions ``forward``, ``backward``,
``double_backward``; the graph is made by ``autograd``. KIND "composite": one differentiable
``attention`` with ``GRAD_ORDER``, the highest derivative in which it is exact.
Modules are imported at the first question about them; none may import an optional package before
it is asked to run.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

# Native kernels first: they are exact to second order. cpu stands before the two for CUDA, so that
# Triton's interpreter serves CPU tensors by name only; triton before cuda until a GPU has timed
# both. The automatic choice ends at reference, which serves everything; flex is used by name only.
PRIORITY = (
    "cpu", "triton", "cuda", "flash_attn", "varlen", "xformers", "sdpa", "reference", "flex",
)  # fmt: skip

_loaded: dict[str, ModuleType] = {}


def load(name: str) -> ModuleType:
    module = _loaded.get(name)
    if module is None:
        module = _loaded[name] = import_module(f"{__name__}.{name}")
    return module


class _Backends(ModuleType):
    def __call__(self) -> tuple[str, ...]:
        """The names of all backends, in the order of the automatic choice."""
        return PRIORITY


# attnpool_kernels.backends() lists the names, and attnpool_kernels.backends.cpu is a module.
sys.modules[__name__].__class__ = _Backends
