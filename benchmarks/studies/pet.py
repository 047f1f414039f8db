"""PET of metatrain with its own attention and with ours: ``python -m benchmarks.studies.pet``.

Default hyperparameters, float32, the same weights. A training step is energies, forces through
``create_graph``, 0.01·MSE(energy) + MSE(forces), backward and Adam; an MD step is energies and
forces in evaluation. Both by metatrain's ``evaluate_model``; neighbour lists are made before. The
two take turns in one process. Peak memory is that of one step in a child process, over model, state
of Adam and systems.

The default malloc of glibc gives large blocks back and pays page faults for them in every step,
which weighs heavier on whoever uses more memory. So run it twice, the second time with
``MALLOC_MMAP_THRESHOLD_=4294967295 MALLOC_TRIM_THRESHOLD_=8589934592
MALLOC_TOP_PAD_=268435456`` in front; the file says which it was.

On a machine with other work ``--threads 1 --clock cpu`` counts the seconds that the process was
running, page faults included.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import attnpool_kernels
from attnpool_kernels.integrations.metatrain import use_attnpool

from ..contenders.packages import version
from ..measuring import clock, memory, sheet
from ..measuring.provenance import provenance
from ..measuring.sheet import BenchmarkError, Row
from ..reporting import tables
from .options import add_shared, positive

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
STEPS = ("training", "md")
CONTENDERS = ("pet", "pet_attnpool")  # own attention, ours
CLOSE = 1e-4  # of float32 forces from those of the other
SMALL = ("CH4", "NH3", "H2O", "C2H6", "CH3CH2OH", "C6H6", "CH3COOH", "CH3CHO", "C3H8", "C4H4O")
HYPERS: dict[str, Any] = {}  # besides the defaults; tests make the model small


def small_molecules(count: int) -> list:
    from ase.build import molecule

    return [molecule(SMALL[i % len(SMALL)]) for i in range(count)]


def alkanes(count: int) -> list:
    """Zigzag chains of 4, 5, 6, ... groups CH2."""
    from ase import Atoms

    group = np.array([[0, 0.44, 0], [0, 1.07, 0.89], [0, 1.07, -0.89]])
    found = []
    for length in range(4, 4 + count):
        places = [group * [1, (-1) ** i, 1] + [1.27 * i, 0, 0] for i in range(length)]
        found.append(Atoms("CH2" * length, np.concatenate(places)))
    return found


def water(side: int) -> list:
    """side³ molecules at the density of the liquid, turned at random."""
    from ase import Atoms
    from ase.build import molecule

    rng = np.random.default_rng(0)
    box = Atoms(cell=[3.1 * side] * 3, pbc=True)
    for place in np.ndindex(side, side, side):
        one = molecule("H2O")
        one.rotate(360 * rng.random(), rng.standard_normal(3))
        one.translate(3.1 * np.array(place))
        box += one
    return [box]


def copper(side: int) -> list:
    from ase.build import bulk

    return [bulk("Cu", cubic=True) * (side, side, side)]


def salt(side: int) -> list:
    from ase.build import bulk

    return [bulk("NaCl", "rocksalt", 5.64, cubic=True) * (side, side, side)]


# name: structures of a size, the size, and one to warm up with
WORKLOADS: dict[str, tuple[Callable[[int], list], int, int]] = {
    "molecules60": (small_molecules, 60, 4),
    "alkanes16": (alkanes, 16, 1),
    "water192": (water, 4, 2),
    "copper256": (copper, 4, 1),
    "salt216": (salt, 3, 1),
    "water1029": (water, 7, 2),
    "copper864": (copper, 6, 1),
}


@dataclass
class Batch:
    """Systems of metatomic with their neighbours, and counts that say how they are padded."""

    systems: list
    atoms: int
    edges: int
    longest: int  # neighbours of one atom
    types: list[int] = field(default_factory=list)


def target() -> Any:
    from metatrain.utils.data.target_info import get_energy_target_info

    quantity = {"quantity": "energy", "unit": "eV"}
    return get_energy_target_info("energy", quantity, add_position_gradients=True)


def build(types: list[int], ours: bool) -> torch.nn.Module:
    from metatrain.pet import PET
    from metatrain.utils.architectures import get_default_hypers
    from metatrain.utils.data import DatasetInfo

    # Every process says these; the first is about neighbour lists of systems that need gradients.
    warnings.filterwarnings("ignore", message="This system's positions or cell")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.manual_seed(0)
    hypers = get_default_hypers("pet")["model"] | HYPERS
    model = PET(hypers, DatasetInfo("angstrom", types, {"energy": target()}))
    return use_attnpool(model) if ours else model


def load(name: str, warm: bool = False) -> Batch:
    """Structures of a workload, shaken by 0.08 Å."""
    from metatomic.torch import systems_to_torch
    from metatrain.utils.neighbor_lists import get_system_with_neighbor_lists

    make, full, little = WORKLOADS[name]
    structures = make(little if warm else full)
    for seed, atoms in enumerate(structures):
        atoms.rattle(0.08, seed=seed)
    types = sorted({int(z) for atoms in make(full) for z in atoms.numbers})
    wanted = build(types, False).requested_neighbor_lists()
    systems = systems_to_torch(structures, dtype=torch.float32)
    systems = [get_system_with_neighbor_lists(x, wanted) for x in systems]
    counts = torch.cat([_neighbours(x, wanted[0]) for x in systems])
    return Batch(systems, len(counts), int(counts.sum()), int(counts.max()), types)


def _neighbours(system: Any, options: Any) -> torch.Tensor:
    """Of each atom within the cutoff; a list may hold pairs beyond it."""
    block = system.get_neighbor_list(options)
    near = block.values[:, :, 0].norm(dim=1) <= options.cutoff
    return torch.bincount(block.samples.values[near, 0].long(), minlength=len(system))


def predicted(model: torch.nn.Module, systems: list, training: bool) -> list[torch.Tensor]:
    """Energies [B, 1] and their gradients in positions [A, 3, 1]."""
    from metatrain.utils.evaluate_model import evaluate_model

    out = evaluate_model(model.train(training), systems, {"energy": target()}, training)
    block = out["energy"].block()
    return [block.values, block.gradient("positions").values]


def stepper(model: torch.nn.Module, what: str) -> Callable[[list], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def train(systems: list) -> None:
        optimizer.zero_grad()
        energy, force = predicted(model, systems, True)
        (0.01 * energy.square().mean() + force.square().mean()).backward()
        optimizer.step()

    def move(systems: list) -> None:
        predicted(model, systems, False)

    return train if what == "training" else move


def compare(models: dict[str, torch.nn.Module], batch: Batch) -> tuple[float, str]:
    """Relative difference of float32 forces, and "" or what is wrong with it."""
    own, ours = (predicted(models[name], batch.systems, False)[1].detach() for name in CONTENDERS)
    error = float((own - ours).norm() / own.norm())
    return error, "" if error <= CLOSE else f"forces differ by {error:.2g}, allowed {CLOSE:g}"


def peak(name: str, what: str, ours: bool, limit_s: float) -> memory.Probe:
    """Peak bytes of one step in a child process."""
    preload = ("metatrain.pet",)
    threads = torch.get_num_threads()
    return memory.in_child(_measured, (name, what, ours, HYPERS), threads, limit_s, preload)


def _measured(pipe: Any, name: str, what: str, ours: bool, hypers: dict) -> memory.Probe:
    HYPERS.update(hypers)
    batch = load(name)
    step = stepper(build(batch.types, ours), what)
    step(load(name, warm=True).systems)  # makes the state of Adam, loads code
    mark = memory.ready(pipe)
    step(batch.systems)
    return memory.Probe("ok", peak_bytes=mark.peak())


def timed(step: Callable[[list], None], systems: list, now: Callable[[], float]) -> float:
    """Seconds of a step by the clock ``now``."""
    begin = now()
    step(systems)
    return now() - begin


def run(
    name: str,
    what: str,
    budget_s: float,
    fewest: int,
    limit_s: float,
    now: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Compares, measures and times both on a workload; a row each."""
    batch = load(name)
    own = build(batch.types, False)
    models = {"pet": own, "pet_attnpool": use_attnpool(copy.deepcopy(own))}
    error, wrong = compare(models, batch)
    rows, samplers = {}, {}
    for contender, model in models.items():
        rows[contender] = row = _row(contender, name, what, batch)
        row.error, row.reason, row.status = error, wrong, "wrong" if wrong else "ok"
        if wrong:
            continue
        found = peak(name, what, contender != "pet", limit_s)
        row.peak_bytes = found.peak_bytes
        if found.status != "ok":
            row.reason = f"no peak memory: {found.status} {found.reason}"
        step = stepper(model, what)
        step(batch.systems)
        samplers[contender] = lambda step=step: timed(step, batch.systems, now)
    for contender, timing in clock.interleave(samplers, budget_s, fewest).items():
        rows[contender].fill(timing)
    return list(rows.values())


def _row(contender: str, name: str, what: str, batch: Batch) -> Row:
    ours = contender != "pet"
    attention = f"attnpool_kernels {attnpool_kernels.__version__}" if ours else "its own attention"
    padded = batch.atoms * batch.longest / batch.edges
    return Row(
        suite="pet",
        family="pet",
        workload=name,
        x=None,
        molecules=len(batch.systems),
        atoms=batch.atoms,
        longest=batch.longest + 1,
        heads=HYPERS.get("num_heads", 8),
        dim=HYPERS.get("d_pet", 128) // HYPERS.get("num_heads", 8),
        seeds=None,
        dtype="float32",
        layout="ragged" if ours else "padded",
        what=f"{what} step",
        contender=contender,
        kernel=f"metatrain {version('metatrain')} PET, {attention}; torch {torch.__version__}",
        ours=int(ours),
        status="ok",
        check=f"forces of both; {batch.edges} edges, PET's grid has {padded:.2f} times as many",
    )


def table(rows: list[Row]) -> str:
    """One line a workload and step: times, peaks, and what is won."""
    lines = [["PET", "own, ms", "ours, ms", "faster", "own, MB", "ours, MB", "memory"]]
    for (workload, what), group in tables.grouped(rows, "workload", "what").items():
        own, ours = group
        if not (own.timed and ours.timed):
            lines.append([f"{workload}, {what}: {own.status} {own.reason}", *[""] * 6])
            continue
        times = [f"{x:.4g}" for x in (own.p50_ms, ours.p50_ms)]
        line = [f"{workload}, {what}", *times, f"{own.p50_ms / ours.p50_ms:.2f}"]
        if own.peak_bytes and ours.peak_bytes:
            line += [f"{x.peak_bytes / 1e6:.0f}" for x in (own, ours)]
            line.append(f"{ours.peak_bytes / own.peak_bytes:.2f}")
        lines.append(line + [""] * (7 - len(line)))
    return tables.render(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m benchmarks.studies.pet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--workloads", default=",".join(WORKLOADS), metavar="LIST", help="default: %(default)s"
    )
    p.add_argument("--steps", default=",".join(STEPS), metavar="LIST", help="default: %(default)s")
    p.add_argument(
        "--budget",
        type=float,
        default=10.0,
        metavar="S",
        help="timed seconds per contender and step (default: 10)",
    )
    p.add_argument("--clock", default="wall", choices=CLOCKS, help="(default: wall)")
    p.add_argument("--samples", type=int, default=5, metavar="N", help="at least (default: 5)")
    p.add_argument(
        "--resume",
        action="store_true",
        help="add to the file: a process for each large workload needs less memory",
    )
    add_shared(p, "pet")
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return _main(options)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        memory.stop()


def _main(options: argparse.Namespace) -> int:
    names = _known("--workloads", options.workloads, tuple(WORKLOADS))
    steps = _known("--steps", options.steps, STEPS)
    positive(options, "samples", "budget", "threads")
    for package in ("metatrain", "ase"):
        if not version(package):
            raise BenchmarkError(f"this study needs {package}: pip install {package}")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.clock == "cpu" and torch.get_num_threads() != 1:
        raise BenchmarkError("--clock cpu adds up the seconds of all threads: it needs --threads 1")
    begin = time.monotonic()
    out = sheet.Sheet(options.output, options.resume)
    chosen = {k: v for k, v in vars(options).items() if isinstance(v, str | int | float)}
    about = provenance("cpu", {"command": "python -m benchmarks.studies.pet", **chosen})
    needed = ("metatrain", "metatomic-torch", "metatensor-torch", "ase")
    about["versions"] |= {package: version(package) for package in needed}
    out.start(about)
    print(f"{about['device']}, {about['threads']} threads, malloc {about['malloc']}", flush=True)
    for name in names:
        for what in steps:
            clocked = CLOCKS[options.clock]
            for row in run(name, what, options.budget, options.samples, 300.0, clocked):
                out.add(row)
            print(table(out.rows[-len(CONTENDERS) :]), flush=True)
    print(f"results: {options.output}; {time.monotonic() - begin:.0f} s")
    found = [row for row in out.rows if row.run == out.run]
    return 1 if any(row.status != "ok" for row in found) else 0


def _known(option: str, given: str, known: tuple[str, ...]) -> list[str]:
    for name in given.split(","):
        if name not in known:
            raise BenchmarkError(f"{option} must be of {', '.join(known)}, got {name!r}")
    return given.split(",")


if __name__ == "__main__":
    sys.exit(main())
