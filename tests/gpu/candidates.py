"""Prunes tiles of the Triton kernels by their machine code, without a GPU, for the sweep on one.

    python tests/gpu/candidates.py --minutes 20       goes on where it ended
    python tests/gpu/candidates.py --only "bf16 64"

For each entry of the table a grid of tiles is compiled for sm_90. What spills much, repeats
products or needs more shared memory than there is goes; of the rest those with the fewest
instructions for molecules of 18 and 55 atoms, or sets of 1,024 and 4,096 rows, (warps x
instructions, loops as often as they run) are kept in ``candidates.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)
sys.path[1:1] = [str(ROOT / "tests")]

import triton  # noqa: E402
from tools import aot  # noqa: E402

from gpu import tiles  # noqa: E402
from gpu.tiles import Key, Tile  # noqa: E402

SM = 90
KEPT = 4  # of each entry, beside the one of the table
SPILLS = 64  # bytes
REPEATED = 1.5  # products that warps compute more than once, over those that are needed
ATOMS, LONG_ATOMS = (18, 55), (1024, 4096)
# BLOCK_M, BLOCK_N, warps
SHORT = (
    (16, 16, 1),
    (16, 32, 1),
    (16, 64, 1),
    (16, 64, 2),
    (32, 16, 2),
    (32, 32, 1),
    (32, 32, 2),
    (32, 64, 2),
    (64, 32, 2),
    (64, 32, 4),
    (64, 64, 4),
)
LONG = ((64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8))
FEW = ((16, 16, 1), (16, 32, 1), (16, 32, 2), (16, 64, 1), (16, 64, 2), (16, 64, 4))
KEYS = tuple(
    Key(row, width, name)
    for row, width in (("bf16", 64), ("bf16", 32), ("fp32", 64), ("fp32", 32))
    for name in (*aot.tile_table.PASSES, *aot.tile_table.FEW_PASSES, *aot.tile_table.LONG_PASSES)
)


def grid(key: Key) -> list[Tile]:
    """Tiles that are tried, that of the table first."""
    first = tiles.shipped(key, (9, 0))
    if first is None:
        return []
    few, long = key.name in aot.tile_table.FEW_PASSES, key.name in aot.tile_table.LONG_PASSES
    slices = min(key.width, 64 if key.row == "bf16" else 32)
    stages = 3 if long else first[4]
    chosen = FEW if few else LONG if long else SHORT
    made = [(m, n, slices, warps, stages, 255) for m, n, warps in chosen]
    return [first, *(tile for tile in made if tile[:5] != first[:5])]


def measured(key: Key, tile: Tile) -> dict | None:
    """What the machine code of a tile says; None where it does not compile."""
    variant = aot.Variant(SM, key.row, key.width, key.name)
    with tiles.using({key: tile}):
        launches = aot.launches(variant)
    found: dict = {"tile": list(tile), "registers": 0, "spills": 0, "shared": 0, "repeated": 1.0}
    atoms = LONG_ATOMS if key.name in aot.tile_table.LONG_PASSES else ATOMS
    work = dict.fromkeys(atoms, 0.0)
    for launch in launches:
        if "PRECISION" not in launch.arguments or launch.arguments.get("STATISTICS"):
            continue
        try:
            compiled = launch.compile(SM)
        except Exception:
            return None
        record = aot.resources(compiled)
        total, loop = instructions(compiled)
        warps = launch.options["num_warps"]
        for name, x in zip(("registers", "spills", "shared"), record.line()):
            found[name] = max(found[name], x)
        found["repeated"] = max(found["repeated"], repeated(compiled.asm["ttgir"]))
        for n in atoms:
            turns = math.ceil(n / tile[1])
            work[n] += warps * math.ceil(n / tile[0]) * (total - loop + loop * turns)
    return found | {"instructions": {str(n): round(x) for n, x in work.items()}}


def instructions(compiled) -> tuple[int, int]:
    """Machine instructions, and those of the longest loop with products."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = aot.tool("nvdisasm", "-c", file.name)
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"^\.(L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)(.*?);", line):
            found.append(instruction[1])
    longest = 0
    for place, instruction in enumerate(found):
        target = re.search(r"\bBRA\b.*?`\(\.(L_x_\d+)\)", instruction)
        start = labels.get(target[1], place) if target else place
        if start < place and any("MMA" in x for x in found[start:place]):
            longest = max(longest, place + 1 - start)
    return len(found), longest


def repeated(ttgir: str) -> float:
    """Products that all warps compute over those that the tiles hold: more warps than rows."""
    layouts = {
        found[1]: (int(found[2]), int(found[3]))
        for found in re.finditer(
            r"^(#mma\d*) = #ttg\.nvidia_mma<\{.*?warpsPerCTA = \[(\d+), (\d+)\]", ttgir, re.M
        )
    }
    needed = computed = 0.0
    pattern = (
        r"tt\.dot .*?: tensor<(\d+)x(\d+)x\w+, #ttg\.dot_op<\{opIdx = 0, parent = (#mma\d*).*?"
        r"\* tensor<\d+x(\d+)x"
    )
    for dot in re.finditer(pattern, ttgir):
        m, k, n = int(dot[1]), int(dot[2]), int(dot[4])
        rows, columns = layouts[dot[3]]
        times = max(1.0, rows * 16 / m) * max(1.0, columns * 8 / n)
        needed, computed = needed + m * k * n, computed + m * k * n * times
    return round(computed / needed, 2) if needed else 1.0


def pruned(entries: list[dict]) -> list[dict]:
    """The best of an entry's tiles but the first, that of the table, which is timed anyway."""
    good = [
        entry
        for entry in entries[1:]
        if entry["spills"] <= SPILLS
        and entry["repeated"] <= REPEATED
        and entry["shared"] <= aot.SHARED_LIMIT[SM] * 1024
    ]
    return sorted(good, key=cost)[:KEPT]


def cost(entry: dict) -> float:
    return math.prod(entry["instructions"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--only", default="", help="entries whose name begins so")
    given = parser.parse_args()
    end = time.monotonic() + 60 * given.minutes
    known = json.loads(tiles.FILE.read_text()) if tiles.FILE.exists() else {}
    if known.get("triton") != triton.__version__:
        known = {"triton": triton.__version__, "sm": SM, "entries": {}}
    for key in KEYS:
        if str(key) in known["entries"] or not str(key).startswith(given.only):
            continue
        found = [entry for tile in grid(key) if (entry := measured(key, tile)) is not None]
        if not found:
            continue
        for entry in found:
            print(key, entry, flush=True)
        known["entries"][str(key)] = pruned(found)
        tiles.FILE.write_text(written(known))
        if time.monotonic() > end:
            break


def written(known: dict) -> str:
    """JSON with a line for each tile."""
    entries = []
    for key, kept in known["entries"].items():
        own = ",\n".join(f"   {json.dumps(entry)}" for entry in kept)
        entries.append(f"  {json.dumps(key)}: [\n{own}\n  ]")
    head = json.dumps({key: x for key, x in known.items() if key != "entries"})[1:-1]
    return f'{{\n {head},\n "entries": {{\n' + ",\n".join(entries) + "\n }\n}\n"


if __name__ == "__main__":
    main()
