"""What Triton compiles, without a GPU: a sample of the tile table through the gate, and the PTX of
all passes executed in the simulator against the float64 oracle."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs compiled kernels", allow_module_level=True)
pytest.importorskip("triton")

import aot
from simulated import simulated

import attnpool_kernels.backends.triton as backend
from attnpool_kernels import testing
from attnpool_kernels.backends.triton import tile_table
from attnpool_kernels.operands import Operands, Options
from attnpool_kernels.testing import Case

EVERYTHING = Case(
    "everything", (3, 0, 17), heads=1, dim=16, bias="pair", dropout=0.25, lse=True, nobody=1
)
SEEDS = Case("seeds", (3, 18), seeds=2, heads=1, dim=12, value_dim=20)
ONE_TILE = Case("one tile", (5, 17), heads=1, dim=16)
ODD = Case("odd width", (3, 18), heads=1, dim=5, value_dim=7)


def test_gate_on_a_sample_of_the_table():
    """Everything is compiled by `make aot`."""
    entries = aot.read_snapshot()["entries"]
    for variant in list(aot.variants())[7 :: aot.SAMPLE]:
        record, found = aot.examine(variant)
        if entries:
            assert entries[variant.key][:-1] == record.line(), variant.key
        else:  # triton_versions.py judges what other compilers spill
            found = [finding for finding in found if "spills" not in finding]
        assert not found, (variant.key, record)


def test_resource_table_is_of_these_sources():
    snapshot = aot.read_snapshot()
    if not snapshot["entries"]:
        pytest.skip("no table for this version of Triton")
    known = {variant.key: variant for variant in aot.variants()}
    assert set(snapshot["entries"]) <= set(known), "entries of no tile: run `make aot`"
    present = [v for v in known.values() if v.key in snapshot["entries"]]
    assert not [v.key for v in aot.stale(present)], "stale: run `make aot`"


def test_resource_table_is_complete_and_nothing_spills():
    entries = aot.read_snapshot()["entries"]
    if entries:
        assert not [variant.key for variant in aot.variants() if variant.key not in entries]
        assert not {key: spill for key, (_, spill, *_) in entries.items() if spill}


SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "SLICE": 16}


@pytest.mark.parametrize(
    ("case", "row", "schedule", "changes"),
    [
        (EVERYTHING, "fp32", "block", SMALL | {"num_warps": 1}),
        (SEEDS, "bf16", "warp", SMALL | {"num_warps": 2}),
        (ODD, "fp16", "block", SMALL | {"num_warps": 1}),
        (ONE_TILE, "bf16", "warp", {}),
        pytest.param(ONE_TILE, "fp32", "warp", {}, marks=pytest.mark.slow),
    ],
    ids=["fp32", "bf16", "fp16", "bf16 as shipped", "fp32 as shipped"],
)
def test_compiled_kernels_in_the_simulator(monkeypatch, case, row, schedule, changes):
    monkeypatch.setattr(tile_table, "SPLIT", 16)  # the keys of the larger molecule in two parts
    kernels = set()

    def run(batch):
        with simulated(80, row, schedule, seed=3, **changes) as ran:
            found = testing.run_kernels(batch, backend)
        kernels.update(name.split(":")[0] for name in ran)
        return found

    testing.judge(case, aot.DTYPES[row], run)
    assert len(kernels) == 5  # of few seeds: forward, merge, backward, sum, double backward


def test_compiled_kernels_stay_inside_whatever_ptr_holds():
    batch = Case("garbage", (9, 4), heads=1, dim=16).make(torch.bfloat16)
    ptr = torch.tensor([2**62, -(2**63), 7])
    x = Operands(batch.q, batch.k, batch.v, None, ptr, ptr, None, None)
    with simulated(90, "bf16"):
        backend.forward(x, Options(1.0))
