"""Peak memory of one pass over its inputs, in a child process with a limit on memory and time.

On Linux the child resets the kernel's high-water mark of resident memory after it has made the
inputs and runs the contender once. Children are forked from a server that has imported torch but
never computed, so each costs milliseconds. The mark is exact to about half a megabyte. A contender
that exceeds the limits, crashes or hangs ends its child, not the benchmark.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..contenders import registry
from ..workloads.batch import make_batch
from ..workloads.workload import Workload
from .gate import Gate

_TINY = (5, 3)
START_S = 300.0  # seconds that a child may take to start and prepare, on a busy machine
_READY = "ready"


@dataclass
class Probe:
    """How one call went. status: ok, wrong, oom, timeout, refused, error.

    check and error are those of the gate where the call was long; else empty.
    """

    status: str
    reason: str = ""
    peak_bytes: int | None = None
    seconds: float = 0.0
    check: str = ""
    error: float | None = None


def probe(
    work: Workload,
    what: str,
    name: str,
    threads: int,
    cap: int,
    limit_s: float,
    long_s: float = math.inf,
) -> Probe:
    """Runs the contender once in a child process on the CPU.

    A call of ``long_s`` seconds or more also goes through the gate there: it need not be repeated.
    """
    return in_child(_measured, (work, what, name, cap, long_s), threads, limit_s)


def in_child(
    measured: Callable[..., Probe],
    arguments: tuple,
    threads: int,
    limit_s: float,
    preload: tuple[str, ...] = (),
) -> Probe:
    """What ``measured(pipe, *arguments)`` finds in a child process, or how that ended.

    It calls ``ready(pipe)`` before the call that counts. preload: modules that it needs besides.
    """
    # Freed blocks go back to the system at once, so that the mark counts what was in use.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "131072")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, f"{__package__}.preload", *preload])
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(there, measured, arguments, threads), daemon=True)
    begin = time.perf_counter()
    child.start()
    there.close()
    try:
        return answer(here, child, limit_s)
    except EOFError:
        child.join(5)
        code = child.exitcode
        oom = code == -9
        reason = f"its process ended with {'signal ' + str(-code) if code and code < 0 else code}"
        seconds = time.perf_counter() - begin
        return Probe("oom" if oom else "error", reason, seconds=seconds)
    finally:
        child.join(5)
        here.close()


def answer(pipe, child, limit_s: float) -> Probe:
    """What the child found; the limit counts from when it has prepared the call.

    EOFError where the child ended without a word.
    """
    for allowed, what in ((START_S, "to start and prepare"), (limit_s, "for one call")):
        if not pipe.poll(allowed):
            child.kill()
            return Probe("timeout", f"over {allowed:.0f} s {what}", seconds=allowed)
        found = pipe.recv()
        if found != _READY:
            break
    return found


def stop() -> None:
    """Ends the server, so that nothing outlives the benchmark."""
    from multiprocessing import forkserver

    forkserver._forkserver._stop()


def available() -> int:
    """Bytes that a child may take: 85% of what the system has to give now."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(int(line.split()[1]) * 1024 * 0.85)
    except OSError:
        pass
    return 8 * 2**30


def _child(pipe, measured: Callable[..., Probe], arguments: tuple, threads: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries' notices and last words
    torch.set_num_threads(threads)
    try:
        pipe.send(measured(pipe, *arguments))
    except BaseException as error:
        status, reason = classify(error)
        pipe.send(Probe(status, reason))
    pipe.close()
    os._exit(0)


def _measured(pipe, work: Workload, what: str, name: str, cap: int, long_s: float) -> Probe:
    contender = registry.CONTENDERS[name]
    sizes = work.sizes[:1] if len(set(work.sizes)) == 1 else _TINY
    warm = make_batch(replace(work, sizes=tuple(min(n, 8) for n in sizes)), "cpu")
    warm.prepare(what)
    warm.run(contender.prepare(warm), what)  # thread pools, lazily loaded code
    batch = make_batch(work, "cpu")
    batch.prepare(what)
    call = contender.prepare(batch)
    free = resource.getrlimit(resource.RLIMIT_DATA)
    _limit(cap)
    mark = ready(pipe)
    begin = time.perf_counter()
    found = batch.run(call, what)
    seconds = time.perf_counter() - begin
    peak = mark.peak()
    if seconds < long_s:
        return Probe("ok", "", peak, seconds)
    resource.setrlimit(resource.RLIMIT_DATA, free)
    gate = Gate(batch, what)
    error, wrong = gate.error(found)
    return Probe("wrong" if wrong else "ok", wrong, peak, seconds, gate.check, error)


def _limit(cap: int) -> None:
    """Lets an allocation fail beyond ``cap`` more bytes, before the machine swaps or dies."""
    used = _status("VmData:") or 0
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (used + cap, hard))


class Mark:
    """The high-water mark of resident memory from now on, over what is resident now."""

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.exact = _status("VmHWM:") is not None
        except OSError:
            self.exact = False
        self.before = _status("VmRSS:") if self.exact else high_water()

    def peak(self) -> int | None:
        """Bytes. None where they are not known: without a reset a mark may be an earlier one."""
        after = high_water()
        if self.before is None or after is None:
            return None
        more = max(0, after - self.before)
        return more if self.exact or more else None


def ready(pipe) -> Mark:
    """Tells the parent that its limit begins; the mark from which the peak counts."""
    pipe.send(_READY)
    return Mark()


def high_water() -> int | None:
    """The most bytes that were ever resident, or None where the system does not say."""
    found = _status("VmHWM:")
    if found is None:
        unit = 1 if sys.platform == "darwin" else 1024
        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return found


def _status(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def peak_cuda(call: Callable[[], object]) -> int:
    """Peak bytes of torch's allocator during a call, over what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = call()
    torch.cuda.synchronize()
    del found
    return torch.cuda.max_memory_allocated() - before


def classify(error: BaseException) -> tuple[str, str]:
    """The status of a row for an exception of a contender, and one line that says why."""
    text = " ".join(str(error).split()) or type(error).__name__
    low = text.lower()
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "can't allocate" in low or "out of memory" in low or "bad_alloc" in low
    ):
        return "oom", text[:160]
    if isinstance(error, NotImplementedError) or type(error).__name__ == "BackendError":
        return "refused", text.split(" Problem(")[0][:240]
    if "derivative for" in low and "not implemented" in low:
        return "refused", text[:240]
    if "no available kernel" in low or "no viable backend" in low:
        return "refused", text[:240]
    return "error", f"{type(error).__name__}: {text}"[:240]
