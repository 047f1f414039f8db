"""What a device can do at best: the limit that times are compared with.

Arithmetic: on a CPU multiply-adds on registers, by a loop of the C++ library at every vector width
that runs here (csrc/cpu/peak_loops.cpp). The matrix product of torch's library is measured beside
it: it is no limit, because a library may be slow on some processor. It stands in for one where
there is no such loop (builds without the C++ library; CUDA), and rows say so (``limit_by``).

Memory: the faster of reading and copying, for working sets from a cache to far beyond all of them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .clock import once
from .provenance import cores

ARITHMETIC, MEMORY, LIBRARY = "arithmetic", "memory", "library"
# Bytes of a working set: 64 KiB, 256 KiB, ... Without the C++ library, and on CUDA, the overhead of
# a call would count for the small ones.
FOOTPRINTS = tuple(2**n for n in range(16, 29, 2))
CALLS = tuple(2**n for n in range(22, 29, 2))
PIECES = 50  # of our loop on one thread in one measurement, some 20 µs each
READ = 2**24  # bytes of one measurement of a small working set
FACTOR, SUMMAND = 0.9, 0.1  # x = 0.9 x + 0.1 stays near 1: no denormal, no overflow
FEWEST = 5  # measurements, of which the best counts


@dataclass(frozen=True)
class Rates:
    """The best of one run or more: flops per second by dtype, bytes per second.

    product: of the library's matrix product; copy: of a copy far larger than any cache;
    fma: of our loop, of dtypes that have one; memory: (bytes of the working set, rate), rising.
    """

    product: dict[torch.dtype, float]
    copy: float
    fma: dict[torch.dtype, float] = field(default_factory=dict)
    memory: tuple[tuple[int, float], ...] = ()

    def limit(self, flops: float, size: float, dtype: torch.dtype) -> float:
        """Seconds that no implementation can beat: arithmetic or memory, whichever is longer."""
        return max(self._arithmetic(flops, dtype), size / self._memory(size))

    def limit_by(self, flops: float, size: float, dtype: torch.dtype) -> str:
        """What the limit follows from; LIBRARY: it is none, the library's product stands in."""
        if size / self._memory(size) > self._arithmetic(flops, dtype):
            return MEMORY
        return ARITHMETIC if dtype in self.fma else LIBRARY

    def library(self, flops: float, size: float, dtype: torch.dtype) -> float:
        """Seconds at the rate of the library's product, or of a copy far beyond the caches."""
        return max(flops / self.product[dtype], size / self.copy)

    def best(self, other: Rates) -> Rates:
        """What was reached in either of two measurements of the same machine."""
        memory = dict(self.memory)
        for size, rate in other.memory:
            memory[size] = max(rate, memory.get(size, 0.0))
        product = _larger(self.product, other.product)
        fma = _larger(self.fma, other.fma)
        return Rates(product, max(self.copy, other.copy), fma, _falling(memory))

    def record(self) -> dict:
        """For the provenance of a run, in GFLOP/s and GB/s."""
        found = {"matmul_gflops": _billions(self.product), "copy_gbs": round(self.copy / 1e9, 1)}
        if self.fma:
            found["fma_gflops"] = _billions(self.fma)
        if self.memory:
            found["memory_gbs"] = {str(size): round(r / 1e9, 1) for size, r in self.memory}
        return found

    def _arithmetic(self, flops: float, dtype: torch.dtype) -> float:
        # A library may have units for its type that our loop does not use.
        return flops / max(self.fma.get(dtype, 0.0), self.product[dtype])

    def _memory(self, size: float) -> float:
        """The rate for half the bytes: a pass may find in a cache what the former one has left."""
        fitting = [rate for footprint, rate in self.memory if footprint <= size / 2]
        if fitting:
            return max(self.copy, fitting[-1])
        return max(self.copy, self.memory[0][1]) if self.memory else self.copy


def measure(dtypes: set[torch.dtype], device: str, seconds: float = 0.6) -> Rates:
    """Measures everything, a fraction of ``seconds`` for each dtype and kind."""
    names = widths() if device == "cpu" else []
    fma = {}
    for dtype in {_computed(x, device) for x in dtypes} if names else ():
        fma[dtype] = _multiply_adds(dtype, names, seconds / 2)
    known = sorted(dtypes, key=str)
    product = {dtype: _product(dtype, device, seconds) for dtype in known}
    memory, copy = _memory(device, names, seconds)
    return Rates(product, copy, {x: fma[_computed(x, device)] for x in known if fma}, memory)


def said(record: dict) -> str:
    """The rates of a run in words, of old records too: which one is the limit, and which is not."""
    product, fma = record.get("matmul_gflops") or {}, record.get("fma_gflops") or {}
    parts = []
    if fma:
        parts.append(f"multiply-adds on registers {_listed(fma)} GFLOP/s (the limit)")
        parts.append(f"the library's matrix product {_listed(product)} GFLOP/s (no limit)")
    elif product:
        parts.append(
            f"the library's matrix product {_listed(product)} GFLOP/s (it stands in for the limit, "
            "which a better kernel can beat: our own loop was not measured)"
        )
    if record.get("copy_gbs") is not None:
        parts.append(f"copy {record['copy_gbs']:g} GB/s")
    memory = record.get("memory_gbs") or {}
    if memory:
        first = next(iter(memory.items()))
        parts.append(f"memory up to {first[1]:g} GB/s at {int(first[0]) // 1024} KiB")
    return ", ".join(parts)


def _listed(rates: dict) -> str:
    return ", ".join(f"{k} {v:g}" for k, v in rates.items() if v is not None)


def _billions(rates: dict[torch.dtype, float]) -> dict[str, float]:
    return {str(x).removeprefix("torch."): round(rate / 1e9, 1) for x, rate in rates.items()}


def _larger(a: dict, b: dict) -> dict:
    return {x: max(a.get(x, 0.0), b.get(x, 0.0)) for x in {**a, **b}}


def _computed(dtype: torch.dtype, device: str) -> torch.dtype:
    """Half types are computed in float32 on a CPU."""
    return torch.float32 if device == "cpu" and dtype.itemsize == 2 else dtype


def widths() -> list[str]:
    """Names of the vector widths that run here; none without the C++ library."""
    from attnpool_kernels.impl import cpu

    if cpu.load() or not hasattr(torch.ops.attnpool, "_multiply_adds"):  # none, or an older one
        return []
    found = []
    info = torch.ops.attnpool.build_info()
    for name in info.split("built for ")[1].split(";")[0].split():
        with contextlib.suppress(RuntimeError):  # built, but not for this processor
            torch.ops.attnpool._multiply_adds(name, False, 1, FACTOR, SUMMAND)
            found.append(name)
    return found


def _multiply_adds(dtype: torch.dtype, names: list[str], seconds: float) -> float:
    """Of every width: the widest vectors need not be the fastest."""
    wide = dtype == torch.float64

    def rate(name: str) -> float:
        return torch.ops.attnpool._multiply_adds(name, wide, PIECES, FACTOR, SUMMAND)

    part = seconds / len(names)
    return running() * max(_highest(lambda name=name: rate(name), part) for name in names)


def running() -> float:
    """The share of torch's threads that can run at once."""
    return min(1.0, (cores() or 1) / torch.get_num_threads())


def _highest(rate: Callable[[], float], seconds: float) -> float:
    """The highest of repeated measurements: noise must not make a limit that can be beaten."""
    found, begin = [rate() for _ in range(FEWEST)], time.perf_counter()
    while time.perf_counter() - begin < seconds:
        found.append(rate())
    return max(found)


def _product(dtype: torch.dtype, device: str, seconds: float) -> float:
    """Of square matrices; half types take seconds where the processor has nothing for them."""
    best = 0.0
    small = (256, 1024) if dtype.itemsize == 2 else (1024, 2048)
    for n in small if device == "cpu" else (4096, 8192):
        if best and 2 * n**3 / best > 0.1:
            break
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        took = _fastest(lambda: torch.mm(a, b, out=out), device, seconds / 2)  # noqa: B023
        best = max(best, 2 * n**3 / took)
    return best


def _memory(
    device: str, names: list[str], seconds: float
) -> tuple[tuple[tuple[int, float], ...], float]:
    """Rates by working set, and that of a copy far beyond any cache."""
    elements = 2**26 if device == "cpu" else 2**28
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _fastest(lambda: target.copy_(source), device, seconds / 2)
    rates, footprints = {}, FOOTPRINTS if names else CALLS
    part = seconds / len(footprints) / 2
    for size in footprints:
        x = source[: size // source.itemsize]
        half = len(x) // 2
        first, second = x[:half], target[:half]
        best = size / _fastest(lambda: second.copy_(first), device, part)  # noqa: B023
        if names:
            times = max(1, READ // size)

            def read(x=x, times=times) -> float:
                return torch.ops.attnpool._read(x, names[0], times)

            best = max(best, running() * _highest(read, part))
        else:
            best = max(best, size / _fastest(x.sum, device, part))
        rates[size] = best
    return _falling(rates), copy


def _falling(rates: dict[int, float]) -> tuple[tuple[int, float], ...]:
    """A smaller working set is never slower: where it was, something disturbed the measurement."""
    found: list[tuple[int, float]] = []
    for size in sorted(rates, reverse=True):
        found.append((size, max(rates[size], found[-1][1] if found else 0.0)))
    return tuple(reversed(found))


def _fastest(call: Callable[[], object], device: str, seconds: float) -> float:
    """Seconds of the shortest of repeated calls."""
    call()
    samples, begin = 0, time.perf_counter()
    best = float("inf")
    while samples < FEWEST or (time.perf_counter() - begin < seconds and samples < 2000):
        best = min(best, once(call, device))
        samples += 1
    return best
