"""Executed warp-instructions of the CUDA kernels for small sets stay within the committed counts.

tests/tools/cuda_executed.csv has them for one molecule and head (8 heads of width 64, 1,024 equal
molecules of known size, sm_90), beside the budget and what the kernels before needed. In every run
with nvcc of the release that made them the frequent ones are counted again; -m slow counts all.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("triton")  # whose package has the disassembler

from tools import cuda_host, executed_cuda, nvcc_report

TABLE = Path(executed_cuda.__file__).with_name("cuda_executed.csv")
ROWS = list(csv.DictReader(TABLE.open()))
OFTEN = [
    x for x in ROWS if x["type"] == "bf16" and x["rows"] == "18" and x["pass"] != "double_backward"
]
HEADS, MOLECULES = 8, 1024

pytestmark = [
    pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing()),
    pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed"),
]
RELEASE = json.loads(nvcc_report.TABLE.read_text())["nvcc"]


def count(row: dict[str, str]) -> float:
    if nvcc_report.release() != RELEASE:
        pytest.skip(f"the counts are of nvcc {RELEASE}, this is {nvcc_report.release()}")
    kernels = executed_cuda.Counted(row["type"], 64, HEADS)
    launches = executed_cuda.run(kernels, row["pass"], int(row["rows"]), MOLECULES)
    return sum(x.instructions for x in launches) / (HEADS * MOLECULES)


def name(row: dict[str, str]) -> str:
    return f"{row['type']}-{row['pass']}-{row['rows']}"


@pytest.mark.parametrize("row", OFTEN, ids=name)
def test_frequent_passes(row):
    assert count(row) <= 1.1 * int(row["executed"])


@pytest.mark.slow
@pytest.mark.parametrize("row", [x for x in ROWS if x not in OFTEN], ids=name)
def test_all_passes(row):
    assert count(row) <= 1.1 * int(row["executed"])


def test_half_types_are_within_their_budgets():
    for row in ROWS:
        if row["type"] == "bf16" and row["budget"]:
            assert int(row["executed"]) <= 1.1 * int(row["budget"]), name(row)
