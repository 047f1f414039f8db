"""What a call costs beside its kernels: the import of the package, and one small molecule."""

from __future__ import annotations

import statistics
import subprocess
import sys

import torch

from ..contenders import registry
from ..workloads.batch import make_batch
from ..workloads.workload import Workload
from .clock import repeated
from .sheet import Row
from .sweep import Sweep


def measure(sweep: Sweep, tiny: bool) -> None:
    """Adds rows of the time of ``import attnpool_kernels`` and of a call on one small molecule."""
    repeats = 3 if tiny else 9
    code = (
        "import torch, time; t = time.perf_counter(); import attnpool_kernels; "
        "print(time.perf_counter() - t)"
    )
    times = []
    for _ in range(repeats):
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if found.returncode == 0:
            times.append(float(found.stdout))
    work = Workload("one molecule of 5 atoms", "overhead", (5,))
    for contender in registry.for_workload(work, sweep.contenders):
        if not contender.ours or contender.why_not(work, "forward", sweep.device):
            continue
        row = sweep.new_row(work, "forward", contender)
        batch = make_batch(work, sweep.device)
        batch.prepare("forward")
        call = contender.prepare(batch)

        def run(call=call, inputs=batch.inputs):
            return call(*inputs)

        with torch.no_grad():
            repeated(run, sweep.device, 200)
            samples = [repeated(run, sweep.device, 200) for _ in range(repeats)]
        _put(sweep, row, samples)
        if times:
            row = sweep.new_row(work, "forward", contender)
            row.workload, row.limit_ms, row.library_ms = "import beyond torch", None, None
            row.flops = row.bytes = None  # it computes nothing that a limit could follow from
            row.limit_by = ""
            _put(sweep, row, times)


def _put(sweep: Sweep, row: Row, seconds: list[float]) -> None:
    if row.key in sweep.sheet.done():
        return
    row.samples, row.check = len(seconds), "none"
    row.p50_ms = row.p20_ms = row.p80_ms = 1e3 * statistics.median(seconds)
    sweep.sheet.add(row)
