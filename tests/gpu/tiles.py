"""Tiles of the Triton kernels: candidates for a sweep, other tiles for a while, and a file of them.

A tile is a tuple as in ``tile_table``: BLOCK_M, BLOCK_N, SLICE, warps, stages[, most registers].
"""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from attnpool_kernels.impl.triton import tile_table

FILE = Path(__file__).with_name("candidates.json")
Tile = tuple[int, ...]
NAMES = ("BLOCK_M", "BLOCK_N", "SLICE", "num_warps", "num_stages", "maxnreg")
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16", "fp64": "float64"}


@dataclass(frozen=True)
class Key:
    """Of an entry of the table: row, width and pass."""

    row: str
    width: int
    name: str

    def __str__(self) -> str:
        return f"{self.row} {self.width} {self.name}"

    @classmethod
    def of(cls, text: str) -> Key:
        row, width, name = text.split()
        return cls(row, int(width), name)


def options(tile: Tile) -> dict[str, int | None]:
    return dict(zip(NAMES, (*tile, None)))


def shipped(key: Key, capability: tuple[int, int] | None) -> Tile | None:
    """The entry of the table."""
    entry = tile_table.tile(key.name, capability, key.row, key.width, False)
    if entry is None:
        return None
    found = [entry[name] for name in NAMES]
    return tuple(found if found[-1] is not None else found[:-1])


@contextlib.contextmanager
def using(tiles: dict[Key, Tile]) -> Iterator[None]:
    """Other entries of the table inside."""
    original = tile_table.tile

    def tile(name, capability, row, width, *rest):
        entry = original(name, capability, row, width, *rest)
        other = tiles.get(Key(row, width, name))
        return entry if entry is None or other is None else entry | options(other)

    tile_table.tile = tile
    try:
        yield
    finally:
        tile_table.tile = original


def candidates() -> dict[Key, list[Tile]]:
    """What ``candidates.py`` has left over, the fewest instructions first."""
    known = json.loads(FILE.read_text())
    return {
        Key.of(name): [tuple(entry["tile"]) for entry in entries]
        for name, entries in known["entries"].items()
        if entries  # of some entries only the tile of the table is left
    }


def lines(capability: tuple[int, int], chosen: dict[Key, tuple[Tile, float, float]]) -> str:
    """Entries of ``tile_table._CHIPS``, with the microseconds before and after."""
    found = ["{  # for tile_table._CHIPS: check with tests/tools/aot.py before it ships"]
    for key, (tile, before, after) in chosen.items():
        place = (capability, key.row, key.width, key.name)
        found.append(f"    {place!r}: {tile!r},  # {1e6 * before:.1f} -> {1e6 * after:.1f} µs")
    return "\n".join([*found, "}"]).replace("'", '"') + "\n"


def take_over(text: str) -> dict[tuple, Tile]:
    """The entries of a file that ``lines`` has written."""
    return ast.literal_eval(text)
