"""nvcc compiles every CUDA kernel within the committed table of registers and spilled bytes.

Compiling everything takes minutes (-m slow). In every run: the table belongs to these sources, none
of its kernels spills, and three of the kernels closest to the limit are compiled again. Those are
skipped where nvcc is absent or of another release than the table's, which says nothing about it.
The table holds at least sm_80 and sm_90; ``nvcc_report.py --archs 120 --update`` adds another.
"""

from __future__ import annotations

import json
import re
import shutil

import pytest
from tools import nvcc_report

TABLE = json.loads(nvcc_report.TABLE.read_text())


def needs_nvcc() -> None:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    if nvcc_report.release() != TABLE["nvcc"]:
        pytest.skip(f"the table is of nvcc {TABLE['nvcc']}, this is {nvcc_report.release()}")


def test_the_table_belongs_to_these_sources():
    assert TABLE["sources"] == nvcc_report.of_sources(), "run tests/tools/nvcc_report.py --update"


def test_only_small_sets_spill_and_the_frequent_ones_little():
    assert not nvcc_report.violations(TABLE["archs"], TABLE["archs"], list(TABLE["archs"]))
    for table in TABLE["archs"].values():
        for name, x in table.items():
            if name.startswith("small_") and "double" not in name and "128" not in name:
                assert x["spilled"] <= 160, name


@pytest.mark.parametrize(
    ("source", "arch", "dtype", "width"),
    [
        ("backward", "80", "float", 64),
        ("double_backward", "90", "Bfloat16", 128),
        ("few_seeds_backward", "90", "Bfloat16", 128),
        ("small_backward", "90", "Bfloat16", 64),
    ],
)
def test_some_of_the_largest(source, arch, dtype, width):
    needs_nvcc()
    said = nvcc_report.compile_one(source, arch, (dtype, width))
    found = nvcc_report.parse(said)
    assert any(name.startswith(f"{source}_") for name in found[arch])
    assert not nvcc_report.violations(found, TABLE["archs"], [arch], some=True)
    # A barrier whose number is in a register claims all 16, and an SM has 64 for all its blocks.
    assert max(map(int, re.findall(r"used (\d+) barriers", said))) <= 3


@pytest.mark.slow
def test_all_architectures():
    needs_nvcc()
    archs = list(TABLE["archs"])
    assert not nvcc_report.violations(nvcc_report.measure(archs), TABLE["archs"], archs)


def test_the_gate_can_fail():
    good = TABLE["archs"]["80"]
    name = next(iter(good))
    assert not nvcc_report.violations({"80": good}, TABLE["archs"], ["80"])
    for registers, spilled in ((255, 4), (good[name]["registers"] + 9, 0)):
        worse = good | {name: {"registers": registers, "spilled": spilled}}
        assert nvcc_report.violations({"80": worse}, TABLE["archs"], ["80"])
    missing = {other: x for other, x in good.items() if other != name}
    assert nvcc_report.violations({"80": missing}, TABLE["archs"], ["80"])
    assert not nvcc_report.violations({"80": missing}, TABLE["archs"], ["80"], some=True)
    new = good | {"new_kernel float32 32": {"registers": 40, "spilled": 4}}
    assert nvcc_report.violations({"80": new}, TABLE["archs"], ["80"])


def test_the_table_covers_every_architecture_alike():
    kernels = {arch: set(table) for arch, table in TABLE["archs"].items()}
    assert {"80", "90"} <= set(kernels) <= set(nvcc_report.ARCHS)
    assert len(set(map(frozenset, kernels.values()))) == 1
