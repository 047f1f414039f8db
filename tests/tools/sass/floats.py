"""The few operations on floats that decide a path: comparisons, and divisions of integers."""

from __future__ import annotations

import numpy as np

from .instructions import COMPARE, joined, negation, put
from .machine import TRUE, Value, Warp, handles, unknown
from .parser import Operand


@handles("FSETP")
def compare_floats(warp, i, lanes):
    first, second, a, b, given = i.operands
    values = floats(warp, a), floats(warp, b)
    found = None
    if values[0] is not None and values[1] is not None:
        name = next(x for x in COMPARE if x in i.parts)
        found = COMPARE[name](*values)
    elif i.parts & {"NE", "NEU", "EQ", "EQU"}:  # floats of which one is unknown are not equal
        found = TRUE if i.parts & {"NE", "NEU"} else ~TRUE
    given = warp.predicate(given)
    warp.write(first, joined(i, found, given), lanes)
    warp.write(second, joined(i, negation(found), given), lanes)


def floats(warp: Warp, x: Operand) -> Value:
    bits = warp.raw(x)
    if bits is None:
        return None
    value = bits.view(np.float32)
    if x.kind == "imm":
        return value
    value = np.abs(value) if x.absolute else value
    return -value if x.negated else value


@handles("FCHK")
def check_division(warp, i, lanes):
    """Whether a quotient needs the slow path: it does not."""
    warp.write(i.operands[0], ~TRUE, lanes)


@handles("FADD", "FMUL", "FFMA", "FMNMX")
def arithmetic(warp, i, lanes):
    given = [floats(warp, x) for x in i.operands[1:] if x.kind not in ("P", "UP")]
    value = None
    if all(x is not None for x in given):
        if i.name == "FMNMX":
            least = warp.predicate(i.operands[3])
            if least is not None:
                value = np.where(least, np.fmin(*given[:2]), np.fmax(*given[:2]))
        elif i.name == "FADD":
            value = given[0] + given[1]
        else:
            value = given[0] * given[1]
            value = value + given[2] if i.name == "FFMA" else value
    warp.write(i.operands[0], None if value is None else np.float32(value).view(np.uint32), lanes)


@handles("I2F", "I2FP", "F2I", "MUFU")
def convert(warp, i, lanes):
    """As far as a division of 32-bit integers needs: its last steps correct what rounding does."""
    a, parts = warp.raw(i.operands[-1]), i.parts
    if a is None or parts & {"F64", "U64", "S64", "F16", "S16", "U16", "U8", "S8"}:
        return unknown(warp, i, lanes)
    value = None
    if i.name in ("I2F", "I2FP"):
        exact = a.astype(np.float64) if "U32" in parts else a.view(np.int32).astype(np.float64)
        value = exact.astype(np.float32)
        if "RP" in parts:
            value = np.where(value < exact, np.nextafter(value, np.float32(np.inf)), value)
        value = value.astype(np.float32).view(np.uint32)
    elif i.name == "F2I" and "U32" in parts:
        whole = np.trunc(a.view(np.float32).astype(np.float64))
        value = np.clip(whole, 0, 2**32 - 1).astype(np.uint32)
    elif i.name == "MUFU" and "RCP" in parts:
        value = (np.float32(1) / a.view(np.float32)).view(np.uint32)
    put(warp, i, value, lanes)


@handles("HFMA2")
def constant(warp, i, lanes):
    """Of nothing but zeros and two halves it is a constant: a way to spell MOV."""
    zeros = [x.kind == "R" and x.index == 255 for x in i.operands[1:3]]
    if not all(zeros) or len(i.operands) != 5:
        return unknown(warp, i, lanes)
    high, low = (np.float16(float(x.text)).view(np.uint16) for x in i.operands[3:])
    put(warp, i, np.full(32, int(high) << 16 | int(low), np.uint32), lanes)
