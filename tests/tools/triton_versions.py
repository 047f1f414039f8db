"""The Triton backend with several versions of Triton, and a table of the result.

    python tests/tools/triton_versions.py [VERSION ...] [--jobs 2] [--pip "--index-url ..."]

Each version is installed once into its own folder (build/triton/<version>, without dependencies)
and put before the environment's packages on PYTHONPATH; torch and the rest are shared. With each
run: a part of the interpreted suite under the guard, the compiled PTX of every pass in the
simulator, and a sample of the tile table compiled ahead of time; with --all the whole interpreted
suite and a larger sample.

The tiles are chosen for the compiler of the version that has lines in triton_resources.csv; other
compilers assign registers otherwise. Under those every spill is printed, and one of more than
SLACK bytes per thread is a finding like any other. Exit code 1 where anything
failed, or where a version was not tried because no package index could be reached (with
--unreachable-ok that is only printed).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# What torch 2.10 and 2.11 need, torch 2.12 and 2.13, torch 2.14, and the newest.
VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
NEEDS = {"3.6.0": ["numpy<2.4"]}  # its interpreter uses what later numpy removed
PART = "error_budget and not float64 and (edges or everything or parts or long) or guard_sees"
INTERPRETED = ("test_triton_interpreted", "test_triton_interpreted_bits")
STEP, STEP_OF_ALL = 61, 19  # every 61st variant of the tile table is compiled
SLACK = 256  # bytes per thread, a quarter of its registers
MINUTES = 5  # for an installation, 200 MB
# What pip says without an index that answers; with one it lists the versions that there are.
OFFLINE = r"from versions: none|Max retries|timed out|Connection|HTTP error 5|IncompleteRead"


class Unreachable(Exception):
    """No package index answers."""


def install(version: str, cache: Path, options: list[str]) -> Path:
    folder = cache / version
    done = folder / ".installed"
    if not done.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "30"]
        command += ["--target", str(folder), *options]
        command += [f"triton=={version}", *NEEDS.get(version, [])]
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES)
        except subprocess.TimeoutExpired:
            raise Unreachable(f"pip took more than {MINUTES} minutes") from None
        if found.returncode:
            text = found.stderr.strip()
            error = Unreachable if re.search(OFFLINE, text) else RuntimeError
            raise error(f"pip: {text.splitlines()[-1] if text else 'no message'}")
        done.touch()
    return folder


def run(folder: Path, command: list[str], **environment: str) -> tuple[int, str]:
    path = os.pathsep.join(
        [str(folder), str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    )
    threads = {"OMP_NUM_THREADS": "1"}
    cache = {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder / ".cache")}
    found = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | threads | cache | environment,
    )
    return found.returncode, found.stdout + found.stderr


def tests(folder: Path, names: tuple, part: str, **environment: str) -> tuple[bool, str]:
    """(whether all passed, the count)."""
    files = [f"tests/impl/{name}.py" for name in names]
    command = ["-m", "pytest", "-p", "no:cacheprovider", *files]
    status, text = run(folder, command + (["-k", part] if part else []), **environment)
    if status:
        print(text[-4000:], flush=True)
    counts = re.findall(r"\d+ (?:passed|failed|errors?)\b", text)
    return status == 0 and bool(counts), ", ".join(counts) or f"exit {status}"


def try_version(version: str, folder: Path, everything: bool) -> tuple[bool, str]:
    """(whether all is well, a row of the table)."""
    begin = time.perf_counter()
    _, imported = run(folder, ["-c", "import triton, torch; print(triton.__version__)"])
    if imported.strip() != version:
        return False, f"{version:<8} not importable: {imported.strip()[-200:]}"
    part = "" if everything else PART
    first, interpreted = tests(folder, INTERPRETED, part, TRITON_INTERPRET="1")
    second, simulated = tests(folder, ("test_triton_compiled",), "compiled_kernels")
    step = STEP_OF_ALL if everything else STEP
    status, report = run(folder, [str(Path(__file__).resolve()), "--sample", str(step)])
    print(report[-8000:].strip(), flush=True)
    lines = report.strip().splitlines() or ["no answer"]
    seconds = time.perf_counter() - begin
    row = f"{version:<8} {interpreted:<22} {simulated:<22} {lines[-1]:<62} {seconds:4.0f} s"
    return first and second and status == 0, row


def sample(step: int) -> int:
    """In the process of one version: every step-th variant through the gate. Number of findings."""
    import triton

    from tools import aot, triton_table

    version, tiled = triton.__version__, bool(triton_table.summary())
    bad, spills, chosen = 0, [], list(aot.variants())[::step]
    for variant in chosen:
        record, found = aot.examine(variant)
        if record.stack:
            spills.append(record.stack)
            print(f"triton {version} spills {record.stack} B per thread: {variant.key}")
            if not tiled:
                found = [x for x in found if "spills" not in x]
                found += [f"{record.stack} bytes of spills"] * (record.stack > SLACK)
        bad += len(found)
        for finding in found:
            print(f"triton {version} FINDING {variant.key}: {finding} {record.line()}")
    most = f", at most {max(spills)} B" if spills else ""
    print(f"{len(chosen)} variants, {len(spills)} spill{most}, {bad} findings")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "triton")
    parser.add_argument("--pip", default="", help="options for pip install")
    parser.add_argument("--all", action="store_true", help="the whole interpreted suite")
    parser.add_argument("--jobs", type=int, default=1, help="versions at a time")
    parser.add_argument("--unreachable-ok", action="store_true", help="exit code 0 without a net")
    parser.add_argument("--sample", type=int, metavar="STEP", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sample:
        return min(sample(options.sample), 1)

    def attempt(version: str) -> tuple[bool, str]:
        try:
            folder = install(version, options.cache.resolve(), options.pip.split())
        except Unreachable as reason:
            return options.unreachable_ok, f"{version:<8} NOT TRIED: {reason}"
        except RuntimeError as reason:
            return False, f"{version:<8} not installed: {reason}"
        return try_version(version, folder, options.all)

    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(attempt, options.versions))
    print(f"\n{'triton':<8} {'interpreted':<22} {'PTX simulated':<22} ahead of time")
    print("\n".join(row for _, row in rows))
    return 0 if all(good for good, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
