"""The few sentences that the results come to, computed from their rows."""

from __future__ import annotations

from ..measuring.sheet import Row
from . import plot, tables


def lines(results: list[tuple[str, list[Row]]]) -> list[str]:
    """Sentences from (suite, rows) of every result file; the scaling of the first that has one."""
    found: list[str] = []
    scaled = False
    for name, rows in results:
        study = [r for r in rows if r.family == "scaling" and r.dtype == "float32"]
        if study and not scaled:
            found += _scaling([r for r in study if r.what == "forward"])
            scaled = True
        if name == "molecules":
            batches = [r for r in rows if r.family == "molecules"]
            found += _speed(batches, "batches of molecules, over the fastest other way")
        if name == "seeds":
            pooling = [r for r in rows if r.family == "seeds"]
            found += _speed(pooling, "seed pooling, over the fastest other way")
        if name == "modules":
            module = [r for r in rows if r.ours or r.contender == "pyg"]
            found += _speed(module, "the pooling module, over PyG's")
    return found


def _scaling(rows: list[Row]) -> list[str]:
    found, powers = [], []
    for (name,), own in tables.grouped(rows, "contender").items():
        time, memory = tables.exponents(own)
        if time is not None and memory is not None:
            powers.append(f"{plot.LABELS.get(name, name)} {time:.2f} and {memory:.2f}")
    if powers:
        found.append(
            f"Exponents of time and of memory against atoms, forward: {'; '.join(powers)}."
        )
    ours = [r for r in rows if r.ours and r.timed and r.x and r.peak_bytes is not None]
    if ours:
        row = max(ours, key=lambda r: r.x or 0)
        found.append(
            f"One molecule of {row.x:,} atoms, forward: {row.p50_ms / 1e3:.3g} s and "
            f"{tables.size(row.peak_bytes)}B over the inputs."
        )
    return found


def _speed(rows: list[Row], what: str) -> list[str]:
    parts = []
    for kind, label in plot.PASS.items():
        speeds = []
        chosen = [r for r in rows if r.what == kind]
        for group in tables.grouped(chosen, "workload").values():
            mine, other = tables.fastest(group, True), tables.fastest(group, False)
            if mine is not None and other is not None:
                speeds.append(other.p50_ms / mine.p50_ms)
        if speeds:
            parts.append(
                f"{label} {tables.geomean(speeds):.2f}x ({min(speeds):.2f} to {max(speeds):.2f}, "
                f"{len(speeds)} cases)"
            )
    return [f"Speed-up of {what}, geometric mean: {'; '.join(parts)}."] if parts else []
