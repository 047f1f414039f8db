"""Triton kernels compiled without a GPU, under the very keys that a launch on it looks up later.

The real host code runs on CPU tensors that stand for those of a device. Triton's launcher works out
the specialisation of each argument; what it would compile is collected instead, and compiled by
processes that know nothing but the target. TRITON_CACHE_DIR holds the result.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from attnpool_kernels.impl.triton import tile_table

ROWS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
POOLS = 3  # times that a pool of processes may break


class _Device:
    """What Triton asks a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass
class Variant:
    source: Any
    options: Any

    @property
    def name(self) -> str:
        return f"{self.source.fn.__module__.rsplit('.', 1)[-1]}.{self.source.fn.__name__}"


@dataclass
class Collected:
    """Variants in the order in which they were asked for first."""

    target: GPUTarget
    found: dict[tuple[str, str], Variant] = field(default_factory=dict)


def target(capability: tuple[int, int]) -> GPUTarget:
    return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)


@contextlib.contextmanager
def collecting(capability: tuple[int, int]) -> Iterator[Collected]:
    """Collects what the kernels that are called inside would compile; nothing runs."""
    collected = Collected(target(capability))
    compile_, run = JITFunction._do_compile, JITFunction.run
    tile, precision = tile_table.tile, tile_table.precision
    # `active` is made at the first use: asking for it would want a GPU
    before = getattr(driver, "_active", None)

    def collect(self, key, signature, device, constexprs, options, attrs, warmup):
        source = self.ASTSource(self, signature, constexprs, attrs)
        place = source.hash(), str(options)
        collected.found.setdefault(place, Variant(source, options))

    def prepare(self, *arguments, grid, warmup, **named):
        return run(self, *arguments, grid=grid, warmup=True, **named)

    driver.set_active(_Device(collected.target))
    JITFunction._do_compile, JITFunction.run = collect, prepare
    tile_table.tile = lambda name, _, *rest: tile(name, capability, *rest)
    tile_table.precision = lambda dtype: ROWS[str(dtype).removeprefix("torch.")]
    try:
        yield collected
    finally:
        JITFunction._do_compile, JITFunction.run = compile_, run
        tile_table.tile, tile_table.precision = tile, precision
        driver._active = before


@dataclass(frozen=True)
class Compiled:
    name: str
    seconds: float
    error: str = ""


_jobs: tuple[list[Variant], GPUTarget, bool] = ([], GPUTarget("cuda", 90, 32), False)


def compiled(
    variants: list[Variant],
    where: GPUTarget,
    processes: int,
    left: Callable[[], float],
    launchers: bool = False,
) -> Iterator[Compiled]:
    """Compiles on several cores, in about this order, until no time is left.

    launchers: also the C functions that start a kernel, where this Triton compiles any; they are
    linked to the driver's library.
    """
    global _jobs
    _jobs = variants, where, launchers
    waiting = list(range(len(variants)))
    context = multiprocessing.get_context("fork")  # sources cannot be sent
    for _ in range(POOLS):
        running: dict[Future, int] = {}
        pool = ProcessPoolExecutor(max(1, processes), mp_context=context)
        try:
            while (waiting or running) and left() > 0:
                while waiting and len(running) < 2 * processes:
                    running[pool.submit(_compile, waiting[0])] = waiting[0]
                    waiting.pop(0)
                done, _ = wait(running, min(1.0, max(0.0, left())), FIRST_COMPLETED)
                for future in done:
                    place = running.pop(future)
                    try:
                        yield future.result()
                    except BrokenProcessPool:
                        running[future] = place
                        raise
            return
        except BrokenProcessPool as error:
            # One of these kills the compiler. Each is lost, the others go on.
            for place in running.values():
                yield Compiled(variants[place].name, 0.0, f"its process ended: {error}")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _compile(place: int) -> Compiled:
    variants, where, launchers = _jobs
    variant, began = variants[place], time.perf_counter()
    try:
        kernel = triton.compile(variant.source, target=where, options=variant.options.__dict__)
        if launchers:
            from triton.backends.nvidia import driver as nvidia

            if hasattr(nvidia, "make_launcher"):  # the newer ones have one launcher for all
                nvidia.CudaLauncher(variant.source, kernel.metadata)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"[:500]
        return Compiled(variant.name, time.perf_counter() - began, text)
    return Compiled(variant.name, time.perf_counter() - began)
