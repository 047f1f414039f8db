"""Training on forces, eager and compiled: ``python -m benchmarks.studies.compiled``.

A step is energy, forces and the gradient of a loss on both for all parameters. "compiled" is
``deploy.compiled.CompiledGradients``: the same recorded by make_fx and compiled by inductor.
Both are first compared in float64. Steps take turns in one process; the first compilation (of the
float32 graph, recording included) is in the column ``kernel``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

import attnpool_kernels
from attnpool_kernels import Ragged, set_attention
from attnpool_kernels.deploy.compiled import CompiledGradients
from attnpool_kernels.layouts import with_centres
from attnpool_kernels.zoo.backbones import backbone
from attnpool_kernels.zoo.graph import edges
from attnpool_kernels.zoo.model import PooledModel

from ..measuring import clock
from ..measuring.sheet import Row
from ..reporting import tables
from ..workloads.sizes import draw
from .options import case_parser, cases_of, exit_code, started

SAME = 1e-12  # of the gradients in float64, relative to the largest
NAMES = ("eager", "compiled")


@dataclass
class Case:
    """sizes: atoms of the molecules; model: takes z, pos, index, ptr → energy [B]."""

    name: str
    sizes: list[int]
    model: torch.nn.Module
    cutoff: float

    def batch(self, sizes: list[int]) -> tuple[Tensor, ...]:
        """z, pos, edges, boundaries, and targets of energies and forces; float32."""
        generator = torch.Generator().manual_seed(0)
        ragged = Ragged.from_counts(sizes)
        lattice = 1.4 * torch.cartesian_prod(*[torch.arange(7.0)] * 3)
        lattice = lattice[lattice.square().sum(1).argsort()]
        pos = torch.cat([lattice[:n] for n in sizes])
        pos = pos + 0.1 * torch.randn(pos.shape, generator=generator)
        z = torch.randint(1, 9, (len(pos),), generator=generator)
        index = edges(pos, ragged, self.cutoff)
        energy, force = (torch.randn(n, generator=generator) for n in ((len(sizes),), pos.shape))
        return z, pos, index, ragged.ptr, energy, force


def loss(model: torch.nn.Module, *batch: Tensor) -> Tensor:
    z, pos, index, ptr, wanted_energy, wanted_force = batch
    pos = pos.detach().requires_grad_()
    energy = model(z, pos, index, ptr)
    (gradient,) = torch.autograd.grad(energy.sum(), pos, create_graph=True)
    return 0.01 * mse_loss(energy, wanted_energy) + 0.99 * mse_loss(-gradient, wanted_force)


class FromEdges(torch.nn.Module):
    """A model of the zoo, which is given its neighbours."""

    def __init__(self, model: PooledModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor, pos: Tensor, index: Tensor, ptr: Tensor) -> Tensor:
        return self.model.from_edges(z, pos, index, ptr)[:, 0]


class Neighbourhoods(torch.nn.Module):
    """Two transformer layers over every atom with its edges, with PET's widths 128 and 8 heads."""

    def __init__(self, cutoff: float, width: int = 128, heads: int = 8) -> None:
        super().__init__()
        self.cutoff, self.heads = cutoff, heads
        self.centre = torch.nn.Embedding(10, width)
        self.edge = torch.nn.Linear(4, width)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(4))
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(width, 3 * width) for _ in range(2))
        self.out = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(2))
        self.mlp = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Linear(width, 2 * width),
                torch.nn.SiLU(),
                torch.nn.Linear(2 * width, width),
            )
            for _ in range(2)
        )
        self.head = torch.nn.Linear(width, 1)

    def forward(self, z: Tensor, pos: Tensor, index: Tensor, ptr: Tensor) -> Tensor:
        atoms = torch.arange(z.shape[0] + 1)
        row_ptr = torch.searchsorted(index[1].contiguous(), atoms)
        vector = pos.index_select(0, index[0]) - pos.index_select(0, index[1])
        distance = vector.square().sum(1, keepdim=True).sqrt()
        edge = self.edge(torch.cat([vector, distance], 1)) + self.centre(z)[index[0]]
        smooth = 0.5 * (torch.cos(distance[:, 0] * (torch.pi / self.cutoff)) + 1)
        x, sets = with_centres(self.centre(z), edge, row_ptr)
        key_bias, _ = with_centres(
            smooth.new_zeros(z.shape[0]), smooth.clamp(min=1e-15).log(), row_ptr
        )
        for layer in range(2):
            rows = self.qkv[layer](self.norms[2 * layer](x))
            q, k, v = rows.unflatten(1, (3, self.heads, -1)).unbind(1)
            attended = set_attention(q, k, v, sets, key_bias=key_bias).flatten(1)
            x = x + self.out[layer](attended)
            x = x + self.mlp[layer](self.norms[2 * layer + 1](x))
        energy = self.head(x.index_select(0, sets.ptr[:-1]))[:, 0]
        batch = torch.searchsorted(ptr, atoms[:-1], right=True) - 1
        return energy.new_zeros(ptr.shape[0] - 1).index_add(0, batch, energy)


def _schnet() -> Case:
    net = backbone("schnet", hidden_channels=128, num_filters=128, num_interactions=3, cutoff=5.0)
    options = {"hidden": 128, "heads": 8, "seeds": 8, "encoder_blocks": 1}
    model = FromEdges(PooledModel(net, "abp", pooling_options=options))
    return Case("SchNet 128 + ABP 128, QM7b sizes x64", draw("QM7b", 64), model, 5.0)


def _neighbourhoods() -> Case:
    model = Neighbourhoods(4.0)
    return Case("neighbourhoods 128/8, 2 layers, QM9-like x32", draw("QM9-like", 32), model, 4.0)


def _tiny() -> Case:
    return Case("neighbourhoods 8/2, x3", [3, 4, 2], Neighbourhoods(4.0, 8, 2), 4.0)


CASES: dict[str, Callable[[], Case]] = {
    "schnet": _schnet,
    "neighbourhoods": _neighbourhoods,
    "tiny": _tiny,
}


def gradients(model: torch.nn.Module, batch: tuple[Tensor, ...]) -> list[Tensor]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss(model, *batch), wanted, materialize_grads=True))


def compare(case: Case) -> str:
    """ "" or what is different in float64; for other sizes than those that were recorded."""
    model = case.model.double()
    half = [case.batch(sizes) for sizes in (case.sizes, case.sizes[: 1 + len(case.sizes) // 2])]
    recorded, other = ([x.double() if x.is_floating_point() else x for x in b] for b in half)
    step = CompiledGradients(loss, model, *recorded)
    step(*other)
    eager = gradients(model, tuple(other))
    scale = max(float(g.abs().max()) for g in eager)
    worst = max(float((p.grad - g).abs().max()) for p, g in zip(step.parameters, eager)) / scale
    model.float()
    return "" if worst <= SAME else f"gradients {worst:.1e} apart, allowed {SAME:g}"


def run(name: str, budget_s: float) -> list[Row]:
    torch.manual_seed(0)
    case = CASES[name]()
    reason = compare(case)
    batch = case.batch(case.sizes)
    start = time.perf_counter()
    step = CompiledGradients(loss, case.model, *batch)
    step(*batch)
    seconds = time.perf_counter() - start
    rows = [_row(case, contender, seconds) for contender in (0, 1)]
    if reason:
        for row in rows:
            row.status, row.reason = "wrong", reason
        return rows
    calls = partial(gradients, case.model, batch), partial(step, *batch)
    for call in calls:
        call()
    samplers = {key: partial(clock.once, call, "cpu") for key, call in zip(NAMES, calls)}
    timings = clock.interleave(samplers, budget_s)
    for row in rows:
        row.fill(timings[row.contender])
    return rows


def _row(case: Case, contender: int, seconds: float) -> Row:
    kernel = f"attnpool_kernels {attnpool_kernels.__version__}, torch {torch.__version__}"
    if contender:
        kernel += f", first compilation {seconds:.0f} s"
    return Row(
        suite="compiled",
        family="compiled",
        workload=case.name,
        x=None,
        molecules=len(case.sizes),
        atoms=sum(case.sizes),
        longest=max(case.sizes),
        heads=0,
        dim=0,
        seeds=None,
        dtype="float32",
        layout="ragged",
        what="force training",
        contender=NAMES[contender],
        kernel=kernel,
        ours=contender,
        status="ok",
        check=f"gradients within {SAME:g} in float64, other sizes than recorded",
    )


def table(rows: list[Row]) -> str:
    lines = [["model", "eager ms", "compiled ms", "times faster", "first compilation"]]
    for (workload,), group in tables.grouped(rows, "workload").items():
        eager, compiled = group
        if not (eager.timed and compiled.timed):
            lines.append([workload, f"{eager.status} {eager.reason}", "", "", ""])
            continue
        times = f"{eager.p50_ms:.4g}", f"{compiled.p50_ms:.4g}"
        ratio = f"{eager.p50_ms / compiled.p50_ms:.2f}"
        lines.append([workload, *times, ratio, compiled.kernel.split("compilation ")[1]])
    return tables.render(lines)


def main(arguments: list[str] | None = None) -> int:
    return exit_code(_main, case_parser("compiled", __doc__, CASES).parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    names = cases_of(options, CASES)
    out = started(options, "benchmarks.studies.compiled")
    for name in names:
        for row in run(name, options.budget):
            out.add(row)
        print(table(out.rows[-2:]), flush=True)
    return int(any(row.status != "ok" for row in out.rows))


if __name__ == "__main__":
    sys.exit(main())
