"""Lines that only CUDA reaches, executed here with a stand-in for ``torch.cuda``.

What the stand-in does is what the lines rely on: a graph runs its call again into the same tensors,
a synchronisation in the wrong mode raises, a kernel on another stream comes too early.
"""

from __future__ import annotations

import contextlib
import sys
import time
import types
from dataclasses import replace

import pytest
import torch

from attnpool_kernels import testing
from attnpool_kernels.impl import cpu

from . import batches, card, child, judgement, passes
from .blocks import adapters, environment, invariants, sanitizers
from .case import Case, Outcome, Settings


class Graph:
    """Runs its call again into the same tensors; ``stale``: it does nothing."""

    def __init__(self, call, stale=False):
        self.call, self.results, self.stale = call, call(), stale

    def replay(self):
        if not self.stale:
            for key, x in self.call().items():
                self.results[key].copy_(x)


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda as far as the blocks use it, on the CPU."""
    fake = types.SimpleNamespace(calls=[], free=80e9, working=True)
    stream = types.SimpleNamespace(wait_stream=fake.calls.append, synchronize=lambda: None)

    def synchronize():
        if not fake.working:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    for name, stand_in in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "synchronize": synchronize,
        "_sleep": fake.calls.append,
        "set_sync_debug_mode": fake.calls.append,
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (fake.free, 80e9),
        "is_initialized": lambda: True,
        "get_device_name": lambda: "a card",
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return fake


@pytest.fixture(autouse=True)
def _cpu_kernels():
    if cpu.load():
        pytest.skip(cpu.load())
    torch.use_deterministic_algorithms(False)


STEPS = (
    invariants.captured,
    invariants.replays,
    invariants.unsynchronised,
    invariants.side_stream,
    invariants.repeats,
    invariants.alone,
    invariants.large,
)


@pytest.mark.parametrize("seeds", [None, 4])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_steps_pass_where_all_is_right(step, seeds, cuda, monkeypatch):
    monkeypatch.setattr(invariants, "record", lambda call: (g := Graph(call), g.results))
    row = step("cpu", torch.float32, seeds, "cpu")
    assert row["status"] == "ok", row


@pytest.mark.parametrize("step", [invariants.captured, invariants.replays])
def test_stale_graphs_are_seen(step, cuda, monkeypatch):
    monkeypatch.setattr(invariants, "record", lambda call: (g := Graph(call, True), g.results))
    row = step("cpu", torch.float32, None, "cpu")
    assert row["status"] == "wrong" and "out of replay 0 differs" in row["text"]


def test_record_captures_one_call(monkeypatch):
    log = []
    graph = object()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)

    @contextlib.contextmanager
    def capture(which):
        assert which is graph
        log.append("begin")
        yield
        log.append("end")

    monkeypatch.setattr(torch.cuda, "graph", capture)
    found, results = invariants.record(lambda: log.append("call") or {"out": 1})
    assert found is graph and results == {"out": 1} and log == ["begin", "call", "end"]


def test_other_values_keep_the_boundaries_in_order():
    batch = batches.mixed(torch.float32, "cpu")
    before = batch.q.clone()
    for place in range(5):
        invariants._other_values(batch, place)
        ptr = batch.k_ptr
        assert ptr[0] == 0 and ptr[-1] == len(batch.k) and bool((ptr.diff() >= 0).all())
    assert not torch.equal(batch.q, before) and batch.q_ptr is batch.k_ptr


class Faulty:
    """The cpu kernels with one fault: a call whose results differ by a unit in the last place."""

    def __init__(self, name, wrong):
        self.name, self.wrong, self.calls = name, wrong, 0

    def __getattr__(self, name):
        if name != self.name:
            return getattr(cpu, name)

        def call(*arguments):
            self.calls += 1
            first, *rest = results = getattr(cpu, name)(*arguments)
            if self.wrong(self, arguments[0]):
                first = first * (1 + 1e-6)
            return results._make([first, *rest])

        return call


@pytest.mark.parametrize(
    ("step", "wrong"),
    [
        (invariants.repeats, lambda self, _: self.calls == 2),
        (invariants.alone, lambda self, x: len(x.k) == 3),
        (invariants.side_stream, lambda self, _: self.calls == 2),
        (invariants.large, lambda self, x: len(x.k) > 64),
    ],
)
@pytest.mark.parametrize("name", ["forward", "backward", "double_backward"])
def test_faults_are_seen(step, wrong, name, cuda, monkeypatch):
    faulty = Faulty(name, wrong)
    monkeypatch.setattr(passes, "load", lambda *_: faulty)
    monkeypatch.setattr(invariants, "_batch", lambda *_: (small(), faulty))
    row = step("cpu", torch.float32, None, "cpu")
    assert row["status"] == "wrong", row


def small():
    return batches.mixed(torch.float32, "cpu", small=True)


def test_synchronisations_are_seen(cuda, monkeypatch):
    def forward(*arguments):
        if cuda.calls and cuda.calls[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return cpu.forward(*arguments)

    module = types.SimpleNamespace(
        forward=forward, backward=cpu.backward, double_backward=cpu.double_backward
    )
    monkeypatch.setattr(invariants, "_batch", lambda *_: (small(), module))
    row = invariants.unsynchronised("cpu", torch.float32, None, "cpu")
    assert row["status"] == "wrong" and "synchronizing" in row["text"]
    assert cuda.calls[-1] == "default"


def test_memory_is_poisoned():
    with judgement.poisoned():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_memory_is_asked_for(cuda):
    batches.require_memory(int(70e9), "cuda")
    cuda.free = 3e9
    with pytest.raises(Outcome, match=r"needs 4\.4 GB of memory, 3\.0 are free"):
        batches.require_memory(int(4e9), "cuda")
    batches.require_memory(int(4e9), "cpu")


def test_a_dead_device_is_seen(cuda):
    assert child._sick() == "" or "CUDA" in child._sick()  # this torch may have none
    cuda.working = False
    assert child._sick() == " [sticky: CUDA error: an illegal memory access was encountered]"
    assert child._card() == {"card": "a card"}


def test_times_of_a_card(monkeypatch):
    class Event:
        clock = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.clock += 1.5
            self.at = Event.clock

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert card.once(lambda: None, "cuda") == pytest.approx(1.5e-3)
    assert card.shortest(lambda: None, "cuda", 0.0) == pytest.approx(1.5e-3)


def test_the_machine_is_described(cuda, monkeypatch, tmp_path):
    facts = types.SimpleNamespace(
        name="a card",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=80e9,
        L2_cache_size=50e6,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    row = environment.machine(Settings("cuda", tmp_path, tmp_path))
    assert row["capability"] == "9.0" and row["memory_gb"] == 80 and row["l2_mb"] == 50


@pytest.mark.parametrize("name", ["far rows", "far heads", "far width", "far rows of seeds"])
def test_far_axes_are_far(name):
    size = 2**18
    batch = batches.far(name, torch.float32, "cpu", size)
    axis = batches.FAR[name.removesuffix(" of seeds")]
    same = batches.FAR_SHAPE if "seeds" not in name else replace(batches.FAR_SHAPE, seeds=4)
    dense = same.make(torch.float32, "cpu")
    reach = 0
    for key in ("q", "k", "v", "ddq", "ddk", "ddv"):
        x = getattr(batch, key)
        assert torch.equal(x, getattr(dense, key)) and x.stride(axis) > 1024
        reach = max(reach, x.stride(axis) * (x.shape[axis] - 1))
    assert 0.9 * size < reach <= size


def test_passes_one_by_one_are_those_of_run_kernels():
    batch = batches.CASES["bias"].make(torch.float32)
    whole, known = testing.run_kernels(batch, cpu), judgement.oracle(batch)
    for step in passes.PASSES:
        found = passes.one(step, batch, cpu, known)
        for key, x in found.items():
            torch.testing.assert_close(x, whole.pop(key), rtol=1e-4, atol=1e-5)
    assert whole == {}


def test_a_second_derivative_that_torch_lacks_is_refused(monkeypatch):
    def lacking(*_):
        raise RuntimeError("derivative for aten::_efficient_attention_backward is not implemented")

    monkeypatch.setattr(adapters, "second", lacking)
    rows = []
    case = Case("adapters", "molecules", "sdpa", "float32")
    adapters.run(case, Settings("cpu", None, None), rows.append)
    assert [row["status"] for row in rows] == ["ok", "ok", "refused"]


TOOL = """#!/bin/sh
if [ "$1" = --help ]; then echo "{help}"; exit 0; fi
echo "$@" > {seen}
while [ "$#" -gt 0 ] && [ "$1" != "{python}" ]; do shift; done
"$@" || exit $?
echo "========= {summary}"
exit {code}
"""


@pytest.mark.parametrize(
    ("tool", "summary", "code", "status"),
    [
        ("memcheck", "ERROR SUMMARY: 0 errors", 0, "ok"),
        ("initcheck", "ERROR SUMMARY: 2 errors", 9, "wrong"),
    ],
)
def test_sanitizers_by_a_stand_in(tool, summary, code, status, tmp_path, monkeypatch):
    seen = tmp_path / "seen"
    program = tmp_path / "compute-sanitizer"
    text = TOOL.format(
        help="--kernel-regex arg  --kernel-regex-exclude arg",
        seen=seen,
        python=sys.executable,
        summary=summary,
        code=code,
    )
    program.write_text(text)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setitem(sanitizers.OWN, "cpu", "attnpool")
    (tmp_path / "log").mkdir()
    settings = Settings("cpu", tmp_path, tmp_path, deadline=time.time() + 100)
    rows = []
    sanitizers.run(Case("sanitizers", tool, "cpu", seconds=90.0), settings, rows.append)
    assert [row["status"] for row in rows] == [status], rows
    options = seen.read_text()
    assert f"--tool {tool}" in options and "--error-exitcode 9" in options
    assert ("--kernel-regex kns=attnpool" in options) == (tool != "initcheck")
    assert ("--padding 512" in options) == (tool == "memcheck")


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("all passes have run\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)", "ok"),
        ("all passes have run\n========= RACECHECK SUMMARY: 1 hazard displayed", "wrong"),
        ("all passes have run\n========= ERROR SUMMARY: 10 errors", "wrong"),
        ("========= ERROR SUMMARY: 0 errors", "failed"),
        ("all passes have run", "failed"),
    ],
)
def test_verdicts_of_sanitizers(text, status):
    assert sanitizers.verdict(0, text, 1.0)["status"] == status


def test_a_tool_that_hangs_is_killed():
    code, text = sanitizers.output_of(["sh", "-c", "echo here; sleep 100"], 0.5)
    assert code is None and text.startswith("here\n")
    assert sanitizers.verdict(code, text, 0.5)["status"] == "no time"


@pytest.mark.parametrize(
    ("known", "options"),
    [
        ("--kernel-regex arg --filter arg", ["--kernel-regex", "kns=x"]),
        ("--kernel-regex-exclude arg --filter arg", ["--filter", "kns=x"]),
        ("--kernel-name arg", ["--kernel-name", "kns=x"]),
        ("", []),
    ],
)
def test_the_filter_has_had_several_names(known, options):
    assert sanitizers.only("x", known) == options
