"""The shapes that are timed, the most telling first, and what each pass has to move and compute."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from benchmarks.workloads.batch import WorkloadBatch
from benchmarks.workloads.sizes import draw
from benchmarks.workloads.workload import Workload

from .passes import PASSES

ATOMS = (18, 55, 15, 32, 64)
WIDTHS = ((8, 64), (8, 32), (8, 16), (16, 64))
BATCHES = (1024, 128, 4096)
NEIGHBOURS = 10_000  # sets of 20 to 60 rows
LONG = (4096, 16_384)
HUGE = 100_000  # rows of one set that few queries attend to


@dataclass(frozen=True)
class Shape:
    """sizes: rows of each set; seeds: shared queries instead of the rows."""

    name: str
    sizes: tuple[int, ...] = field(repr=False)
    heads: int
    dim: int
    seeds: int | None = None
    family: str = "equal"

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    def workload(self, dtype: torch.dtype) -> Workload:
        return Workload(self.name, self.family, self.sizes, self.heads, self.dim, self.seeds, dtype)

    def bytes(self, what: str, dtype: torch.dtype) -> int:
        """Of one pass by itself, every tensor once: what it is given and what it returns.

        Rows of q, k, v and out; backward those of q, k, v, dout, dq, dk, dv; second derivative of
        q, k, v, dout, ddq, ddk, ddv, gq, gk, gv, gdout. The LSE is given or returned, too.
        """
        place = PASSES.index(what)
        keys = (2, 4, 6)[place] * self.rows
        outs = (1, 1, 2)[place]  # out, dout; dout and gdout
        queries = (1, 2, 3)[place]  # q; q and dq; q, ddq and gq
        if self.seeds is None:
            attending = (outs + queries) * self.rows
            lse = self.rows
        else:
            lse = len(self.sizes) * self.seeds
            attending = outs * lse + queries * self.seeds
        wide = 8 if dtype == torch.float64 else 4
        return self.heads * (self.dim * (keys + attending) * dtype.itemsize + lse * wide)

    def flops(self, what: str) -> float:
        """Of the matrix products of one pass: 2, 5 (one again) and 12."""
        products = {"forward": 2, "backward": 5, "double_backward": 12}[what]
        pairs = sum(n * (self.seeds or n) for n in self.sizes)
        return 2.0 * products * pairs * self.heads * self.dim

    def facts(self) -> dict[str, int | float | None]:
        return {
            "sets": len(self.sizes),
            "rows": self.rows,
            "longest": max(self.sizes),
            "heads": self.heads,
            "dim": self.dim,
            "seeds": self.seeds,
        }


def equal(atoms: int, molecules: int, heads: int, dim: int) -> Shape:
    name = f"{molecules} x {atoms} atoms, {heads}x{dim}"
    return Shape(name, (atoms,) * molecules, heads, dim)


def every() -> list[Shape]:
    """All shapes, in the order in which they are worth their time."""
    found = [equal(n, 1024, h, d) for h, d in WIDTHS for n in ATOMS]
    found += special()
    found += [equal(n, b, h, d) for b in BATCHES[1:] for h, d in WIDTHS for n in ATOMS]
    return found


def special() -> list[Shape]:
    real = [
        Shape(f"{kind} x {count}, 8x32", draw(kind, count), 8, 32, family="molecules")
        for kind, count in (("QM7b", 1024), ("QMugs-like", 512))
    ]
    seeds = [
        Shape(f"{s} seeds, {kind} x 1024, 8x32", draw(kind, 1024), 8, 32, s, "seeds")
        for s in (1, 4, 32)
        for kind in ("QM7b", "QMugs-like")
    ]
    rng = random.Random(0)
    around = tuple(rng.randint(20, 60) for _ in range(NEIGHBOURS))
    neighbours = [
        Shape(f"{NEIGHBOURS} neighbour sets, {h}x{d}", around, h, d, family="neighbours")
        for h, d in ((8, 16), (10, 64))
    ]
    few = [
        Shape(f"{s} queries, one set of {HUGE}, 8x64", (HUGE,), 8, 64, s, "few queries")
        for s in (1, 16)
    ]
    long = [Shape(f"one set of {n}, 8x64", (n,), 8, 64, family="long") for n in LONG]
    return [*real, *neighbours, *seeds, *few, *long]


def tiny() -> list[Shape]:
    """One of each kind, for a rehearsal."""
    return [
        equal(5, 3, 2, 16),
        Shape("ragged, 2x8", (4, 9, 1), 2, 8, family="molecules"),
        Shape("2 seeds, ragged, 2x16", (4, 9, 1), 2, 16, 2, "seeds"),
    ]


def of(device: str) -> list[Shape]:
    return every() if device == "cuda" else tiny()


def named(name: str, device: str) -> Shape:
    return next(shape for shape in of(device) if shape.name == name)


def without_values(shape: Shape, dtype: torch.dtype) -> WorkloadBatch:
    """A batch on the CPU whose tensors were never written: for host code that reads only shapes.

    Nothing of their memory is touched, so the largest costs nothing.
    """
    work = shape.workload(dtype)
    row = (work.heads, work.dim)
    rows = (work.atoms,) if work.seeds is None else (work.seeds,)
    outs = rows if work.seeds is None else (len(work.sizes), work.seeds)
    inputs = [torch.empty(*n, *row, dtype=dtype) for n in (rows, (work.atoms,))]
    inputs.append(torch.empty_like(inputs[1]))
    return WorkloadBatch(
        work,
        "cpu",
        seed=0,
        ptr=torch.tensor([0, *work.sizes]).cumsum(0),
        inputs=inputs,
        dout=torch.empty(*outs, *row, dtype=dtype),
        cotangents=[torch.empty_like(x) for x in inputs],
    )
