"""Tables of results as plain text, and the numbers in them: exponents and speed-ups."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..measuring.rates import ARITHMETIC, MEMORY
from ..measuring.sheet import Row

WORDS = {
    "forward": "forward",
    "backward": "forward + backward",
    "double_backward": "forward + backward + second derivative",
}
FLOOR = 1e6  # bytes under which a peak is too close to the resolution to fit an exponent
RESOLUTION = 5e5  # bytes that resident memory may be off


def exponent(points: Iterable[tuple[float, float]]) -> float | None:
    """Slope of log y over log x by least squares; None for fewer than 3 points, or all at one x."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len(logs) < 3:
        return None
    mean_x = sum(x for x, _ in logs) / len(logs)
    mean_y = sum(y for _, y in logs) / len(logs)
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread if spread else None


def exponents(rows: list[Row]) -> tuple[float | None, float | None]:
    """Of time and of memory against x, over the largest sizes (from 512 on) of one contender."""
    good = [row for row in rows if row.timed and row.x is not None and row.x >= 512]
    time = exponent((row.x, row.p50_ms) for row in good)
    memory = exponent((row.x, row.peak_bytes) for row in good if (row.peak_bytes or 0) > FLOOR)
    return time, memory


def fastest(rows: list[Row], ours: bool) -> Row | None:
    """The fastest of our native backends, or the fastest other way."""
    good = [
        row
        for row in rows
        if row.timed and bool(row.ours) == ours and not row.contender.startswith("base:")
    ]
    return min(good, key=lambda row: row.p50_ms, default=None)


def is_limit(row: Row) -> bool:
    """Whether limit_ms is one; else it follows from the library's product, which can be beaten."""
    return row.limit_by in (ARITHMETIC, MEMORY)


def limit_name(rows: list[Row]) -> str:
    return "its limit" if all(map(is_limit, rows)) else "the library's rates"


def over(row: Row | None) -> tuple[str, str]:
    """The time of a row as a multiple of the limit, and of what the library's rates come to."""
    if row is None or not row.timed:
        return "-", "-"
    limit = row.ratio if is_limit(row) else None
    library = row.p50_ms / row.library_ms if row.library_ms else None
    if library is None and not is_limit(row):  # files older than that column
        library = row.ratio
    return tuple("-" if x is None else f"{x:.2f}" for x in (limit, library))


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple, list[Row]]:
    """Rows by the values of some columns, in the order of their first appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in names), []).append(row)
    return groups


def milliseconds(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def size(x: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= scale:
            return f"{x / scale:.3g}{unit}"
    return f"{x:.0f}"


def render(lines: list[list[str]]) -> str:
    """Columns aligned; the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def scaling(rows: list[Row], family: str = "scaling") -> str:
    """Time and memory against atoms per molecule, with fitted exponents."""
    parts = []
    chosen = [row for row in rows if row.family == family]
    for (what, dtype, heads, dim), group in grouped(
        chosen, "what", "dtype", "heads", "dim"
    ).items():
        xs = sorted({row.x for row in group if row.x is not None})
        # Every second size where there are many, with the smallest and the largest.
        odd = (len(xs) - 1) % 2
        shown = xs if len(xs) <= 10 else [x for i, x in enumerate(xs) if i % 2 == odd or i == 0]
        head = ["milliseconds | bytes over the inputs", *map(str, shown), "time ~", "memory ~"]
        lines = [head]
        for (name,), own in grouped(group, "contender").items():
            at = {row.x: row for row in own}
            if not any(row.timed for row in own):
                continue
            cells = [cell(at.get(x)) for x in shown]
            power = [f"n^{p:.2f}" if p is not None else "-" for p in exponents(own)]
            lines.append([name, *cells, *power])
        if len(lines) > 1:
            title = (
                f"{family}, {WORDS.get(what, what)}, {heads}x{dim} {dtype}, by atoms per molecule"
            )
            parts.append(title + "\n" + render(lines))
    return "\n\n".join(parts)


def cell(row: Row | None) -> str:
    """Milliseconds and, behind a bar, the memory; or the word for what happened."""
    if row is None:
        return ""
    if not row.ok:
        return row.status
    if not row.timed:
        return "-"
    if row.peak_bytes is None:
        return milliseconds(row.p50_ms)
    memory = size(row.peak_bytes) if row.peak_bytes >= RESOLUTION else "-"
    return f"{milliseconds(row.p50_ms)}|{memory}"


def batches(rows: list[Row], families: tuple[str, ...]) -> str:
    """One line a workload and pass: our time, its ratio to the limit, and the others' multiples."""
    chosen = [row for row in rows if row.family in families]
    names = list(dict.fromkeys(row.contender for row in chosen if row.timed and not row.ours))
    names = [name for name in names if not name.startswith("base:")]
    if not names:
        return ""
    lines = [["workload", "pass", "ours ms", "x limit", "x library", "speed-up", *names]]
    for (key, what), group in grouped(chosen, "workload", "what").items():
        mine, other = fastest(group, True), fastest(group, False)
        reference = mine or other
        if reference is None:
            continue
        at = {row.contender: row for row in group}
        cells = []
        for name in names:
            row = at.get(name)
            if row is not None and row.timed:
                cells.append(f"{row.p50_ms / reference.p50_ms:.2f}x")
            else:
                cells.append(cell(row))
        time = milliseconds(mine.p50_ms) if mine else "-"
        speed = f"{other.p50_ms / mine.p50_ms:.2f}" if mine and other else "-"
        short = what.replace("double_backward", "double")
        lines.append([key, short, time, *over(mine), speed, *cells])
    note = (
        "x limit: of the machine's multiply-adds and memory; x library: of its matrix product and "
        "copy; speed-up: over the fastest other; columns: time as a multiple of ours"
    )
    return f"{', '.join(families)} ({note})\n" + render(lines)


def refusals(rows: list[Row]) -> str:
    """Who did not run, and why; equal reasons once."""
    found: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if not row.ok and row.status != "skipped":
            key = (row.contender, row.status, row.reason)
            found[key] = found.get(key, 0) + 1
    lines = [f"  {name}: {status} ({n}x): {why[:150]}" for (name, status, why), n in found.items()]
    return "not timed\n" + "\n".join(lines) if lines else ""


def against_base(rows: list[Row]) -> str:
    """Time of the base ref over the time of this tree, case by case."""
    lines = [["case", "pass", "base ms", "now ms", "base / now"]]
    ratios = []
    for (key, what), group in grouped(rows, "workload", "what").items():
        at = {row.contender: row for row in group if row.timed}
        for name, row in at.items():
            if not name.startswith("base:") or name[5:] not in at:
                continue
            now = at[name[5:]]
            ratios.append(row.p50_ms / now.p50_ms)
            times = [milliseconds(x.p50_ms) for x in (row, now)]
            lines.append([f"{key} {name[5:]}", what, *times, f"{ratios[-1]:.2f}"])
    if not ratios:
        return ""
    return f"{render(lines)}\ngeometric mean {geomean(ratios):.2f} (over 1: this tree is faster)"


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def everything(rows: list[Row]) -> str:
    parts = [
        scaling(rows),
        scaling(rows, "constant"),
        batches(rows, ("molecules", "mixed", "long")),
        batches(rows, ("seeds",)),
        modules(rows),
        against_base(rows),
        refusals(rows),
    ]
    return "\n\n".join(part for part in parts if part)


def modules(rows: list[Row]) -> str:
    chosen = [row for row in rows if row.family == "modules"]
    names = list(dict.fromkeys(row.contender for row in chosen))
    if not names:
        return ""
    lines = [["module, milliseconds", "pass", *names]]
    for (key, what), group in grouped(chosen, "workload", "what").items():
        at = {row.contender: row for row in group}
        lines.append([key, what, *[cell(at.get(name)) for name in names]])
    return render(lines)
