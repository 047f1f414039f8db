"""The Triton backend with several versions of Triton, one after another, and a table of the result.

    python tests/backends/triton_versions.py [VERSION ...] [--cache DIR] [--pip "--index-url ..."]

Each version is installed once into its own folder (build/triton/<version>, without dependencies)
and put before the environment's packages on PYTHONPATH; torch and the rest are shared. With each
run: a part of the interpreted suite under the guard, all tests of it with --all, and a sample of
the tile table compiled ahead of time. Exit code 1 where anything failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# What pip installs as torch 2.11, 2.13 (2.12.1), and the newest.
VERSIONS = ("3.6.0", "3.7.1", "3.9.0")
NEEDS = {"3.6.0": ["numpy<2.4"]}  # its interpreter uses what later numpy removed
PART = "error_budget and not float64 and (edges or everything or parts or long) or guard_sees"


def install(version: str, cache: Path, options: list[str]) -> Path:
    folder = cache / version
    done = folder / ".installed"
    if not done.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        command += ["--disable-pip-version-check", "--target", str(folder), *options]
        subprocess.run([*command, f"triton=={version}", *NEEDS.get(version, [])], check=True)
        done.touch()
    return folder


def run(folder: Path, command: list[str], **environment: str) -> tuple[int, str]:
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    cache = str(folder / ".cache")
    found = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": cache} | environment,
    )  # fmt: skip
    return found.returncode, found.stdout + found.stderr


def try_version(version: str, folder: Path, everything: bool) -> tuple[bool, str]:
    """(whether all is well, a row of the table)."""
    begin = time.perf_counter()
    _, imported = run(folder, ["-c", "import triton, torch; print(triton.__version__)"])
    if imported.strip() != version:
        return False, f"{version:<8} not importable: {imported.strip()[-200:]}"
    suite = ["-m", "pytest", "tests/backends/test_triton_interpreted.py"]
    status, text = run(folder, suite + ([] if everything else ["-k", PART]), TRITON_INTERPRET="1")
    tests = re.findall(r"\d+ (?:passed|failed|error)[^\n]*", text)
    if status:
        print(text[-3000:], flush=True)
    gate, report = run(folder, ["tests/backends/aot.py", "check"])
    if gate:
        print(report[-3000:], flush=True)
    last = report.strip().splitlines()[-1] if report.strip() else "no answer"
    seconds = time.perf_counter() - begin
    row = f"{version:<8} {tests[-1] if tests else f'exit {status}':<34} {last:<76} {seconds:5.0f} s"
    return status == 0 and gate == 0, row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "triton")
    parser.add_argument("--pip", default="", help="options for pip install")
    parser.add_argument("--all", action="store_true", help="the whole interpreted suite")
    options = parser.parse_args()
    rows = []
    for version in options.versions:
        folder = install(version, options.cache, options.pip.split())
        rows.append(try_version(version, folder, options.all))
        print(rows[-1][1], flush=True)
    print(f"\n{'triton':<8} {'interpreted':<34} {'ahead of time':<76}")
    print("\n".join(row for _, row in rows))
    return 0 if all(good for good, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
