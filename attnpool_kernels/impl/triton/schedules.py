"""Which launches a pass needs, with which tiles: by what is known about the molecules' sizes.

A molecule has the tile of its own size, never of its batch, so its bits do not depend on its batch:
"" up to MEDIUM rows, "_medium" up to LONG, "_long" beyond. A launch serves the sizes SHORTEST to
LONGEST - 1. Sizes that nobody has get no launch; its neighbours then serve their interval as well.
So what was known wrongly costs time, or other bits, but every molecule is served by one launch.

In a launch without long molecules a program has a whole segment (a molecule, or the rows of none)
and walks its tiles, of which there are few. In one for long molecules only there is a program for
each tile that a long molecule can have in so many rows, and in others one for each tile that any
can have: both find theirs by a search.
"""

from __future__ import annotations

import torch

from ...operands import Operands
from ...ragged import Sizes, sizes_of
from . import launch, tile_table

NO_LIMIT = 2**31 - 1
SEARCH, SEGMENT, LONG_ONLY = 0, 1, 2  # how a program finds its tiles: WALK in the kernels


def known(ptr: torch.Tensor, rows: int) -> Sizes | None:
    """The least and the most rows of a segment, those of no molecule being one too.

    None where they are unknown.
    """
    found = sizes_of(ptr)
    if found is None:
        return None
    rest = max(rows - found.rows, 0)
    if rest == 0:
        return found
    return Sizes(min(found.shortest, rest), max(found.longest, rest), found.rows)


def _bounds(ptr: torch.Tensor, rows: int) -> tuple[int, int]:
    sizes = known(ptr, rows)
    return (0, rows) if sizes is None else (sizes.shortest, min(sizes.longest, rows))


def of_queries(name: str, x: Operands) -> list[dict]:
    """Tiles of the launches over queries."""
    if x.q_ptr is None:  # seeds, which are the same for every molecule
        whole = dict(SHORTEST=0, LONGEST=NO_LIMIT, WALK=SEARCH, COMPLETES=True)
        return [launch.chosen(name, x) | whole]
    return _launches(name, x, *_bounds(x.q_ptr, x.q.shape[0]))


def of_keys(name: str, x: Operands, complete: int) -> list[dict]:
    """Tiles of the launches over keys; none where the queries' programs do all.

    complete: queries up to which they do those of a molecule, see ``alone``.
    """
    if x.k.shape[0] == 0 or alone(x, complete):
        return []
    least, most = _bounds(x.k_ptr, x.k.shape[0])
    return _launches(name, x, least, most)


def alone(x: Operands, complete: int) -> bool:
    """Whether the queries' programs write every gradient: no molecule has more than ``complete``
    queries, and those who have keys are those who have queries."""
    if x.q_ptr is None or x.q_ptr is not x.k_ptr or x.q.shape[0] != x.k.shape[0]:
        return False
    sizes = sizes_of(x.q_ptr)
    return sizes is not None and sizes.longest <= complete


def complete(launches: list[dict]) -> int:
    """Queries up to which a molecule's gradients are all written by these launches over queries."""
    most = 0
    for tile in launches:  # their sizes rise, without gaps
        if tile["COMPLETES"]:
            most = min(tile["BLOCK_M"], tile["LONGEST"] - 1)
        if most < tile["LONGEST"] - 1:
            break
    return most


def _launches(name: str, x: Operands, least: int, most: int) -> list[dict]:
    """Of the tiles that there are, those that sizes from ``least`` to ``most`` need."""
    medium = long = None
    if not launch.has_options(x) and not x.shared:
        medium, long = launch.tile(f"{name}_medium", x), launch.tile(f"{name}_long", x)
    return combined(launch.chosen(name, x), medium, long, least, most)


def combined(
    short: dict, medium: dict | None, long: dict | None, least: int, most: int
) -> list[dict]:
    """The launches of these tiles for sizes from ``least`` to ``most``."""
    tiles, starts = [short | dict(COMPLETES=True)], [0]
    # else the short tile would leave some sizes to the keys' programs, below those of this one
    if medium is not None and short["BLOCK_M"] >= tile_table.MEDIUM - 1:
        tiles.append(medium | dict(COMPLETES=True))
        starts.append(tile_table.MEDIUM)
    if long is not None:
        tiles.append(long | dict(COMPLETES=False))
        starts.append(tile_table.LONG)
    ends = [*starts[1:], NO_LIMIT]
    needed = [(t, e) for t, s, e in zip(tiles, starts, ends) if s <= most and least < e]
    found, start = [], 0
    for place, (tile, end) in enumerate(needed):
        last = place == len(needed) - 1
        walk = SEARCH
        if min(end - 1, most) < tile_table.LONG:
            walk = SEGMENT
        elif start >= max(tile["BLOCK_M"], tile["BLOCK_N"]):
            walk = LONG_ONLY
        found.append(tile | dict(SHORTEST=start, LONGEST=NO_LIMIT if last else end, WALK=walk))
        start = end
    return found


def query_programs(x: Operands, parts: int, tile: dict) -> int:
    """Programs of a head over queries; parts: the molecules, or what serves several of them."""
    if tile["WALK"] == SEARCH:
        return launch.query_tiles(x, parts, tile["BLOCK_M"])
    return _programs(x.q.shape[0], x.molecules, tile["WALK"], tile["BLOCK_M"])


def key_programs(x: Operands, tile: dict) -> int:
    """Programs of a head over keys."""
    if tile["WALK"] == SEARCH:
        return launch.tiles_of(x.k.shape[0], x.molecules, tile["BLOCK_N"])
    return _programs(x.k.shape[0], x.molecules, tile["WALK"], tile["BLOCK_N"])


def _programs(rows: int, molecules: int, walk: int, block: int) -> int:
    return molecules + 2 if walk == SEGMENT else 2 * (rows // block + 1)


def without_completion(tile: dict) -> dict:
    """For kernels that are no gradients of queries."""
    return {name: x for name, x in tile.items() if name != "COMPLETES"}
