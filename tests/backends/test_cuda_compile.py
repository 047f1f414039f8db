"""nvcc compiles every CUDA kernel within the committed table of registers and spills.

sm_80 and sm_90 always; the others with -m slow. Skipped where nvcc is absent or of another release
than the table's, whose numbers say nothing about it.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "csrc" / "nvcc_report.py"
spec = importlib.util.spec_from_file_location("nvcc_report", PATH)
nvcc_report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nvcc_report)
TABLE = json.loads(nvcc_report.TABLE.read_text())


def gate(archs: list[str]) -> None:
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    if nvcc_report.release() != TABLE["nvcc"]:
        pytest.skip(f"the table is of nvcc {TABLE['nvcc']}, this is {nvcc_report.release()}")
    found = nvcc_report.measure(archs)
    assert not nvcc_report.violations(found, TABLE["archs"], archs)


def test_sm_80_and_sm_90():
    gate(["80", "90"])


@pytest.mark.slow
def test_all_architectures():
    gate(list(nvcc_report.ARCHS))


def test_the_gate_can_fail():
    good = TABLE["archs"]["80"]
    name = next(iter(good))
    assert not nvcc_report.violations({"80": good}, TABLE["archs"], ["80"])
    spilling = good | {name: {"registers": 255, "spilled": good[name]["spilled"] + 8}}
    assert nvcc_report.violations({"80": spilling}, TABLE["archs"], ["80"])
    missing = {other: x for other, x in good.items() if other != name}
    assert nvcc_report.violations({"80": missing}, TABLE["archs"], ["80"])
    new = good | {"new_kernel float32 32": {"registers": 40, "spilled": 4}}
    assert nvcc_report.violations({"80": new}, TABLE["archs"], ["80"])


def test_the_table_covers_every_architecture_alike():
    kernels = {arch: set(table) for arch, table in TABLE["archs"].items()}
    assert set(kernels) == set(nvcc_report.ARCHS)
    assert len(set(map(frozenset, kernels.values()))) == 1
