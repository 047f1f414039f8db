"""One training step of a whole model, padded and not: ``python -m benchmarks.studies.training``.

PyG's SchNet with a pooling, 128 molecules of QM7b (of its sizes, where its file is not there).
A step is forward, loss, backward and Adam; in a force step forces are the gradient with respect to
positions and the loss is 0.01·MSE(energy) + 0.99·MSE(forces), which needs a second derivative.
Steps of all contenders take turns in one process. Before that each contender is compared in float64
with another implementation of the same pooling with the same weights.

Peak memory is that of one step in a child process, over what the process held before it: model,
state of Adam and batch.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch_geometric.nn
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss

import attnpool_kernels
from attnpool_kernels.zoo.pyg import MoleculeGraph, pooled_schnet

from ..measuring import clock, memory, rates, sheet
from ..measuring.provenance import provenance
from ..measuring.sheet import BenchmarkError, Row
from ..reporting import tables
from ..workloads.sizes import draw
from . import molecules
from .options import add_shared, exit_code, positive
from .poolings import CONTENDERS, SIZES, STEPS, PoolingContender, Size

SAME = 1e-9  # relative difference in float64 of outputs and gradients, for the same weights
CLOSE = 1e-4  # of float32 outputs from float64
CHECKED = 8  # molecules of the comparison


@dataclass
class Data:
    """z [N], pos [N, 3] in Å, batch [N], the sizes, and random targets [B], [N, 3]."""

    source: str
    z: Tensor
    pos: Tensor
    batch: Tensor
    sizes: tuple[int, ...]
    energy: Tensor
    forces: Tensor

    def to(self, dtype: torch.dtype) -> Data:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        converted = {
            name: x.to(dtype)
            for name, x in values.items()
            if isinstance(x, Tensor) and x.is_floating_point()
        }
        return replace(self, **converted)

    def first(self, count: int) -> Data:
        sizes = self.sizes[:count]
        n = sum(sizes)
        parts = (self.z[:n], self.pos[:n], self.batch[:n])
        return Data(self.source, *parts, sizes, self.energy[:count], self.forces[:n])


def load(path: Path | None, count: int) -> Data:
    """``count`` molecules of QM7b at random; without its file, pieces of a lattice of its sizes."""
    generator = torch.Generator().manual_seed(0)
    if path is not None or molecules.QM7B.exists():
        found = molecules.load(path)
        picked = torch.randperm(len(found.sizes), generator=generator)[:count].tolist()
        ends = torch.tensor(found.sizes).cumsum(0).tolist()
        rows = [torch.arange(ends[i] - found.sizes[i], ends[i]) for i in picked]
        index, sizes = torch.cat(rows), tuple(found.sizes[i] for i in picked)
        source, z, pos = "QM7b", found.z[index], found.pos[index]
    else:
        lattice = 1.4 * torch.cartesian_prod(*[torch.arange(3.0)] * 3)
        sizes = draw("QM7b", count)
        pos = torch.cat([lattice[:n] for n in sizes])
        pos = pos + 0.1 * torch.randn(pos.shape, generator=generator)
        z = torch.tensor([1, 1, 6, 6, 7, 8])[torch.randint(6, (len(pos),), generator=generator)]
        source = "QM7b sizes"
    batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    targets = (torch.randn(n, generator=generator) for n in ((len(sizes),), (len(z), 3)))
    return Data(source, z, pos.double(), batch, sizes, *targets).to(torch.float32)


def build(size: Size, pool: Callable[[Size], torch.nn.Module]) -> torch.nn.Module:
    torch.manual_seed(0)
    schnet = torch_geometric.nn.SchNet(
        size.width, size.width, size.interactions, interaction_graph=MoleculeGraph(10.0)
    )
    return pooled_schnet(schnet, pool(size))


def predicted(model: torch.nn.Module, data: Data, what: str) -> list[Tensor]:
    """Energies [B], in a force step also forces [N, 3] with their graph."""
    pos = data.pos.clone().requires_grad_(what == "force")
    energy = model(data.z, pos, data.batch).squeeze(1)
    if what == "energy":
        return [energy]
    return [energy, -torch.autograd.grad(energy.sum(), pos, create_graph=True)[0]]


def loss(model: torch.nn.Module, data: Data, what: str) -> Tensor:
    found = predicted(model, data, what)
    if what == "energy":
        return l1_loss(found[0], data.energy)
    return 0.01 * mse_loss(found[0], data.energy) + 0.99 * mse_loss(found[1], data.forces)


def stepper(contender: PoolingContender, size: Size, what: str) -> Callable[[Data], None]:
    model = build(size, contender.pool)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step(data: Data) -> None:
        optimizer.zero_grad()
        loss(model, data, what).backward()
        optimizer.step()

    return step


def compare(contender: PoolingContender, size: Size, what: str, data: Data) -> tuple[float, str]:
    """Error of float32 outputs, and "" or what is wrong.

    In float64 outputs and the gradient of all parameters must equal those of ``contender.like`` to
    SAME, relative to their norms; float32 outputs must be CLOSE to float64.
    """
    if contender.like is None:
        return 0.0, ""
    data = data.first(CHECKED)
    wide, model = data.to(torch.float64), build(size, contender.pool).double()
    other = build(size, contender.like).double()
    other.load_state_dict(model.state_dict())
    results = []
    for each in (model, other):
        out = predicted(each, wide, what)
        gradients = torch.autograd.grad(
            loss(each, wide, what), list(each.parameters()), materialize_grads=True
        )
        results.append([*(x.detach() for x in out), torch.cat([g.flatten() for g in gradients])])
    names = ["energy", "forces", "gradients"] if what == "force" else ["energy", "gradients"]
    wrong = []
    for name, a, b in zip(names, *results):
        difference = _relative(a, b)
        if not difference <= SAME:
            wrong.append(f"{name}: relative difference {difference:.2g}, allowed {SAME:g}")
    narrow = predicted(copy.deepcopy(model).float(), data, what)
    error = max(_relative(x.detach().double(), truth) for x, truth in zip(narrow, results[1]))
    if not error <= CLOSE:
        wrong.append(f"float32: relative error {error:.2g}, allowed {CLOSE:g}")
    return error, "; ".join(wrong)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def peak(contender: str, size: Size, what: str, data: Data, limit_s: float) -> memory.Probe:
    """Peak bytes of one step in a child process."""
    arguments = (contender, size, what, data)
    preload = ("attnpool_kernels.zoo.pyg",)
    return memory.in_child(_measured, arguments, torch.get_num_threads(), limit_s, preload)


def _measured(pipe, contender: str, size: Size, what: str, data: Data) -> memory.Probe:
    step = stepper(CONTENDERS[contender], size, what)
    step(data.first(2))  # makes the state of Adam, loads code
    mark = memory.ready(pipe)
    step(data)
    return memory.Probe("ok", peak_bytes=mark.peak())


def run(
    size: Size,
    what: str,
    names: list[str],
    data: Data,
    budget_s: float,
    limit_s: float,
    fewest: int,
    end: float,
) -> list[Row]:
    """Compares, measures and times the contenders of one size and step; a row each.

    What would begin after ``end`` of the monotonic clock is skipped.
    """
    rows, samplers = {}, {}
    for name in names:
        contender = CONTENDERS[name]
        if what not in contender.steps:
            continue
        rows[name] = row = _row(contender, size, what, data)
        if time.monotonic() > end:
            row.status, row.reason = "skipped", "out of time, see --minutes"
            continue
        try:
            row.error, row.reason = compare(contender, size, what, data)
            if row.reason:
                row.status = "wrong"
                continue
            step = stepper(contender, size, what)
            step(data.first(2))  # makes the state of Adam, loads code
        except Exception as error:
            row.status, row.reason = memory.classify(error)
            continue
        found = peak(name, size, what, data, limit_s)
        row.peak_bytes = found.peak_bytes
        if found.status != "ok":
            row.reason = f"no peak memory: {found.status} {found.reason}"
        samplers[name] = lambda step=step: clock.once(lambda: step(data), "cpu")
    for name, timing in clock.interleave(samplers, budget_s, fewest).items():
        rows[name].fill(timing)
    return list(rows.values())


def _row(contender: PoolingContender, size: Size, what: str, data: Data) -> Row:
    versions = f"torch_geometric {torch_geometric.__version__}, torch {torch.__version__}"
    return Row(
        suite="training",
        family="training",
        workload=f"{data.source} x{len(data.sizes)} {size} float32",
        x=None,
        molecules=len(data.sizes),
        atoms=sum(data.sizes),
        longest=max(data.sizes),
        heads=size.heads,
        dim=size.hidden // size.heads,
        seeds=size.seeds,
        dtype="float32",
        layout=contender.layout,
        what=f"{what} step",
        contender=contender.name,
        kernel=f"{contender.title}; attnpool_kernels {attnpool_kernels.__version__}, {versions}",
        ours=int(contender.ours),
        status="ok",
        check="" if contender.like is None else f"gradients and outputs, {CHECKED} molecules",
    )


def table(rows: list[Row]) -> str:
    """One line a contender: time, molecules per second, peak memory, time over that of ABP here."""
    lines = [["training step", "ms", "p20", "p80", "molecules/s", "peak MB", "x abp"]]
    for (workload, what), group in tables.grouped(rows, "workload", "what").items():
        lines.append([f"{workload}, {what}", *[""] * 6])
        ours = next((r.p50_ms for r in group if r.contender == "abp" and r.timed), None)
        for row in group:
            if not row.timed:
                lines.append([f"  {row.contender}: {row.status} {row.reason}", *[""] * 6])
                continue
            times = ["-" if x is None else f"{x:.4g}" for x in (row.p50_ms, row.p20_ms, row.p80_ms)]
            rate = f"{1e3 * row.molecules / row.p50_ms:.4g}"
            size = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
            over = f"{row.p50_ms / ours:.2f}" if ours else "-"
            lines.append([f"  {row.contender}", *times, rate, size, over])
    return tables.render(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m benchmarks.studies.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="contenders:\n" + "\n".join(f"  {c.name:14} {c.title}" for c in CONTENDERS.values()),
    )
    p.add_argument(
        "--steps",
        default="small:energy,small:force,published:energy",
        metavar="LIST",
        help="size:step,...; sizes "
        + "; ".join(f"{name} = {size}" for name, size in SIZES.items())
        + "; steps energy and force (default: %(default)s)",
    )
    p.add_argument(
        "--contenders", default=",".join(CONTENDERS), metavar="LIST", help="default: all of them"
    )
    p.add_argument("--molecules", type=int, default=128, help="in the batch (default: 128)")
    p.add_argument(
        "--budget",
        type=float,
        default=3.0,
        metavar="S",
        help="timed seconds per contender and step (default: 3)",
    )
    p.add_argument(
        "--minutes",
        type=float,
        default=3.5,
        metavar="M",
        help="begin with no contender later than this (default: 3.5)",
    )
    p.add_argument("--samples", type=int, default=3, metavar="N", help="at least (default: 3)")
    p.add_argument("--qm7b", type=Path, metavar="PATH", help="qm7b.npz for the real molecules")
    add_shared(p, "training")
    return p


def main(arguments: list[str] | None = None) -> int:
    return exit_code(_main, parser().parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    plan = [_known(step, SIZES, STEPS) for step in options.steps.split(",")]
    names = options.contenders.split(",")
    for name in names:
        if name not in CONTENDERS:
            known = ", ".join(CONTENDERS)
            raise BenchmarkError(f"--contenders must be of {known}, got {name!r}")
    positive(options, "molecules", "samples", "budget", "minutes", "threads")
    if options.threads:
        torch.set_num_threads(options.threads)
    begin = time.monotonic()
    end = begin + 60 * options.minutes
    data = load(options.qm7b, options.molecules)
    out = sheet.Sheet(options.output)
    chosen = {k: v for k, v in vars(options).items() if isinstance(v, str | int | float)}
    about = provenance("cpu", {"command": "python -m benchmarks.studies.training", **chosen})
    about["rates"] = rates.measure({torch.float32}, "cpu", 0.3).record()
    out.start(about)
    print(
        f"{about['device']}, {about['threads']} threads; {rates.said(about['rates'])}; "
        f"{len(data.sizes)} molecules, {len(data.z)} atoms ({data.source})",
        flush=True,
    )
    for size, what in plan:
        rows = run(SIZES[size], what, names, data, options.budget, 60.0, options.samples, end)
        for row in rows:
            out.add(row)
        print(table(rows), flush=True)
    print(f"results: {options.output}; {time.monotonic() - begin:.0f} s")
    failed = [row for row in out.rows if row.status not in ("ok", "skipped")]
    for row in failed:
        print(f"FAILED: {row.contender}, {row.workload}, {row.what}: {row.status} {row.reason}")
    return 1 if failed else 0


def _known(step: str, sizes: dict, whats: tuple[str, ...]) -> tuple[str, str]:
    size, _, what = step.partition(":")
    if size not in sizes or what not in whats:
        raise BenchmarkError(
            f"--steps must be size:step with sizes {', '.join(sizes)} and steps "
            f"{', '.join(whats)}, got {step!r}"
        )
    return size, what


if __name__ == "__main__":
    sys.exit(main())
