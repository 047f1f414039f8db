"""The short table at the end of a run, and the exit code."""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any

from .case import BAD, STATUSES, UNFINISHED

LINES = 40  # of what went wrong; the rows have all of it


def table(rows: list[dict[str, Any]], blocks: list[ModuleType], skipped: int) -> list[str]:
    """A line per block, the blocks' own lines, and a line for each case that is not right."""
    cases = [row for row in rows if row["what"] == "case"]
    names = list(dict.fromkeys(row["block"] for row in cases))
    lines = ["", f"{'block':<12} {'cases':>5} {'s':>6}  outcome"]
    for name in names:
        own = [row for row in cases if row["block"] == name]
        counts = Counter(row["status"] for row in own)
        text = ", ".join(f"{counts[key]} {key}" for key in STATUSES if counts[key])
        took = sum(row.get("took", 0.0) for row in own)
        lines.append(f"{name:<12} {len(own):>5} {took:>6.1f}  {text}")
    if skipped:
        lines.append(f"{skipped} cases were done before")
    for block in blocks:
        if hasattr(block, "table"):
            try:
                lines += block.table([row for row in rows if row["block"] == block.NAME])
            except Exception as error:  # the rows are there, and other lines
                lines.append(f"no lines of {block.NAME}: {type(error).__name__}: {error}")
    wrong = [row for row in cases if row["status"] in BAD]
    for row in wrong[:LINES]:
        text = " ".join(str(row.get("text", "")).split())
        lines.append(f"{row['status'].upper():<8} {row['key']}: {text[:240]}")
    if len(wrong) > LINES:
        lines.append(f"and {len(wrong) - LINES} more")
    return lines


def verdict(rows: list[dict[str, Any]]) -> int:
    statuses = {row["status"] for row in rows if row["what"] == "case"}
    if statuses & set(BAD):
        return 1
    return 3 if statuses & set(UNFINISHED) else 0
