"""The gate: every contender that is timed is right, and what is wrong is refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.contenders import attention, registry
from benchmarks.measuring import gate, oracle
from benchmarks.workloads.batch import make_batch
from benchmarks.workloads.workload import PASSES, Workload

RAGGED = Workload("ragged", "molecules", (5, 1, 9, 3), heads=2, dim=8)
KINDS = {
    "ragged": RAGGED,
    "fused": replace(RAGGED, layout="fused"),
    "equal": replace(RAGGED, sizes=(6, 6)),
    "one seed": replace(RAGGED, seeds=1),
    "four seeds": replace(RAGGED, seeds=4),
    "double": replace(RAGGED, dtype=torch.float64),
    "module": replace(RAGGED, seeds=2, module=True),
}


@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_contender_passes_the_gate(kind, what):
    work = KINDS[kind]
    batch = make_batch(work, "cpu")
    batch.prepare(what)
    judge = gate.Gate(batch, what)
    ran = 0
    for contender in registry.for_workload(work):
        if contender.name in registry.SLOW_TO_START or contender.why_not(work, what, "cpu"):
            continue
        error, wrong = judge.error(batch.run(contender.prepare(batch), what))
        assert not wrong, f"{contender.name}: {wrong}"
        assert error < 1e-5
        assert contender.kernel(work, "cpu")
        ran += 1
    assert ran >= 2


def _spoiled(spoil):
    def call(q, k, v):
        return spoil(oracle.attention64(RAGGED, q, k, v))

    return call


@pytest.mark.parametrize(
    ("what", "spoil", "named"),
    [
        ("forward", lambda out: out * 1.0001, "out"),
        ("forward", lambda out: out[:-1], "shape"),
        ("forward", lambda out: out * torch.nan, "out"),
        ("backward", lambda out: out.detach() + (out - out.detach()) * 1.001, "d0"),
        (
            "double_backward",
            lambda out: out + (out - out.detach()) ** 2,  # value and first derivative are right
            "g0",
        ),
    ],
)
def test_gate_refuses(what, spoil, named):
    batch = make_batch(RAGGED, "cpu")
    batch.prepare(what)
    _, wrong = gate.Gate(batch, what).error(batch.run(_spoiled(spoil), what))
    assert wrong.startswith((named, "out: " + named))


def test_sampled_gate_sees_the_last_row(monkeypatch):
    monkeypatch.setattr(gate, "FULL", 0)
    for what in PASSES[:2]:
        batch = make_batch(RAGGED, "cpu")
        batch.prepare(what)
        call = attention.naive(batch)
        judge = gate.Gate(batch, what)
        found = batch.run(call, what)
        assert judge.error(found)[1] == ""
        name = "out" if what == "forward" else "d0"
        found[name] = found[name].clone()
        found[name][-1] *= 1.01
        assert judge.error(found)[1].startswith(name)
