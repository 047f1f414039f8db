"""Steps of SchNet by edges and by pairs of atoms: ``python -m benchmarks.studies.steps``.

"edges": the layers of PyG, a filter for every edge, forces by differentiating them; a loss of
forces differentiates twice. "pairs": ``zoo.pairs``, a filter for each pair with its derivative
beside it. Weights, neighbours, pooling and losses are the same, and state dicts too. Both are first
compared: in float64 to SAME; the column ``error`` has the difference of the forces (of the energies
without them) in float32, relative to their norm. Steps take turns in one process. Times are seconds
of the processor on one thread: unlike those of the wall they do not hold the turns of others.

A step of training is forward, loss, backward and Adam, with the loss of ``studies.training``; one
of dynamics is energies and forces alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss

import attnpool_kernels
from attnpool_kernels import Ragged
from attnpool_kernels.zoo.model import PooledModel
from attnpool_kernels.zoo.molecules import Molecules

from ..measuring import clock
from ..measuring.sheet import BenchmarkError, Row
from ..reporting import tables
from .options import case_parser, cases_of, exit_code, started
from .training import load

SAME = 1e-11  # of energies, forces and gradients in float64, relative to their norms
CHECKED = 12  # molecules of the comparison
NAMES = ("edges", "pairs")
WHATS = ("energy step", "force step", "dynamics step")


class Case(NamedTuple):
    molecules: int
    cutoff: float
    width: int = 128
    interactions: int = 3

    def __str__(self) -> str:
        return f"x{self.molecules} SchNet {self.width}x{self.interactions} {self.cutoff:g} A"


CASES = {
    "small": Case(32, 5.0),
    "near": Case(128, 5.0),
    "far": Case(128, 10.0),
    "tiny": Case(4, 5.0, 8, 1),
}


def build(case: Case, name: str) -> PooledModel:
    torch.manual_seed(0)
    options = {"hidden_channels": case.width, "num_filters": case.width, "cutoff": case.cutoff}
    model = PooledModel.from_config(
        {
            "backbone": "schnet",
            "backbone_options": {**options, "num_interactions": case.interactions},
            "pooling": "abp",
            "pooling_options": {"hidden": case.width, "heads": 8, "seeds": 8, "activation": "silu"},
        }
    )
    if name == "edges":
        model.backbone.radial = lambda: None  # type: ignore[method-assign]
    return model.train()


def batch(case: Case, path: Path | None) -> tuple[str, Molecules]:
    data = load(path, case.molecules)
    ragged = Ragged.from_counts(data.sizes)
    made = Molecules(data.z, data.pos, ragged.ptr.long(), data.energy[:, None], data.forces)
    return data.source, made


def loss(model: PooledModel, molecules: Molecules, what: str) -> tuple[Tensor, list[Tensor]]:
    """The loss, and what it was made of."""
    assert molecules.y is not None and molecules.forces is not None
    if what == "energy step":
        energy = model(molecules)
        return l1_loss(energy, molecules.y), [energy]
    energy, forces = model.energy_and_forces(molecules)
    wanted = molecules.y[:, 0]
    total = 0.01 * mse_loss(energy, wanted) + 0.99 * mse_loss(forces, molecules.forces)
    return total, [energy, forces]


def stepper(case: Case, name: str, molecules: Molecules, what: str) -> Callable[[], object]:
    model = build(case, name)
    if what == "dynamics step":
        model.requires_grad_(False).eval()
        return lambda: model.energy_and_forces(molecules)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss(model, molecules, what)[0].backward()
        optimizer.step()

    return step


def compare(case: Case, molecules: Molecules, what: str) -> tuple[float, str]:
    """Difference in float32, and "" or what is different in float64."""
    wide, narrow = [], []
    for name in NAMES:
        part = molecules.select(range(min(CHECKED, len(molecules)))).to(dtype=torch.float64)
        model = build(case, name).double()
        total, outputs = loss(model, part, what)
        found = torch.autograd.grad(total, list(model.parameters()), materialize_grads=True)
        wide.append([total, *outputs, torch.cat([g.flatten() for g in found])])
        narrow.append(loss(build(case, name), molecules, what)[1][-1])
    far = [_apart(a, b) for a, b in zip(*wide)]
    wrong = "" if max(far) <= SAME else f"{max(far):.1e} apart in float64, allowed {SAME:g}"
    return _apart(*narrow), wrong


def _apart(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def run(case: Case, what: str, path: Path | None, budget_s: float) -> list[Row]:
    source, molecules = batch(case, path)
    error, reason = compare(case, molecules, what)
    rows = [_row(case, what, name, source, molecules) for name in NAMES]
    for row in rows:
        row.error, row.reason = error, reason
    if reason:
        for row in rows:
            row.status = "wrong"
        return rows
    steps = {name: stepper(case, name, molecules, what) for name in NAMES}
    for step in steps.values():
        step()
    samplers = {name: partial(_seconds, step) for name, step in steps.items()}
    timings = clock.interleave(samplers, budget_s)
    for row in rows:
        row.fill(timings[row.contender])
    return rows


def _seconds(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def _row(case: Case, what: str, name: str, source: str, molecules: Molecules) -> Row:
    return Row(
        suite="steps",
        family="steps",
        workload=f"{source} {case} float32",
        x=None,
        molecules=len(molecules),
        atoms=len(molecules.z),
        longest=int(molecules.ptr.diff().max()),
        heads=8,
        dim=case.width // 8,
        seeds=8,
        dtype="float32",
        layout="ragged",
        what=what,
        contender=name,
        kernel=f"attnpool_kernels {attnpool_kernels.__version__}, torch {torch.__version__}",
        ours=int(name == "pairs"),
        status="ok",
        check=f"within {SAME:g} in float64",
    )


def table(rows: list[Row]) -> str:
    lines = [["model", "step", "edges ms", "pairs ms", "times faster"]]
    for (workload, what), group in tables.grouped(rows, "workload", "what").items():
        edges, pairs = group
        if not (edges.timed and pairs.timed):
            lines.append([workload, what, f"{edges.status} {edges.reason}", "", ""])
            continue
        ratio = f"{edges.p50_ms / pairs.p50_ms:.2f}"
        lines.append([workload, what, f"{edges.p50_ms:.4g}", f"{pairs.p50_ms:.4g}", ratio])
    return tables.render(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = case_parser("steps", __doc__, CASES)
    parser.add_argument("--data", type=Path, metavar="NPZ", help="qm7b.npz (default: its sizes)")
    parser.set_defaults(threads=1)
    return exit_code(_main, parser.parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    names = cases_of(options, CASES)
    if options.data is not None and not options.data.exists():
        raise BenchmarkError(f"--data must be a file, got {options.data}")
    out = started(options, "benchmarks.studies.steps")
    for name in names:
        for what in WHATS:
            for row in run(CASES[name], what, options.data, options.budget):
                out.add(row)
            print(table(out.rows[-2:]), flush=True)
    return int(any(row.status != "ok" for row in out.rows))


if __name__ == "__main__":
    sys.exit(main())
