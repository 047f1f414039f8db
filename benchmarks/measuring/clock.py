"""The clock: interleaved samples of contenders.

Contenders take turns within one process, so that a noisy second or a changed clock rate meets all
of them. A sample is the mean of enough calls to be far above the resolution of the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Sampler = Callable[[], float]  # runs a contender, returns the seconds of one call
SHORTEST = {"cpu": 4e-4, "cuda": 3e-3}  # seconds that one sample should last


@dataclass
class Timing:
    """Seconds of the samples of one contender."""

    samples: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        """Milliseconds; linear between order statistics."""
        ordered = sorted(self.samples)
        place = q * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return 1e3 * (ordered[low] + (place - low) * (ordered[high] - ordered[low]))


def once(call: Callable[[], object], device: str) -> float:
    """Seconds of a single call."""
    return repeated(call, device, 1)


def repeated(call: Callable[[], object], device: str, times: int) -> float:
    """Seconds per call over ``times`` calls; on CUDA by events on the stream."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(times):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / times
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def sampler(call: Callable[[], object], device: str, first: float) -> Sampler:
    """first: seconds of the warm-up call, from which the number of calls a sample follows."""
    quick = min(first, repeated(call, device, 1)) if first < SHORTEST[device] * 20 else first
    times = max(1, min(100, round(SHORTEST[device] / max(quick, 1e-7))))
    return lambda: repeated(call, device, times)


def interleave(
    samplers: dict[str, Sampler], budget_s: float, fewest: int = 5, most: int = 200
) -> dict[str, Timing]:
    """Samples all contenders in turn until each has spent its budget; at least ``fewest`` each.

    A contender slower than the budget allows gets fewer samples, but never none.
    """
    timings = {name: Timing() for name in samplers}
    spent = dict.fromkeys(samplers, 0.0)
    going = list(samplers)
    while going:
        for name in list(going):
            begin = time.perf_counter()
            timings[name].samples.append(samplers[name]())
            spent[name] += time.perf_counter() - begin
            count = len(timings[name].samples)
            enough = count >= fewest and spent[name] >= budget_s
            if enough or count >= most or spent[name] > 4 * budget_s:
                going.remove(name)
    return timings
