"""The table of performance goals, from the rows of the suite ``molecules``.

Speed-up is over the fastest other way from packed rows to packed rows; "limit" is the larger of
flops over the measured rate of multiply-adds and bytes over that of reading or copying as many. In
older results, and where that loop cannot run, it is named "the library's rates": of a matrix
product and of a copy.
"""

from __future__ import annotations

import statistics

from ..measuring.sheet import Row
from . import tables


def render(rows: list[Row]) -> str:
    """Goal, measured, and whether it is reached; one line each."""
    lines = [["goal", "wanted", "measured", ""]]
    for name, wanted, measured, reached in judge(rows):
        word = "" if wanted == "-" else "ok" if reached else "NOT REACHED"
        lines.append([name, wanted, measured, word])
    return "performance goals\n" + tables.render(lines)


def judge(rows: list[Row]) -> list[tuple[str, str, str, bool]]:
    """(goal, what is wanted, what was measured, whether it is reached) of what the rows hold."""
    found = [*_speed(rows), *_limits(rows), *_long(rows), *_second(rows), *_pooling(rows)]
    for workload, name, wanted, unit, scale in (
        ("import beyond torch", "import beyond import torch", 50.0, "ms", 1.0),
        ("one molecule of 5 atoms", "one forward call on one molecule", 40.0, "µs", 1e3),
    ):
        times = [r.p50_ms * scale for r in rows if r.timed and r.workload.startswith(workload)]
        if times:
            t = min(times)
            found.append((name, f"<= {wanted:g} {unit}", f"{t:.3g} {unit}", t <= wanted))
    return found


def _operator(rows: list[Row], what: str) -> list[tuple[Row, Row]]:
    """Ours and the fastest other, for each batch of real molecule sizes."""
    chosen = [r for r in rows if r.family == "molecules" and r.what == what]
    pairs = []
    for group in tables.grouped(chosen, "workload").values():
        mine, other = tables.fastest(group, True), tables.fastest(group, False)
        if mine is not None and other is not None:
            pairs.append((mine, other))
    return pairs


def _speed(rows: list[Row]) -> list[tuple[str, str, str, bool]]:
    found = []
    for what in ("forward", "backward"):
        pairs = _operator(rows, what)
        if not pairs:
            continue
        speeds = [other.p50_ms / mine.p50_ms for mine, other in pairs]
        mean = tables.geomean(speeds)
        name = f"{tables.WORDS[what]}, {len(pairs)} batches of molecules"
        found.append((f"{name}: geometric mean speed-up", ">= 4", f"{mean:.2f}", mean >= 4))
        low = [s for s, (mine, _) in zip(speeds, pairs) if s < 2 and (mine.ratio or 9) > 1.5]
        text = f"min {min(speeds):.2f}, {len(low)} too slow"
        found.append((f"{name}: each", ">= 2 or <= 1.5x limit", text, not low))
    return found


def _limits(rows: list[Row]) -> list[tuple[str, str, str, bool]]:
    found = []
    for label, kinds, allowed in (
        ("15 atoms (QM7b, QM8)", ("QM7b", "QM8"), 3.0),
        ("55 atoms (QMugs-like)", ("QMugs-like",), 1.6),
    ):
        chosen = [m for m, _ in _operator(rows, "forward") if m.ratio]
        chosen = [m for m in chosen if m.workload.startswith(kinds)]
        ratios = [m.ratio for m in chosen]
        if ratios:
            text = f"median {statistics.median(ratios):.2f}, worst {max(ratios):.2f}"
            name = f"forward over {tables.limit_name(chosen)} at {label}"
            found.append((name, f"<= {allowed:g}", text, max(ratios) <= allowed))
    for x in (512, 2048):
        for group in tables.grouped(
            [r for r in rows if r.family == "long" and r.x == x and r.what == "forward"], "workload"
        ).values():
            mine = tables.fastest(group, True)
            if mine and mine.ratio:
                name = f"forward over {tables.limit_name([mine])} at {x} atoms"
                found.append((name, "<= 1.6", f"{mine.ratio:.2f}", mine.ratio <= 1.6))
    return found


def _long(rows: list[Row]) -> list[tuple[str, str, str, bool]]:
    found = []
    chosen = [r for r in rows if r.family == "long" and r.x in (512, 2048)]
    for (x, what), group in tables.grouped(chosen, "x", "what").items():
        mine = tables.fastest(group, True)
        flash = [r for r in group if r.timed and r.contender in ("flash", "per_molecule")]
        if mine is not None and flash:
            speed = min(r.p50_ms for r in flash) / mine.p50_ms
            name = f"{tables.WORDS.get(what, what)}, n = {x}: over torch's flash"
            found.append((name, ">= 1.2", f"{speed:.2f}", speed >= 1.2))
    return found


def _second(rows: list[Row]) -> list[tuple[str, str, str, bool]]:
    found, speeds = [], []
    chosen = [r for r in rows if r.family == "molecules" and r.what == "double_backward"]
    for group in tables.grouped(chosen, "workload").values():
        mine = tables.fastest(group, True)
        naive = [r for r in group if r.timed and r.contender in ("naive", "einsum")]
        if mine is not None and naive:
            speeds.append(min(r.p50_ms for r in naive) / mine.p50_ms)
    if speeds:
        text = f"{tables.geomean(speeds):.2f}, min {min(speeds):.2f}"
        name = "second derivative over double autograd through naive"
        found.append((name, ">= 3", text, min(speeds) >= 3))
    huge = [r for r in rows if r.family == "long" and r.x == 16384 and r.ours]
    for row in huge:
        name = f"{tables.WORDS.get(row.what, row.what)}, n = 16384: memory over the inputs"
        if row.ok and row.peak_bytes is not None:
            text, fine = tables.size(row.peak_bytes), row.peak_bytes <= 1e9
        else:
            text, fine = row.status, False
        if row.status not in ("refused", "skipped"):
            found.append((name, "<= 1 GB", text, fine))
    return found


def _pooling(rows: list[Row]) -> list[tuple[str, str, str, bool]]:
    """seed_pool against the time to read k and v once; the goal is for S = 1 from 55 atoms on."""
    found = []
    chosen = [r for r in rows if r.family == "seeds" and r.what == "forward"]
    for (workload,), group in tables.grouped(chosen, "workload").items():
        mine = tables.fastest(group, True)
        if mine is None or not mine.ratio:
            continue
        name = f"seed_pool forward over {tables.limit_name([mine])}, {workload}"
        goal = mine.seeds == 1 and workload.startswith("QMugs")
        wanted = "<= 1.7" if goal else "-"
        found.append((name, wanted, f"{mine.ratio:.2f}", not goal or mine.ratio <= 1.7))
    return found
