"""Drop-ins beside the modules that they replace: ``python -m benchmarks.studies.dropins``.

Both have the same weights. "backward" is forward and backward to the rows and all parameters;
"force step" the gradient of the squared gradient with respect to the rows. Calls of both take turns
in one process; first they are compared in float64. Peak memory is that of one call in a child
process, over what it held before.

GPSConv is a stack of ten layers as in torch_geometric's own example for ZINC (64 channels, 4 heads,
GINEConv); edge-set attention has the widths of the published QM9 runs (256, 16 heads), against
the same layers on a padded batch with a dense mask.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch_geometric
import torch_geometric.nn as pyg
from torch import Tensor
from torch.nn.functional import mish

import attnpool_kernels
from attnpool_kernels import Ragged
from attnpool_kernels.nn import EdgeSetAttention, MultiheadAttention, edge_sets
from attnpool_kernels.zoo import pyg as ours

from ..measuring import clock, memory
from ..measuring.sheet import Row
from ..reporting import tables
from ..workloads.sizes import draw
from .options import case_parser, cases_of, exit_code, started

SAME = 1e-8  # relative difference in float64
STEPS = ("backward", "force step")
Call = Callable[[torch.nn.Module, Tensor], Tensor]


@dataclass
class Case:
    """make(): their module and ours, unlike in class only; x: rows; call(module, x) → output."""

    name: str
    sizes: tuple[int, ...]
    make: tuple[Callable[[], torch.nn.Module], Callable[[], torch.nn.Module]]
    x: Tensor
    call: Call
    steps: tuple[str, ...] = ("backward",)

    def modules(self) -> list[torch.nn.Module]:
        torch.manual_seed(0)
        theirs, mine = (build() for build in self.make)
        mine.load_state_dict(theirs.state_dict())
        return [theirs, mine]


def graphs(family: str, count: int) -> tuple[tuple[int, ...], Ragged, Tensor]:
    """Sizes, boundaries, and edges of chains with a ring bond every six atoms, both ways."""
    sizes = draw(family, count)
    ragged = Ragged.from_counts(sizes)
    pairs = []
    for first, size in zip(ragged.ptr.tolist(), sizes):
        bonds = [(i, i + 1) for i in range(size - 1)] + [(i, i + 5) for i in range(0, size - 5, 6)]
        pairs += [(first + a, first + b) for i, j in bonds for a, b in ((i, j), (j, i))]
    return tuple(sizes), ragged, torch.tensor(pairs).t()


class GPS(torch.nn.Module):
    """Ten GPS layers of 64 channels and 4 heads."""

    def __init__(self, layer: type) -> None:
        super().__init__()

        def conv() -> torch.nn.Module:
            inner = [torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64)]
            return pyg.GINEConv(torch.nn.Sequential(*inner))

        self.layers = torch.nn.ModuleList(layer(64, conv(), heads=4) for _ in range(10))

    def forward(self, x: Tensor, index: Tensor, batch: Tensor, attributes: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, index, batch, edge_attr=attributes)
        return x


class DenseEdgeSetAttention(EdgeSetAttention):
    """The same on a padded batch, as programs without ragged kernels have it."""

    def forward(self, x: Tensor, sets: Ragged, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        counts = sets.counts()
        longest = int(counts.max())
        real = torch.arange(longest) < counts[:, None]
        rows = x.new_zeros(*real.shape, x.shape[1]).index_put(real.nonzero(as_tuple=True), x)
        adjacent = _dense(bias, counts, longest) if bias is not None else None
        h, first = rows, rows
        layers = self.encoder.layers + "P"
        for kind, block in zip(layers, [*self.encoder.blocks, *self.decoder]):
            if kind == "P":
                h = h + first
            n = block.norm(h)
            y = self.seeds.expand(len(counts), -1, -1) if kind == "P" else n
            mask = adjacent if kind == "M" else real[:, None].expand(-1, y.shape[1], -1)
            a = _attend(block.attn, y, n, mask)
            h = a + mish(block.out(a)) + (0 if kind == "P" else n)
            h = h + block.mlp(block.norm_mlp(h))
        return mish(self.head(h.mean(1)))


def _dense(bias: Tensor, counts: Tensor, longest: int) -> Tensor:
    masks = []
    for part, n in zip(bias[:, 0].split((counts**2).tolist()), counts.tolist()):
        mask = torch.zeros(longest, longest, dtype=torch.bool)
        mask[:n, :n] = part.view(n, n) == 0
        masks.append(mask)
    return torch.stack(masks)


def _attend(attn: torch.nn.Module, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    weights, biases = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    q, k, v = (
        torch.nn.functional.linear(z, w, b).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        for z, w, b in zip((x, y, y), weights, biases)
    )
    logits = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~mask[:, None], -torch.inf)
    alive = mask.any(2)[:, None, :, None]
    p = torch.where(alive, logits, 0.0).softmax(3) * alive
    return (p @ v).transpose(1, 2).flatten(2)


def rows_of(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


def _gps(family: str, molecules: int) -> Case:
    sizes, ragged, index = graphs(family, molecules)
    attributes, batch = rows_of(index.shape[1], 64), ragged.batch()

    def call(module: torch.nn.Module, x: Tensor) -> Tensor:
        return module(x, index, batch, attributes.to(x.dtype))

    make = (partial(GPS, pyg.GPSConv), partial(GPS, ours.GPSConv))
    return Case(
        f"GPSConv, 10 layers, {family} x{molecules}", sizes, make, rows_of(sum(sizes), 64), call
    )


def _multihead(family: str, molecules: int) -> Case:
    sizes, ragged, _ = graphs(family, molecules)
    longest = max(sizes)
    padding = torch.arange(longest) >= ragged.counts()[:, None]
    x = rows_of(molecules * longest, 128).view(molecules, longest, 128)

    def call(module: torch.nn.Module, x: Tensor) -> Tensor:
        out = module(x, x, x, padding, need_weights=False)[0]
        return out.masked_fill(padding[:, :, None], 0.0)

    make = tuple(
        partial(kind, 128, 8, batch_first=True)
        for kind in (torch.nn.MultiheadAttention, MultiheadAttention)
    )
    return Case(f"MultiheadAttention 128/8, padded {family} x{molecules}", sizes, make, x, call)


def _aggregation(name: str, arguments: tuple, family: str, molecules: int) -> Case:
    sizes, ragged, _ = graphs(family, molecules)
    batch = ragged.batch()
    call = lambda module, x: module(x, batch, dim_size=molecules)  # noqa: E731
    make = (partial(getattr(pyg.aggr, name), *arguments), partial(getattr(ours, name), *arguments))
    return Case(f"{name}, {family} x{molecules}", sizes, make, rows_of(sum(sizes), 64), call)


def _esa(edges: int, molecules: int) -> Case:
    """Graphs of ``edges`` directed edges at most, of chains half as long and longer."""
    sizes = tuple(edges // 4 + (i * 7) % (edges // 4) + 1 for i in range(molecules))
    ragged = Ragged.from_counts(sizes)
    pairs = [
        (first + a, first + b)
        for first, size in zip(ragged.ptr.tolist(), sizes)
        for i in range(size - 1)
        for a, b in ((i, i + 1), (i + 1, i))
    ]
    sets, bias = edge_sets(torch.tensor(pairs).t(), ragged)
    make = tuple(
        partial(kind, 256, layers="MSMSMP", heads=16, seeds=32)
        for kind in (DenseEdgeSetAttention, EdgeSetAttention)
    )
    rows = rows_of(len(pairs), 256)
    return Case(
        f"EdgeSetAttention 256/16 MSMSMP, up to {edges} edges x{molecules}",
        tuple(sets.counts().tolist()),
        make,
        rows,
        lambda module, x: module(x, sets, bias),
        STEPS,
    )


CASES: dict[str, Callable[[], Case]] = {
    "gps-18": lambda: _gps("QM9-like", 128),
    "gps-55": lambda: _gps("n=55+-20", 128),
    "multihead": lambda: _multihead("n=55+-20", 128),
    "set2set": lambda: _aggregation("Set2Set", (64, 4), "QM9-like", 128),
    "gmt": lambda: _aggregation("GraphMultisetTransformer", (64, 8, 1, 4), "n=55+-20", 128),
    "esa-94": lambda: _esa(94, 64),
    "esa-1000": lambda: _esa(1000, 4),
    "tiny": lambda: _aggregation("Set2Set", (64, 1), "QM9-like", 2),
}
NAMES = ("theirs", "attnpool")


def results(case: Case, module: torch.nn.Module, x: Tensor, what: str) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = case.call(module, x)
    wanted = [x, *module.parameters()]
    if what == "backward":
        return [out, *torch.autograd.grad(out.sum(), wanted, materialize_grads=True)]
    (force,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    loss = force.square().sum()
    return [out, force, *torch.autograd.grad(loss, wanted, materialize_grads=True)]


def compare(case: Case, what: str) -> str:
    """ "" or what is different in float64."""
    x = case.x.double()
    found = [results(case, module.double(), x, what) for module in case.modules()]
    scale = max(float(a.detach().norm()) for a in found[0])
    for i, (a, b) in enumerate(zip(*found)):
        difference = float((a - b).detach().norm()) / max(float(a.detach().norm()), 1e-6 * scale)
        if not difference <= SAME:
            return f"result {i}: relative difference {difference:.2g}, allowed {SAME:g}"
    return ""


def measured(pipe, name: str, contender: int, what: str) -> memory.Probe:
    case = CASES[name]()
    module = case.modules()[contender]
    mark = memory.ready(pipe)
    results(case, module, case.x, what)
    return memory.Probe("ok", peak_bytes=mark.peak())


def run(name: str, what: str, budget_s: float) -> list[Row]:
    case = CASES[name]()
    rows = [_row(case, what, contender) for contender in (0, 1)]
    reason = compare(case, what)
    samplers = {}
    for i, (row, module) in enumerate(zip(rows, case.modules())):
        if reason:
            row.status, row.reason = "wrong", reason
            continue
        preload = ("attnpool_kernels.zoo.pyg",)
        found = memory.in_child(measured, (name, i, what), torch.get_num_threads(), 120.0, preload)
        row.peak_bytes = found.peak_bytes
        call = partial(results, case, module, case.x, what)
        call()
        samplers[NAMES[i]] = partial(clock.once, call, "cpu")
    timings = clock.interleave(samplers, budget_s)
    for row in rows:
        if row.contender in timings:
            row.fill(timings[row.contender])
    return rows


def _row(case: Case, what: str, contender: int) -> Row:
    versions = f"torch_geometric {torch_geometric.__version__}, torch {torch.__version__}"
    return Row(
        suite="dropins",
        family="dropins",
        workload=case.name,
        x=None,
        molecules=len(case.sizes),
        atoms=sum(case.sizes),
        longest=max(case.sizes),
        heads=0,
        dim=case.x.shape[-1],
        seeds=None,
        dtype="float32",
        layout=("padded", "ragged")[contender],
        what=what,
        contender=NAMES[contender],
        kernel=f"attnpool_kernels {attnpool_kernels.__version__}, {versions}",
        ours=contender,
        status="ok",
        check="outputs and gradients in float64",
    )


def table(rows: list[Row]) -> str:
    lines = [["module", "pass", "theirs ms", "ours ms", "times faster", "memory of theirs"]]
    for (workload, what), group in tables.grouped(rows, "workload", "what").items():
        theirs, mine = group
        if not (theirs.timed and mine.timed):
            lines.append([workload, what, f"{theirs.status} {theirs.reason}", "", "", ""])
            continue
        memory_of = "-"
        if theirs.peak_bytes and mine.peak_bytes:
            memory_of = f"{mine.peak_bytes / theirs.peak_bytes:.2f}"
        ratio = f"{theirs.p50_ms / mine.p50_ms:.2f}"
        times = f"{theirs.p50_ms:.4g}", f"{mine.p50_ms:.4g}"
        lines.append([workload, what, *times, ratio, memory_of])
    return tables.render(lines)


def main(arguments: list[str] | None = None) -> int:
    return exit_code(_main, case_parser("dropins", __doc__, CASES).parse_args(arguments))


def _main(options: argparse.Namespace) -> int:
    names = cases_of(options, CASES)
    out = started(options, "benchmarks.studies.dropins")
    for name in names:
        for what in CASES[name]().steps:
            for row in run(name, what, options.budget):
                out.add(row)
            print(table(out.rows[-2:]), flush=True)
    return int(any(row.status != "ok" for row in out.rows))


if __name__ == "__main__":
    sys.exit(main())
