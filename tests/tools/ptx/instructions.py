"""Instructions on registers and memory. Handlers: (block, instruction, lanes).

lanes selects the executing threads: a bool mask, or slice(None) for all of them.
"""

from __future__ import annotations

import numpy as np

from .machine import (
    FLOAT,
    SINT,
    UINT,
    WINDOWS,
    Block,
    f32_to_bf16,
    handles,
    not_implemented,
)  # fmt: skip
from .parser import (
    F32,
    PRED,
    U32,
    U64,
    Address,
    Instruction,
    Pair,
    PtxError,
    Symbol,
    Type,
    Vector,
    parse_type,
)  # fmt: skip


def parts(operand) -> tuple:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def unsigned(kind: Type) -> Type:
    return Type("u", kind.bits)


# ---- memory -------------------------------------------------------------------------------------
@handles("ld", "ldu")
def load(b: Block, i: Instruction, lanes) -> None:
    kind, targets = i.types[-1], parts(i.operands[0])
    size, place = kind.bits // 8, i.operands[1]
    if "param" in i.opcode and isinstance(place.base, Symbol):
        raw = b.arguments[place.base.name]
        for n, target in enumerate(targets):
            piece = raw[place.offset + n * size : place.offset + (n + 1) * size]
            b.write(target, np.uint64(int.from_bytes(piece, "little")), unsigned(kind), lanes)
        return
    if not isinstance(place, Address):
        raise not_implemented(i)
    data = b.load(b.address(place, lanes), size * len(targets), b.space(i), lanes, i.text)
    stored = (SINT if kind.kind == "s" else UINT)[kind.bits]
    words = np.ascontiguousarray(data).view(stored)
    for n, target in enumerate(targets):
        b.write(target, words[:, n], kind if kind.kind == "s" else unsigned(kind), lanes)


@handles("st")
def store(b: Block, i: Instruction, lanes) -> None:
    kind = unsigned(i.types[-1])
    words = [b.read(x, kind, lanes) for x in parts(i.operands[1])]
    data = np.ascontiguousarray(np.stack(words, 1)).view(np.uint8)
    b.store(b.address(i.operands[0], lanes), data, b.space(i), lanes, i.text)


@handles("atom", "red")
def atomic(b: Block, i: Instruction, lanes) -> None:
    """add, min, max, exch; one lane after the other."""
    kind, returns = i.types[-1], i.opcode[0] == "atom"
    calls = {"add": np.add, "min": np.minimum, "max": np.maximum, "exch": lambda old, new: new}
    call = next((calls[x] for x in i.opcode if x in calls), None)
    if call is None:
        raise not_implemented(i)
    addresses = b.address(i.operands[1 if returns else 0], lanes)
    values = b.read(i.operands[-1], kind, lanes)
    threads, old = b.thread[lanes], np.empty_like(values)
    for n in range(len(addresses)):
        one, place = threads[n : n + 1], addresses[n : n + 1]
        found = b.load(place, kind.bits // 8, b.space(i), one, i.text)
        old[n] = np.ascontiguousarray(found).view(values.dtype)[0, 0]
        new = np.asarray(call(old[n : n + 1], values[n : n + 1]), values.dtype)
        b.store(place, new.view(np.uint8).reshape(1, -1), b.space(i), one, i.text)
    if returns:
        b.write(i.operands[0], old, kind, lanes)


@handles("cp")
def copy_async(b: Block, i: Instruction, lanes) -> None:
    """cp.async: data lands at the wait that must have seen it, so a missing wait shows."""
    if i.opcode[1] != "async" or "bulk" in i.opcode or "mbarrier" in i.opcode:
        raise not_implemented(i)
    threads, what = b.thread[lanes], i.opcode[2]
    for w in np.unique(threads // 32):
        if what in ("commit_group", "wait_all"):
            b.copy_groups[w].append(b.open_copies[w])
            b.open_copies[w] = []
        if what in ("wait_group", "wait_all"):
            keep = i.operands[0].bits if what == "wait_group" else 0
            while len(b.copy_groups[w]) > keep:
                for target, data in b.copy_groups[w].pop(0):
                    b.store(target, data, "shared", slice(None), i.text)
    if what in ("commit_group", "wait_all", "wait_group"):
        return
    nbytes = i.operands[2].bits
    target, source = b.address(i.operands[0], lanes), b.address(i.operands[1], lanes)
    given = len(i.operands) > 3  # bytes to read; the rest is filled with zeros
    size = b.read(i.operands[3], U32, lanes) if given else np.full(len(threads), nbytes, np.uint32)
    if not np.isin(size, (0, nbytes)).all():
        raise not_implemented(i)
    data, wanted = np.zeros((len(threads), nbytes), np.uint8), size > 0
    b.load(target, nbytes, "shared", lanes, i.text)  # checks the target now
    if wanted.any():
        data[wanted] = b.load(source[wanted], nbytes, "global", threads[wanted], i.text)
    for w in np.unique(threads // 32):
        mine = threads // 32 == w
        b.open_copies[w].append((target[mine], data[mine]))


@handles("mov")
def move(b: Block, i: Instruction, lanes) -> None:
    kind, (target, source) = i.types[-1], i.operands
    if isinstance(target, Vector):  # unpack
        width = kind.bits // len(target.parts)
        value = b.read(source, unsigned(kind), lanes)
        for n, part in enumerate(target.parts):
            piece = (value >> np.array(n * width, value.dtype)).astype(UINT[width])
            b.write(part, piece, Type("u", width), lanes)
    elif isinstance(source, Vector):  # pack
        width, value = kind.bits // len(source.parts), np.uint64(0)
        for n, part in enumerate(source.parts):
            word = b.read(part, Type("u", width), lanes).astype(np.uint64)
            value = value | (word << np.uint64(n * width))
        b.write(target, value, unsigned(kind), lanes)
    elif kind == PRED:
        b.write(target, b.read(source, PRED, lanes), PRED, lanes)
    else:
        b.write(target, b.read(source, unsigned(kind), lanes), unsigned(kind), lanes)


@handles("cvta")
def convert_address(b: Block, i: Instruction, lanes) -> None:
    window = np.uint64(WINDOWS.get(b.space(i), 0))
    value = b.read(i.operands[1], U64, lanes)
    value = value & ~window if "to" in i.opcode else value | window
    b.write(i.operands[0], value, U64, lanes)


@handles("prefetch", "discard", "membar", "fence", "griddepcontrol", "nanosleep")
def nothing(b: Block, i: Instruction, lanes) -> None:
    """Hints and fences: memory here is always in order."""


# ---- arithmetic ---------------------------------------------------------------------------------
def packed_f32x2(b: Block, i: Instruction, lanes) -> bool:
    """Two floats in a 64-bit register: add, sub, mul, fma of sm_100 and later."""
    if "f32x2" not in i.opcode:
        return False
    words = [np.ascontiguousarray(b.read(x, U64, lanes)) for x in i.operands[1:]]
    x = [w.view(np.float32).astype(np.float64) for w in words]
    name = i.opcode[0]
    value = x[0] * x[1] + x[2] if name == "fma" else BINARY[name](*x)
    b.write(i.operands[0], value.astype(np.float32).view(np.uint64), U64, lanes)
    return True


def packed_half(b: Block, i: Instruction, lanes) -> bool:
    """Two halves in a 32-bit register: add, sub, mul, fma, min, max."""
    name = next((x for x in i.opcode if x in ("f16x2", "bf16x2")), None)
    if name is None:
        return False
    kind, values = parse_type(name[:-2]), []
    for shift in (0, 16):
        words = [(b.read(x, U32, lanes) >> np.uint32(shift)).astype(np.uint16)
                 for x in i.operands[1:]]  # fmt: skip
        x = [half_value(w, kind).astype(np.float64) for w in words]
        values.append(x[0] * x[1] + x[2] if i.opcode[0] == "fma" else BINARY[i.opcode[0]](*x))
    low, high = (half_bits(v, kind).astype(np.uint32) for v in values)
    b.write(i.operands[0], low | (high << np.uint32(16)), U32, lanes)
    return True


def half_value(bits: np.ndarray, kind: Type) -> np.ndarray:
    if kind.kind == "h":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def half_bits(values: np.ndarray, kind: Type) -> np.ndarray:
    if kind.kind == "h":
        return f32_to_bf16(values.astype(np.float32))
    return values.astype(np.float16).view(np.uint16)


def flushed(i: Instruction, value: np.ndarray) -> np.ndarray:
    """.ftz: subnormal results become zero."""
    if "ftz" not in i.opcode or value.dtype != np.float32:
        return value
    return np.where(np.abs(value) < np.finfo(np.float32).tiny, value * 0, value)


BINARY = {
    "add": np.add, "sub": np.subtract, "min": np.fmin, "max": np.fmax, "mul": np.multiply,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "rem": np.fmod,
    "div": np.divide, "copysign": lambda x, y: np.copysign(y, x),
}  # fmt: skip


@handles("add", "sub", "min", "max", "and", "or", "xor", "rem", "div", "copysign")
def binary(b: Block, i: Instruction, lanes) -> None:
    if packed_f32x2(b, i, lanes) or packed_half(b, i, lanes):
        return
    kind, name = i.types[-1], i.opcode[0]
    x, y = (b.read(o, kind, lanes) for o in i.operands[1:3])
    if {"sat", "cc"} & set(i.opcode):
        raise not_implemented(i)
    if name == "div" and kind.kind == "u":
        value = x // np.where(y == 0, 1, y).astype(y.dtype)
    elif name == "div" and kind.kind == "s":  # truncates
        a, c = x.astype(np.int64), y.astype(np.int64)
        value = np.abs(a) // np.maximum(np.abs(c), 1) * np.sign(a) * np.sign(c)
    else:
        value = BINARY[name](x, y)
    if len(i.operands) == 4:  # min and max take three inputs on sm_100 and later
        value = BINARY[name](value, b.read(i.operands[3], kind, lanes))
    if "NaN" in i.opcode:
        value = np.where(np.isnan(x) | np.isnan(y), np.nan, value)
    b.write(i.operands[0], flushed(i, value), kind, lanes)


@handles("mul", "mad", "mul24", "mad24")
def multiply(b: Block, i: Instruction, lanes) -> None:
    if packed_f32x2(b, i, lanes) or packed_half(b, i, lanes):
        return
    kind = i.types[-1]
    x, y = (b.read(o, kind, lanes) for o in i.operands[1:3])
    result = kind
    if kind.kind in "us" and "wide" in i.opcode:
        result = Type(kind.kind, kind.bits * 2)
        wide = (SINT if kind.kind == "s" else UINT)[result.bits]
        value = x.astype(wide) * y.astype(wide)
    elif kind.kind in "us" and "hi" in i.opcode:
        if kind.bits <= 32:
            wide = (SINT if kind.kind == "s" else UINT)[64]
            value = (x.astype(wide) * y.astype(wide)) >> np.array(kind.bits, wide)
        else:
            value = (x.astype(object) * y.astype(object)) // 2**kind.bits
        value = value.astype(x.dtype)
    else:
        value = x * y
    if i.opcode[0] == "mad":
        value = value + b.read(i.operands[3], result, lanes)
    b.write(i.operands[0], flushed(i, value), result, lanes)


@handles("fma")
def fused_multiply_add(b: Block, i: Instruction, lanes) -> None:
    if packed_f32x2(b, i, lanes) or packed_half(b, i, lanes):
        return
    kind = i.types[-1]
    x, y, z = (b.read(o, kind, lanes) for o in i.operands[1:4])
    if kind.bits <= 32:  # one rounding, by way of double; float64 is rounded twice here
        value = x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64)
        value = value.astype(np.float32 if kind.kind == "h" else FLOAT[kind.bits])
    else:
        value = x * y + z
    if "relu" in i.opcode:
        value = np.fmax(value, 0)
    b.write(i.operands[0], flushed(i, value), kind, lanes)


@handles("neg", "abs", "not", "popc", "clz", "brev", "bfind")
def unary(b: Block, i: Instruction, lanes) -> None:
    kind, name = i.types[-1], i.opcode[0]
    x = b.read(i.operands[1], kind, lanes)
    if name in ("popc", "clz", "bfind", "brev"):
        width = kind.bits
        call = {
            "popc": lambda n: n.bit_count(),
            "clz": lambda n: width - n.bit_length(),
            "bfind": lambda n: n.bit_length() - 1,  # -1 where no bit is set
            "shiftamt": lambda n: width - n.bit_length() if n else -1,
            "brev": lambda n: int(f"{n:0{width}b}"[::-1], 2),
        }["shiftamt" if "shiftamt" in i.opcode else name]
        x = np.where(x < 0, ~x, x) if name == "bfind" and kind.kind == "s" else x  # not the sign
        value = np.array([call(int(n)) & (2**width - 1) for n in x.view(UINT[width])], UINT[width])
        b.write(i.operands[0], value, U32 if name != "brev" else unsigned(kind), lanes)
        return
    invert = np.logical_not if kind == PRED else np.invert
    b.write(i.operands[0], {"neg": np.negative, "abs": np.abs, "not": invert}[name](x), kind, lanes)


@handles("shl", "shr")
def shift(b: Block, i: Instruction, lanes) -> None:
    kind = i.types[-1]
    x, by = b.read(i.operands[1], kind, lanes), b.read(i.operands[2], U32, lanes)
    amount = np.minimum(by, kind.bits - 1).astype(x.dtype)
    value = x << amount if i.opcode[0] == "shl" else x >> amount
    arithmetic = i.opcode[0] == "shr" and kind.kind == "s"
    value = np.where((by >= kind.bits) & (not arithmetic), 0, value).astype(x.dtype)
    b.write(i.operands[0], value, kind, lanes)


@handles("shf")
def funnel_shift(b: Block, i: Instruction, lanes) -> None:
    low, high, by = (b.read(x, U32, lanes).astype(np.uint64) for x in i.operands[1:4])
    by = by & np.uint64(31) if "wrap" in i.opcode else np.minimum(by, np.uint64(32))
    both = (high << np.uint64(32)) | low
    value = (both << by) >> np.uint64(32) if "l" in i.opcode else both >> by
    b.write(i.operands[0], value & np.uint64(0xFFFFFFFF), U32, lanes)


MATH = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": lambda x: 1 / x, "sqrt": np.sqrt, "tanh": np.tanh,
    "rsqrt": lambda x: 1 / np.sqrt(x), "sin": np.sin, "cos": np.cos,
}  # fmt: skip


@handles(*MATH)
def function(b: Block, i: Instruction, lanes) -> None:
    kind = i.types[-1]
    value = MATH[i.opcode[0]](b.read(i.operands[1], kind, lanes))
    b.write(i.operands[0], flushed(i, value), kind, lanes)


@handles("lop3")
def logic3(b: Block, i: Instruction, lanes) -> None:
    x = [b.read(o, U32, lanes) for o in i.operands[1:4]]
    table, value = i.operands[4].bits, np.zeros_like(x[0])
    for row in range(8):
        if table >> row & 1:
            terms = [v if row >> (2 - n) & 1 else ~v for n, v in enumerate(x)]
            value |= terms[0] & terms[1] & terms[2]
    b.write(i.operands[0], value, U32, lanes)


@handles("prmt")
def permute(b: Block, i: Instruction, lanes) -> None:
    low, high, selector = (b.read(o, U32, lanes) for o in i.operands[1:4])
    source = (high.astype(np.uint64) << np.uint64(32)) | low
    value = np.zeros_like(low)
    for n in range(4):
        pick = (selector >> np.uint32(4 * n)) & np.uint32(0xF)
        byte = (source >> (8 * (pick & 7)).astype(np.uint64)).astype(np.uint32) & np.uint32(0xFF)
        sign = np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0))
        value |= np.where(pick & 8, sign, byte) << np.uint32(8 * n)
    b.write(i.operands[0], value, U32, lanes)


@handles("bfe")
def extract(b: Block, i: Instruction, lanes) -> None:
    kind = i.types[-1]
    x = b.read(i.operands[1], U32, lanes).astype(np.int64)
    position, length = (b.read(v, U32, lanes).astype(np.int64) for v in i.operands[2:4])
    if kind.bits != 32:
        raise not_implemented(i)
    bits = (x >> position) & ((1 << length) - 1)
    negative = (kind.kind == "s") & ((bits >> np.maximum(length - 1, 0)) & 1 == 1)
    b.write(i.operands[0], np.where(negative, bits - (1 << length), bits), kind, lanes)


@handles("bfi")
def insert(b: Block, i: Instruction, lanes) -> None:
    """Bits 0 ... length - 1 of the first operand into the second, from a position on."""
    kind = i.types[-1]
    x, into = (b.read(o, kind, lanes) for o in i.operands[1:3])
    position, length = (b.read(o, U32, lanes).tolist() for o in i.operands[3:5])
    mask = [(2 ** (n & 255) - 1) << (at & 255) for at, n in zip(position, length)]
    new = [(int(bits) << (at & 255)) & m for bits, at, m in zip(x, position, mask)]
    value = [(int(old) & ~m | n) & (2**kind.bits - 1) for old, m, n in zip(into, mask, new)]
    b.write(i.operands[0], np.array(value, UINT[kind.bits]), kind, lanes)


@handles("setp", "set")
def compare(b: Block, i: Instruction, lanes) -> None:
    """setp.op[.and|or|xor]: the predicate, combined with a fourth operand where there is one."""
    kind, test = i.types[-1], i.opcode[1]
    x, y = (b.read(o, kind, lanes) for o in i.operands[1:3])
    real = kind.kind in "fh"
    nan = (np.isnan(x) | np.isnan(y)) if real else np.zeros(len(x), bool)
    unordered = real and len(test) == 3 and test not in ("num", "nan")
    name = test if test in ("num", "nan") else test[:2]
    value = {
        "eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y,
        "lo": x < y, "ls": x <= y, "hi": x > y, "hs": x >= y, "nan": nan, "num": ~nan,
    }[name]  # fmt: skip
    if real and name == "ne" and not unordered:
        value = value & ~nan
    value = value | nan if unordered else value
    if i.opcode[0] == "set" or isinstance(i.operands[0], Pair):
        raise not_implemented(i)
    if len(i.operands) > 3:
        other = b.read(i.operands[3], PRED, lanes)
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
        value = combine[i.opcode[2]](value, other)
    b.write(i.operands[0], value, PRED, lanes)


@handles("selp")
def select(b: Block, i: Instruction, lanes) -> None:
    kind = unsigned(i.types[-1])
    yes, no = (b.read(o, kind, lanes) for o in i.operands[1:3])
    b.write(i.operands[0], np.where(b.read(i.operands[3], PRED, lanes), yes, no), kind, lanes)


ROUND = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@handles("cvt")
def convert(b: Block, i: Instruction, lanes) -> None:
    to, source = i.opcode[-2], i.opcode[-1]
    if to in ("bf16x2", "f16x2"):
        kind = parse_type(to[:-2])
        high, low = (half_bits(b.read(o, F32, lanes), kind) for o in i.operands[1:3])
        word = (high.astype(np.uint32) << np.uint32(16)) | low
        b.write(i.operands[0], word, U32, lanes)
        return
    if to == "tf32":  # rna: halves go away from zero
        word = b.read(i.operands[1], U32, lanes) + np.uint32(0x1000)
        b.write(i.operands[0], word & np.uint32(0xFFFFE000), U32, lanes)
        return
    target, origin = parse_type(to), parse_type(source)
    value = b.read(i.operands[1], origin, lanes)
    whole = next((x for x in i.opcode if x in ROUND), None)
    if whole:
        value = ROUND[whole](value)
    if target.kind in "us" and origin.kind in "fh":  # saturates; NaN becomes 0
        limit = np.iinfo((SINT if target.kind == "s" else UINT)[target.bits])
        value = np.clip(np.nan_to_num(value.astype(np.float64)), limit.min, limit.max)
        value = np.where(value >= float(limit.max), limit.max, value.astype(limit.dtype))
    if "rz" in i.opcode and target.kind in "fh" and target.bits < origin.bits:
        raise not_implemented(i)
    if "sat" in i.opcode:
        value = np.clip(np.nan_to_num(value), 0, 1)
    b.write(i.operands[0], value, target, lanes)


# ---- between the lanes of a warp ----------------------------------------------------------------
def check_members(b: Block, i: Instruction, lanes, members: np.ndarray) -> None:
    threads = b.thread[lanes]
    for w in np.unique(threads // 32):
        mine = threads // 32 == w
        here = np.bitwise_or.reduce(np.uint32(1) << (threads[mine] % 32).astype(np.uint32))
        if (members[mine] & ~here).any():
            raise PtxError(f"the member mask names absent lanes: {i.text}")


@handles("shfl")
def shuffle(b: Block, i: Instruction, lanes) -> None:
    target = i.operands[0]
    value, arg, clamp = (b.read(o, U32, lanes) for o in i.operands[1:4])
    check_members(b, i, lanes, b.read(i.operands[4], U32, lanes))
    everyone = np.zeros(-(-b.threads // 32) * 32, np.uint32)
    threads = b.thread[lanes]
    everyone[threads] = value
    lane, arg = threads % 32, arg.astype(np.int64)
    segment, bound = (clamp >> 8 & 31).astype(np.int64), (clamp & 31).astype(np.int64)
    low, high = lane & segment, (lane & segment) | (bound & ~segment)
    mode = i.opcode[2]
    other = {"bfly": lane ^ arg, "idx": low | (arg & ~segment), "up": lane - arg,
             "down": lane + arg}[mode]  # fmt: skip
    inside = other >= high if mode == "up" else other <= high
    value = everyone[threads // 32 * 32 + np.where(inside, other, lane)]
    if isinstance(target, Pair):
        b.write(target.predicate, inside, PRED, lanes)
        target = target.value
    b.write(target, value, U32, lanes)


@handles("vote", "activemask", "redux", "match")
def agree(b: Block, i: Instruction, lanes) -> None:
    """vote.{all,any,ballot}, activemask, redux.{add,min,max,and,or,xor} over the lanes present."""
    threads, name = b.thread[lanes], i.opcode[0]
    kind = PRED if name == "vote" else (i.types or (U32,))[-1]
    if name == "activemask":
        values = np.ones(len(threads), bool)
    elif name == "match":
        raise not_implemented(i)
    else:
        check_members(b, i, lanes, b.read(i.operands[2], U32, lanes))
        values = b.read(i.operands[1], kind, lanes)
    ballot = name == "activemask" or "ballot" in i.opcode
    reductions = {"all": np.all, "any": np.any, "add": np.sum, "min": np.min, "max": np.max,
                  "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce,
                  "xor": np.bitwise_xor.reduce}  # fmt: skip
    result = np.zeros(len(threads), np.uint32 if ballot or kind != PRED else bool)
    for w in np.unique(threads // 32):
        mine = threads // 32 == w
        if ballot:
            bits = np.uint32(1) << (threads[mine] % 32).astype(np.uint32)
            result[mine] = np.bitwise_or.reduce(np.where(values[mine], bits, np.uint32(0)))
        else:
            call = next(reductions[x] for x in i.opcode if x in reductions)
            result[mine] = np.asarray(call(values[mine])).astype(np.int64) & (2**kind.bits - 1)
    b.write(i.operands[0], result, U32 if ballot or kind != PRED else PRED, lanes)
