"""Warp-wide matrix instructions: mma.sync, ldmatrix, stmatrix. Layouts as in the PTX ISA.

Products are summed in float64 and rounded once; tensor cores round differently, at the last bits.
"""

from __future__ import annotations

import numpy as np

from .instructions import half_value
from .machine import Block, handles, not_implemented
from .parser import F32, F64, U32, Instruction, PtxError, parse_type

LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4  # a lane's row and column in a fragment of 8 x 4


def full_warps(b: Block, i: Instruction, lanes):
    """Masks of the warps; all lanes of a warp must be there."""
    present = np.zeros(-(-b.threads // 32) * 32, bool)
    present[b.thread[lanes]] = True
    for w, warp in enumerate(present.reshape(-1, 32)):
        if warp.any():
            if not warp.all():
                raise PtxError(f"lanes are missing in a warp-wide instruction: {i.text}")
            yield slice(32 * w, 32 * w + 32)


@handles("mma")
def multiply_matrices(b: Block, i: Instruction, lanes) -> None:
    shape, kind = i.opcode[3], i.opcode[7]
    target, left, right, acc = i.operands
    call = MMA.get((shape, kind))
    if call is None or i.opcode[4:6] != ("row", "col") or i.opcode[6] not in ("f32", "f64"):
        raise not_implemented(i)
    for warp in full_warps(b, i, lanes):
        call(b, warp, target.parts, left.parts, right.parts, acc.parts, kind)


def _half(b: Block, warp, target, left, right, acc, kind) -> None:
    """m16n8k8 and m16n8k16 of float16 or bfloat16."""
    depth, half = 4 * len(left), parse_type(kind)
    x, y = np.zeros((16, depth)), np.zeros((depth, 8))
    for n, words in enumerate(left):
        for h, values in enumerate(_halves(b.read(words, U32, warp), half)):
            x[GROUP + 8 * (n & 1), MEMBER * 2 + h + 8 * (n >> 1)] = values
    for n, words in enumerate(right):
        for h, values in enumerate(_halves(b.read(words, U32, warp), half)):
            y[MEMBER * 2 + h + 8 * n, GROUP] = values
    _accumulate(b, warp, target, acc, x @ y)


def _halves(words: np.ndarray, kind):
    for shift in (0, 16):
        yield half_value((words >> np.uint32(shift)).astype(np.uint16), kind)


def _tf32(b: Block, warp, target, left, right, acc, kind) -> None:
    """m16n8k4 and m16n8k8; the tensor core ignores the low 13 bits."""
    depth = 2 * len(left)
    x, y = np.zeros((16, depth)), np.zeros((depth, 8))
    for n, words in enumerate(left):
        x[GROUP + 8 * (n & 1), MEMBER + 4 * (n >> 1)] = _truncated(b.read(words, U32, warp))
    for n, words in enumerate(right):
        y[MEMBER + 4 * n, GROUP] = _truncated(b.read(words, U32, warp))
    _accumulate(b, warp, target, acc, x @ y)


def _truncated(words: np.ndarray) -> np.ndarray:
    return (words & np.uint32(0xFFFFE000)).view(np.float32)


def _accumulate(b: Block, warp, target, acc, product, kind=F32) -> None:
    """target = product + acc; every input is read first, as a target may be one of them."""
    totals = []
    for n, old in enumerate(acc):
        part = product[GROUP + 8 * (n >> 1), MEMBER * 2 + (n & 1)]
        totals.append(part + b.read(old, kind, warp))
    for words, total in zip(target, totals):
        b.write(words, total, kind, warp)


def _f64(b: Block, warp, target, left, right, acc, kind) -> None:
    """m8n8k4 (sm_80) and m16n8k4/8/16 (sm_90) of float64."""
    rows = 8 if len(target) == 2 else 16
    tall = rows // 8
    depth = 4 * len(left) // tall
    x, y = np.zeros((rows, depth)), np.zeros((depth, 8))
    for n, words in enumerate(left):
        x[GROUP + 8 * (n % tall), MEMBER + 4 * (n // tall)] = b.read(words, F64, warp)
    for n, words in enumerate(right):
        y[MEMBER + 4 * n, GROUP] = b.read(words, F64, warp)
    _accumulate(b, warp, target, acc, x @ y, F64)


MMA = {(shape, kind): _half for shape in ("m16n8k8", "m16n8k16") for kind in ("f16", "bf16")}
MMA |= {(shape, "tf32"): _tf32 for shape in ("m16n8k4", "m16n8k8")}
MMA |= {(shape, "f64"): _f64 for shape in ("m8n8k4", "m16n8k4", "m16n8k8", "m16n8k16")}


def _count(i: Instruction) -> int:
    if "m8n8" not in i.opcode or not {"b16"} & set(i.opcode):
        raise not_implemented(i)
    return {"x1": 1, "x2": 2, "x4": 4}[next(x for x in i.opcode if x in ("x1", "x2", "x4"))]


@handles("ldmatrix")
def load_matrices(b: Block, i: Instruction, lanes) -> None:
    """8 x 8 tiles of 16-bit elements; lane 8 n + r holds the address of row r of tile n."""
    count = _count(i)
    for warp in full_warps(b, i, lanes):
        rows = b.load(b.address(i.operands[1], warp)[: 8 * count], 16, "shared", warp, i.text)
        tiles = np.ascontiguousarray(rows).view(np.uint16).reshape(count, 8, 8)
        for tile, target in zip(tiles, i.operands[0].parts):
            tile = tile.T if "trans" in i.opcode else tile
            low, high = tile[GROUP, MEMBER * 2], tile[GROUP, MEMBER * 2 + 1]
            word = low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))
            b.write(target, word, U32, warp)


@handles("stmatrix")
def store_matrices(b: Block, i: Instruction, lanes) -> None:
    count = _count(i)
    for warp in full_warps(b, i, lanes):
        tiles = np.zeros((count, 8, 8), np.uint16)
        for tile, source in zip(tiles, i.operands[1].parts):
            tile = tile.T if "trans" in i.opcode else tile
            word = b.read(source, U32, warp)
            tile[GROUP, MEMBER * 2] = word.astype(np.uint16)
            tile[GROUP, MEMBER * 2 + 1] = (word >> np.uint32(16)).astype(np.uint16)
        rows = np.ascontiguousarray(tiles.reshape(count * 8, 8)).view(np.uint8)
        address = b.address(i.operands[0], warp)[: 8 * count]
        b.store(address, rows, "shared", warp, i.text)
