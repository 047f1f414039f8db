"""Executed warp-instructions of the Triton kernels on sm_90: table, and a gate on it.

    python -m tools.executed_triton report [NAME ...]    counts and prints; NAME: a part of a line
    python -m tools.executed_triton update [NAME ...]    and writes them to triton_executed.csv
    python -m tools.executed_triton check [NAME ...]     against the budgets

A line of ``triton_executed.csv`` is a launch: what it issues for each (molecule, head), the bytes
its lanes ask for, its registers, shared memory and the blocks of a multiprocessor. "before" are the
kernels as they were when they were counted first, "now" the present ones. Counted over whole
periods of the tiling, in the middle of the batch, for one head (see ``tools.executed``).
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

import attnpool_kernels.impl.triton as backend
from attnpool_kernels import Ragged, ragged
from attnpool_kernels.operands import Cotangents, Operands, Options, Result, Tangents, accumulator
from tools import aot, executed, ptx, sass
from tools.simulated import passed

TABLE = Path(__file__).with_name("triton_executed.csv")
FIELDS = (
    "state", "triton", "line", "kernel", "instructions", "requested", "products", "registers",
    "stack", "shared", "code", "warps", "blocks",
)  # fmt: skip
# warp-instructions for each (molecule, head), as far as the kernels have got
BUDGETS: dict[str, float] = {
    "bf16 forward 1024 x 18": 1400,
    "bf16 forward 512 x 55": 3700,
    "bf16 backward 1024 x 18": 2950,
    "bf16 backward 512 x 55": 6000,
    "bf16 double_backward 1024 x 18": 5000,
    "bf16 double_backward 512 x 55": 24_500,
    "fp32 forward 1024 x 18": 4350,
    "fp32 forward 512 x 55": 13_100,
    "fp32 backward 1024 x 18": 10_600,
    "fp32 backward 512 x 55": 73_500,
    "fp32 double_backward 1024 x 18": 30_500,
    "bf16 forward 4 seeds 1024 x 18": 1200,
    "bf16 forward 1 x 4096": 0.30 * 4096**2,
    "bf16 backward 1 x 4096": 1.15 * 4096**2,
    "bf16 forward 16 seeds 1 x 100000": 1_460_000,
    "bf16 backward 16 seeds 1 x 100000": 5_400_000,
}
SLACK = 1.1
MOST = 128  # tiles of a head that are run where there is no period


@dataclass(frozen=True)
class Line:
    """One pass over equal molecules. seeds: shared queries; known: whether their sizes are."""

    row: str
    pass_name: str
    rows: int
    molecules: int = 1024
    heads: int = 8
    width: int = 64
    seeds: int | None = None
    known: bool = True

    def __str__(self) -> str:
        queries = f"{self.seeds} seeds " if self.seeds else ""
        known = "" if self.known else ", sizes unknown"
        return f"{self.row} {self.pass_name} {queries}{self.molecules} x {self.rows}{known}"

    @property
    def scores(self) -> int:
        """Of a (molecule, head)."""
        return self.rows * (self.seeds or self.rows)

    def launches(self) -> list[aot.Launch]:
        dtype, heads = aot.DTYPES[self.row], self.heads
        sizes = Ragged.from_counts([self.rows] * self.molecules)
        ptr = sizes.ptr.clone()
        if self.known:
            ragged.remember(ptr, sizes.sizes)
        k = torch.empty(self.rows * self.molecules, heads, self.width, dtype=dtype)
        q = k if self.seeds is None else k[: self.seeds]
        outs = q.shape if self.seeds is None else (self.molecules, *q.shape)
        out = torch.empty(outs, dtype=dtype)
        lse = torch.full(outs[:-1], 3.0, dtype=accumulator(dtype))
        x = Operands.plain(q, k, k, ptr if self.seeds is None else None, ptr)
        y, dy, options = Result(out, lse), Cotangents(out, None), Options(0.125)
        found: list[aot.Launch] = []
        with aot.as_device((9, 0), self.row), aot.on_launch(found.append):
            if self.pass_name == "forward":
                backend.forward(x, options)
            elif self.pass_name == "backward":
                backend.backward(x, y, dy, options, False)
            else:
                backend.double_backward(x, y, dy, Tangents(q, k, k), options)
        return found

    def measured(self) -> Iterator[executed.Measured]:
        for launch in self.launches():
            compiled = launch.compile(90)
            entry = ptx.Kernel(compiled.asm["ptx"])
            given = list(passed(launch))
            given += [0] * (len(entry.params) - len(given))  # Triton's scratch pointers
            small = [x for x in tensors(launch.arguments) if x.dim() < 3]
            found = executed.measure(
                compiled.asm["cubin"],
                None,
                launch.grid,
                32 * launch.options.get("num_warps", 4),
                executed.packed([size for _, size in entry.params], given),
                small,
                compiled.metadata.shared,
                blocks=self.blocks(launch),
            )
            yield found.renamed(launch.name)

    def blocks(self, launch: aot.Launch) -> list[int] | None:
        """Of the first head, whole periods of the tiling from the middle of the batch."""
        names = ("BLOCK_N" if "key" in launch.name else "BLOCK_M", "SPLIT", "BLOCK")
        block = next((launch.arguments[x] for x in names if x in launch.arguments), None)
        if self.seeds is not None and "SPLIT" in launch.arguments:
            block = launch.arguments["SPLIT"]
        tiles = launch.grid[0] // self.heads
        if launch.arguments.get("WALK") == 1:  # a program for each molecule
            return [tile * self.heads for tile in (tiles // 3, tiles // 2)]
        if block is None or launch.grid[0] % self.heads:
            return None
        molecules = block // math.gcd(self.rows, block)
        period = molecules * self.rows // block + molecules
        if self.molecules == 1 or tiles <= MOST or period > MOST:
            chosen = executed.spread(tiles, 8 if self.rows >= 1024 else MOST)
        else:
            chosen = list(range(tiles // 2, tiles // 2 + period))
        return [tile * self.heads for tile in chosen]


def tensors(x: Any) -> Iterator[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, dict | tuple):
        for member in x.values() if isinstance(x, dict) else x:
            yield from tensors(member)


def lines() -> list[Line]:
    """The most telling first."""
    found = []
    for row in ("bf16", "fp32"):
        for name in ("forward", "backward", "double_backward"):
            for rows in (18, 55):
                found.append(Line(row, name, rows, 1024 if rows == 18 else 512))
    found += [Line("bf16", name, 18, known=False) for name in ("forward", "backward")]
    found += [Line("bf16", name, 18, seeds=4) for name in ("forward", "backward")]
    found += [Line("bf16", name, 4096, 1) for name in ("forward", "backward")]
    found += [Line("bf16", name, 100_000, 1, seeds=16) for name in ("forward", "backward")]
    return found


def written(state: str, line: Line) -> list[list[Any]]:
    unit = line.molecules * line.heads
    return [
        [
            state, triton.__version__, str(line), x.kernel, round(x.instructions / unit),
            round(x.requested / unit), round(x.products / unit), x.resources.registers,
            x.resources.stack, x.resources.shared, x.resources.bytes_of_code, x.resources.warps,
            x.resources.blocks,
        ]
        for x in line.measured()
    ]  # fmt: skip


def read() -> list[list[str]]:
    if not TABLE.exists():
        return []
    with TABLE.open() as file:
        return list(csv.reader(file))[1:]


def write(rows: list[list[Any]]) -> None:
    order = {str(line): n for n, line in enumerate(lines())}
    kept = [list(map(str, row)) for row in rows if str(row[2]) in order]
    kept.sort(key=lambda row: (order[row[2]], row[0]))
    with TABLE.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([FIELDS, *kept])


def total(rows: list[list[Any]]) -> float:
    return sum(float(row[4]) for row in rows)


def show(line: Line, rows: list[list[Any]]) -> None:
    for row in rows:
        print("  ", *row[3:], flush=True)
    per_score = f", {total(rows) / line.scores:.3f} for each score"
    print(f"{line}: {total(rows):.0f} for each (molecule, head){per_score}", flush=True)


def beyond(line: Line, rows: list[list[Any]]) -> str:
    """What is wrong with a line; empty where it is within its budget."""
    most = BUDGETS.get(str(line))
    if most is None or total(rows) <= SLACK * most:
        return ""
    return f"{line}: {total(rows):.0f} warp-instructions, the budget is {most:.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("report", "update", "check"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--state", default="now")
    given = parser.parse_args()
    bad = 0
    for line in lines():
        if given.names and not any(name in str(line) for name in given.names):
            continue
        try:
            found = written(given.state, line)
        except sass.SassError as error:
            print(f"{line}: {error}", flush=True)
            bad += 1
            continue
        show(line, found)
        if given.mode == "update":
            others = [x for x in read() if (x[0], x[2]) != (given.state, str(line))]
            write([*others, *found])
        if given.mode == "check" and (wrong := beyond(line, found)):
            print("FINDING", wrong)
            bad += 1
    return bad


if __name__ == "__main__":
    sys.exit(bool(main()))
