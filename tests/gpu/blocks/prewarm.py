"""Every Triton variant that the other blocks will launch, compiled on all cores beside them.

The GPU is not touched: the variants come from the real host code on CPU tensors (gpu.variants).
The other blocks' cases for Triton wait for this one. Without CUDA a few are compiled for sm_90.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

from gpu.case import Case, Emit, Outcome, Settings

NAME = "prewarm"
WEIGHT = 9.0
BACKGROUND = True
DTYPES = ("bfloat16", "float32", "float16", "float64")
REHEARSED = 3  # variants without CUDA
RESERVE = 2.0  # seconds before the end at which no variant is waited for any more
KERNELS = "attnpool_kernels.impl.triton"


def cases(settings: Settings) -> list[Case]:
    if not settings.wants("triton"):
        return []
    dtypes = DTYPES if settings.device == "cuda" else DTYPES[:1]
    return [Case(NAME, "compile", dtype=dtype, seconds=240.0, shard="all") for dtype in dtypes]


def run(case: Case, settings: Settings, emit: Emit) -> None:
    import torch

    import attnpool_kernels.impl.triton as backend

    if reason := backend._why_no_triton():
        raise Outcome("missing", reason)
    dtype = getattr(torch, case.dtype)
    if dtype == torch.float64 and backend._version() < backend._FLOAT64:
        raise Outcome("refused", "this Triton has no exact float64 product")
    from gpu import variants

    cuda = settings.device == "cuda"
    capability = of_the_card() if cuda else (9, 0)
    with variants.collecting(capability) as collected:
        calls = of_blocks(dtype, cuda)
        for call in calls:
            call()
            if not cuda and len(collected.found) >= REHEARSED:
                break
    jobs = list(collected.found.values())[: None if cuda else REHEARSED]
    took, slowest, failed, done = 0.0, 0.0, 0, 0
    for one in variants.compiled(
        jobs, collected.target, settings.cores, lambda: settings.left() - RESERVE, cuda
    ):
        took, slowest, done = took + one.seconds, max(slowest, one.seconds), done + 1
        if one.error:
            failed += 1
            emit({"what": one.name, "status": "failed", "text": one.error})
    emit(
        {
            "what": "variants",
            "status": "ok" if done == len(jobs) else "no time",
            "target": collected.target.arch,
            "variants": len(jobs),
            "compiled": done - failed,
            "failed": failed,
            "core_seconds": took,
            "slowest": slowest,
            "processes": settings.cores,
        }
    )


def of_the_card() -> tuple[int, int]:
    """Asked in a process of its own, so that this one never starts CUDA and can fork."""
    code = "import torch; print(*torch.cuda.get_device_capability())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    if asked.returncode:
        raise RuntimeError(f"the capability of the card: {asked.stderr.strip()[-300:]}")
    major, minor = map(int, asked.stdout.split())
    return major, minor


def of_blocks(dtype, cuda: bool) -> Iterator[Callable[[], object]]:
    """Calls of the host code that the blocks will make, those of most worth first."""
    import attnpool_kernels.impl.triton as backend
    from attnpool_kernels import testing
    from gpu import alone, batches, shapes

    def passes(shape):
        kernels = alone.Kernels(shapes.without_values(shape, dtype), backend)
        return [kernels.forward, kernels.backward, kernels.double_backward]

    for shape in shapes.of("cuda"):
        yield from passes(shape)

    def whole(batch):
        return lambda: testing.run_kernels(batch, backend)

    for name in (*batches.CASES, *batches.SPECIAL):
        yield whole(batches.make(name, dtype, "cpu"))
    for seeds in (None, 4):
        yield whole(batches.mixed(dtype, "cpu", seeds))
    if cuda:  # their storage is never touched, but it is large
        for name in batches.FAR:
            for kind in ("", " of seeds"):
                yield whole(batches.far(name + kind, dtype, "cpu", 2**32))
