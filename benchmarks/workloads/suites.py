"""The workloads: which molecules, how wide, in which layout, and which suites they form.

Sizes count atoms with hydrogens. The histograms of QM7b (Montavon et al. 2013; 7,211 molecules) and
QM8 (21,786 molecules) are counts over the whole data sets. QM9-like and QMugs-like are *assumed*
normal shapes around the published mean, cut at the published maximum: no histogram was at hand.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

PASSES = ("forward", "backward", "double_backward")  # each contains the ones before it

HISTOGRAMS = {  # atoms per molecule: molecules
    "QM7b": {
        4: 1, 5: 2, 6: 5, 7: 7, 8: 21, 9: 64, 10: 147, 11: 269, 12: 495, 13: 777, 14: 767,
        15: 1219, 16: 786, 17: 1084, 18: 592, 19: 539, 20: 264, 21: 124, 22: 39, 23: 9,
    },
    "QM8": {
        3: 2, 4: 4, 5: 5, 6: 12, 7: 20, 8: 63, 9: 152, 10: 362, 11: 623, 12: 1069, 13: 1705,
        14: 2292, 15: 2701, 16: 3113, 17: 2716, 18: 2806, 19: 1311, 20: 1721, 21: 265, 22: 648,
        23: 33, 24: 145, 26: 18,
    },
}  # fmt: skip
NORMALS = {  # mean, standard deviation, smallest, largest: assumed shapes
    "QM9-like": (18.0, 3.0, 3, 29),
    "QMugs-like": (55.0, 35.0, 4, 228),
    "n=55+-20": (55.0, 20.0, 4, 228),
}
DISTRIBUTIONS = (*HISTOGRAMS, *NORMALS)


def draw(distribution: str, molecules: int, seed: int = 0) -> tuple[int, ...]:
    """Sizes of a batch of molecules; the same on every machine and Python version."""
    rng = random.Random(f"{distribution} {seed}")
    if distribution in HISTOGRAMS:
        histogram = HISTOGRAMS[distribution]
        return tuple(rng.choices(list(histogram), list(histogram.values()), k=molecules))
    mean, deviation, smallest, largest = NORMALS[distribution]
    sizes: list[int] = []
    while len(sizes) < molecules:
        size = round(rng.gauss(mean, deviation))
        if smallest <= size <= largest:
            sizes.append(size)
    return tuple(sizes)


@dataclass(frozen=True)
class Workload:
    """One batch. ``x`` is its place on the axis of its family (atoms per molecule, or seeds)."""

    name: str
    family: str
    sizes: tuple[int, ...]
    heads: int = 8
    dim: int = 32
    seeds: int | None = None  # shared queries: seed pooling instead of set attention
    dtype: torch.dtype = torch.float32
    layout: str = "separate"  # or "fused": q, k, v are views of one [N, 3, H, D]
    x: int | None = None
    passes: tuple[str, ...] = PASSES
    rivals: bool = True  # False: only our native backends, for what would take the others minutes
    patience: float = 1.0  # factor on the longest call that is waited for
    without: tuple[str, ...] = ()  # contenders left out unless they are asked for by name
    module: bool = False  # a whole Set Transformer pooling module instead of the operator

    @property
    def atoms(self) -> int:
        return sum(self.sizes)

    @property
    def pairs(self) -> int:
        """Query-key pairs of all molecules, for one head."""
        if self.seeds is not None:
            return self.seeds * self.atoms
        return sum(n * n for n in self.sizes)

    @property
    def key(self) -> str:
        """Names the workload in a CSV: two with one key would be the same measurement."""
        parts = [self.name, f"{self.heads}x{self.dim}", str(self.dtype).removeprefix("torch.")]
        parts += [f"S={self.seeds}"] * (self.seeds is not None) + [self.layout]
        return " ".join(parts)

    def work(self, what: str) -> tuple[float, float]:
        """Flops and bytes that no way to compute the passes can do without.

        Flops: 2 matrix products forward, 4 backward, 10 for the second derivative, where the
        weights are kept. (Kernels of linear memory compute 1 and 2 of them again.) Bytes: rows of
        q, k, v and out, each touched once; with out, their gradients and cotangents after.
        """
        products = {"forward": 2, "backward": 6, "double_backward": 16}[what]
        queries = self.atoms if self.seeds is None else len(self.sizes) * self.seeds
        k_rows = {"forward": 2, "backward": 6, "double_backward": 12}[what] * self.atoms
        q_rows = {"forward": 2, "backward": 6, "double_backward": 12}[what] * queries
        if self.seeds is not None:  # the seeds themselves are few: only out and its kin count
            q_rows //= 2
        row = self.heads * self.dim
        return 2.0 * products * self.pairs * row, float(
            (q_rows + k_rows) * row * self.dtype.itemsize
        )

    def make(self, device: str, seed: int = 0) -> Batch:
        return Batch(self, device, seed)


@dataclass
class Batch:
    """The tensors of a workload: ``inputs`` that are differentiated, and cotangents for each pass.

    q is [N, H, D] or, with seeds, [S, H, D]; k, v are [N, H, D]; out has the shape of q or
    [B, S, H, D]. A module workload has x [N, C] and the module's weights instead.
    """

    workload: Workload
    device: str
    seed: int = 0
    ptr: Tensor = field(init=False)
    inputs: list[Tensor] = field(init=False)
    dout: Tensor = field(init=False)
    cotangents: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        work = self.workload
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            x = torch.empty(shape, dtype=torch.float32, device=self.device)
            return x.normal_(generator=generator).to(work.dtype)

        counts = torch.tensor([0, *work.sizes], dtype=torch.int64)
        self.ptr = counts.cumsum(0).to(self.device)
        atoms, shape = work.atoms, (work.heads, work.dim)
        if work.module:
            from benchmarks.contenders.modules import draw_weights

            self.inputs = [normal(atoms, work.heads * work.dim), *draw_weights(work, normal)]
            self.dout = normal(len(work.sizes), (work.seeds or 1) * work.heads * work.dim)
        else:
            if work.seeds is not None:
                self.inputs = [normal(work.seeds, *shape), normal(atoms, *shape)]
                self.inputs.append(normal(atoms, *shape))
            elif work.layout == "fused":
                self.inputs = list(normal(atoms, 3, *shape).unbind(1))
            else:
                self.inputs = [normal(atoms, *shape) for _ in range(3)]
            rows = (atoms,) if work.seeds is None else (len(work.sizes), work.seeds)
            self.dout = normal(*rows, *shape)
        self.cotangents = [torch.empty(0)] * len(self.inputs)

    def prepare(self, what: str) -> None:
        """Makes leaves that require grad, and the cotangents of the pass, before any clock runs."""
        if what == "double_backward" and self.cotangents[0].numel() == 0:
            generator = torch.Generator(self.device).manual_seed(self.seed + 1)
            self.cotangents = [
                torch.empty(x.shape, dtype=torch.float32, device=self.device)
                .normal_(generator=generator)
                .to(x.dtype)
                for x in self.inputs
            ]
        grad = what != "forward"
        self.inputs = [x.detach().requires_grad_(grad) for x in self.inputs]
        self.dout = self.dout.detach().requires_grad_(what == "double_backward")

    def run(self, call: Callable[..., Tensor], what: str) -> dict[str, Tensor]:
        """One pass with everything before it; the tensors that it gives, by name."""
        if what == "forward":
            with torch.no_grad():
                return {"out": call(*self.inputs)}
        out = call(*self.inputs)
        if what == "backward":
            first = torch.autograd.grad(out, self.inputs, self.dout)
            return {"out": out.detach(), **{f"d{i}": x for i, x in enumerate(first)}}
        first = torch.autograd.grad(out, self.inputs, self.dout, create_graph=True)
        # A bias behind the last layer has no second derivative: zeros instead of an error.
        second = torch.autograd.grad(
            first,
            [*self.inputs, self.dout],
            self.cotangents,
            allow_unused=True,
            materialize_grads=True,
        )
        named = {"out": out.detach(), **{f"d{i}": x.detach() for i, x in enumerate(first)}}
        return named | {f"g{i}": x for i, x in enumerate(second)}


def _scaling(sizes: tuple[int, ...], **options) -> list[Workload]:
    return [Workload(f"n={n}", "scaling", (n,), x=n, **options) for n in sizes]


def _constant(atoms: int, sizes: tuple[int, ...]) -> list[Workload]:
    name = f"{atoms} atoms in molecules of "
    return [Workload(f"{name}{n}", "constant", (n,) * (atoms // n), x=n) for n in sizes]


def _molecules(kind: str, count: int, **options: Any) -> Workload:
    options = {"family": "molecules"} | options
    return Workload(f"{kind} x{count}", sizes=draw(kind, count), **options)


def _pooling(kind: str, count: int, seeds: tuple[int, ...], **options) -> list[Workload]:
    batch = _molecules(kind, count, **options)
    return [replace(batch, family="seeds", seeds=s, x=s) for s in seeds]


def _quick(device: str) -> list[Workload]:
    once = PASSES[:2]
    # With one molecule there is nothing to pad: these are the naive way or SDPA once more.
    slow = ("nested", "einsum", "attnpool:sdpa", "attnpool:reference")
    return [
        _molecules("QM7b", 128),
        _molecules("QM8", 128, layout="fused", passes=once),
        _molecules("QMugs-like", 64, passes=once),
        *_pooling("QM7b", 128, (1, 4, 32), passes=once),
        *_scaling((8, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384), without=slow),
    ]


# Not in the study of the paper, or never the fastest other way and minutes of a suite.
ADAPTERS = ("attnpool:sdpa", "attnpool:reference", "attnpool:flex")
SLOW = ("nested", "memory_efficient", "attnpool:reference", "attnpool:flex")


def _paper(device: str) -> list[Workload]:
    """The study (naive, memory-efficient, flash, ours against atoms), then batches and widths."""
    once = PASSES[:2]
    # What a CPU of today does in seconds; one call on 100,000 atoms takes it the better part of one
    # minute forward, and several with derivatives.
    largest = {"forward": 100_000, "backward": 16_384, "double_backward": 8192}
    sizes = [*(2**i for i in range(3, 17)), 100_000]
    if device == "cpu":
        sizes.remove(65_536)
    else:
        largest = dict.fromkeys(PASSES, 100_000)
    study = [
        replace(
            work,
            passes=tuple(what for what in PASSES if work.atoms <= largest[what]),
            patience=6.0 if work.atoms > 65_536 else 1.0,
        )
        for work in _scaling(tuple(sizes))
    ]
    mixed = (2000, *draw("QM9-like", 200))
    batches = [_molecules(kind, 128) for kind in ("QM7b", "QM8", "QM9-like", "QMugs-like")]
    batches.append(Workload("one of 2000 among 200 QM9-like", "mixed", mixed))
    wide = [
        _molecules("QM9-like", 128, heads=h, dim=d, passes=once)
        for h, d in ((4, 64), (16, 64), (4, 128), (8, 40))
    ]
    other = [
        _molecules("QM9-like", 128, dtype=dtype, passes=once)
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
    ]
    constant = _constant(16_384, tuple(2**i for i in range(3, 13)))
    constant = [replace(work, passes=once) for work in constant]
    study = [replace(w, without=("per_molecule", "nested", "einsum", *ADAPTERS)) for w in study]
    rest = [*batches, *constant[::2], *other, *wide, *constant[1::2]]
    return [*study, *[replace(w, without=("nested", "einsum", *ADAPTERS)) for w in rest]]


def _goals(device: str) -> list[Workload]:
    """The configurations that the performance goals name, see ``goals``."""
    kinds = ("QM7b", "QM8", "QMugs-like")
    widths = ((8, 32), (4, 64), (16, 64))
    few, many = (
        [
            _molecules(
                kind, count, heads=heads, dim=dim, layout=layout,
                passes=PASSES if layout == "separate" and count == 128 else PASSES[:2],
                without=SLOW if count > 128 else (),
            )
            for layout in ("separate", "fused")
            for heads, dim in widths
            for kind in kinds
        ]
        for count in (128, 1024)
    )  # fmt: skip
    long = [replace(w, family="long") for w in _scaling((512, 2048), passes=PASSES[:2])]
    huge = replace(_scaling((16384,))[0], family="long", rivals=False, patience=6.0)
    pooling = [
        work
        for kind in ("QMugs-like", "QM7b")
        for work in _pooling(kind, 1024, (1, 4, 32), passes=PASSES[:2], without=SLOW)
    ]
    separate = len(kinds) * len(widths)
    first, fused = few[:separate], few[separate:]
    return [*first, *long, pooling[0], *many[:3], *fused, huge, *pooling[1:], *many[3:]]


def _seeds(device: str) -> list[Workload]:
    giant = Workload("n=20000", "seeds", (20_000,), passes=PASSES[:2])
    found = []
    for counts in ((1, 4, 16, 64), (2, 8, 32)):
        found += _pooling("QM7b", 1024, counts, without=SLOW)
        found += _pooling("QMugs-like", 128, counts, without=SLOW)
        found += [replace(giant, seeds=s, x=s, without=SLOW) for s in counts]
    return found


def _modules(device: str) -> list[Workload]:
    once = PASSES[:2]
    return [
        _molecules(
            kind, 128, family="modules", module=True, heads=heads, dim=dim, seeds=seeds,
            passes=PASSES if seeds == 1 else once,
            without=("module_naive", "module_mha") if heads * dim > 256 else (),
        )
        for heads, dim, seeds in ((8, 16, 1), (8, 32, 32), (16, 64, 32))
        for kind in ("QM9-like", "n=55+-20")
    ]  # fmt: skip


SUITES: dict[str, tuple[str, Callable[[str], list[Workload]]]] = {
    "quick": ("scaling, QM7b, QM8, QMugs-like, seeds, all contenders", _quick),
    "paper": ("the scaling study: 8 to 100,000 atoms; distributions, widths, dtypes", _paper),
    "molecules": ("real molecule sizes, and the table of performance goals", _goals),
    "seeds": ("seed pooling with 1 to 64 seeds", _seeds),
    "modules": ("a whole Set Transformer pooling module, forward and force training", _modules),
}


def suite(name: str, device: str = "cpu", tiny: bool = False) -> list[Workload]:
    """The workloads of a suite, the most telling first. tiny: the same at toy sizes."""
    found = SUITES[name][1](device)
    if device != "cpu" and name in ("quick", "paper"):  # half precision is what GPUs are used for
        half = [w for w in found if w.dim == 32 and w.dtype == torch.float32]
        found = [*found, *[replace(w, dtype=torch.bfloat16) for w in half]]
        found = list({work.key: work for work in found}.values())
    if not tiny:
        return found
    small: dict[str, Workload] = {}
    for work in found:
        sizes = tuple(min(n, 64) for n in work.sizes[:4])
        name = f"n={sizes[0]}" if work.family == "scaling" else f"{work.name} (tiny)"
        x = sizes[0] if work.family == "scaling" else work.x
        work = replace(
            work, name=name, sizes=sizes, heads=2, dim=8, x=x,
            seeds=None if work.seeds is None else min(work.seeds, 4),
        )  # fmt: skip
        small.setdefault(work.key, work)
    return list(small.values())
