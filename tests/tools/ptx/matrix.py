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


def full_warps(b: Block, i: Instruction, lanes) -> int:
    """How many warps take part; all lanes of each must be there."""
    threads = b.thread[lanes]
    counts = np.unique(threads // 32, return_counts=True)[1]
    if (counts != 32).any():
        raise PtxError(f"lanes are missing in a warp-wide instruction: {i.text}")
    return len(counts)


@handles("mma")
def multiply_matrices(b: Block, i: Instruction, lanes) -> None:
    shape, kind = i.opcode[3], i.opcode[7]
    target, left, right, acc = (operand.parts for operand in i.operands)
    call = MMA.get((shape, kind))
    if call is None or i.opcode[4:6] != ("row", "col") or i.opcode[6] not in ("f32", "f64"):
        raise not_implemented(i)
    warps = full_warps(b, i, lanes)
    result = F64 if kind == "f64" else F32

    def words(operand, as_type=U32):  # [warps, lanes]
        return b.read(operand, as_type, lanes).reshape(warps, 32)

    product = call(warps, words, left, right, kind)
    totals = []  # every input is read first, as a target may be one of them
    for n, old in enumerate(acc):
        part = product[:, GROUP + 8 * (n >> 1), MEMBER * 2 + (n & 1)]
        totals.append((part + words(old, result)).reshape(-1))
    for operand, total in zip(target, totals):
        b.write(operand, total, result, lanes)


def _half(warps, words, left, right, kind) -> np.ndarray:
    """m16n8k8 and m16n8k16 of float16 or bfloat16."""
    depth, half = 4 * len(left), parse_type(kind)
    x, y = np.zeros((warps, 16, depth)), np.zeros((warps, depth, 8))
    for n, operand in enumerate(left):
        for h, values in enumerate(_halves(words(operand), half)):
            x[:, GROUP + 8 * (n & 1), MEMBER * 2 + h + 8 * (n >> 1)] = values
    for n, operand in enumerate(right):
        for h, values in enumerate(_halves(words(operand), half)):
            y[:, MEMBER * 2 + h + 8 * n, GROUP] = values
    return x @ y


def _halves(words: np.ndarray, kind):
    for shift in (0, 16):
        yield half_value((words >> np.uint32(shift)).astype(np.uint16), kind)


def _tf32(warps, words, left, right, kind) -> np.ndarray:
    """m16n8k4 and m16n8k8; the tensor core ignores the low 13 bits."""
    depth = 2 * len(left)
    x, y = np.zeros((warps, 16, depth)), np.zeros((warps, depth, 8))
    for n, operand in enumerate(left):
        x[:, GROUP + 8 * (n & 1), MEMBER + 4 * (n >> 1)] = _truncated(words(operand))
    for n, operand in enumerate(right):
        y[:, MEMBER + 4 * n, GROUP] = _truncated(words(operand))
    return x @ y


def _truncated(words: np.ndarray) -> np.ndarray:
    return (words & np.uint32(0xFFFFE000)).view(np.float32)


def _f64(warps, words, left, right, kind) -> np.ndarray:
    """m8n8k4 (sm_80) and m16n8k4/8/16 (sm_90) of float64."""
    tall = 1 if len(left) == len(right) else 2  # tiles of 8 rows
    depth = 4 * len(right)
    x, y = np.zeros((warps, 8 * tall, depth)), np.zeros((warps, depth, 8))
    for n, operand in enumerate(left):
        x[:, GROUP + 8 * (n % tall), MEMBER + 4 * (n // tall)] = words(operand, F64)
    for n, operand in enumerate(right):
        y[:, MEMBER + 4 * n, GROUP] = words(operand, F64)
    return x @ y


MMA = {(shape, kind): _half for shape in ("m16n8k8", "m16n8k16") for kind in ("f16", "bf16")}
MMA |= {(shape, "tf32"): _tf32 for shape in ("m16n8k4", "m16n8k8")}
MMA |= {(shape, "f64"): _f64 for shape in ("m8n8k4", "m16n8k4", "m16n8k8", "m16n8k16")}


def _rows(b: Block, i: Instruction, operand, lanes) -> tuple[int, int, np.ndarray]:
    """(warps, tiles, addresses of their rows): lane 8 n + r holds that of row r of tile n."""
    if "m8n8" not in i.opcode or "b16" not in i.opcode:
        raise not_implemented(i)
    tiles = {"x1": 1, "x2": 2, "x4": 4}[next(x for x in i.opcode if x in ("x1", "x2", "x4"))]
    warps = full_warps(b, i, lanes)
    return warps, tiles, b.address(operand, lanes).reshape(warps, 32)[:, : 8 * tiles].reshape(-1)


@handles("ldmatrix")
def load_matrices(b: Block, i: Instruction, lanes) -> None:
    """8 x 8 tiles of 16-bit elements."""
    warps, count, addresses = _rows(b, i, i.operands[1], lanes)
    rows = b.load(addresses, 16, "shared", lanes, i.text)
    tiles = np.ascontiguousarray(rows).view(np.uint16).reshape(warps, count, 8, 8)
    if "trans" in i.opcode:
        tiles = tiles.swapaxes(2, 3)
    for n, target in enumerate(i.operands[0].parts):
        low, high = tiles[:, n, GROUP, MEMBER * 2], tiles[:, n, GROUP, MEMBER * 2 + 1]
        word = low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))
        b.write(target, word.reshape(-1), U32, lanes)


@handles("stmatrix")
def store_matrices(b: Block, i: Instruction, lanes) -> None:
    warps, count, addresses = _rows(b, i, i.operands[0], lanes)
    tiles = np.zeros((warps, count, 8, 8), np.uint16)
    for n, source in enumerate(i.operands[1].parts):
        word = b.read(source, U32, lanes).reshape(warps, 32)
        tiles[:, n, GROUP, MEMBER * 2] = word.astype(np.uint16)
        tiles[:, n, GROUP, MEMBER * 2 + 1] = (word >> np.uint32(16)).astype(np.uint16)
    if "trans" in i.opcode:
        tiles = tiles.swapaxes(2, 3)
    rows = np.ascontiguousarray(tiles).reshape(-1, 8).view(np.uint8)
    b.store(addresses, rows, "shared", lanes, i.text)
