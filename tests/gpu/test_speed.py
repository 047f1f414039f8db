"""The clock of graphs, the shapes, our times and those of other libraries, without a GPU."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from attnpool_kernels import impl
from attnpool_kernels.impl import cpu
from benchmarks.contenders import packages, registry
from benchmarks.contenders.contender import Contender
from benchmarks.measuring import replay, sheet, sweep
from benchmarks.workloads.batch import make_batch
from benchmarks.workloads.workload import PASSES, Workload

from . import alone, fake_cuda, rivals, shapes
from .blocks import prewarm, speed
from .blocks import rivals as rivals_block
from .blocks import sweep as sweep_block
from .case import Outcome, Settings

SMALL = shapes.equal(5, 3, 2, 16)
POOLED = shapes.Shape("pooled", (4, 9, 1), 2, 8, 2)


def settings(tmp_path, name="cuda", **options):
    return Settings(name, tmp_path, tmp_path, **({"cores": 1, "deadline": 1e12} | options))


def rows_of(block, case, chosen):
    rows = []
    block.run(case, chosen, rows.append)
    return rows


# The clock of graphs


def test_calls_are_captured_and_replayed(device):
    seen = []
    recording = replay.record([lambda place=place: seen.append(place) for place in range(5)])
    assert seen == [0, 0, 0, 1, 2, 3, 4]  # twice before the capture, then all of them
    assert recording.calls == 5 and device.replays == 1
    took = recording.seconds()
    assert device.replays == 1 + replay.REPLAYS >= 21
    assert took == pytest.approx(fake_cuda.REPLAY / 5, rel=0.2)
    assert device.stream is device.first


def test_a_call_that_waits_is_found_before_the_capture(device):
    with pytest.raises(replay.CannotRecord, match=r"it waits for the device \(called a synch"):
        replay.record([torch.cuda.synchronize])
    assert not device.capturing and device.mode == 0 and device.stream is device.first


def test_no_rival_but_those_of_ours_reads_sizes_from_the_device(device):
    """The fake notices what reads contents, as our own adapters do."""
    work = Workload("ragged", "ragged", (5, 1, 9, 3), heads=2, dim=16, dtype=torch.bfloat16)
    batch = make_batch(work, "cuda")
    batch.prepare("backward")
    passes = alone.Autograd(batch, rivals.RIVALS["naive, padded"](batch))
    passes.backward()
    assert replay.record([passes.forward, passes.backward]).calls == 2
    with pytest.raises(replay.CannotRecord, match="it waits for the device"):
        replay.record([lambda: batch.ptr.tolist()])


def test_a_capture_that_fails_leaves_the_stream_as_it_was(device):
    def call():
        if device.capturing:
            raise RuntimeError("the true cause\nand more")

    with pytest.raises(replay.CannotRecord, match=r"cannot be captured \(the true cause\)"):
        replay.record([call])
    assert device.stream is device.first


def test_inputs_of_a_graph_exceed_the_cache(device):
    for size in (1000, 2**20, 60 * 2**20, 2**31):
        count = replay.turns(size)
        assert count == replay.MOST or count * size > 3 * fake_cuda.CACHE
        assert count == 1 or (count - 1) * size <= 3 * fake_cuda.CACHE


@pytest.mark.parametrize("what", PASSES)
def test_the_suite_times_cuda_contenders_by_replay(device, tmp_path, monkeypatch, what):
    work = Workload("ragged", "molecules", (5, 1, 9, 3), heads=2, dim=8, passes=(what,))
    monkeypatch.setattr(replay, "MOST", 3)
    monkeypatch.setattr(replay, "repeated", lambda *_: 1e-4)
    waiting = registry.CONTENDERS["naive"]

    def waits(batch):
        call = waiting.prepare(batch)

        def run(*inputs):
            torch.cuda.synchronize()
            return call(*inputs)

        return run

    slow = Contender("einsum", "", waits, waiting.why_not, waiting.kernel)
    monkeypatch.setitem(registry.CONTENDERS, "einsum", slow)
    table = sheet.Sheet(tmp_path / "out.csv")
    table.start({})
    limit = SimpleNamespace(limit=lambda *_: 1e-3, limit_by=lambda *_: "", library=lambda *_: 1.0)
    limit.product = limit.matmul = {}
    run = sweep.Sweep("x", "cuda", limit, table, sweep.Limits(0.0, 5.0), ["naive", "einsum"])
    run.run([work])
    naive, other = table.rows
    assert (naive.status, naive.reason) == ("ok", "")
    assert naive.p50_ms == pytest.approx(1e3 * fake_cuda.REPLAY / 3, rel=0.3)
    assert other.status == "ok"
    assert other.reason.startswith("timed by plain calls: it waits for the device")


def test_a_long_call_needs_no_graph(device, monkeypatch):
    batch = make_batch(Workload("n", "n", (4,), heads=1, dim=4), "cuda")
    batch.prepare("forward")
    monkeypatch.setattr(replay, "repeated", lambda *_: 1.0)
    _, reason = replay.of_batch(batch, lambda q, k, v: q, "forward", 1.0)
    assert reason == "" and device.replays == 0


# Shapes and passes


def test_floors_are_those_of_the_notes():
    """18 atoms, 1,024 molecules, 8 x 64, bf16 at 3.0 TB/s: 25, 44 and 69 microseconds."""
    shape = shapes.equal(18, 1024, 8, 64)
    times = [shape.bytes(what, torch.bfloat16) / 3.0e6 for what in PASSES]
    assert times == pytest.approx([25.2, 44.0, 69.2], abs=0.5)
    assert shape.flops("forward") == 4 * 8 * 64 * 1024 * 18**2
    pooled = shapes.Shape("", (100,), 1, 8, 2)
    assert pooled.bytes("forward", torch.float32) == 4 * (8 * (200 + 2 + 2) + 2)


def test_all_shapes_that_were_asked_for_are_there():
    every = shapes.every()
    assert len({shape.name for shape in every}) == len(every)
    for n in (15, 18, 32, 55, 64):
        for b in (128, 1024, 4096):
            for h, d in ((8, 16), (8, 32), (8, 64), (16, 64)):
                assert shapes.equal(n, b, h, d) in every
    assert {shape.seeds for shape in every} >= {1, 4, 16, 32}
    around = [shape for shape in every if shape.family == "neighbours"]
    assert {(s.heads, s.dim) for s in around} == {(8, 16), (10, 64)}
    assert all(len(s.sizes) == 10_000 and 20 <= min(s.sizes) < max(s.sizes) <= 60 for s in around)
    assert {s.sizes for s in every if s.family == "long"} == {(4096,), (16_384,)}
    names = {shape.name for shape in every}
    assert set(rivals_block.HALF) | set(rivals_block.SINGLE) <= names


@pytest.mark.parametrize("shape", [SMALL, POOLED], ids=["sets", "seeds"])
def test_passes_alone_give_what_they_give_together(shape):
    if cpu.load():
        pytest.skip(cpu.load())
    batch = make_batch(shape.workload(torch.float64), "cpu")
    batch.prepare("double_backward")
    call = rivals.ours("cpu")(batch)
    expected = batch.run(call, "double_backward")
    for passes in (alone.Autograd(batch, call), alone.Kernels(batch, cpu)):
        found = passes.double_backward() | passes.backward() | passes.forward()
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x)
    empty = shapes.without_values(shape, torch.float64)
    for one, other in zip(
        (*batch.inputs, batch.dout, *batch.cotangents),
        (*empty.inputs, empty.dout, *empty.cotangents),
    ):
        assert one.shape == other.shape and one.dtype == other.dtype
    assert torch.equal(batch.ptr, empty.ptr)


# Blocks, as on a GPU and as rehearsed


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_cases_have_names_of_their_own(tmp_path, name):
    for block in (speed, rivals_block, prewarm, sweep_block):
        found = block.cases(settings(tmp_path, name))
        assert len({case.key for case in found}) == len(found) > 0
        assert all(case.block == block.NAME for case in found)
        environments = {}
        for case in found:
            known = environments.setdefault((case.shard or case.key, case.backend), case)
            assert known.environment == case.environment
    assert not prewarm.cases(settings(tmp_path, name, backends=("cpu",)))


def test_speed_comes_in_the_order_of_worth(tmp_path):
    found = speed.cases(settings(tmp_path))
    assert found[0].name == "1024 x 18 atoms, 8x64" and found[0].dtype == "bfloat16"
    assert [case.backend for case in found[:: speed.SHARD]][:2] == ["cuda", "triton"]
    assert all(case.after == "prewarm" for case in found if case.backend == "triton")


@pytest.mark.parametrize("shape", [SMALL, POOLED], ids=["sets", "seeds"])
def test_speed_as_on_a_gpu(as_cuda, monkeypatch, shape):
    monkeypatch.setattr(replay, "MOST", 4)
    rows = []
    speed.timed(shape, torch.float32, "cuda", "cuda", rows.append)
    timed, check = rows[:3], rows[3]
    assert [row["what"] for row in timed] == list(PASSES)
    for row in timed:
        assert row["clock"] == "graph" and row["turns"] == 4 and row["replays"] == 20
        assert row["seconds"] == pytest.approx(fake_cuda.REPLAY / 4, rel=0.2)
        assert row["floor"] == pytest.approx(shape.bytes(row["what"], torch.float32) / 3.0e12)
        assert row["ratio"] == pytest.approx(row["seconds"] / row["floor"])
        assert row["eager_us"] > 0 and row["host_us"] > 0
    assert check["status"] == "ok" and check["error"] < 1e-5
    lines = speed.table(
        [row | {"name": "x", "backend": "cuda", "dtype": "float32"} for row in rows]
    )
    microseconds = [f"{1e6 * row['seconds']:.1f}" for row in timed]  # about 250, as the clock ran
    assert any(line.startswith("x ") and all(x in line for x in microseconds) for line in lines)


def test_one_pass_that_fails_does_not_cost_the_others(as_cuda, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 1)

    def broken(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(impl.load("cuda"), "backward", broken)
    rows = []
    with pytest.raises(RuntimeError, match="planted"):
        speed.timed(SMALL, torch.float32, "cuda", "cuda", rows.append)
    assert [(row["what"], row.get("status", "ok")) for row in rows] == [
        ("forward", "ok"),
        ("backward", "failed"),
        ("double_backward", "ok"),
    ]
    assert rows[2]["seconds"] > 0 and "the public call" in rows[2]["text"]


def test_wrong_results_are_seen_by_the_clock(as_cuda, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 1)
    module = impl.load("cuda")
    right = module.backward

    def wrong(dx):
        return dx._replace(dq=1.01 * dx.dq)

    monkeypatch.setattr(module, "backward", lambda *x: wrong(right(*x)))
    rows = []
    speed.timed(SMALL, torch.float32, "cuda", "cuda", rows.append)
    assert rows[-1]["status"] == "wrong" and "d0" in rows[-1]["text"]


def stand_in_varlen(monkeypatch, seen):
    """torch's packed attention, computed set by set."""

    def varlen_attn(q, k, v, q_ptr, k_ptr, longest_q, longest_k):
        assert q_ptr.dtype == k_ptr.dtype == torch.int32
        q_ptr, k_ptr = q_ptr.numpy(), k_ptr.numpy()  # as a kernel reads them: nobody waits
        assert longest_q == max(q_ptr[1:] - q_ptr[:-1]) and longest_k == max(k_ptr[1:] - k_ptr[:-1])
        seen.append(q.shape)
        bounds = zip(q_ptr[:-1], q_ptr[1:], k_ptr[:-1], k_ptr[1:])
        parts = [
            torch.softmax(torch.einsum("ihd,jhd->hij", q[a:b], k[c:d]) * q.shape[2] ** -0.5, 2)
            @ v[c:d].transpose(0, 1)
            for a, b, c, d in bounds
        ]
        return torch.cat([part.transpose(0, 1) for part in parts])

    module = ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = varlen_attn
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)


@pytest.mark.parametrize("shape", [SMALL, POOLED], ids=["sets", "seeds"])
def test_a_rival_as_on_a_gpu(as_cuda, monkeypatch, shape):
    monkeypatch.setattr(replay, "MOST", 2)
    seen, rows = [], []
    stand_in_varlen(monkeypatch, seen)
    passes = PASSES[:2]
    rivals_block.timed(
        shape, torch.bfloat16, "torch varlen", rivals.varlen, passes, "cuda", rows.append
    )
    assert [row["what"] for row in rows] == [*passes, "check"] and seen
    assert rows[0]["clock"] == rows[1]["clock"] == "graph" and rows[2]["status"] == "ok"
    with pytest.raises(Outcome, match="float16 and bfloat16") as found:
        rivals_block.timed(
            shape, torch.float32, "torch varlen", rivals.varlen, passes, "cuda", rows.append
        )
    assert found.value.status == "refused"


def test_every_rival_can_be_called_on_ragged_sets(monkeypatch):
    """On the CPU: the fused kernels of CUDA are replaced by torch's own choice."""
    import torch.nn.attention as attention

    monkeypatch.setattr(attention, "sdpa_kernel", lambda *_: __import__("contextlib").nullcontext())
    monkeypatch.setattr("benchmarks.contenders.attention.sdpa_kernel", attention.sdpa_kernel)
    stand_in_varlen(monkeypatch, [])
    packed = sys.modules["torch.nn.attention.varlen"].varlen_attn
    flash = ModuleType("flash_attn")
    flash.flash_attn_varlen_func = packed
    masks = ModuleType("xformers.ops.fmha.attn_bias")

    class Mask:
        @staticmethod
        def from_seqlens(q_counts, k_counts, device=None):
            def ptr(counts):
                return torch.tensor([0, *counts]).cumsum(0).int()

            return ptr(q_counts), ptr(k_counts), max(q_counts), max(k_counts)

    masks.BlockDiagonalMask = Mask
    ops = ModuleType("xformers.ops")
    ops.memory_efficient_attention = lambda q, k, v, attn_bias: packed(
        q[0], k[0], v[0], *attn_bias
    )[None]
    for module in (flash, masks, ops):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for shape in (SMALL, POOLED, shapes.Shape("ragged", (4, 9, 1), 2, 8)):
        batch = make_batch(shape.workload(torch.bfloat16), "cpu")
        expected = rivals.RIVALS["naive, padded"](batch)(*batch.inputs)
        for name, prepare in rivals.RIVALS.items():
            found = prepare(batch)(*batch.inputs)
            torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03, msg=name)


def test_a_library_that_is_not_there_is_missing(monkeypatch):
    batch = make_batch(SMALL.workload(torch.bfloat16), "cpu")
    for name, prepare in (("xformers", rivals.xformers), ("flash_attn", rivals.flash_attn)):
        for part in [key for key in sys.modules if key.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, part)
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(Outcome, match=name) as found:
            prepare(batch)
        assert found.value.status == "missing"


def test_a_rival_that_refuses_is_a_row(as_cuda, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 1)

    def refuses(batch):
        def call(q, k, v):
            raise RuntimeError("No available kernel. Aborting execution.")

        return call

    rows = []
    rivals_block.timed(SMALL, torch.float32, "cudnn", refuses, PASSES[:2], "cuda", rows.append)
    assert [(row["what"], row["status"]) for row in rows] == [("forward", "refused")]


@pytest.mark.parametrize("block", [speed, rivals_block], ids=["speed", "rivals"])
def test_rehearsal_on_a_cpu(tmp_path, block):
    chosen = settings(tmp_path, "cpu")
    found = [case for case in block.cases(chosen) if not case.needs_cuda]
    assert {case.dtype for case in found} == {"bfloat16", "float32"}
    everything = []
    for case in found:
        if case.name.endswith(": pyg") and not packages.installed("torch_geometric"):
            with pytest.raises(Outcome, match="torch_geometric"):
                rows_of(block, case, chosen)
            continue
        rows = rows_of(block, case, chosen)
        assert all(row.get("status", "ok") == "ok" for row in rows), (case, rows)
        everything += [
            {"name": case.name, "backend": case.backend, "dtype": case.dtype} | row for row in rows
        ]
    assert {row["what"] for row in everything} >= set(PASSES)
    assert len(block.table(everything)) > 5


def test_suites_have_no_batch_without_work():
    """The workloads of the rivals' modules are those of the suite."""
    names = {contender.name for contender in registry.CONTENDERS.values() if contender.module}
    assert set(rivals.MODULES) <= names and shapes.PASSES == PASSES
