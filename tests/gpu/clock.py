"""Times of one pass as a row: its kernels by graph replay, and the same call as Python makes it."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from benchmarks.measuring import replay
from benchmarks.measuring.gate import Gate
from benchmarks.workloads.batch import WorkloadBatch, make_batch

from . import card
from .shapes import Shape

Call = Callable[[], Any]

SAMPLES = 3
LONGEST = 0.4  # seconds that a sample of REPLAYS replays may last; slower calls are replayed less
EAGER = 20  # calls, fewer where they are slow
CHECKED = 3_000_000  # pairs x heads up to which results are compared with float64
ARITHMETIC = 100_000_000  # pairs x heads from which a cache changes nothing, but memory may end
SHARE = 0.4  # of the free memory that the copies of the inputs may take


class Turns:
    """Batches of one shape in memory of their own, made when they are asked for."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self.work, self.device = shape.workload(dtype), device
        self.made: list[WorkloadBatch] = []

    def __call__(self, place: int) -> WorkloadBatch:
        while len(self.made) <= place:
            batch = make_batch(self.work, self.device, len(self.made))
            batch.prepare("double_backward")
            self.made.append(batch)
        return self.made[place]

    def count(self, what: str) -> int:
        """How many a pass needs so that its inputs are more than three times the L2 cache."""
        if self.device != "cuda" or self.work.pairs * self.work.heads > ARITHMETIC:
            return 1
        batch = self(0)
        used = [*batch.inputs]
        used += [batch.dout] if what != "forward" else []
        used += batch.cotangents if what == "double_backward" else []
        wanted = replay.turns(sum(x.nbytes for x in used))
        # a turn has all inputs, their gradients and the second ones
        turn = 3 * sum(x.nbytes for x in (*batch.inputs, batch.dout, *batch.cotangents))
        more = int(SHARE * torch.cuda.mem_get_info()[0] / max(turn, 1))
        return max(1, min(wanted, max(more, len(self.made))))


@contextmanager
def own_stream(device: str) -> Iterator[Any]:
    """Everything of a case runs on one stream, for torch's autograd keeps the first it sees."""
    if device != "cuda":
        torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other
        yield None
        return
    _freeze()
    gc.collect()  # graphs of the case before, and with them their memory
    torch.cuda.empty_cache()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream


def kernels(calls: list[Call], stream: Any) -> dict[str, Any]:
    """Seconds of one of the calls by graph replay: median, and the lowest and highest of samples.

    Without a stream: plain calls on a CPU.
    """
    if stream is None:
        return {"clock": "cpu"} | _spread([_plain(calls[0]) for _ in range(3)])
    try:
        recording = replay.record(calls, stream)
    except replay.CannotRecord as error:
        found = [replay.plain(calls[0], EAGER)[0] for _ in range(3)]
        return {"clock": "calls", "text": str(error)} | _spread(found)
    length = recording.seconds(1) * recording.calls
    replays = max(1, min(replay.REPLAYS, int(LONGEST / max(length, 1e-9))))
    found = [recording.seconds(replays) for _ in range(SAMPLES)]
    return {"clock": "graph", "turns": len(calls), "replays": replays} | _spread(found)


def eager(call: Call, stream: Any, seconds: float) -> dict[str, float]:
    """Microseconds of the call as Python makes it, and those until Python is done with it.

    seconds: of its kernels.
    """
    if stream is None:
        took = 1e6 * min(_plain(call) for _ in range(3))
        return {"eager_us": took, "host_us": took}
    took, host = replay.plain(call, max(3, min(EAGER, int(0.1 / max(seconds, 1e-9)))))
    return {"eager_us": 1e6 * took, "host_us": 1e6 * host}


def rates(shape: Shape, what: str, dtype: torch.dtype, device: str, seconds: float) -> dict:
    """What the time means: bytes and operations per second, and the ratio to the byte floor."""
    size, flops = shape.bytes(what, dtype), shape.flops(what)
    floor = size / copy_rate(device)
    return {
        "shape": shape.facts(),
        "floor": floor,
        "ratio": seconds / floor,
        "copy_gb_s": copy_rate(device) / 1e9,
        "gb_s": size / seconds / 1e9,
        "tflop_s": flops / seconds / 1e12,
    }


@cache
def _freeze() -> None:
    """Once a process: what torch has imported is no garbage to look through at each capture."""
    gc.collect()
    gc.freeze()


@cache
def copy_rate(device: str) -> float:
    """Of this process: bytes per second of a large copy."""
    return card.copy_rate(device, 0.2 if device == "cuda" else 0.02)


def checked(
    batch: WorkloadBatch, found: Callable[[str], dict], passes: tuple[str, ...]
) -> dict | None:
    """A row with the worst relative error of the passes' results; None for a large batch."""
    work = batch.workload
    if work.pairs * work.heads > CHECKED:
        return None
    results: dict = {}
    for what in passes:
        results |= found(what)
    if set(passes) != {"forward", "backward", "double_backward"}:
        batch.prepare(passes[-1])
    error, wrong = Gate(batch, passes[-1]).error(results)
    row = {"what": "check", "error": error, "status": "wrong" if wrong else "ok"}
    return row | ({"text": wrong} if wrong else {})


def _spread(found: list[float]) -> dict[str, Any]:
    return {"seconds": statistics.median(found), "low": min(found), "high": max(found)}


def _plain(call: Call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
