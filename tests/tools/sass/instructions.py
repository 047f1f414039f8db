"""Instructions on integers, predicates and a few floats. Handlers: (warp, instruction, lanes).

A result is unknown where an operand is, but for a predicate that a known one decides.
"""

from __future__ import annotations

import numpy as np

from .machine import LANES, TRUE, Value, Warp, handles, unknown, width
from .parser import Instruction, Operand

U64 = np.uint64
LOW = U64(0xFFFFFFFF)
COMPARE = {
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal,
    "EQ": np.equal, "NE": np.not_equal,
    "LTU": lambda a, b: ~(a >= b), "LEU": lambda a, b: ~(a > b), "GTU": lambda a, b: ~(a <= b),
    "GEU": lambda a, b: ~(a < b), "NEU": np.not_equal, "EQU": lambda a, b: ~((a < b) | (a > b)),
}  # fmt: skip


SUBNORMAL = Operand("imm", 0x1FFFFFF, text="0x1ffffff")


def both(a: Value, b: Value) -> Value:
    """a and b, where either may be unknown."""
    if a is None or b is None:
        known = b if a is None else a
        return known if known is not None and not known.any() else None
    return a & b


def negation(a: Value) -> Value:
    return None if a is None else ~a


def either(a: Value, b: Value) -> Value:
    return negation(both(negation(a), negation(b)))


def joined(i: Instruction, a: Value, b: Value) -> Value:
    if "OR" in i.parts:
        return either(a, b)
    if "XOR" in i.parts:
        return None if a is None or b is None else a ^ b
    return both(a, b)


def data(i: Instruction) -> list[Operand]:
    """The operands behind the results, registers and predicates alike."""
    start = 1
    while start < len(i.operands) and i.operands[start].kind in ("P", "UP"):
        start += 1
    return list(i.operands[start:])


def results(i: Instruction) -> list[Operand]:
    """Predicates that an addition writes: its carries."""
    found = []
    for x in i.operands[1:]:
        if x.kind not in ("P", "UP"):
            break
        found.append(x)
    return found


def wide(values: list[Value]) -> list[np.ndarray] | None:
    if any(x is None for x in values):
        return None
    return [x.astype(U64) for x in values]


def put(warp: Warp, i: Instruction, value: Value, lanes: Value) -> None:
    warp.write(i.operands[0], None if value is None else value.astype(np.uint32), lanes)


def put64(warp: Warp, x: Operand, value: Value, lanes: Value) -> None:
    for word in (0, 1):
        part = None if value is None else (value >> U64(32 * word) & LOW).astype(np.uint32)
        warp.write(x, part, lanes, word)


@handles("MOV", "UMOV", "R2UR")
def move(warp, i, lanes):
    if i.operands[0].kind in ("P", "UP"):
        return unknown(warp, i, lanes)
    value = warp.word(i.operands[1])
    if i.name == "R2UR" and value is not None and lanes is not None and lanes.any():
        value = np.full(32, value[lanes][0], np.uint32)
    put(warp, i, value, lanes)


@handles("IMAD", "UIMAD")
def multiply(warp, i, lanes):
    given = data(i)
    if "WIDE" in i.parts or "HI" in i.parts:
        return multiply_wide(warp, i, given, lanes)
    carry = np.zeros(32, bool)
    predicates = [x for x in given if x.kind in ("P", "UP")]
    values = [warp.word(x) for x in given if x.kind not in ("P", "UP")]
    for x in predicates:
        carry = warp.predicate(x)
    values = wide([*values, carry])
    total = None if values is None else values[0] * values[1] + values[2] + values[3]
    put(warp, i, None if total is None else total & LOW, lanes)
    for x in results(i):  # the carry of IMAD.X and the like: only of sums
        warp.write(x, None if total is None else total >> U64(32) > 0, lanes)


def multiply_wide(warp: Warp, i: Instruction, given: list[Operand], lanes: Value) -> None:
    """64 bits of a product and a sum, or their upper half; a carry in and out."""
    a, b = (warp.word(x) for x in given[:2])
    c = warp.double(given[2]) if given[2:] else np.zeros(32, U64)
    carry = warp.predicate(given[3]) if given[3:] else ~TRUE
    value = over = None
    if a is not None and b is not None and c is not None and carry is not None:
        if "U32" in i.parts:
            product = a.astype(U64) * b.astype(U64)
        else:
            product = (a.view(np.int32).astype(np.int64) * b.view(np.int32)).view(U64)
        value = product + c
        over = (value < c) | carry & (value == U64(2**64 - 1))
        value = value + carry.astype(U64)
    if "WIDE" in i.parts:
        put64(warp, i.operands[0], value, lanes)
    else:
        put(warp, i, None if value is None else value >> U64(32), lanes)
    for x in results(i):
        warp.write(x, over, lanes)


@handles("IADD3", "UIADD3", "VIADD", "IADD", "UIADD")
def add(warp, i, lanes):
    given = data(i)
    terms = [x for x in given if x.kind not in ("P", "UP")]
    total = np.zeros(32, U64)
    for x in terms:
        value = warp.raw(x)
        if value is None:
            total = None
            break
        if x.kind != "imm":
            if x.negated or x.inverted:
                value = ~value
            total = total + value.astype(U64) + U64(x.negated)
        else:
            total = total + value.astype(U64)
    if "X" in i.parts and total is not None:
        for x in given[len(terms) :]:
            carry = warp.predicate(x)
            total = None if carry is None or total is None else total + carry.astype(U64)
    for n, x in enumerate(results(i), 1):
        warp.write(x, None if total is None else total >> U64(32) >= n, lanes)
    put(warp, i, None if total is None else total & LOW, lanes)


@handles("LEA", "ULEA")
def scale_and_add(warp, i, lanes):
    given = data(i)
    carry = np.zeros(32, bool)
    if "X" in i.parts:
        carry = warp.predicate(given[-1])
        given = given[:-1]
    elif given[-1].kind in ("P", "UP"):
        given = given[:-1]
    if "HI" in i.parts:
        if "SX32" in i.parts:
            a, b, shift = given
            low = warp.word(a)
            high = None if low is None else (low.view(np.int32) >> 31).view(np.uint32)
        else:
            a, b, c, shift = given
            low, high = warp.word(a), warp.word(c)
        values = wide([low, high, warp.word(b), carry])
        total = None
        if values is not None:
            whole = values[0] | values[1] << U64(32)
            total = (whole << U64(shift.index) >> U64(32)) + values[2] + values[3]
    else:
        a, b, *rest = given
        shift = rest[-1] if rest else Operand("imm")
        values = wide([warp.word(a), warp.word(b), carry])
        total = None
        if values is not None:
            total = (values[0] << U64(shift.index) & LOW) + values[1] + values[2]
    put(warp, i, None if total is None else total & LOW, lanes)
    for x in results(i):
        warp.write(x, None if total is None else total > LOW, lanes)


@handles("LOP3", "ULOP3")
def logic(warp, i, lanes):
    first = i.operands[0]
    given = list(i.operands[1:])
    target = first
    if first.kind in ("P", "UP"):
        target, given = given[0], given[1:]
    a, b, c = (warp.word(x) for x in given[:3])
    table = given[3].index
    value = None
    if table == 0xC0:  # a zero decides
        for x in (a, b):
            if x is not None and not x.any():
                value = x
    if value is None and not any(x is None for x in (a, b, c)):
        value = np.zeros(32, np.uint32)
        for n in range(8):
            if table >> n & 1:
                terms = (a if n & 4 else ~a, b if n & 2 else ~b, c if n & 1 else ~c)
                value = value | (terms[0] & terms[1] & terms[2])
    warp.write(target, value, lanes)
    if first.kind in ("P", "UP"):
        warp.write(first, None if value is None else value != 0, lanes)


def fits(value: Value, bit: int) -> bool:
    """Whether all lanes of a predicate may be so."""
    return value is None or bool(value.all() if bit else not value.any())


@handles("PLOP3", "UPLOP3")
def logic_of_predicates(warp, i, lanes):
    first, second, *given = i.operands
    values = [warp.predicate(x) for x in given[:3]]
    for target, table in zip((first, second), given[3:]):
        answers = set()
        for n in range(8):  # every combination that the known ones allow
            if all(fits(v, n >> (2 - k) & 1) for k, v in enumerate(values)):
                answers.add(table.index >> n & 1)
        value = None
        if len(answers) == 1:
            value = TRUE if answers.pop() else ~TRUE
        elif all(v is not None for v in values):
            n = sum(v.astype(np.int64) << (2 - k) for k, v in enumerate(values))
            value = (table.index >> n & 1).astype(bool)
        warp.write(target, value, lanes)


def compared(i: Instruction, a: Value, b: Value) -> Value:
    if a is None or b is None:
        return None
    name = next(x for x in ("LT", "LE", "GT", "GE", "EQ", "NE", "T", "F") if x in i.parts)
    if name in "TF":
        return TRUE if name == "T" else ~TRUE
    if "U32" not in i.parts:
        a, b = a.view(np.int32), b.view(np.int32)
    return COMPARE[name](a, b)


@handles("ISETP", "UISETP")
def compare(warp, i, lanes):
    first, second, a, b, *rest = i.operands
    values = warp.word(a), warp.word(b)
    found = compared(i, *values)
    if found is None and b == SUBNORMAL and "GT" in i.parts:
        found = TRUE  # an exponent, before a reciprocal: its slow path is for subnormal numbers
    if "EX" in i.parts:  # the high words; the last operand is what the low ones say
        low = warp.predicate(rest[1])
        if values[0] is None or values[1] is None:
            found = None
        else:
            equal = values[0] == values[1]
            name = next(x for x in ("LT", "LE", "GT", "GE", "EQ", "NE") if x in i.parts)
            if name == "NE":
                found = either(~equal, low)
            elif name == "EQ":
                found = both(equal, low)
            else:
                found = either(found & ~equal, both(equal, low))
    given = warp.predicate(rest[0])
    warp.write(first, joined(i, found, given), lanes)
    warp.write(second, joined(i, negation(found), given), lanes)


def bits(warp: Warp, i: Instruction, x: Operand) -> Value:
    """An operand of a selection: of floats the signs are bits."""
    if i.name != "FSEL":
        return warp.word(x)
    value = warp.raw(x)
    if value is not None and x.kind != "imm":
        value = value & np.uint32(0x7FFFFFFF) if x.absolute else value
        value = value ^ np.uint32(0x80000000) if x.negated else value
    return value


@handles("SEL", "USEL", "FSEL")
def select(warp, i, lanes):
    _, a, b, which = i.operands
    values, which = [bits(warp, i, a), bits(warp, i, b)], warp.predicate(which)
    value = None
    if which is not None:
        if which.all() or not which.any():
            value = values[0] if which.all() else values[1]
        elif values[0] is not None and values[1] is not None:
            value = np.where(which, *values)
    put(warp, i, value, lanes)


@handles("SHF", "USHF")
def shift(warp, i, lanes):
    _, a, b, c = i.operands
    values = wide([warp.word(a), warp.word(b), warp.word(c)])
    value = None
    if values is not None:
        low, by, high = values
        whole = low | high << U64(32)
        by = by & U64(63) if by.max() > 63 else by
        signed = "S32" in i.parts or "S64" in i.parts
        if "L" in i.parts:
            value = whole << by >> U64(32) if "HI" in i.parts else low << by & LOW
        elif "HI" in i.parts and "U64" not in i.parts and "S64" not in i.parts:
            value = np.where(by > 31, 0, high >> by)
            if signed:
                places = np.minimum(by, 31).astype(np.int32)
                value = (high.astype(np.uint32).view(np.int32) >> places).view(np.uint32)
        else:
            value = whole >> by
            if signed:
                value = (whole.view(np.int64) >> by.astype(np.int64)).view(U64)
            value = value >> U64(32) if "HI" in i.parts else value & LOW
    put(warp, i, value, lanes)


@handles("SGXT", "USGXT")
def extend(warp, i, lanes):
    a, bits = warp.word(i.operands[1]), i.operands[2].index
    value = None
    if a is not None and "U32" in i.parts:
        value = a & np.uint32((1 << bits) - 1)
    elif a is not None:
        value = (a.view(np.int32) << (32 - bits) >> (32 - bits)).view(np.uint32)
    put(warp, i, value, lanes)


@handles("IABS")
def absolute(warp, i, lanes):
    a = warp.word(i.operands[1])
    put(warp, i, None if a is None else np.abs(a.view(np.int32)).view(np.uint32), lanes)


@handles("IMNMX", "VIMNMX", "UIMNMX", "VIADDMNMX")
def least_or_largest(warp, i, lanes):
    given = [x for x in i.operands[1:] if x.kind not in ("P", "UP")]
    which = warp.predicate(next(x for x in i.operands[1:] if x.kind in ("P", "UP")))
    values = [warp.word(x) for x in given]
    value = None
    if which is not None and all(x is not None for x in values):
        if i.name == "VIADDMNMX":
            values = [values[0] + values[1], values[2]]
        if "U32" not in i.parts:
            values = [x.view(np.int32) for x in values]
        value = np.where(which, np.minimum(*values), np.maximum(*values)).view(np.uint32)
    put(warp, i, value, lanes)


@handles("PRMT", "UPRMT")
def permute(warp, i, lanes):
    _, a, selector, b = i.operands
    values = [warp.word(x) for x in (a, selector, b)]
    value = None
    if all(x is not None for x in values) and not i.parts:
        whole = values[0].astype(U64) | values[2].astype(U64) << U64(32)
        value = np.zeros(32, U64)
        for n in range(4):
            nibble = values[1].astype(U64) >> U64(4 * n) & U64(15)
            byte = whole >> (nibble & U64(7)) * U64(8) & U64(255)
            sign = np.where(byte > 127, U64(255), U64(0))
            value |= np.where(nibble > 7, sign, byte) << U64(8 * n)
    put(warp, i, value, lanes)


@handles("POPC", "FLO", "UFLO", "UPOPC", "BREV", "UBREV")
def bits_of(warp, i, lanes):
    a = warp.word(i.operands[-1])
    value = None
    if a is not None:
        texts = [format(int(x), "032b") for x in a]
        if i.name.endswith("POPC"):
            value = np.array([x.count("1") for x in texts], np.uint32)
        elif i.name.endswith("BREV"):
            value = np.array([int(x[::-1], 2) for x in texts], np.uint32)
        elif "U32" in i.parts:
            shifted = "SH" in i.parts
            found = [x.find("1") if shifted else 31 - x.find("1") for x in texts]
            value = np.array(
                [f if "1" in x else 0xFFFFFFFF for f, x in zip(found, texts)], np.uint32
            )
    put(warp, i, value, lanes)


@handles("S2R", "S2UR", "CS2R")
def special(warp, i, lanes):
    name = i.operands[1].text
    x, y, z = warp.block.index
    known = {
        "SRZ": 0, "SR_CTAID.X": x, "SR_CTAID.Y": y, "SR_CTAID.Z": z, "SR_TID.Y": 0, "SR_TID.Z": 0,
        "SR_CgaCtaId": 0,
    }  # fmt: skip
    if name == "SR_TID.X":
        value: Value = LANES + np.uint32(32 * warp.number)
    elif name == "SR_LANEID":
        value = LANES
    else:
        value = np.full(32, known[name], np.uint32) if name in known else None
    warp.write(i.operands[0], value, lanes)
    if i.name == "CS2R" and "32" not in i.parts:
        warp.write(i.operands[0], value, lanes, 1)


@handles("LDC", "ULDC")
def load_constant(warp, i, lanes):
    x = i.operands[1]
    for word in range(width(i)):
        warp.write(i.operands[0], warp.raw(x, word) if x.kind == "const" else None, lanes, word)


@handles("P2R")
def pack_predicates(warp, i, lanes):
    rest, mask = warp.word(i.operands[2]), i.operands[3].index
    value = None if rest is None or i.parts else rest & np.uint32(~mask & 0xFFFFFFFF)
    for n in range(7):
        if mask >> n & 1:
            bit = warp.predicate(Operand("P", n))
            value = None if value is None or bit is None else value | bit.astype(np.uint32) << n
    put(warp, i, value, lanes)


@handles("R2P")
def unpack_predicates(warp, i, lanes):
    a, mask = warp.word(i.operands[1]), i.operands[2].index
    for n in range(7):
        if mask >> n & 1:
            value = None if a is None else (a >> np.uint32(n) & np.uint32(1)).astype(bool)
            warp.write(Operand("P", n), value, lanes)


@handles("VOTE", "VOTEU")
def vote(warp, i, lanes):
    given = warp.predicate(i.operands[-1])
    if given is None or lanes is None:
        for x in i.operands[:-1]:
            warp.write(x, None, lanes)
        return
    mine = given & lanes
    word = np.full(32, sum(1 << n for n in range(32) if mine[n]), np.uint32)
    said = {"ANY": mine.any(), "ALL": given[lanes].all()}
    said["EQ"] = given[lanes].all() or not mine.any()
    for x in i.operands[:-1]:
        answer = next(value for name, value in said.items() if name in i.parts)
        warp.write(x, word if x.kind in ("R", "UR") else np.full(32, bool(answer)), lanes)


@handles("REDUX")
def reduce(warp, i, lanes):
    a = warp.word(i.operands[1])
    value = None
    if a is not None and lanes is not None and lanes.any():
        mine = a[lanes]
        signed = mine.view(np.int32) if "S32" in i.parts else mine
        found = {
            "SUM": lambda: int(mine.astype(U64).sum()),
            "MIN": lambda: int(signed.min()),
            "MAX": lambda: int(signed.max()),
            "OR": lambda: int(np.bitwise_or.reduce(mine)),
            "XOR": lambda: int(np.bitwise_xor.reduce(mine)),
        }
        name = next((x for x in found if x in i.parts), None)
        answer = int(np.bitwise_and.reduce(mine)) if name is None else found[name]()
        value = np.full(32, answer & 0xFFFFFFFF, np.uint32)
    put(warp, i, value, TRUE if lanes is not None else None)


@handles("SHFL")
def shuffle(warp, i, lanes):
    landed, target, a, by, bound = i.operands
    value, by, bound = warp.word(a), warp.word(by), warp.word(bound)
    if value is None or by is None or bound is None:
        warp.write(target, None, lanes)
        warp.write(landed, None, lanes)
        return
    mask, clamp = bound >> np.uint32(8) & np.uint32(31), bound & np.uint32(31)
    own = LANES & mask
    last = own | clamp & ~mask
    if "IDX" in i.parts:
        source = own | by & ~mask
    elif "BFLY" in i.parts:
        source = LANES ^ by
    else:
        source = LANES - by if "UP" in i.parts else LANES + by
    signed, last = source.view(np.int32), last.view(np.int32)
    inside = signed >= last if "UP" in i.parts else signed <= last
    source = np.where(inside, source, LANES) & np.uint32(31)
    warp.write(target, value[source], lanes)
    warp.write(landed, inside, lanes)
