"""The clock of CUDA: calls captured into a graph, and the time of its replays between two events.

A plain call of a small kernel measures Python and the driver; a replay measures the kernels. The
calls of one graph work on inputs of their own, together larger than the L2 cache, so that no replay
finds in it what the former one has left. Where calls cannot be captured (they wait for the device)
or are so long that starting them is nothing, they are timed as they are, and the reason is said.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..workloads.batch import WorkloadBatch, make_batch
from .clock import Sampler, repeated, sampler

Call = Callable[[], object]

REPLAYS = 20  # between two events
BEYOND = 3.0  # times the L2 cache, which the inputs of the calls of one graph are larger than
MOST = 256  # calls of a graph
SLOW = 0.01  # seconds of a call from which it needs no graph
SAMPLE = 0.03  # seconds that a sample of the benchmark lasts at most, where one replay does not
RECORDING = 1.0  # seconds that the calls of a graph may take while they are captured


class CannotRecord(RuntimeError):
    """Calls that no graph can hold; the text says why."""


@dataclass
class Recording:
    """A graph of ``calls`` calls."""

    graph: torch.cuda.CUDAGraph
    calls: int
    stream: torch.cuda.Stream

    def seconds(self, replays: int = REPLAYS) -> float:
        """Of one call."""
        with torch.cuda.stream(self.stream):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(replays):
                self.graph.replay()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) / 1e3 / (replays * self.calls)


def record(calls: Sequence[Call], stream: torch.cuda.Stream | None = None) -> Recording:
    """Captures the calls, one after the other, into a graph that was replayed once.

    The first call runs before that as it is, twice: it compiles, and a call that waits for the
    device is found where that breaks nothing. Results of all calls lie in memory of their own.
    Raises CannotRecord.
    """
    stream = stream or torch.cuda.Stream()
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            calls[0]()
            try:
                with _no_waiting():
                    calls[0]()
            except RuntimeError as error:
                raise CannotRecord(f"it waits for the device ({_line(error)})") from error
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                held = [call() for call in calls]
        except RuntimeError as error:
            raise CannotRecord(f"it cannot be captured ({_cause(error)})") from error
        del held
        with torch.cuda.stream(stream):
            graph.replay()  # the first replay also uploads the graph
        torch.cuda.synchronize()
    finally:
        torch.cuda.set_stream(current)  # a capture that failed leaves its own
    return Recording(graph, len(calls), stream)


def turns(size: int) -> int:
    """How many inputs of ``size`` bytes are together more than ``BEYOND`` times the L2 cache."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(1, min(MOST, math.floor(BEYOND * cache / max(size, 1)) + 1))


def of_batch(
    batch: WorkloadBatch, call: Callable[..., torch.Tensor], what: str, first: float
) -> tuple[Sampler, str]:
    """A sampler of one pass of a contender, and on CUDA why it is not timed by replays, or "".

    first: seconds of the first call.
    """

    def plain() -> object:
        return batch.run(call, what)

    if batch.device != "cuda":
        return sampler(plain, batch.device, first), ""
    once = min(first, repeated(plain, "cuda", 1))
    if once > SLOW:
        return sampler(plain, "cuda", once), ""
    try:
        size = sum(x.nbytes for x in (*batch.inputs, batch.dout, *batch.cotangents))
        batches = [batch]
        for place in range(1, min(turns(size), max(1, math.floor(RECORDING / once)))):
            batches.append(make_batch(batch.workload, "cuda", batch.seed + place))
        for other in batches:
            other.prepare(what)  # leaves that no stream but that of the graph has seen
        recording = record([lambda own=own: own.run(call, what) for own in batches])
    except (CannotRecord, torch.OutOfMemoryError) as error:
        torch.cuda.empty_cache()
        return sampler(plain, "cuda", once), f"timed by plain calls: {_line(error)}"
    length = recording.seconds(2) * recording.calls
    replays = max(1, min(REPLAYS, round(SAMPLE / length)))
    return lambda: recording.seconds(replays), ""


def plain(call: Call, times: int) -> tuple[float, float]:
    """Seconds of a call by events, and those that the host needs to start it; no graph."""
    call()
    torch.cuda.synchronize()
    stream = torch.cuda.current_stream()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(stream)
    started = time.perf_counter()
    for _ in range(times):
        call()
    host = time.perf_counter() - started
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times, host / times


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """A call that waits for the device raises."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _cause(error: BaseException) -> str:
    """The error that broke a capture, not what its end says about that."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return _line(error)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
