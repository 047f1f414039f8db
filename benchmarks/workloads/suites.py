"""The suites: which workloads belong together, the most telling first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .sizes import draw
from .workload import PASSES, Workload


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
                kind,
                count,
                heads=heads,
                dim=dim,
                layout=layout,
                passes=PASSES if layout == "separate" and count == 128 else PASSES[:2],
                without=SLOW if count > 128 else (),
            )
            for layout in ("separate", "fused")
            for heads, dim in widths
            for kind in kinds
        ]
        for count in (128, 1024)
    )
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
            kind,
            128,
            family="modules",
            module=True,
            heads=heads,
            dim=dim,
            seeds=seeds,
            passes=PASSES if seeds == 1 else once,
            without=("module_naive", "module_mha") if heads * dim > 256 else (),
        )
        for heads, dim, seeds in ((8, 16, 1), (8, 32, 32), (16, 64, 32))
        for kind in ("QM9-like", "n=55+-20")
    ]


def _neighbours(device: str) -> list[Workload]:
    """Sets of an atom and its neighbours, 20 to 60 rows, with the log of a cutoff as key bias."""
    sizes = draw("neighbours", 10_000)

    def sets(count: int, heads: int, dim: int, passes: tuple[str, ...] = PASSES) -> Workload:
        chosen = (sizes * (-(-count // len(sizes))))[:count]
        return Workload(
            f"{count} neighbourhoods",
            "neighbours",
            chosen,
            heads=heads,
            dim=dim,
            key_bias=True,
            passes=passes,
            x=count,
            without=SLOW,
        )

    found = [sets(n, 8, 16) for n in (2000, 1000, 10_000)]
    found += [sets(n, 10, 64, PASSES if n < 2000 else PASSES[:2]) for n in (1000, 2000)]
    if device != "cpu":  # 4 million rows
        found.append(sets(100_000, 8, 16))
    return found


def _shares(device: str) -> list[Workload]:
    """How much of the machine our kernels use; beside others where one giant has few seeds."""
    wide = [
        _molecules("40-80 atoms", 128, heads=8, dim=dim) for dim in (32, 64, 16, 24, 20, 40, 48)
    ]
    sets = [replace(w, name="1000 neighbourhoods") for w in _neighbours(device)[1:2]]
    sets += [replace(w, key_bias=False) for w in sets]
    small = [_molecules("10-20 atoms", 512, heads=8, dim=dim) for dim in (32, 20)]
    mixed = [_molecules("QMugs-like", 128, heads=8, dim=dim) for dim in (32, 64, 24)]
    giant, larger = (
        [Workload(f"n={n}", "shares", (n,), seeds=s, x=s, without=SLOW) for s in (1, 16, 32)]
        for n in (20_000, 200_000)
    )
    types = [
        _molecules("QMugs-like", 128, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float64)
    ]
    alone = [*wide, *sets, *small, *mixed, *_scaling((512, 2048)), *types, *larger]
    return [*giant, *[replace(work, family="shares", rivals=False) for work in alone]]


SUITES: dict[str, tuple[str, Callable[[str], list[Workload]]]] = {
    "quick": ("scaling, QM7b, QM8, QMugs-like, seeds, all contenders", _quick),
    "paper": ("the scaling study: 8 to 100,000 atoms; distributions, widths, dtypes", _paper),
    "molecules": ("real molecule sizes, and the table of performance goals", _goals),
    "neighbours": ("sets of 20 to 60 neighbours with a key bias, three passes", _neighbours),
    "seeds": ("seed pooling with 1 to 64 seeds", _seeds),
    "shares": ("our kernels alone: what share of the machine they use", _shares),
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
            work,
            name=name,
            sizes=sizes,
            heads=2,
            dim=8,
            x=x,
            seeds=None if work.seeds is None else min(work.seeds, 4),
        )
        small.setdefault(work.key, work)
    return list(small.values())
