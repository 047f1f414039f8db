"""What Triton compiles, without a GPU: a sample of the tile table through the gate, and the PTX of
all passes executed in the simulator against the float64 oracle."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs compiled kernels", allow_module_level=True)
pytest.importorskip("triton")

from tools import aot, triton_table
from tools.simulated import simulated

import attnpool_kernels.impl.triton as backend
from attnpool_kernels import testing
from attnpool_kernels.impl.triton import tile_table
from attnpool_kernels.operands import Operands, Options
from attnpool_kernels.testing import Case

EVERYTHING = Case(
    "everything",
    (3, 0, 17),
    heads=1,
    dim=16,
    bias="pair",
    key_bias="float32",
    dropout=0.25,
    lse=True,
    nobody=1,
)
SEEDS = Case("seeds", (3, 18), seeds=2, heads=1, dim=12, value_dim=20, key_bias="pair")
ONE_TILE = Case("one tile", (5, 17), heads=1, dim=16)
ODD = Case("odd width", (3, 18), heads=1, dim=5, value_dim=7)


def test_gate_on_a_sample_of_the_table():
    """Everything is compiled by `make aot`."""
    lines = triton_table.summary()
    for variant in list(aot.variants())[7 :: triton_table.SAMPLE]:
        record, found = aot.examine(variant)
        found += triton_table.beyond(lines.get(variant.line), record)
        if not lines:  # triton_versions.py judges what other compilers spill
            found = [finding for finding in found if "spills" not in finding]
        assert not found, (variant.key, record)


def test_summary_is_of_these_sources_and_little_spills():
    lines = triton_table.summary()
    if not lines:
        pytest.skip("no summary for this version of Triton")
    assert not triton_table.outdated(), "run `make aot`"
    assert not [line for line in lines.values() if line.spilled > aot.SPILLS]


def test_a_changed_source_makes_the_summary_stale(monkeypatch):
    if not triton_table.summary():
        pytest.skip("no summary for this version of Triton")
    digest = triton_table.digest
    monkeypatch.setattr(
        triton_table, "digest", lambda x: digest(x) + "*" * (x.pass_name == "forward")
    )
    assert triton_table.outdated() and all(" forward " in name for name in triton_table.outdated())


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
    # of few seeds: forward, merge, backward, merge of statistics, sum, double backward
    assert len(kernels) == (6 if case.seeds else 5)


def test_compiled_kernels_stay_inside_whatever_ptr_holds():
    batch = Case("garbage", (9, 4), heads=1, dim=16).make(torch.bfloat16)
    ptr = torch.tensor([2**62, -(2**63), 7])
    x = Operands.plain(batch.q, batch.k, batch.v, ptr, ptr)
    with simulated(90, "bf16"):
        backend.forward(x, Options(1.0))
