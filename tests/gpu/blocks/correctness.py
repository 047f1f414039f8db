"""The whole matrix against the float64 oracle on the CPU: cases x dtypes x three passes.

Cases of a backend and dtype share a few processes. Memory is poisoned before the kernels write.
"""

from __future__ import annotations

from typing import Any

from gpu.case import Case, Emit, Settings
from gpu.passes import DTYPES, kernels, parallel

NAME = "correctness"
WEIGHT = 10.0
SHARDS = 3  # processes of a backend and dtype
PARALLEL = parallel


def cases(settings: Settings) -> list[Case]:
    found = []
    for backend in kernels(settings):
        for dtype in DTYPES:
            for place, name in enumerate(_names(settings, backend, dtype)):
                shard = f"{dtype} {place % SHARDS}" if settings.device == "cuda" else "all"
                far = name.startswith("far ")
                found.append(
                    Case(
                        NAME,
                        name,
                        backend,
                        dtype,
                        seconds=90.0 if far else 60.0,
                        # its storage is up to 17 GB: one after another
                        shard="far" if far else shard,
                        after="prewarm" if backend == "triton" else "",
                    )
                )
    return found


def _names(settings: Settings, backend: str, dtype: str) -> list[str]:
    """On a CPU a few of them, and fewer in Triton's interpreter."""
    from gpu import batches

    far = [f"{name}{kind}" for name in batches.FAR for kind in ("", " of seeds")]
    if settings.device == "cuda":
        names = [*batches.CASES, *batches.SPECIAL]
        return names + far if dtype in ("bfloat16", "float32") else names
    if dtype == "float32":
        if backend == "triton":
            return [case.name for case in batches.SMALLEST]
        return [*batches.TINY, *batches.SPECIAL, *far]
    return ["molecules"] if (backend, dtype) == ("cpu", "bfloat16") else []


def run(case: Case, settings: Settings, emit: Emit) -> None:
    from gpu import batches

    if not case.name.startswith("far "):
        emit(row(case, settings))
        return
    with batches.memory_to_itself(settings.cache):
        emit(row(case, settings))


def row(case: Case, settings: Settings) -> dict[str, Any]:
    import torch

    from attnpool_kernels import testing
    from gpu import batches, judgement, passes

    dtype = getattr(torch, case.dtype)
    batch = batches.make(case.name, dtype, settings.device)
    module = passes.load(case.backend, batch, dtype)
    with judgement.poisoned():
        if case.name.startswith("far "):
            found = testing.run_kernels(batch, module)  # autograd may copy what is so far apart
        else:
            found = testing.run_public(batch, case.backend)
    if settings.device == "cuda":
        torch.cuda.synchronize()
    return judgement.judged(batch, found, dtype)
