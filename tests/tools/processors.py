"""The CPU kernels compiled for another processor, executed by a user-mode emulator.

    python tests/tools/processors.py [--compiler aarch64-linux-gnu-g++] [--emulator qemu-aarch64]

Compiles the kernels without torch, with the driver passes.cpp, by this machine's compiler and by
the other one, runs the second program under the emulator, and compares every result of the three
passes. Debian's packages g++-aarch64-linux-gnu and qemu-user have both. Two compilers contract
other products and sums into one operation, so results differ by rounding: printed is the largest
difference in units of the largest entry of a result. Exit status 1 where one is above LIMITS.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("product", "forward", "backward", "double_backward", "kernels", "plan")
FLAGS = [
    *("-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-Wall", "-Wextra", "-Werror"),
]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# Of the largest entry: some roundings of a sum, or of the last place of a half type.
LIMITS = {"float64": 1e-14, "float32": 5e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
Results = dict[str, torch.Tensor]


def missing(compiler: str = COMPILER, emulator: str = EMULATOR) -> str:
    """What this machine lacks, or an empty string."""
    needed = (os.environ.get("CXX", "g++"), compiler, emulator)
    absent = [x for x in needed if not shutil.which(shlex.split(x)[0])]
    return f"not installed: {', '.join(absent)}" if absent else ""


def build(compiler: str, folder: Path, *flags: str) -> Path:
    """The driver and the kernels of the plain code, by this compiler."""
    folder.mkdir()
    command = [*shlex.split(compiler), *FLAGS, *flags, f"-I{ROOT / 'csrc'}", "-DATTN_ISA=baseline"]
    objects = []
    driver = ROOT / "tests" / "tools" / "passes.cpp"
    for source in (*(ROOT / "csrc" / "cpu" / f"{x}.cpp" for x in SOURCES), driver):
        objects.append(str(folder / f"{source.stem}.o"))
        subprocess.run([*command, "-c", str(source), "-o", objects[-1]], check=True)
    program = folder / "passes"
    subprocess.run([*command, "-static", *objects, "-o", str(program)], check=True)
    return program


def run(*command: str | Path) -> Results:
    """Name of a result -> its numbers, from what the driver prints."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    lines = iter(done.stdout.splitlines())
    return {
        name: torch.tensor([float(next(lines)) for _ in range(int(count))], dtype=torch.float64)
        for name, _, count in (line.rpartition(" ") for line in lines)
    }


def differences(here: Results, there: Results) -> dict[str, float]:
    """The largest difference of each result, in units of its largest entry; inf: another shape."""
    assert here and here.keys() == there.keys()
    found = {}
    for name, x in here.items():
        y = there[name]
        finite = x.isfinite()
        same = x.shape == y.shape and torch.equal(x[~finite], y[~finite])
        scale = x[finite].abs().max() if finite.any() else torch.tensor(1.0)
        worst = ((x - y)[finite].abs() / scale).max() if same and finite.any() else scale * 0
        found[name] = float(worst) if same and not worst.isnan() else float("inf")
    return found


def violations(found: dict[str, float]) -> list[str]:
    return [f"{name}: {x:.2g}" for name, x in found.items() if x > LIMITS[name.split()[0]]]


def compare(compiler: str = COMPILER, emulator: str = EMULATOR) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        here = run(build(os.environ.get("CXX", "g++"), Path(folder, "here")))
        there = run(*shlex.split(emulator), build(compiler, Path(folder, "there")))
    return differences(here, there)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiler", default=COMPILER)
    parser.add_argument("--emulator", default=EMULATOR)
    options = parser.parse_args()
    absent = missing(options.compiler, options.emulator)
    if absent:
        print(absent)
        return 1
    found = compare(options.compiler, options.emulator)
    for dtype in LIMITS:
        of_type = {name: x for name, x in found.items() if name.split()[0] == dtype}
        worst = max(of_type, key=lambda name: of_type[name])
        print(f"{dtype:<9} {len(of_type):3d} results, most {of_type[worst]:.2g} ({worst})")
    for line in violations(found):
        print("ABOVE THE LIMIT", line)
    return 1 if violations(found) else 0


if __name__ == "__main__":
    sys.exit(main())
