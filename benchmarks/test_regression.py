"""Guards against slowness: ratios inside one run, never absolute times.

``pytest benchmarks/test_regression.py --benchmark-enable`` also records our times. The factors are
about half of what was measured on a quiet 2-core machine, so that noise does not fail them and a
lost vector width, thread or fast path does.
"""

from __future__ import annotations

import pytest

import attnpool_kernels
from attnpool_kernels.impl import cpu
from benchmarks.contenders import registry
from benchmarks.measuring import memory
from benchmarks.measuring.clock import interleave, once, sampler
from benchmarks.workloads.batch import make_batch
from benchmarks.workloads.sizes import draw
from benchmarks.workloads.workload import PASSES, Workload

pytestmark = [
    pytest.mark.timing,
    pytest.mark.skipif(bool(cpu.load()), reason=f"no C++ library: {cpu.load()}"),
]

QM7B = Workload("QM7b x128", "molecules", draw("QM7b", 128))
LONG = Workload("n=1024", "scaling", (1024,))
POOL = Workload("QMugs-like x64", "seeds", draw("QMugs-like", 64), seeds=1)


def _ratio(work: Workload, what: str, rival: str, benchmark) -> float:
    """Time of the rival over ours; quick quantiles, which noise moves least."""
    batch = make_batch(work, "cpu")
    batch.prepare(what)
    samplers = {}
    for name in ("attnpool:cpu", rival):
        call = registry.CONTENDERS[name].prepare(batch)

        def again(call=call):
            return batch.run(call, what)

        again()
        samplers[name] = sampler(again, "cpu", once(again, "cpu"))
        if name == "attnpool:cpu":
            benchmark.pedantic(again, rounds=5, warmup_rounds=1)
    timings = interleave(samplers, 0.5, fewest=7, most=60)
    return timings[rival].quantile(0.2) / timings["attnpool:cpu"].quantile(0.2)


@pytest.mark.parametrize(
    ("work", "what", "rival", "least"),
    [
        (QM7B, "forward", "flash", 2.0),
        (QM7B, "backward", "naive", 1.7),
        (QM7B, "double_backward", "naive", 1.4),
        (LONG, "forward", "flash", 0.7),
        (LONG, "backward", "naive", 1.2),
        (POOL, "forward", "naive", 1.5),
    ],
    ids=lambda x: x.name if isinstance(x, Workload) else str(x),
)
def test_not_slower(work, what, rival, least, benchmark):
    ratio = _ratio(work, what, rival, benchmark)
    assert ratio > least, f"only {ratio:.2f} times as fast as {rival}, at least {least} expected"


@pytest.mark.parametrize("what", PASSES)
def test_memory_is_linear(what):
    peaks = []
    for n in (1024, 2048):
        work = Workload(f"n={n}", "scaling", (n,))
        found = memory.probe(work, what, "attnpool:cpu", 2, 2**32, 600.0)
        assert found.status == "ok", found.reason
        if found.peak_bytes is None:
            pytest.skip("memory cannot be measured here")
        peaks.append(found.peak_bytes)
    memory.stop()
    inputs = 3 * 2048 * 8 * 32 * 4
    assert peaks[1] < 2.5 * peaks[0] + 1e6 and peaks[1] < 5 * inputs


def test_a_call_costs_microseconds():
    """One tiny molecule through the public function, against one torch SDPA call on it."""
    work = Workload("5 atoms", "overhead", (5,))
    batch = make_batch(work, "cpu")
    batch.prepare("forward")
    samplers = {}
    for name in ("attnpool:cpu", "per_molecule"):
        call = registry.CONTENDERS[name].prepare(batch)

        def again(call=call):
            return batch.run(call, "forward")

        again()
        samplers[name] = sampler(again, "cpu", once(again, "cpu"))
    timings = interleave(samplers, 0.3, fewest=20)
    ratio = timings["attnpool:cpu"].quantile(0.2) / timings["per_molecule"].quantile(0.2)
    assert ratio < 4, f"{attnpool_kernels.__name__} costs {ratio:.1f} calls of SDPA"
