"""The contenders by name.

Every backend of ``attnpool_kernels.backends()`` is here as ``attnpool:<name>``; one that cannot
serve gives a row with its reasons. Optional packages are imported only when a contender that needs
them is asked.
"""

from __future__ import annotations

from functools import cache

import torch

import attnpool_kernels

from ..workloads.workload import Workload
from . import attention, modules
from .contender import Contender
from .ours import backend

# Traces for seconds in every fresh process, which no suite has the time for on a CPU.
SLOW_TO_START = ("attnpool:flex",)

CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        *map(backend, attnpool_kernels.backends()),
        *attention.CONTENDERS,
        *modules.CONTENDERS,
    )
}


@cache
def _native() -> bool:
    """Whether a kernel of ours runs here; without one, plain torch stands for this package."""
    work = Workload("any", "any", (1,))
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    own = [contender for contender in CONTENDERS.values() if contender.ours]
    return any(not c.why_not(work, "forward", device) for c in own for device in devices)


def for_workload(work: Workload, names: list[str] | None = None) -> list[Contender]:
    """The contenders of a workload (operator or module), in the order of the registry."""
    without = work.without if names is None and _native() else ()
    return [
        contender
        for contender in CONTENDERS.values()
        if contender.module == work.module
        and (names is None or contender.name in names)
        and (work.rivals or contender.ours)
        and (contender.key_bias or not work.key_bias)
        and contender.name not in without
    ]
