"""The sweep: every contender on every workload and pass becomes one row, whatever happens to it.

Order of events for a row: reasons against it, a probe in a child process (peak memory; running out
of memory or time ends the child only), the gate against float64, then interleaved timing. A
contender that ran out of memory or time is not tried on larger workloads of the same family.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ..contenders import registry
from ..contenders.contender import Contender
from ..workloads.batch import WorkloadBatch, make_batch
from ..workloads.workload import Workload
from . import memory, replay
from .base import Base
from .clock import Sampler, Timing, interleave, once
from .gate import Gate, shortened
from .rates import Rates
from .sheet import BenchmarkError, Row, Sheet

BASE = "base:"


@dataclass
class Limits:
    """What a point may cost."""

    budget_s: float = 0.3  # timed seconds per contender, workload and pass
    call_s: float = 10.0  # longest single call
    cap_bytes: int = 0  # memory over the inputs; 0: what the machine has
    minutes: float = math.inf  # for all of it
    fewest: int = 5  # samples
    long_s: float = 4.0  # seconds from which the one call in the child is the measurement (CPU)


@dataclass
class Sweep:
    """One run over workloads into a sheet, with what it has learned on the way."""

    suite: str
    device: str
    rates: Rates
    sheet: Sheet
    limits: Limits
    contenders: list[str] | None = None
    base: Base | None = None
    blocked: dict[tuple, tuple[int, str]] = field(default_factory=dict)
    trusted: dict[tuple, str] = field(default_factory=dict)

    def run(self, workloads: Iterable[Workload]) -> None:
        points = [(work, what) for work in workloads for what in work.passes]
        costs = [self._cost(*point) for point in points]
        progress = Progress(costs, self.limits.minutes * 60)
        begin, done = time.monotonic(), self.sheet.done()
        for row in self.sheet.rows:  # of an earlier run that is being resumed
            if row.status in ("oom", "timeout"):
                self._block(row, row.x)
        for work, what in points:
            progress.show(f"{work.key} {what}")
            late = time.monotonic() - begin > self.limits.minutes * 60
            self._point(work, what, done, late)
            progress.advance()
        progress.end()

    def _cost(self, work: Workload, what: str) -> float:
        """Seconds that a point takes, roughly: for the progress bar."""
        limits, able = self.limits, registry.for_workload(work, self.contenders)
        able = [c for c in able if not c.why_not(work, what, self.device)]
        call = min(
            limits.call_s * work.patience, 4 * self.rates.limit(*work.work(what), work.dtype)
        )
        calls = 1 if call > limits.long_s else 4
        return 0.1 + len(able) * (limits.budget_s + 0.5 + calls * call)

    def _point(self, work: Workload, what: str, done: set, late: bool) -> None:
        rows: dict[str, Row] = {}
        pending: list[Contender] = []
        for contender in registry.for_workload(work, self.contenders):
            row = self.new_row(work, what, contender)
            if row.key in done:
                continue
            reasons = contender.why_not(work, what, self.device)
            if reasons:
                row.status, row.reason = "refused", "; ".join(reasons)
            elif self._starts_slowly(contender):
                row.status, row.reason = "skipped", "traces for seconds: name it in --contenders"
            elif late:
                row.status, row.reason = "skipped", f"over {self.limits.minutes:g} minutes"
            elif self._blocking(row) is not None:
                row.status, row.reason = "skipped", self._blocking(row)
            else:
                rows[contender.name] = row
                pending.append(contender)
                continue
            self.sheet.add(row)
        if not pending:
            return
        samplers: dict[str, Sampler] = {}
        timings: dict[str, Timing] = {}
        if self.device == "cpu":
            pending = [c for c in pending if self._probe(work, what, c, rows[c.name], timings)]
        batch = make_batch(work, self.device)
        batch.prepare(what)
        gate = Gate(batch, what)
        for contender in pending:
            made = self._admit(batch, what, contender, gate, rows[contender.name])
            if made is not None:
                first, samplers[contender.name] = made
                timings[contender.name] = Timing([first] if first > 1.0 else [])
        if self.base is not None:
            for contender in [c for c in pending if c.name in samplers and self._has_base(c)]:
                row = self.new_row(work, what, contender)
                row.contender, row.ours = BASE + contender.name, 0
                row.kernel = f"{contender.name} at {self.base.ref}"
                sample = self.base.sampler(work, what, contender.name)
                if isinstance(sample, str):
                    row.status, row.reason = "error", sample
                else:
                    samplers[row.contender] = sample
                rows[row.contender] = row
        slow = {n for n in samplers if n in timings and timings[n].samples}  # one call may do
        quick = {n: s for n, s in samplers.items() if n not in slow}
        timings |= interleave(quick, self.limits.budget_s, self.limits.fewest)
        few = {n: samplers[n] for n in slow if timings[n].samples[0] < 5.0}
        for name, timing in interleave(few, 0, min(2, self.limits.fewest)).items():
            timings[name].samples += timing.samples
        for name, row in rows.items():
            if row.status == "ok":
                row.fill(timings[name])
                _compare(row)
            if row.key not in done:
                self.sheet.add(row)
        del samplers, batch, gate
        gc.collect()

    def _probe(
        self, work: Workload, what: str, contender: Contender, row: Row, timings: dict[str, Timing]
    ) -> bool:
        """Memory and first call in a child; True where the time is to be taken in this process.

        A call of many seconds is checked and timed in the child, once.
        """
        limits = self.limits
        cap = limits.cap_bytes or memory.available()
        threads = torch.get_num_threads()
        longest = limits.call_s * work.patience
        limit_s = 1.5 * longest + 5
        found = memory.probe(work, what, row.contender, threads, cap, limit_s, limits.long_s)
        row.status, row.reason, row.peak_bytes = found.status, found.reason, found.peak_bytes
        row.error, row.check = found.error, found.check
        if found.status == "ok" and found.seconds > longest:
            row.status = "timeout"
            row.reason = f"{found.seconds:.1f} s for one call, limit {longest:g} s"
        if row.status in ("oom", "timeout"):
            self._block(row, work.x)
        if row.status != "ok" or not found.check:
            return row.status == "ok"
        if found.check != "all" and what == "double_backward":
            wrong = self._short(work, what, contender)
            row.check += ", short all"
            row.status, row.reason = ("wrong", wrong) if wrong else ("ok", "")
        timings[row.contender] = Timing([found.seconds])
        return False

    def _admit(self, batch: WorkloadBatch, what: str, contender: Contender, gate: Gate, row: Row):
        """Checks the numbers of the first call; its seconds and a sampler, or None."""
        device = self.device
        try:
            call = contender.prepare(batch)
            held: list[dict] = []
            if device == "cuda":
                batch.run(call, what)  # compiles, picks algorithms
                row.peak_bytes = memory.peak_cuda(lambda: batch.run(call, what))
            first = once(lambda: held.append(batch.run(call, what)), device)
            row.error, wrong = gate.error(held.pop())
            row.check = gate.check
            if not gate.full and not wrong and what == "double_backward":
                wrong = self._short(batch.workload, what, contender)
                row.check += ", short all"
            if wrong:
                row.status, row.reason = "wrong", wrong
                return None
            if 1.0 < first < 5.0:  # the first call of a process may stumble
                first = once(lambda: batch.run(call, what), device)
            run, row.reason = replay.of_batch(batch, call, what, first)
        except Exception as error:
            row.status, row.reason = memory.classify(error)
            if device == "cuda" and "CUDA error" in row.reason:
                self.sheet.add(row)
                raise BenchmarkError(
                    f"{contender.name} broke the CUDA context: {row.reason}. The rows so far are "
                    "kept; go on with --resume"
                ) from error
            if row.status == "oom":
                self._block(row, batch.workload.x)
                if device == "cuda":
                    torch.cuda.empty_cache()
            return None
        row.status = "ok"
        return first, run

    def _short(self, work: Workload, what: str, contender: Contender) -> str:
        """Full check of all gradients on a shortened workload, once per kind of workload."""
        small = shortened(work)
        key = (small.sizes, small.heads, small.dim, small.seeds, small.dtype, small.layout)
        key = (*key, what, contender.name)
        if key not in self.trusted:
            batch = make_batch(small, self.device)
            batch.prepare(what)
            found = batch.run(contender.prepare(batch), what)
            self.trusted[key] = Gate(batch, what).error(found)[1]
        return self.trusted[key]

    def _has_base(self, contender: Contender) -> bool:
        """Our kernels; the other backends only where they were asked for by name."""
        named = self.contenders is not None and contender.name.startswith("attnpool:")
        return contender.ours or named

    def _starts_slowly(self, contender: Contender) -> bool:
        asked = self.contenders is not None or self.device != "cpu"
        return not asked and contender.name in registry.SLOW_TO_START

    def _axis(self, row: Row) -> tuple | None:
        if row.x is None or row.family not in ("scaling", "constant"):
            return None
        return (row.family, row.contender, row.what, row.heads, row.dim, row.dtype, row.layout)

    def _block(self, row: Row, x: int | None) -> None:
        axis = self._axis(row)
        if axis is not None and x is not None:
            self.blocked.setdefault(axis, (x, f"{row.status} at {x} atoms"))

    def _blocking(self, row: Row) -> str | None:
        """Where it failed on the same axis: longer calls that are waited for count as well."""
        x, reason = self.blocked.get(self._axis(row) or (), (math.inf, None))
        return reason if row.x is not None and row.x >= x else None

    def new_row(self, work: Workload, what: str, contender: Contender) -> Row:
        """What is known of a measurement before it is made."""
        flops, size = work.work(what) if not work.module else (None, None)
        row = Row(
            suite=self.suite,
            family=work.family,
            workload=work.key,
            x=work.x,
            molecules=len(work.sizes),
            atoms=work.atoms,
            longest=max(work.sizes),
            heads=work.heads,
            dim=work.dim,
            seeds=work.seeds,
            dtype=work.dtype_name,
            layout=work.layout,
            what=what,
            contender=contender.name,
            kernel=contender.kernel(work, self.device),
            ours=int(contender.ours),
            status="ok",
            flops=flops,
            bytes=size,
        )
        _limit(row, self.rates)
        return row

    def settle(self, rates: Rates) -> None:
        """Lowers the limits where the machine did better in ``rates`` than before the rows.

        Also those of earlier runs of this machine that the file holds. A limit is never raised.
        """
        self.rates = self.rates.best(rates)
        runs = self.sheet.runs
        machine = [runs[self.sheet.run].get(name) for name in ("device", "threads")]
        for row in self.sheet.rows:
            about = runs[row.run] if 0 <= row.run < len(runs) else {}
            if [about.get(name) for name in ("device", "threads")] == machine:
                _limit(row, self.rates)
        runs[self.sheet.run]["rates"] = self.rates.record()
        self.sheet.rewrite()


def _limit(row: Row, rates: Rates) -> None:
    """The limit by ``rates`` where that is lower than what the row has, and the ratio to it."""
    dtype = getattr(torch, row.dtype)
    if not row.flops or not row.bytes or dtype not in rates.product:
        return
    work = row.flops, row.bytes, dtype
    limit, library = 1e3 * rates.limit(*work), 1e3 * rates.library(*work)
    if row.limit_ms is None or limit < row.limit_ms or not row.limit_by:
        row.limit_ms = limit if row.limit_ms is None else min(limit, row.limit_ms)
        row.limit_by = rates.limit_by(*work)
    row.library_ms = library if row.library_ms is None else min(library, row.library_ms)
    _compare(row)


def _compare(row: Row) -> None:
    row.ratio = row.p50_ms / row.limit_ms if row.p50_ms and row.limit_ms else None


class Progress:
    """A bar with the remaining time, on a terminal; a line now and then where there is none."""

    def __init__(self, costs: list[float], most: float = math.inf) -> None:
        self.costs, self.place, self.most = costs, 0, most
        self.total = sum(costs) or 1.0
        self.begin = self.said = time.monotonic()
        self.live = sys.stderr.isatty()

    def show(self, text: str) -> None:
        now = time.monotonic()
        if not self.live and self.place and now - self.said < 15:
            return
        self.said = now
        share = sum(self.costs[: self.place]) / self.total
        spent = now - self.begin
        left = min(spent * (1 - share) / share, self.most - spent) if share > 0.02 else None
        left = None if left is None else max(0.0, left)
        clock = "--:--" if left is None else f"{int(left // 60)}:{int(left % 60):02d}"
        bar = "#" * round(24 * share)
        line = f"[{bar:<24}] {100 * share:3.0f}%  {clock} left  {text}"
        line, end = (f"\r\x1b[K{line[:118]}", "") if self.live else (line, "\n")
        print(line, end=end, file=sys.stderr, flush=True)

    def advance(self) -> None:
        self.place += 1

    def end(self) -> None:
        took = time.monotonic() - self.begin
        clear = "\r\x1b[K" if self.live else ""
        print(f"{clear}{len(self.costs)} points in {took:.0f} s", file=sys.stderr, flush=True)
