"""Runs the same thing thousands of times and says what is left over: memory, files, threads.

    PYTHONPATH=.:tests python -m tools.soak                     all of them, 25 minutes on one core
    PYTHONPATH=.:tests python -m tools.soak operators --rounds 500
    PYTHONPATH=.:tests python -m tools.soak --csv tests/tools/soak.csv     what is committed

Memory is sampled a hundred times, each time after a garbage collection and after the C library has
handed its free pages back, so that what is seen is held by somebody. A tenth is the warm-up. The
growth is the slope of the least-squares line through the other samples times their rounds; it
must stay below 1 MB. Files and threads are counted before the first and after the last round.
Exit status 1 where something is left.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import logging
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch

from attnpool_kernels import Ragged, nn, seed_pool, set_attention
from tools import tiny

LIMIT = 1.0  # MB
SAMPLES = 100
WARM_UP = 0.1
TABLE = Path(__file__).with_suffix(".csv")  # the whole runs


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    resident: float  # MB
    anonymous: float  # MB of it that are no pages of files, such as of libraries
    files: int
    threads: int


@dataclass(frozen=True)
class Verdict:
    """How what is held has grown over the rounds after the warm-up."""

    rounds: int
    seconds: float
    resident: float  # growth in MB
    anonymous: float
    largest: float  # MB resident
    files: int
    threads: int

    def problems(self, anonymous_only: bool = False) -> list[str]:
        growth = {"anonymous memory": self.anonymous}
        if not anonymous_only:
            growth["resident memory"] = self.resident
        found = [f"{name} grew by {x:.2f} MB" for name, x in growth.items() if x >= LIMIT]
        if self.files > 0:
            found.append(f"{self.files} files are still open")
        if self.threads > 0:
            found.append(f"{self.threads} threads still run")
        return found


def held() -> Held:
    """Now, without garbage and without free pages of the C library."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # not everywhere
        libc.malloc_trim(0)
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, value = line.split(":", 1)
        if name in ("VmRSS", "RssAnon", "Threads"):
            found[name] = int(value.split()[0])
    files = len(os.listdir("/proc/self/fd")) - 1  # of the listing itself
    return Held(found["VmRSS"] / 1024, found["RssAnon"] / 1024, files, found["Threads"])


def growth(rounds: list[int], values: list[float]) -> float:
    """Slope of the least-squares line times the rounds that it spans."""
    x = torch.tensor(rounds, dtype=torch.float64)
    y = torch.tensor(values, dtype=torch.float64)
    dx = x - x.mean()
    slope = (dx * (y - y.mean())).sum() / dx.square().sum()
    return float(slope * (x[-1] - x[0]))


def soak(work: Iterator[None], rounds: int, samples: int = SAMPLES) -> Verdict:
    """Takes ``rounds`` steps of ``work``."""
    every = max(1, rounds // samples)
    warm = max(1, int(WARM_UP * rounds))
    seen: list[tuple[int, Held]] = []
    before, began = None, time.monotonic()
    for number in range(1, rounds + 1):
        next(work)
        if number == warm:
            before = held()
        if number >= warm and number % every == 0:
            seen.append((number, held()))
    after, took = held(), time.monotonic() - began
    assert before is not None
    at = [number for number, _ in seen]
    return Verdict(
        rounds,
        took,
        growth(at, [x.resident for _, x in seen]),
        growth(at, [x.anonymous for _, x in seen]),
        max(x.resident for _, x in seen),
        after.files - before.files,
        after.threads - before.threads,
    )


def operators() -> Iterator[None]:
    """Random batches through forward, backward and double backward, every option in turn."""
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def rows(count: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        x = torch.randn(count, *shape, generator=generator, dtype=torch.float32)
        return x.to(dtype).requires_grad_()

    number = 0
    while True:
        number += 1
        dtype = dtypes[number % 4] if number % 3 == 0 else torch.float32
        backend = "reference" if number % 10 == 0 else None
        heads, dim = (1, 2, 4)[number % 3], (8, 16, 17, 32)[number % 4]
        counts = torch.randint(0, 24, (12,), generator=generator)
        atoms = Ragged.from_counts(counts)
        n = int(counts.sum())
        k, v = rows(n, heads, dim, dtype=dtype), rows(n, heads, dim, dtype=dtype)
        options = {"backend": backend}
        if number % 4 == 1:
            options["key_bias"] = rows(n, heads, dtype=torch.float32)
        if number % 8 == 3:
            options["bias"] = rows(int(counts.square().sum()), heads, dtype=torch.float32)
        if number % 5 == 2:
            options["dropout"] = 0.3
        if number % 2:
            q = rows(n, heads, dim, dtype=dtype)
            out, lse = set_attention(q, k, v, atoms, return_lse=True, **options)
            loss = out.float().square().sum() + lse[lse.isfinite()].sum()
        else:
            options.pop("bias", None)
            q = rows(3, heads, dim, dtype=dtype)
            loss = seed_pool(q, k, v, atoms, **options).float().square().sum()
        inputs = [q, k, v, *(x for x in options.values() if isinstance(x, torch.Tensor))]
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        sum(x.float().square().sum() for x in first).backward()
        if number % 50 == 0:  # an error leaves nothing behind either
            try:
                set_attention(q, k, v[:-1], atoms)
            except ValueError:
                pass
            else:
                raise AssertionError("a wrong shape was taken")
        yield


def modules() -> Iterator[None]:
    """Steps of a training of plain modules."""
    model = nn.AttentionPooling(16, 16, 1, heads=4, seeds=4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    while True:
        counts = torch.randint(1, 24, (16,))
        x = torch.randn(int(counts.sum()), 16)
        optimizer.zero_grad()
        model(x, Ragged.from_counts(counts)).square().mean().backward()
        optimizer.step()
        yield


def forces() -> Iterator[None]:
    """Steps of a training on energies and forces: derivatives of derivatives."""
    from attnpool_kernels.zoo.backbones import backbone
    from attnpool_kernels.zoo.model import PooledModel

    options = {**tiny.ABP, "activation": "silu"}
    model = PooledModel(backbone("schnet", **tiny.SCHNET), "abp", pooling_options=options)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    given = tiny.molecules(64, 1, forces=True)
    while True:
        some = given.select(torch.randperm(64)[:8])
        optimizer.zero_grad()
        energy, found = model.energy_and_forces(some)
        loss = (energy - some.y[:, 0]).square().mean() + (found - some.forces).square().mean()
        loss.backward()
        optimizer.step()
        yield


def fits() -> Iterator[None]:
    """Whole trainings by the command's function, each with its folder, logs and checkpoints."""
    from attnpool_kernels.zoo import run
    from attnpool_kernels.zoo.data import MoleculeData
    from attnpool_kernels.zoo.task import PoolingTask
    from attnpool_kernels.zoo.trainer import TrainerOptions

    options = {"pooling": "abp", "pooling_options": tiny.ABP, "targets": ["energy"]}
    while True:
        with tempfile.TemporaryDirectory() as folder:
            task = PoolingTask("schnet", tiny.SCHNET, **options)
            data = MoleculeData(tiny.molecule_set(), targets=["energy"], batch_size=8)
            run.fit(task, data, TrainerOptions("cpu", max_epochs=2), "", folder)
        yield


def calculator() -> Iterator[None]:
    """Steps of the dynamics of a water molecule: energies and forces of a model."""
    from ase import units
    from ase.build import molecule
    from ase.constraints import Hookean
    from ase.md.verlet import VelocityVerlet

    from attnpool_kernels.zoo.backbones import backbone
    from attnpool_kernels.zoo.calculator import PooledCalculator
    from attnpool_kernels.zoo.model import PooledModel

    sizes = {"hidden_channels": 8, "num_filters": 8, "num_interactions": 1, "num_gaussians": 4}
    pooling = {"hidden": 8, "heads": 2, "seeds": 2, "activation": "silu"}
    water = molecule("H2O")
    model = PooledModel(backbone("schnet", **sizes), "abp", pooling_options=pooling)
    water.calc = PooledCalculator(model)
    # The model is random, so springs keep the molecule together.
    pairs = ((0, 1), (0, 2), (1, 2))
    water.set_constraint([Hookean(a, b, k=5.0, rt=1.6) for a, b in pairs])
    dynamics = VelocityVerlet(water, 0.5 * units.fs)
    while True:
        dynamics.run(1)
        if not abs(water.positions).max() < 1e3:
            raise AssertionError("the molecule has left")
        yield


@contextmanager
def silent() -> Iterator[None]:
    """Trainings print a line per epoch, and Lightning says a lot on the side."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


WORK: dict[str, tuple[Callable[[], Iterator[None]], int]] = {
    "operators": (operators, 10_000),
    "modules": (modules, 10_000),
    "forces": (forces, 10_000),
    "fits": (fits, 200),
    "calculator": (calculator, 100_000),
}
COLUMNS = [
    *("work", "rounds", "seconds", "resident_growth_mb", "anonymous_growth_mb"),
    *("largest_resident_mb", "files_left", "threads_left", "limit_mb", "verdict"),
    *("date", "machine", "python", "torch", "threads", "commit"),
]


def row(name: str, found: Verdict) -> list[object]:
    from benchmarks.measuring.provenance import provenance

    about = provenance("cpu", {})
    python = about["system"].split("Python ")[1]
    return [
        *(name, found.rounds, f"{found.seconds:.1f}", f"{found.resident:.3f}"),
        *(f"{found.anonymous:.3f}", f"{found.largest:.1f}", found.files, found.threads),
        *(LIMIT, "; ".join(found.problems()) or "flat", about["date"], about["device"]),
        *(python, about["versions"]["torch"], torch.get_num_threads(), about["commit"]),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", nargs="*", help=f"of {', '.join(WORK)}; default: all")
    parser.add_argument("--rounds", type=int, help="default: 10,000, dynamics 100,000, fits 200")
    parser.add_argument("--csv", type=Path, help="rows of this table are replaced or added")
    given = parser.parse_args(argv)
    if unknown := set(given.work) - set(WORK):
        parser.error(f"work must be of {', '.join(WORK)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    status = 0
    for name in given.work or WORK:
        make, rounds = WORK[name]
        with silent():
            found = soak(make(), given.rounds or rounds)
        cells = dict(zip(COLUMNS, map(str, row(name, found))))
        print("  ".join(f"{key} {value}" for key, value in list(cells.items())[:10]), flush=True)
        status |= bool(found.problems())
        if given.csv:
            rows = []
            if given.csv.exists():
                with open(given.csv, newline="") as file:
                    rows = [x for x in csv.DictReader(file) if x["work"] != name]
            with open(given.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows([*rows, cells])
    left = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    print(f"threads of Python: {', '.join(left) or 'none but the main one'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
