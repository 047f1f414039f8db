"""The limit: what the machine can do, not what a library does; and nothing is faster than it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from attnpool_kernels.impl import cpu
from benchmarks.measuring import memory, rates, sheet
from benchmarks.measuring.rates import ARITHMETIC, LIBRARY, MEMORY, Rates
from benchmarks.measuring.sweep import Limits, Sweep
from benchmarks.reporting import tables
from benchmarks.workloads.sizes import draw
from benchmarks.workloads.workload import Workload

F32, F64, B16 = torch.float32, torch.float64, torch.bfloat16
with_library = pytest.mark.skipif(bool(cpu.load()), reason=f"no C++ library: {cpu.load()}")
KNOWN = Rates({F32: 5e10, B16: 4e11}, 1e10, {F32: 1e11, B16: 1e11}, ((2**16, 1e11), (2**24, 2e10)))


@pytest.fixture(scope="module", autouse=True)
def _stop_server():
    yield
    memory.stop()


def test_limit_is_what_the_machine_can_do():
    assert KNOWN.limit(1e9, 1.0, F32) == 0.01  # not the 0.02 s of the library
    assert KNOWN.limit_by(1e9, 1.0, F32) == ARITHMETIC
    assert KNOWN.library(1e9, 1.0, F32) == 0.02
    # A library that has better units for a type than our loop: its rate is reached, so it counts.
    assert KNOWN.limit(1e9, 1.0, B16) == 0.0025 and KNOWN.limit_by(1e9, 1.0, B16) == ARITHMETIC
    assert KNOWN.limit_by(1.0, 1e9, F32) == MEMORY


def test_memory_is_as_fast_as_the_cache_that_may_hold_it():
    assert KNOWN.limit(1.0, 2**17, F32) == 2**17 / 1e11
    assert KNOWN.limit(1.0, 2**24, F32) == 2**24 / 1e11  # half of it may still be in that cache
    assert KNOWN.limit(1.0, 2**25, F32) == 2**25 / 2e10
    assert replace(KNOWN, memory=()).limit(1.0, 2**17, F32) == 2**17 / 1e10


def test_without_our_loop_it_is_no_limit():
    plain = replace(KNOWN, fma={})
    assert plain.limit(1e9, 1.0, F32) == 0.02 and plain.limit_by(1e9, 1.0, F32) == LIBRARY
    assert "stands in for the limit" in rates.said(plain.record())
    assert "(the limit)" in rates.said(KNOWN.record())
    assert "fma_gflops" not in plain.record()


def test_the_best_of_two_measurements():
    other = Rates({F32: 6e10}, 5e9, {F32: 9e10, F64: 4e10}, ((2**16, 5e10), (2**20, 6e10)))
    best = KNOWN.best(other)
    assert best.product == {F32: 6e10, B16: 4e11} and best.copy == 1e10
    assert best.fma == {F32: 1e11, B16: 1e11, F64: 4e10}
    assert best.memory == ((2**16, 1e11), (2**20, 6e10), (2**24, 2e10))


@pytest.mark.timing
@with_library
@pytest.mark.parametrize("dtype", [F32, F64])
def test_loop_is_as_fast_as_any_library(dtype):
    """And no faster than a processor: what the compiler had dropped would take no time at all."""
    found = rates.measure({dtype}, "cpu", 0.2)
    assert found.fma[dtype] >= found.product[dtype]
    lanes = 64 // dtype.itemsize
    assert found.fma[dtype] < torch.get_num_threads() * 2 * 2 * lanes * 7e9


@pytest.mark.timing
@with_library
@pytest.mark.parametrize("width", rates.widths() if not cpu.load() else [])
def test_loop_takes_its_time(width):
    """Twice the pieces take twice the time, and more threads than cores are not counted."""
    call = torch.ops.attnpool._multiply_adds
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = max(call(width, False, 50, 0.9, 0.1) for _ in range(20))
        torch.set_num_threads(8)
        many = rates.running() * max(call(width, False, 50, 0.9, 0.1) for _ in range(5))
    finally:
        torch.set_num_threads(before)
    assert one > 1e9 and many < one * 8 * 1.5


@with_library
def test_operators_refuse_what_is_not_there():
    with pytest.raises(RuntimeError, match="no code for 'sse9' here"):
        torch.ops.attnpool._multiply_adds("sse9", False, 1, 0.9, 0.1)
    with pytest.raises(RuntimeError, match="must be contiguous"):
        torch.ops.attnpool._read(torch.ones(4, 4).t(), rates.widths()[0], 1)
    for size in (0, 1, 100):  # nothing to read, or less than a cache line
        torch.ops.attnpool._read(torch.ones(size), rates.widths()[0], 1)


WORKLOADS = {
    "15 atoms": Workload("QM7b x128", "molecules", draw("QM7b", 128)),
    "55 atoms": Workload("QMugs-like x32", "molecules", draw("QMugs-like", 32)),
    "55 atoms float64": Workload("QMugs-like x16", "molecules", draw("QMugs-like", 16), dtype=F64),
    "512 atoms": Workload("n=512", "long", (512,), x=512),
    "one seed": Workload("QMugs-like x64", "seeds", draw("QMugs-like", 64), seeds=1),
}


@pytest.fixture(scope="module")
def before():
    return rates.measure({F32, F64}, "cpu", 0.1)


@pytest.mark.timing
@with_library
@pytest.mark.parametrize("name", WORKLOADS)
def test_nothing_beats_its_limit(name, before, tmp_path):
    """On a busy machine too: limits are what single threads reach in microseconds."""
    work = WORKLOADS[name]
    if name != "55 atoms":
        work = replace(work, passes=("forward",))
    table = sheet.Sheet(tmp_path / "x.csv")
    table.start({"device": "test", "threads": torch.get_num_threads()})
    limits = Limits(budget_s=0.05, fewest=3)
    sweep = Sweep("quick", "cpu", before, table, limits, ["attnpool:cpu", "naive", "flash"])
    sweep.run([work])
    sweep.settle(rates.measure({work.dtype}, "cpu", 0.05))
    timed = [row for row in sheet.read(table.path)[0] if row.timed]
    assert {row.contender for row in timed} >= {"attnpool:cpu", "naive"}
    for row in timed:
        assert row.limit_by in (ARITHMETIC, MEMORY) and row.library_ms > 0
        assert row.p20_ms >= row.limit_ms, f"{row.what}, {row.contender}: {row.ratio:.2f}"
        assert row.ratio == pytest.approx(row.p50_ms / row.limit_ms, rel=1e-4)


def _sweep(path, resume=False, **about):
    table = sheet.Sheet(path, resume)
    table.start({"device": "test", "threads": 2, **about})
    slow = Rates({F32: 1e9}, 1e9, {F32: 2e9}, ((2**16, 4e9),))
    return Sweep("quick", "cpu", slow, table, Limits(budget_s=0.001, fewest=2), ["naive"])


def _work(n):
    return Workload(f"n={n}", "scaling", (n,), heads=2, dim=8, x=n, passes=("forward",))


def test_settling_lowers_limits_and_raises_none(tmp_path):
    path = tmp_path / "x.csv"
    first = _sweep(path)
    first.run([_work(16)])
    before = sheet.read(path)[0][0]
    fast = Rates({F32: 3e9}, 1e9, {F32: 1e12}, ((2**16, 1e12),))
    first.settle(fast)
    (row,), (about,) = sheet.read(path)
    assert row.limit_ms < before.limit_ms / 100 and row.ratio > before.ratio * 100
    assert row.p50_ms == before.p50_ms and row.library_ms < before.library_ms
    assert about["rates"]["fma_gflops"] == {"float32": 1000.0} and about["run"] == 0
    second = _sweep(path, resume=True)  # a slow hour of the same machine
    second.run([_work(16), _work(24)])
    second.settle(second.rates)
    again, other = sheet.read(path)[0]
    assert again.limit_ms == row.limit_ms and other.limit_by == ARITHMETIC
    _sweep(path, resume=True, device="another").settle(replace(fast, fma={F32: 1e15}))
    assert [x.limit_ms for x in sheet.read(path)[0]] == [again.limit_ms, other.limit_ms]


def test_settling_on_a_full_disk_keeps_the_file(tmp_path, monkeypatch):
    path = tmp_path / "x.csv"
    sweep = _sweep(path)
    sweep.run([_work(16)])
    before = path.read_bytes()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_text", full)
    with pytest.raises(sheet.BenchmarkError, match="No space left on device; its rows are kept"):
        sweep.settle(sweep.rates)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_older_file_goes_on(tmp_path):
    """Its columns are those of before the limit was one; resumed rows have all of them."""
    path = tmp_path / "x.csv"
    old = [name for name in sheet.COLUMNS if name not in sheet.LATER]
    values = {
        "suite": "quick",
        "family": "scaling",
        "workload": _work(16).key,
        "x": 16,
        "molecules": 1,
        "atoms": 16,
        "longest": 16,
        "heads": 2,
        "dim": 8,
        "dtype": "float32",
        "layout": "separate",
        "what": "forward",
        "contender": "naive",
        "kernel": "k",
        "ours": 0,
        "status": "ok",
        "p50_ms": 1.0,
        "flops": 1e6,
        "bytes": 4096,
        "limit_ms": 1.25,
        "ratio": 0.8,
        "run": 0,
    }
    about = {"run": 0, "device": "test", "threads": 2, "rates": {"matmul_gflops": {"float32": 1}}}
    lines = [",".join(old), "# run " + json.dumps(about)]
    path.write_text("\n".join([*lines, ",".join(str(values.get(x, "")) for x in old)]) + "\n")
    (row,), _ = sheet.read(path)
    assert not tables.is_limit(row) and tables.over(row) == ("-", "0.80")
    sweep = _sweep(path, resume=True)
    sweep.run([_work(16), _work(24)])
    (row, new), _ = sheet.read(path)
    assert row.ratio == 0.8 and new.limit_by == ARITHMETIC
    sweep.settle(sweep.rates)
    (row, _), _ = sheet.read(path)
    assert row.limit_ms == 0.5 and row.ratio == 2.0 and tables.over(row) == ("2.00", "1.00")
