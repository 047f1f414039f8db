"""The wheel of the CPU library beside other versions of Python, torch, numpy, PyG and Lightning.

    python tests/tools/versions.py [NAME ...] [--wheel FILE] [--pip "--index-url ..."]
    python tests/tools/versions.py --list

One wheel serves all combinations; without --wheel the interpreter that runs this builds it. For
each a new environment under build/versions, into which pip puts the wheel and the versions, then,
away from the checkout: the import, every example of the README, and a part of the tests (of the
zoo, too, where PyG is there). Prints a row of the table in docs/support.md for each; exit status 1
where something failed. A combination whose Python is not on this machine, or whose packages pip
refuses, is printed as such. An environment with a torch for CUDA takes 6 GB while it is tried.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "versions"
COPIED = ("tests", "docs", "README.md", "CONTRIBUTING.md", "pyproject.toml")
TESTS = (
    "tests/docs/test_pages.py::test_page[README.md]",
    "tests/impl/test_cpu_small_sets.py",
    "tests/nn/test_blocks.py",
    "tests/nn/test_pooling.py",
    "tests/test_autograd.py",
    "tests/test_dispatch.py",
    "tests/test_functional.py",
    "tests/test_layouts.py",
    "tests/test_ragged.py",
)
WITHOUT_NUMPY = tuple(x for x in TESTS if "functional" not in x)  # which imports it
ZOO_TESTS = (
    "tests/zoo/test_backbones.py",
    "tests/zoo/test_model.py",
    "tests/zoo/test_pyg.py",
    "tests/zoo/test_task.py",
)
ZOO = ("ase", "jsonargparse[signatures]", "tensorboard", "rich", "pyyaml")
SHOWN = ("torch", "triton", "numpy", "torch_geometric", "lightning")


@dataclass(frozen=True)
class Combination:
    python: str
    packages: tuple[str, ...]
    tests: tuple[str, ...] = TESTS
    absent: tuple[str, ...] = ()  # taken out again after the installation


COMBINATIONS = {
    "oldest": Combination("3.10", ("torch==2.10.0", "numpy==1.26.4")),
    "torch-2.11": Combination("3.11", ("torch==2.11.0", "numpy==2.3.5")),
    "torch-2.12": Combination("3.12", ("torch==2.12.1", "numpy")),
    "no-triton": Combination("3.12", ("torch==2.12.1", "numpy"), absent=("triton",)),
    "no-numpy": Combination("3.11", ("torch==2.13.0",), WITHOUT_NUMPY, absent=("numpy",)),
    "oldest-pyg": Combination(
        "3.11",
        ("torch==2.13.0", "numpy==1.26.4", "torch_geometric==2.6.0", "lightning==2.6.0", *ZOO),
        ZOO_TESTS,
    ),
    "newest-pyg": Combination(
        "3.11", ("torch==2.13.0", "numpy", "torch_geometric", "lightning", *ZOO), ZOO_TESTS
    ),
    "torch-2.14": Combination("3.11", ("torch==2.14.1", "numpy")),
    "newest": Combination("3.13", ("torch", "numpy")),
    "python-3.14": Combination("3.14", ("torch", "numpy")),
}
IMPORTED = """
import torch
import attnpool_kernels as a
x = torch.randn(8, 2, 16)
assert a.set_attention(x, x, x, a.Ragged.from_counts([5, 3]), backend="cpu").isfinite().all()
"""
VERSIONS = """
import sys
from importlib.metadata import version, PackageNotFoundError
for name in sys.argv[1:]:
    try:
        print(version(name))
    except PackageNotFoundError:
        print("-")
"""


class Refused(Exception):
    """Nothing to try: no such interpreter here, or pip finds no such packages for it."""


def interpreter(version: str) -> str:
    """A Python of this version: this one, on the path, or of pyenv."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    of_pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = sorted(of_pyenv.glob(f"{version}.*/bin/python"))
    for candidate in (shutil.which(f"python{version}"), *map(str, found)):
        if candidate and not subprocess.run([candidate, "-c", ""], capture_output=True).returncode:
            return candidate
    raise Refused(f"no Python {version} on this machine")


def pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [x for x in done.stderr.splitlines() if x.startswith("ERROR")]
        raise Refused(f"pip: {errors[-1] if errors else done.stderr[-200:]}")


def build_wheel(options: list[str]) -> Path:
    folder = FOLDER / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", str(ROOT), "--no-deps"]
    command += ["--no-build-isolation", "-w", str(folder), *options]
    subprocess.run(command, check=True, env=os.environ | {"ATTNPOOL_BUILD": "cpu"})
    (wheel,) = folder.glob("*.whl")
    return wheel


def attempt(name: str, wheel: Path, options: list[str]) -> tuple[bool, list[str]]:
    """(whether all passed, cells of the table): installs, imports, runs the tests."""
    combination = COMBINATIONS[name]
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    base = interpreter(combination.python)
    subprocess.run([base, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    # torch comes first: newer ones than the wheel was built with are what is to be tried
    pip(python, "install", "--no-compile", *options, *combination.packages, "pytest>=8", str(wheel))
    if combination.absent:
        pip(python, "uninstall", "--yes", *combination.absent)
    for copied in COPIED:
        source = ROOT / copied
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / copied, ignore=ignored)
        else:
            shutil.copy(source, folder)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(folder / "tests"), "OMP_NUM_THREADS": "1"}
    run = {"cwd": folder, "env": environment, "capture_output": True, "text": True}

    shown = subprocess.run([python, "-c", VERSIONS, *SHOWN], check=True, **run).stdout.split()
    release = subprocess.run([python, "-V"], check=True, **run).stdout.split()[1]
    imported = subprocess.run([python, "-c", IMPORTED], **run)
    if imported.returncode:
        return False, [name, release, *shown, "does not import: " + imported.stderr[-300:]]
    command = [python, "-m", "pytest", "-q", "-o", "addopts=", "-m", "not slow", "--tb=short"]
    done = subprocess.run([*command, "-p", "no:cacheprovider", *combination.tests], **run)
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)\b", done.stdout)
    return done.returncode == 0, [name, release, *shown, ", ".join(counts) or "no tests ran"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(COMBINATIONS))
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--pip", default="", help="options for pip install")
    parser.add_argument("--keep", action="store_true", help="leaves the environments behind")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.list:
        for name, x in COMBINATIONS.items():
            print(f"{name:<12} {x.python}", *x.packages, *(f"without {y}" for y in x.absent))
        return 0
    unknown = set(options.names) - set(COMBINATIONS)
    if unknown:
        parser.error(f"no such combination: {', '.join(sorted(unknown))}; --list names them")
    FOLDER.mkdir(parents=True, exist_ok=True)
    wheel = options.wheel.resolve() if options.wheel else build_wheel(options.pip.split())
    good = True
    print("| " + " | ".join(("combination", "Python", *SHOWN, "tests")) + " |")
    print("|" + "---|" * (len(SHOWN) + 3))
    for name in options.names:
        begin = time.perf_counter()
        try:
            passed, cells = attempt(name, wheel, options.pip.split())
            good &= passed
        except Refused as reason:
            cells = [name, COMBINATIONS[name].python, *["-"] * len(SHOWN), f"not tried: {reason}"]
        if not options.keep:
            shutil.rmtree(FOLDER / name, ignore_errors=True)
        seconds = time.perf_counter() - begin
        print("| " + " | ".join(cells) + f" | {seconds:.0f} s", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
