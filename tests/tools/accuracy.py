"""Errors in units of the budget: ``make accuracy`` rewrites accuracy.csv.

A row is about a backend (and a vector width of the CPU kernels), a dtype and a pass, over the cases
of ``attnpool_kernels.testing`` and as many drawn ones, against float64: how many numbers, the
largest error and the 99.9th percentile, 1 being what a single number may be off. (Logits of 30 are
drawn too: torch's own operators, in ``reference``, are up to three times as far off there in single
numbers.) So a loss of accuracy that no test notices shows in review. ``tests/test_accuracy.py``
compares a part with the committed table.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from attnpool_kernels import testing
from attnpool_kernels.impl import cpu
from attnpool_kernels.testing.verdict import shares
from benchmarks.measuring.provenance import provenance

TABLE = Path(__file__).with_name("accuracy.csv")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PASSES = {"forward": ("out", "lse"), "backward": "d", "double_backward": "g"}
DRAWN = 60


class Line(NamedTuple):
    """A row of the table. numbers: how many were compared; largest, permille: see above."""

    backend: str
    dtype: str
    what: str
    numbers: int
    largest: float
    permille: float  # what one number in a thousand exceeds


def cases(count: int = DRAWN) -> list[testing.Case]:
    """The named cases, and drawn ones, which are the same everywhere."""
    rng = random.Random(0)
    sizes = (0, 1, 2, 3, 5, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129)
    widths = (1, 3, 8, 16, 17, 24, 32, 33, 64, 80)
    found = []
    for i in range(count):
        counts = tuple(rng.choice(sizes) for _ in range(rng.randint(1, 5)))
        found.append(
            testing.Case(
                f"drawn {i}",
                counts,
                heads=rng.choice((1, 2, 3)),
                dim=rng.choice(widths),
                value_dim=rng.choice((None, *widths)),
                seeds=rng.choice((None, None, 1, 3, 8, 17)),
                bias=rng.choice((None, None, "pair", "mask")),
                key_bias=rng.choice((None, None, "pair", "mask")),
                logits=rng.choice((1e-4, 1.0, 30.0)),
                dropout=rng.choice((0.0, 0.0, 0.3)),
                lse=rng.random() < 0.5,
            )
        )
    return [*testing.CASES, *found]


def backends() -> Iterator[tuple[str, Callable[[testing.Batch], dict]]]:
    """Names and what runs a batch: the CPU kernels by width, and the composites."""
    for width in [] if cpu.load() else widths():
        torch.ops.attnpool._use_isa(width)
        yield f"cpu {width}", lambda batch: testing.run_kernels(batch, cpu)
        torch.ops.attnpool._use_isa("")
    yield "reference", lambda batch: testing.run_public(batch, "reference")


def widths() -> list[str]:
    """The vector widths that run here."""
    found = []
    for name in torch.ops.attnpool.build_info().split("built for ")[1].split(";")[0].split():
        try:
            torch.ops.attnpool._use_isa(name)
        except RuntimeError:
            continue
        found.append(name)
    torch.ops.attnpool._use_isa("")
    return found


def lines(
    name: str,
    run: Callable[[testing.Batch], dict],
    dtype: torch.dtype,
    chosen: Iterable[testing.Case],
) -> list[Line]:
    """Of one backend and dtype, a line for each pass."""
    found: dict[str, list[torch.Tensor]] = {what: [] for what in PASSES}
    for case in chosen:
        result = run(case.make(dtype))
        batch = case.make(dtype)
        exact = testing.differentiate(
            lambda x, batch=batch: testing.dense(batch, torch.float64, x), batch, torch.float64
        )
        variances = testing.budget(batch, dtype)
        for key, truth in exact.items():
            good = truth.isfinite()
            x = [torch.where(good, y, 0.0).to(y.dtype) for y in (result[key], truth)]
            variance = torch.where(good, variances[key], 0.0)
            what = next(w for w, names in PASSES.items() if key in names or key[0] in names)
            found[what].append(shares(x[0].detach(), x[1].double(), variance).flatten())
    made = []
    for what, parts in found.items():
        every = torch.cat(parts)
        rank = max(1, round(0.999 * len(every)))
        made.append(
            Line(
                name,
                str(dtype).removeprefix("torch."),
                what,
                len(every),
                round(every.max().item(), 3),
                round(every.kthvalue(rank).values.item(), 3),
            )
        )
    return made


def read() -> dict[tuple[str, str, str], Line]:
    """The committed table by backend, dtype and pass."""
    with TABLE.open() as file:
        rows = list(csv.reader(line for line in file if not line.startswith("#")))
    found = [Line(*r[:3], int(r[3]), float(r[4]), float(r[5])) for r in rows[1:]]
    return {line[:3]: line for line in found}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=TABLE)
    options = parser.parse_args(arguments)
    about = provenance("cpu", {"command": "python -m tools.accuracy"})
    with options.output.open("w", newline="") as file:
        print("#", about, file=file)
        table = csv.writer(file)
        table.writerow(Line._fields)
        for name, run in backends():
            for dtype in DTYPES:
                for line in lines(name, run, dtype, cases()):
                    table.writerow(line)
                    print(*line, flush=True)
                file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
