"""Energies and forces of a molecule, learned through ABP: ``python -m benchmarks.studies.forces``.

1. Molecular dynamics of ethanol at 500 K (Langevin, 0.5 fs, a frame every 10 fs) with GFN2-xTB
   (tblite; without it the EMT of ASE), written in the format of MD17: z, R, E, F in kcal/mol and Å.
2. SchNet with ABP is trained on 0.01·MSE(energy) + 0.99·MSE(forces), both over the variance of the
   energies: on the first 60% of the frames, with the next 20% to follow it and the last to test it.
   Two copies with equal weights take turns on the same batches, one with the automatic choice of
   backend (first and second derivative are this package's kernels) and one with "reference"
   (torch's operators in a loop over molecules, differentiated by autograd).

A row holds the error of the forces as a share of that of predicting zero force, and the time of a
step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import units
from ase.build import molecule
from ase.calculators.calculator import Calculator
from ase.md.langevin import Langevin

import attnpool_kernels
from attnpool_kernels.zoo.datasets import load
from attnpool_kernels.zoo.model import PooledModel
from attnpool_kernels.zoo.molecules import Molecules, Split

from ..contenders.packages import version
from ..measuring import sheet
from ..measuring.clock import Timing
from ..measuring.provenance import provenance
from ..measuring.sheet import BenchmarkError, Row
from .options import add_shared, exit_code, positive

CONFIG: dict[str, Any] = {
    "backbone": "schnet",
    "backbone_options": {
        "hidden_channels": 64,
        "num_filters": 64,
        "num_interactions": 3,
        "num_gaussians": 25,
        "cutoff": 5.0,
    },
    "pooling": "abp",
    "pooling_options": {"hidden": 64, "heads": 4, "seeds": 4, "activation": "silu"},
}
MODEL = "SchNet 64x3 ABP 64/4/4"
BACKENDS = (None, "reference")
ENERGY_WEIGHT, FORCE_WEIGHT = 0.01, 0.99


def calculator(name: str) -> tuple[Calculator, str]:
    """A calculator of ASE, and its name for the record; "auto": GFN2-xTB where it is installed."""
    if name in ("auto", "xtb"):
        try:
            from tblite.ase import TBLite
        except ImportError as error:
            if name == "xtb":
                raise BenchmarkError("--calculator xtb needs tblite: pip install tblite") from error
        else:
            return TBLite(method="GFN2-xTB", verbosity=0), "GFN2-xTB"
    from ase.calculators.emt import EMT

    return EMT(), "EMT"


def simulate(
    formula: str,
    potential: Calculator,
    frames: int,
    every: int = 20,
    settle: int = 1000,
    temperature: float = 500.0,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Fields of MD17: z [n], R [M, n, 3] in Å, E [M] in kcal/mol, F [M, n, 3] in kcal/mol/Å.

    Langevin dynamics with steps of 0.5 fs and a friction of 0.01/fs; the first ``settle`` steps are
    left out; then a frame every ``every`` steps.
    """
    atoms = molecule(formula)
    atoms.calc = potential
    rng = np.random.default_rng(seed)
    spread = np.sqrt(units.kB * temperature * atoms.get_masses()[:, None])
    atoms.set_momenta(rng.standard_normal(atoms.positions.shape) * spread)
    dynamics = Langevin(
        atoms,
        0.5 * units.fs,
        temperature_K=temperature,
        friction=0.01 / units.fs,
        fixcm=False,
        rng=rng,
    )
    dynamics.run(settle)
    places, energies, forces = [], [], []
    for _ in range(frames):
        dynamics.run(every)
        places.append(atoms.get_positions() - atoms.get_center_of_mass())
        energies.append(atoms.get_potential_energy())
        forces.append(atoms.get_forces())
    unit = units.kcal / units.mol
    return {
        "z": atoms.numbers.astype(np.uint8),
        "R": np.stack(places),
        "E": np.array(energies) / unit,
        "F": np.stack(forces) / unit,
    }


def split(frames: int) -> Split:
    """In the order of time, so that the frames to test on are not neighbours of those learned."""
    parts = torch.arange(frames).split([frames * 3 // 5, frames // 5, frames - frames * 4 // 5])
    return Split(*parts)


class Learner:
    """A model, its optimizer and the time of its steps."""

    def __init__(
        self, backend: str | None, data: Molecules, train: torch.Tensor, steps: int, seed: int
    ) -> None:
        torch.manual_seed(seed)
        options = {**CONFIG["pooling_options"], "backend": backend}
        self.model = PooledModel.from_config({**CONFIG, "pooling_options": options})
        for name in ("mean", "std", "atomref"):  # total energies have more digits than a float32
            setattr(self.model, name, getattr(self.model, name).double())
        energies = data.y[train]
        self.model.set_statistics(energies.mean(0), energies.std(0))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.timing = Timing()

    def step(self, batch: Molecules) -> float:
        """The loss before the step."""
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.timing.samples.append(time.perf_counter() - begin)
        return loss.item()

    def loss(self, batch: Molecules) -> torch.Tensor:
        energy, forces = self.model.train().energy_and_forces(batch)
        errors = (energy - batch.y[:, 0]), (forces - batch.forces)
        parts = [(x / self.model.std).square().mean() for x in errors]
        return ENERGY_WEIGHT * parts[0] + FORCE_WEIGHT * parts[1]

    def errors(self, part: Molecules) -> tuple[float, float]:
        """Mean absolute errors of energies in eV and of force components in eV/Å."""
        energy, forces = self.model.eval().energy_and_forces(part)
        wrong = (energy - part.y[:, 0]), (forces - part.forces)
        mean = [float(x.abs().mean()) for x in wrong]
        return mean[0], mean[1]


def train(
    data: Molecules,
    parts: Split,
    steps: int,
    batch: int,
    minutes: float,
    seed: int,
    points: int = 8,
) -> Iterator[tuple[int, dict[str | None, Learner], dict[str | None, float]]]:
    """Yields (step, learners by backend, losses of the step by backend) ``points`` times.

    Stops after ``minutes`` at the latest.
    """
    learners = {name: Learner(name, data, parts.train, steps, seed) for name in BACKENDS}
    generator = torch.Generator().manual_seed(seed)
    end, order = time.monotonic() + 60 * minutes, torch.empty(0, dtype=torch.int64)
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = parts.train[torch.randperm(len(parts.train), generator=generator)]
        chosen, order = data.select(order[:batch]), order[batch:]
        turns = list(learners.items())
        losses = {name: learner.step(chosen) for name, learner in turns[:: 1 if step % 2 else -1]}
        last = step == steps or time.monotonic() > end
        if step == 1 or last or step % max(1, steps // points) == 0:
            yield step, learners, losses
        if last:
            return


def rows(
    name: str,
    step: int,
    learners: dict[str | None, Learner],
    data: Molecules,
    part: str,
    index: torch.Tensor,
) -> list[Row]:
    """A row a backend: errors on the frames of ``index``, time of a step so far."""
    frames = data.select(index)
    zero = float(frames.forces.abs().mean())
    spread = float((frames.y - frames.y.mean()).abs().mean())
    found = []
    for backend, learner in learners.items():
        energy, force = learner.errors(frames)
        options = CONFIG["pooling_options"]
        row = Row(
            suite="forces",
            family="forces",
            workload=f"{name} {MODEL} {part} after {step} steps",
            x=None,
            molecules=len(frames),
            atoms=len(frames.z),
            longest=int(frames.ptr.diff().max()),
            heads=options["heads"],
            dim=options["hidden"] // options["heads"],
            seeds=options["seeds"],
            dtype="float32",
            layout="ragged",
            what="force step",
            contender=f"abp_{backend}" if backend else "abp",
            kernel=f"attnpool_kernels {attnpool_kernels.__version__}, "
            f"backend {backend or 'chosen automatically'}",
            ours=int(backend is None),
            status="ok",
            error=force / zero,
            check=f"forces {force:.4g} eV/Å (zero {zero:.4g}); energies {energy:.4g} eV "
            f"(mean {spread:.4g})",
        )
        row.fill(learner.timing)
        found.append(row)
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m benchmarks.studies.forces",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--molecule", default="CH3CH2OH", help="a name of ase.build.molecule")
    p.add_argument("--calculator", default="auto", choices=("auto", "xtb", "emt"))
    p.add_argument("--frames", type=int, default=500, help="(default: 500)")
    p.add_argument(
        "--data",
        type=Path,
        metavar="NPZ",
        help="read the frames from this file, or write them there where it does not exist",
    )
    p.add_argument("--steps", type=int, default=1500, help="of each training (default: 1500)")
    p.add_argument("--batch", type=int, default=10, help="frames of a step (default: 10)")
    p.add_argument("--minutes", type=float, default=6.0, help="at most, of training (default: 6)")
    p.add_argument("--seed", type=int, default=0)
    add_shared(p, "forces")
    return p


def main(arguments: list[str] | None = None) -> int:
    return exit_code(_main, parser().parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    positive(options, "frames", "steps", "batch", "minutes", "threads")
    if options.frames < max(5, options.batch * 5 // 3 + 1):
        raise BenchmarkError(f"--frames must be over 5/3 of --batch, got {options.frames}")
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = options.data or Path(folder) / "frames.npz"
        name = f"{options.molecule} {path.name}"
        if not path.exists():
            potential, method = calculator(options.calculator)
            name, begin = f"{options.molecule} {method}", time.monotonic()
            np.savez_compressed(path, **simulate(options.molecule, potential, options.frames))
            print(f"{options.frames} frames in {time.monotonic() - begin:.0f} s", flush=True)
        data = load("md17", path, train=1, val=0).molecules
    data = Molecules(data.z, data.pos.float(), data.ptr, data.y, data.forces.float())
    out = sheet.Sheet(options.output)
    chosen = {
        k: v for k, v in vars(options).items() if isinstance(v, str | int | float) and k != "data"
    }
    about = provenance("cpu", {"command": "python -m benchmarks.studies.forces", **chosen})
    chemistry = {package: version(package) for package in ("ase", "tblite")}
    about["versions"] |= {package: x for package, x in chemistry.items() if x}
    out.start(about)
    print(f"{name}: {len(data)} frames; {MODEL}; {about['device']}, {about['threads']} threads")
    parts = split(len(data))
    for step, learners, losses in train(
        data, parts, options.steps, options.batch, options.minutes, options.seed
    ):
        values = " and ".join(f"{loss:.4g}" for loss in losses.values())
        print(f"step {step}: loss {values}", flush=True)
        _show(out, rows(name, step, learners, data, "validation", parts.val))
    _show(out, rows(name, step, learners, data, "test", parts.test))
    ours, reference = (learners[name].timing.quantile(0.5) for name in BACKENDS)
    print(f"median time of a step, reference over ours: {reference / ours:.2f}")
    print(f"results: {options.output}")
    return 0


def _show(out: sheet.Sheet, found: list[Row]) -> None:
    for row in found:
        out.add(row)
        print(f"  {row.contender:14} {row.p50_ms:8.2f} ms  {row.check}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
