"""What the Triton kernels take, variant by variant, and its summary.

``build/triton_<version>.json`` keeps what was found of every variant, with a digest of what was
compiled (sources, signature, constants, options), so that an update compiles what has changed only.
``triton_resources.csv`` is its summary, to be committed and reviewed: the most of all widths and
architectures, and a digest over theirs, so that no stale line goes unnoticed.

    python -m tools.triton_table check                digests of the summary, and a sample compiled
    python -m tools.triton_table check --all          everything compiled; exit code 1 on a finding
    python -m tools.triton_table update [--minutes M] compiles what the table lacks; summary
    python -m tools.triton_table report               every variant with predicted occupancy
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import json
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import triton

from tools.aot import GFX942, SHARED_LIMIT, Record, Variant, digest, examine, short, variants

SUMMARY = pathlib.Path(__file__).with_name("triton_resources.csv")
TABLE = pathlib.Path(__file__).resolve().parents[2] / "build" / f"triton_{triton.__version__}.json"
SAMPLE = 149  # every 149th variant where nothing has changed


def read_table() -> dict[str, list]:
    """{key: [registers, spill, shared, unit, digest]} of this version of Triton, as built here."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def write_table(entries: dict[str, list]) -> None:
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(json.dumps(entries))


class Line(NamedTuple):
    """A line of the summary: the most that any of its variants takes."""

    triton: str
    chips: str
    row: str
    pass_name: str
    options: str
    variants: int
    registers: int
    spilled: int
    shared: int
    digest: str

    @property
    def name(self) -> tuple[str, str, str, str]:
        return self.chips, self.row, self.pass_name, self.options


def digests() -> dict[tuple[str, str, str, str], tuple[int, str]]:
    """Of every line: its variants, counted, and the digest of what they are compiled from."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for variant in variants():
        found.setdefault(variant.line, []).append(f"{variant.key} {digest(variant)}")
    return {name: (len(texts), short("\n".join(texts))) for name, texts in found.items()}


def summary() -> dict[tuple[str, str, str, str], Line]:
    """The committed lines of this version of Triton; {} where there are none."""
    with SUMMARY.open() as file:
        rows = [row for row in csv.DictReader(file) if row["triton"] == triton.__version__]
    numbers = ("variants", "registers", "spilled", "shared")
    lines = [
        Line(**{name: int(x) if name in numbers else x for name, x in r.items()}) for r in rows
    ]
    return {line.name: line for line in lines}


def write_summary(entries: dict[str, list]) -> None:
    """Replaces the lines of this version of Triton; those of others stay."""
    others = []
    if SUMMARY.exists():
        with SUMMARY.open() as file:
            others = [x for x in list(csv.reader(file))[1:] if x[0] != triton.__version__]
    most: dict[tuple[str, str, str, str], list[int]] = {}
    for variant in variants():
        numbers = most.setdefault(variant.line, [0, 0, 0])
        numbers[:] = map(max, numbers, entries[variant.key])
    lines = [Line(triton.__version__, *x, n, *most[x], text) for x, (n, text) in digests().items()]
    with SUMMARY.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([Line._fields, *sorted([*others, *(list(map(str, x)) for x in lines)])])


def stale(chosen: Iterable[Variant]) -> list[Variant]:
    """Variants that the table lacks, or has for other sources, tiles or options."""
    entries = read_table()
    return [v for v in chosen if v.key not in entries or entries[v.key][-1] != digest(v)]


def outdated() -> list[str]:
    """Lines of the summary that are of other sources, or of no variant, and those that lack."""
    lines, now = summary(), digests()
    old = [x for x, line in lines.items() if now.get(x) != (line.variants, line.digest)]
    return [" ".join(x) for x in [*old, *(now.keys() - lines.keys())]]


def beyond(line: Line | None, record: Record) -> list[str]:
    """What a variant takes more of than its line says."""
    if line is None:
        return []
    found = {"registers": record.registers > line.registers, "shared": record.shared > line.shared}
    return [f"{name} beyond the summary's" for name, more in found.items() if more]


def examined(chosen: list[Variant], jobs: int) -> Iterator[tuple[Variant, Record, list[str]]]:
    if jobs > 1:
        with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
            for variant, found in zip(chosen, pool.map(examine, chosen, chunksize=4)):
                yield variant, *found
    else:
        for variant in chosen:
            yield variant, *examine(variant)


def check(everything: bool, jobs: int) -> int:
    """Number of findings in a sample, or in all variants."""
    lines, chosen, bad = summary(), list(variants()), 0
    old = outdated() if lines else []
    for name in old:
        print(f"STALE {name}: run update")
    for variant, record, found in examined(chosen if everything else chosen[::SAMPLE], jobs):
        found += beyond(lines.get(variant.line), record)
        if not lines:  # tiles for another compiler: triton_versions.py judges what it spills
            spills = [x for x in found if "spills" in x]
            found = [x for x in found if x not in spills]
            for x in spills:
                print(f"no summary for this version: {variant.key}: {x}", flush=True)
        bad += len(found)
        for finding in found:
            print(f"FINDING {variant.key}: {finding} {record.line()}", flush=True)
    print(
        f"triton {triton.__version__}: {len(chosen)} variants, {len(lines)} lines of the summary, "
        f"{len(old)} stale, {bad} findings"
    )
    return bad + len(old)


def update(minutes: float, jobs: int) -> int:
    """Compiles the variants that the table lacks, as far as the time goes."""
    end, bad, chosen = time.monotonic() + 60 * minutes, 0, list(variants())
    missing = stale(chosen)
    keys = {v.key for v in chosen} - {v.key for v in missing}
    entries = {key: x for key, x in read_table().items() if key in keys}
    for done, (variant, record, found) in enumerate(examined(missing, jobs)):
        entries[variant.key] = [*record.line(), digest(variant)]
        bad += len(found)
        for finding in found:
            print(f"FINDING {variant.key}: {finding} {record.line()}", flush=True)
        if done % 50 == 49:
            write_table(entries)
        if time.monotonic() > end:
            print(f"{len(missing) - done - 1} of {len(chosen)} variants left for another call")
            break
    write_table(entries)
    if not stale(chosen):
        write_summary(entries)
    return bad


def report() -> int:
    """Registers, shared memory and the warps that fit a multiprocessor, of one molecule a tile."""
    warps_limit = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
    entries = read_table()
    for variant in variants():
        if variant.key in entries and variant.sm != GFX942:
            registers, stack, shared, unit, _ = entries[variant.key]
            tile = variant.tile
            warps = tile["num_warps"]
            blocks = min(
                65536 // (max(registers, 24) * 32 * warps),
                32,
                warps_limit[variant.sm] // warps,
                SHARED_LIMIT[variant.sm] * 1024 // (shared + 1024),
            )
            print(
                f"{variant.key:50s} {tile['BLOCK_M']:3d} x {tile['BLOCK_N']:3d} {warps} warps "
                f"{registers:4d} registers {shared:6d} B shared {unit:9s} {blocks:3d} blocks = "
                f"{blocks * warps:3d} warps of a multiprocessor; {stack} B spilled"
            )
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("check", "update", "report"))
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    call = {
        "check": lambda: check(given.all, given.jobs),
        "update": lambda: update(given.minutes, given.jobs),
    }
    sys.exit(bool(call.get(given.mode, report)()))
