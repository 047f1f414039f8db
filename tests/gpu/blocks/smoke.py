"""A process for each kernel family and dtype: which of them run at all, and give the right result.

The passes get the outputs of the oracle, so that a broken forward does not hide the backward.
"""

from __future__ import annotations

from gpu.case import Case, Emit, Settings
from gpu.passes import DTYPES, PASSES, kernels, parallel

NAME = "smoke"
WEIGHT = 5.0
FAMILIES = {"sets": "empty among them", "few seeds": "four seeds"}
ON_CPU = {"sets": "smallest", "few seeds": "smallest of seeds"}
PARALLEL = parallel


def cases(settings: Settings) -> list[Case]:
    small = settings.device == "cpu"  # without CUDA nothing can die of a kernel
    return [
        Case(
            NAME,
            f"{step} of {family}",
            backend,
            dtype,
            shard="all" if small else f"{family} {step} {dtype}",
        )
        for dtype in (("float32",) if small else DTYPES)
        for backend in kernels(settings)
        for family in FAMILIES
        for step in PASSES
    ]


def run(case: Case, settings: Settings, emit: Emit) -> None:
    import torch

    from gpu import batches, judgement, passes

    step, family = case.name.split(" of ")
    dtype = getattr(torch, case.dtype)
    name = (ON_CPU if settings.device == "cpu" else FAMILIES)[family]
    batch = batches.make(name, dtype, settings.device)
    module = passes.load(case.backend, batch, dtype)
    known = judgement.oracle(batch)
    found = passes.one(step, batch, module, known)
    if settings.device == "cuda":
        torch.cuda.synchronize()
    emit(judgement.judged(batch, found, dtype))
