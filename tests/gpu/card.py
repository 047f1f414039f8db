"""What the device can do at best, measured in this run: the yardsticks of every other time."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def copy_rate(device: str, seconds: float) -> float:
    """Bytes per second, read and written, of a copy far larger than any cache."""
    source = torch.ones(2**28 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / shortest(lambda: target.copy_(source), device, seconds)


def matmul_rate(dtype: torch.dtype, device: str, seconds: float) -> float:
    """Operations per second of a large square product. float32 is float32: no tf32."""
    best = 0.0
    for n in (4096, 8192) if device == "cuda" else (256,):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        took = shortest(lambda: torch.mm(a, b, out=out), device, seconds)  # noqa: B023
        best = max(best, 2 * n**3 / took)
    return best


def shortest(call: Callable[[], object], device: str, seconds: float) -> float:
    """The shortest of repeated calls: what noise adds is not the device's."""
    call()
    found, began = [], time.perf_counter()
    while len(found) < 3 or (time.perf_counter() - began < seconds and len(found) < 500):
        found.append(once(call, device))
    return min(found)


def once(call: Callable[[], object], device: str) -> float:
    """Seconds of one call; on CUDA between events on the stream."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
