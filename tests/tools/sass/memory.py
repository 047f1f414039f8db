"""Loads, stores and copies: bytes are counted; contents are followed where they are known."""

from __future__ import annotations

import re

import numpy as np

from .machine import TRUE, Value, Warp, handles, width
from .parser import Instruction, Operand

U64 = np.uint64


def size_of(i: Instruction) -> int:
    """Bytes that a lane moves."""
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return next((n for name, n in sizes.items() if name in i.parts), 4)


PLACE = re.compile(
    r"(?:desc\[\w+\])?\[((?:R|UR)\w+)(\.64|\.U32|\.X\d+)?(?:\+(UR\w+))?(?:\+(-?0x[0-9a-f]+))?\]"
)


def address(warp: Warp, x: Operand) -> Value:
    """64-bit addresses of the lanes."""
    match = PLACE.fullmatch(x.text)
    if not match:
        return None
    register = match[1]
    kind = "UR" if register.startswith("UR") else "R"
    zero = register.endswith("RZ")
    at = Operand(kind, (63 if kind == "UR" else 255) if zero else int(register[len(kind) :]))
    base = warp.double(at) if match[2] == ".64" else warp.raw(at)
    if base is None or (match[2] or ".64").startswith(".X"):
        return None
    base = base.astype(U64)
    if match[3]:
        more = warp.raw(Operand("UR", int(match[3][2:])))
        if more is None:
            return None
        base = base + more.astype(U64)
    return base + U64(int(match[4] or "0", 16) & (2**64 - 1))


def requested(warp: Warp, i: Instruction, lanes: Value, also: Value = TRUE) -> None:
    """Counts bytes; of an unknown guard those of all lanes."""
    mask = warp.live if lanes is None else lanes
    if also is not None:
        mask = mask & also
    warp.block.count.requested += int(mask.sum()) * size_of(i)


@handles("LDG")
def load_global(warp, i, lanes):
    target = i.operands[0] if i.operands[0].kind == "R" else i.operands[1]
    place = next(x for x in i.operands if x.kind == "mem")
    requested(warp, i, lanes)
    where = address(warp, place)
    words = None
    if where is not None and lanes is not None and size_of(i) >= 4:
        words = warp.block.memory.words(where, width(i), lanes)
    for n in range(width(i)):
        warp.write(target, None if words is None else words[n], lanes, n)


@handles("STG", "RED")
def store_global(warp, i, lanes):
    requested(warp, i, lanes)


@handles("LDGSTS")
def copy_to_shared(warp, i, lanes):
    rest = [x for x in i.operands if x.kind in ("P", "UP")]
    requested(warp, i, lanes, warp.predicate(rest[0]) if rest else TRUE)
    forget(warp, i, lanes)


@handles("STS", "STSM", "UTMALDG", "ATOMS")
def store_shared(warp, i, lanes):
    place = address(warp, i.operands[0])
    if i.name != "STS" or place is None or lanes is None or size_of(i) < 4:
        return forget(warp, i, lanes)
    for n in range(size_of(i) // 4):
        value = warp.raw(i.operands[1], n)
        for lane in np.flatnonzero(lanes):
            warp.block.shared[int(place[lane]) + 4 * n] = None if value is None else value[lane]


def forget(warp: Warp, i: Instruction, lanes: Value) -> None:
    """Words of shared memory that are overwritten by something unknown."""
    if not warp.block.shared:
        return
    place = address(warp, i.operands[0])
    if place is None or lanes is None or (i.name != "LDGSTS" and i.name != "STS"):
        warp.block.shared.clear()
        return
    for lane in np.flatnonzero(lanes):
        for n in range(0, max(size_of(i), 4), 4):
            warp.block.shared.pop((int(place[lane]) & ~3) + n, None)


@handles("LDS")
def load_shared(warp, i, lanes):
    place = address(warp, i.operands[1])
    for n in range(width(i)):
        value = None
        if place is not None and lanes is not None and size_of(i) >= 4:
            found = [warp.block.shared.get(int(x) + 4 * n) for x in place[lanes]]
            if found and all(x is not None for x in found):
                value = np.zeros(32, np.uint32)
                value[lanes] = found
        warp.write(i.operands[0], value, lanes, n)


@handles("STL")
def store_local(warp, i, lanes):
    place = address(warp, i.operands[0])
    if (
        place is None
        or (place != place[0]).any()
        or size_of(i) < 4
        or lanes is None
        or not lanes.all()
    ):
        warp.local.clear()  # no register that was spilled
        return
    for n in range(size_of(i) // 4):
        warp.local[int(place[0]) + 4 * n] = warp.raw(i.operands[1], n)


@handles("LDL")
def load_local(warp, i, lanes):
    place = address(warp, i.operands[1])
    for n in range(width(i)):
        known = place is not None and (place == place[0]).all()
        value = warp.local.get(int(place[0]) + 4 * n) if known else None
        warp.write(i.operands[0], value, lanes, n)


@handles("ST", "UTMASTG", "UTMACMDFLUSH", "UTMAPF", "HGMMA_FENCE")
def store(warp, i, lanes):
    """Memory that is not followed: nothing is known of what it held either."""
