"""``make fuzz MINUTES=30``: new examples for every property, shared out over the targets.

    python -m fuzz.run --minutes 30                  all targets, one process after another
    python -m fuzz.run --target readers --seed 17    one of them from this seed on

A target runs in a process of its own, which may die: the example that killed it is in a file under
build/fuzz. Each prints a line at its end; each failure prints its example and the seed that draws
it again. The exit code is 1 where there was one.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAST = ROOT / "build" / "fuzz"
CHUNK = 25  # examples of a property with one seed
SLOW = 300  # seconds of an example
MEMORY = 10 << 30  # bytes of addresses: what asks for more is refused instead of the machine


@dataclasses.dataclass(frozen=True)
class Target:
    """Modules with properties, the share of the time, and how their process is started."""

    modules: tuple[str, ...]
    share: float
    sanitized: bool = False
    environment: tuple[tuple[str, str], ...] = ()


TARGETS = {
    "operator": Target(("test_properties", "fuzz.test_operator_fuzz"), 5),
    "triton": Target(("fuzz.test_triton_fuzz",), 3, environment=(("TRITON_INTERPRET", "1"),)),
    "modules": Target(("fuzz.test_modules_fuzz", "fuzz.test_arguments_fuzz"), 6),
    "readers": Target(("fuzz.test_readers_fuzz",), 6),
    "command line": Target(("fuzz.test_command_line_fuzz",), 6),
    "operators": Target(("fuzz.test_cpp_fuzz",), 2),
    "sanitized": Target(("fuzz.test_cpp_fuzz",), 4, sanitized=True),
}


class Over(BaseException):
    """The time is; hypothesis takes only exceptions for failures."""


class Slow(Exception):
    """An example that does not end is a failure, too."""


def too_slow(*_) -> None:
    raise Slow(f"the example took more than {SLOW} s")


def properties(names: tuple[str, ...]) -> list[Callable]:
    """What is drawn in the modules."""
    found = []
    for name in names:
        module = importlib.import_module(name)
        found += [x for x in vars(module).values() if getattr(x, "__module__", "") == name]
    return [x for x in found if hasattr(x, "again")]


def fixtures(test: Callable) -> dict:
    """What pytest would give to a property."""
    from attnpool_kernels import impl

    wanted = inspect.signature(test).parameters
    given = {"kernels": impl.load("cpu"), "native": "cpu"}
    return {name: value for name, value in given.items() if name in wanted}


def prepare() -> None:
    """What ``conftest`` does for every test; memory is limited."""
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def work(name: str, seconds: float, seed: int, out: Path) -> int:
    """Runs a target in this process; writes its summary to ``out``; returns the exit code."""
    target = TARGETS[name]
    if not target.sanitized:  # whose shadow memory is address space
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    prepare()
    import attnpool_kernels

    if target.sanitized != ("sanitized" in attnpool_kernels.__path__[0]):
        raise RuntimeError(f"the package is that in {attnpool_kernels.__path__[0]}")
    tests, began = properties(target.modules), time.monotonic()
    count, failures, last = 0, 0, seed
    said: set[str] = set()
    signal.signal(signal.SIGALRM, too_slow)

    def watch(**example) -> None:
        nonlocal count
        if time.monotonic() - began > seconds:
            raise Over
        count += 1
        signal.alarm(SLOW)
        out.with_suffix(".example").write_text(f"{test.__module__}.{test.__name__} {example}\n")

    while time.monotonic() - began < seconds:
        for test in tests:
            out.with_suffix(".seed").write_text(f"{test.__module__}.{test.__name__} {last}\n")
            try:
                import torch

                torch.manual_seed(last)
                test.again(last, CHUNK, watch, **fixtures(test))
            except Over:
                break
            except Exception as error:
                failures += 1
                place = traceback.extract_tb(error.__traceback__)[-1]
                key = f"{test.__name__} {type(error).__name__} {place}"
                if key not in said:
                    said.add(key)
                    print(f"FAILED {name}, seed {last}: {test.__module__}.{test.__name__}")
                    print("".join(traceback.format_exception(error))[-4000:])
                    print(f'again: make fuzz ARGS="--target {name!r} --seed {last}"', flush=True)
        last += 1
    summary = {"examples": count, "properties": len(tests), "failures": failures}
    out.write_text(json.dumps(summary | {"seeds": [seed, last - 1]}))
    return int(failures > 0)


def start(name: str, seconds: float, seed: int) -> bool:
    """Runs a target in a process of its own and prints its line; whether all was well."""
    LAST.mkdir(parents=True, exist_ok=True)
    out, target = LAST / f"{name.replace(' ', '_')}.json", TARGETS[name]
    for path in (out, out.with_suffix(".example")):
        path.unlink(missing_ok=True)
    environment = os.environ | dict(target.environment) | {"OMP_NUM_THREADS": "1"}
    place = ROOT
    if target.sanitized:
        from fuzz import sanitized

        place = sanitized.library()
        environment |= sanitized.environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(place), str(ROOT / "tests")])
    command = [sys.executable, "-X", "faulthandler", "-m", "fuzz.run", "--work", str(out)]
    command += ["--target", name, "--seconds", str(seconds), "--seed", str(seed)]
    began = time.monotonic()
    done = subprocess.run(command, env=environment, cwd=place)  # whose package comes first
    took = time.monotonic() - began
    if not out.exists():
        example = out.with_suffix(".example")
        print(f"{name}: DIED with {done.returncode} after {took:.0f} s, seed and example:")
        print(out.with_suffix(".seed").read_text() if example.exists() else "none yet")
        print(example.read_text() if example.exists() else "", flush=True)
        return False
    found = json.loads(out.read_text())
    first, last = found["seeds"]
    print(
        f"{name}: {found['examples']} examples of {found['properties']} properties, seeds {first} "
        f"to {last}, {found['failures']} failures, {took:.0f} s",
        flush=True,
    )
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="of all targets")
    parser.add_argument("--seed", type=int, default=None, help="the first one; default: the time")
    parser.add_argument("--target", choices=list(TARGETS), nargs="+", default=list(TARGETS))
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    seed = int(time.time()) if given.seed is None else given.seed
    if given.work is not None:
        return work(given.target[0], given.seconds, seed, given.work)
    total = sum(TARGETS[name].share for name in given.target)
    well = [
        start(name, 60 * given.minutes * TARGETS[name].share / total, seed) for name in given.target
    ]
    return int(not all(well))


if __name__ == "__main__":
    sys.exit(main())
