"""Runs the tests that depend on the machine's arithmetic as other machines would run them.

    python tests/tools/portable.py            all combinations below, half an hour on two cores
    python tests/tools/portable.py --sample   two of them on a part of the tests, for CI
    python tests/tools/portable.py --list     prints the combinations

A combination sets the instructions that MKL and torch's own kernels may use, the number of threads
and a shift of every seed; in some of them two other processes keep the cores busy. A processor or a
BLAS that does not know a setting ignores it, which costs nothing but a repeated run. Exit status 1
where a test fails, with the command that repeats it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Verdicts about numbers. Not here: what counts, parses, compiles or looks at text, and what runs
# for minutes in an interpreter of its own (test_interpreted_suite, one combination of which is in
# every `make test`).
TESTS = (
    "tests/test_autograd.py",
    "tests/testing/test_budget.py",
    "tests/test_compat.py",
    "tests/test_dropout.py",
    "tests/test_functional.py",
    "tests/test_ops.py",
    "tests/test_properties.py",
    "tests/nn",
    "tests/impl/test_adapters.py",
    "tests/impl/test_cpu_kernels.py",
    "tests/zoo/test_backbones.py",
    "tests/zoo/test_calculator.py",
    "tests/zoo/test_forces.py",
    "tests/zoo/test_model.py",
)
SAMPLE_TESTS = (
    "tests/test_autograd.py",
    "tests/testing/test_budget.py",
    "tests/nn/test_abp.py",
    "tests/impl/test_cpu_kernels.py::test_cases",
)
BUSY = "while True: sum(range(100_000))"


@dataclass(frozen=True)
class Combination:
    instructions: str  # MKL_ENABLE_INSTRUCTIONS
    capability: str  # ATEN_CPU_CAPABILITY
    threads: int
    shift: int  # of every seed
    busy: bool  # two other processes

    def command(self, tests: tuple[str, ...]) -> list[str]:
        return [
            *(sys.executable, "-m", "pytest", "-q", "--durations=0", "--durations-min=30"),
            *("--torch-threads", str(self.threads), "--seed-shift", str(self.shift), *tests),
        ]

    def environment(self) -> dict[str, str]:
        threads = str(self.threads)
        return {
            "MKL_ENABLE_INSTRUCTIONS": self.instructions,
            "ATEN_CPU_CAPABILITY": self.capability,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
        }

    def __str__(self) -> str:
        variables = " ".join(f"{name}={value}" for name, value in self.environment().items())
        options = f"--torch-threads {self.threads} --seed-shift {self.shift}"
        return f"{variables} pytest {options}{' beside two busy processes' if self.busy else ''}"


def combinations() -> list[Combination]:
    """Every pair of instruction sets with every number of threads, another seed in each."""
    settings = itertools.product(("SSE4_2", "AVX2", "AVX512"), ("default", "avx2"), (1, 2, 4))
    return [Combination(*x, shift=i, busy=i % 3 == 2) for i, x in enumerate(settings)]


def sample() -> list[Combination]:
    return [
        Combination("SSE4_2", "default", 1, 101, False),
        Combination("AVX512", "avx2", 4, 102, True),
    ]


@contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """Two processes that compute for nothing."""
    count = 2 if wanted else 0
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


def run(combination: Combination, tests: tuple[str, ...]) -> bool:
    print(f"\n== {combination}", flush=True)
    start = time.monotonic()
    with busy(combination.busy):
        done = subprocess.run(
            combination.command(tests), cwd=ROOT, env=os.environ | combination.environment()
        )
    print(f"== status {done.returncode} after {time.monotonic() - start:.0f} s", flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", action="store_true", help="two combinations, fewer tests")
    parser.add_argument("--list", action="store_true", help="print the combinations only")
    parser.add_argument("tests", nargs="*", help="instead of the tests listed in this file")
    options = parser.parse_args()
    chosen = sample() if options.sample else combinations()
    tests = tuple(options.tests) or (SAMPLE_TESTS if options.sample else TESTS)
    if options.list:
        print(*chosen, sep="\n")
        return 0
    failed = [combination for combination in chosen if not run(combination, tests)]
    print(f"\n{len(chosen) - len(failed)} of {len(chosen)} combinations passed")
    for combination in failed:
        print(f"failed: {combination} {' '.join(tests)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
