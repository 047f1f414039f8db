"""Warps, their registers of known and unknown values, and the path they take."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from .parser import Instruction, Operand, Program, SassError

LANES = np.arange(32, dtype=np.uint32)
ZERO, TRUE = np.zeros(32, np.uint32), np.ones(32, bool)
PARAMETERS = {80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210, 100: 0x380, 120: 0x380}
HANDLERS: dict[str, Callable] = {}  # opcode's first word -> handler(warp, instruction, lanes)
FLOW = {"BRA", "EXIT", "CALL", "RET", "BRX", "JMP"}
# what has no result that is followed
PLAIN = set(
    [
        "BSSY",
        "BSYNC",
        "BREAK",
        "NOP",
        "WARPSYNC",
        "DEPBAR",
        "LDGDEPBAR",
        "WARPGROUP",
        "NANOSLEEP",
        "MEMBAR",
    ]
)
PLAIN |= set(["ERRBAR", "FENCE", "CCTL", "SYNCS", "YIELD", "BPT", "ARRIVES"])
Value = np.ndarray | None  # 32 words, or predicates, of a warp; None: unknown


def handles(*names: str):
    """Registers a function as the implementation of instructions."""

    def register(function):
        HANDLERS.update(dict.fromkeys(names, function))
        return function

    return register


@dataclass
class Count:
    """What some warps have issued."""

    instructions: int = 0
    requested: int = 0  # bytes of global memory that lanes ask for
    warps: int = 0
    by_name: collections.Counter = field(default_factory=collections.Counter)
    assumed: collections.Counter = field(default_factory=collections.Counter)

    def of(self, pattern: str) -> int:
        """Instructions whose opcode matches."""
        return sum(n for name, n in self.by_name.items() if re.match(pattern, name))


class Memory:
    """The buffers whose contents are known, by address."""

    def __init__(self, buffers: Sequence) -> None:
        self.pieces = []
        for x in buffers:
            size = x.numel() * x.element_size()
            if size:
                start = x.data_ptr()
                raw = x.contiguous().flatten().view(torch.uint8).numpy()
                self.pieces.append((start, start + size, raw))

    def words(self, addresses: np.ndarray, number: int, mask: np.ndarray) -> np.ndarray | None:
        """[number, 32] words at 64-bit addresses of the lanes in mask; None: not all known."""
        if not mask.any():
            return np.zeros((number, 32), np.uint32)
        wanted = addresses[mask]
        for start, end, raw in self.pieces:
            if wanted.min() >= start and wanted.max() + 4 * number <= end:
                offsets = np.where(mask, addresses - np.uint64(start), 0).astype(np.int64)
                at = offsets[:, None] + np.arange(4 * number)
                return np.ascontiguousarray(raw[at]).view(np.uint32).T.copy()
        return None


@dataclass
class Block:
    """What the warps of a thread block share."""

    program: Program
    constants: np.ndarray
    memory: Memory
    index: tuple[int, int, int]
    count: Count
    assume: Callable[[Instruction], bool | None]
    shared: dict[int, np.uint32 | None] = field(default_factory=dict)


class Warp:
    def __init__(self, block: Block, number: int, threads: int) -> None:
        self.block, self.number = block, number
        self.files: dict[str, list[Value]] = {
            "R": [ZERO] * 256, "UR": [ZERO] * 64, "P": [TRUE] * 8, "UP": [TRUE] * 8,
        }  # fmt: skip
        for name in ("P", "UP"):
            self.files[name][:7] = [~TRUE] * 7
        self.live = LANES + 32 * number < threads
        self.now: Instruction | None = None
        self.active = self.live  # lanes at work
        self.partly: dict[tuple[str, int], np.ndarray] = {}  # lanes that know a register
        self.local: dict[int, Value] = {}  # words of local memory, which holds spilled registers
        self.lost: dict[tuple[str, int], Instruction | None] = {}  # what made a register unknown

    # operands ------------------------------------------------------------------------------------
    def raw(self, x: Operand, offset: int = 0) -> Value:
        """A word of an operand without its signs; offset: of a register pair."""
        if x.kind in ("R", "UR"):
            zero = x.index == (255 if x.kind == "R" else 63)
            return ZERO if zero else self.held(x.kind, x.index + offset)
        if x.kind == "imm":
            return np.full(32, 0 if offset else x.index, np.uint32)
        if x.kind == "const":
            return self.constant(x.index + 4 * offset)
        return None

    def constant(self, offset: int) -> Value:
        raw = self.block.constants[offset : offset + 4]
        return np.full(32, raw.view(np.uint32)[0], np.uint32) if raw.size == 4 else None

    def word(self, x: Operand) -> Value:
        """A signed operand modulo 2^32."""
        value = self.raw(x)
        if value is None:
            return None
        if x.kind != "imm":
            if x.absolute:
                value = np.abs(value.view(np.int32)).view(np.uint32)
            if x.inverted:
                value = ~value
            if x.negated:
                value = (~value + np.uint32(1)).astype(np.uint32)
        return value

    def double(self, x: Operand) -> Value:
        """64 bits of a register pair or of a constant."""
        low, high = self.raw(x), self.raw(x, 1)
        if low is None or high is None:
            return None
        value = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        return (~value + np.uint64(1)) if x.negated else value

    def predicate(self, x: Operand) -> Value:
        value = TRUE if x.index == 7 else self.held(x.kind, x.index)
        return value if value is None or not x.negated else ~value

    def write(self, x: Operand, value: Value, lanes: Value, offset: int = 0) -> None:
        """lanes None: the guard itself is unknown."""
        last = {"R": 255, "UR": 63, "P": 7, "UP": 7}.get(x.kind)
        if last is None or x.index == last:
            return
        if x.kind in ("UR", "UP") and lanes is not None:  # of the warp, whichever lanes it has
            if not lanes.any():
                return
            lanes = TRUE
        held, place = self.files[x.kind], (x.kind, x.index + offset)
        at = place[1]
        if value is None:
            self.lost[place] = self.now
        if lanes is None:
            held[at] = None
        elif lanes is TRUE or lanes.all():
            held[at] = value
            self.partly.pop(place, None)
        else:  # other lanes keep what they had
            old = held[at]
            known = self.partly.get(place, TRUE if old is not None else ~TRUE)
            known = known & ~lanes if value is None else known | lanes
            held[at] = None
            self.partly.pop(place, None)
            if known.any():
                new, old = (ZERO if x is None else x for x in (value, old))
                held[at] = np.where(lanes, new, old)
                if not known.all():
                    self.partly[place] = known

    def held(self, kind: str, at: int) -> Value:
        """A register; unknown where one of the lanes at work is."""
        value = self.files[kind][at]
        if self.partly and value is not None:
            known = self.partly.get((kind, at))
            if known is not None and (self.active & ~known).any():
                return None
        return value

    # execution -----------------------------------------------------------------------------------
    def run(self) -> Iterator[None]:
        """Yields at the barriers of the block."""
        code, count = self.block.program.code, self.block.count
        count.warps += 1
        waiting: dict[int, np.ndarray] = {0: self.live}  # lanes by their next instruction
        while waiting:
            pc = min(waiting)
            lanes = waiting.pop(pc)
            while True:
                if waiting and min(waiting) <= pc:
                    other = waiting.get(pc)
                    waiting[pc] = lanes if other is None else lanes | other
                    break
                i, self.active = code[pc], lanes
                count.instructions += 1
                count.by_name[i.name] += 1
                guard = self.predicate(i.guard) if i.guard else TRUE
                active = None if guard is None else lanes if guard is TRUE else lanes & guard
                if i.name in FLOW:
                    for target, which in self.flow(i, pc, lanes, active):
                        other = waiting.get(target)
                        waiting[target] = which if other is None else which | other
                    break
                if i.name == "BAR":
                    yield
                elif i.name not in PLAIN:
                    self.step(i, active)
                pc += 1

    def step(self, i: Instruction, active: Value) -> None:
        handler, self.now = HANDLERS.get(i.name, unknown), i
        try:
            handler(self, i, active)
        except (IndexError, ValueError, KeyError) as error:
            raise SassError(
                f"not implemented ({type(error).__name__}: {error}): {i.text}"
            ) from error

    def flow(self, i: Instruction, pc: int, lanes: np.ndarray, active: Value):
        """(next instruction, lanes) after a branch."""
        operands = [x for x in i.operands if x.kind in ("P", "UP")]
        for x in operands:  # a condition beside the guard
            value = self.predicate(x)
            active = None if active is None or value is None else active & value
        if "DIV" in i.parts:  # goes where a warp is not whole: it is
            active = lanes & False
        if active is None:
            said = self.block.assume(i)
            if said is None:
                raise SassError(f"an unknown value decides {i.text}{self.because(i)}")
            self.block.count.assumed[i.text, said] += 1
            active = lanes if said else lanes & False
        if (lanes & ~active).any():
            yield pc + 1, lanes & ~active
        if i.name == "EXIT" or not active.any():
            return
        labels = self.block.program.labels
        if i.name == "RET":
            register = next(x for x in i.operands if x.kind == "R")
            target = self.raw(register)
            if target is None:
                raise SassError(f"unknown return address: {i.text}")
            yield self.block.program.at(int(target[active][0])), active
        elif (label := next((x for x in i.operands if x.kind == "label"), None)) is not None:
            yield labels[label.text], active
        else:
            raise SassError(f"not implemented: {i.text}")

    def because(self, i: Instruction, depth: int = 8) -> str:
        """The instructions that an unknown operand follows from, the last one first."""
        operands = (*i.operands, *([i.guard] if i.guard else []))
        for x in operands:
            made = self.lost.get((x.kind, x.index))
            if made and made is not i and depth and self.held(x.kind, x.index) is None:
                return f" <- {made.text}{self.because(made, depth - 1)}"
        return ""


def unknown(warp: Warp, i: Instruction, lanes: Value) -> None:
    """Whatever is not followed: its results are unknown."""
    for x in i.operands[: 1 + (i.name in ("SHFL", "FCHK"))]:
        for offset in range(width(i) if x.kind in ("R", "UR") else 1):
            if x.kind in ("R", "UR", "P", "UP"):
                warp.write(x, None, lanes, offset)


def width(i: Instruction) -> int:
    """Registers of the result."""
    sizes = {"64": 2, "96": 3, "128": 4}
    if i.name in ("HGMMA", "QGMMA", "IGMMA"):
        shape = next(x for x in i.parts if re.fullmatch(r"\d+x\d+x\d+", x))
        return int(shape.split("x")[1]) // 2
    if i.name in ("HMMA", "IMMA", "DMMA", "QMMA"):
        return 2 if i.name == "HMMA" and "F16" in i.parts and "F32" not in i.parts else 4
    if i.name in ("F2F", "F2I", "I2F"):  # the type of the result comes first
        kinds = [x for x in i.text.split()[1].split(".") if re.fullmatch(r"[FUS](8|16|32|64)", x)]
        return 2 if kinds and kinds[0].endswith("64") else 1
    if i.name == "LDSM":
        return int(next((x for x in ("2", "4") if x in i.parts), "1"))
    if (i.name[0] == "D" and i.name != "DEPBAR") or "F64" in i.parts or "S64" in i.parts:
        return 2
    return next((n for size, n in sizes.items() if size in i.parts), 1)


def execute(
    program: Program, grid: Sequence[int], threads: int, parameters: bytes, buffers: Sequence = (),
    architecture: int = 90, blocks: Sequence[int] | None = None,
    assume: Callable[[Instruction], bool | None] = lambda i: None,
) -> Count:  # fmt: skip
    """Runs a launch, or the given of its blocks, and counts what its warps issue.

    parameters: the bytes of the constant bank from the first parameter on. buffers: tensors whose
    contents are known. assume: which way a branch goes that an unknown value decides.
    """
    grid = (*grid, 1, 1)[:3]
    start = PARAMETERS[architecture]
    constants = np.zeros(start + len(parameters) + 64, np.uint8)
    constants[start : start + len(parameters)] = np.frombuffer(parameters, np.uint8)
    head = [threads, 1, 1, *grid]
    constants[: 4 * len(head)] = np.array(head, np.uint32).view(np.uint8)
    memory, count = Memory(buffers), Count()
    total = grid[0] * grid[1] * grid[2]
    with np.errstate(all="ignore"):
        for at in range(total) if blocks is None else blocks:
            index = at % grid[0], at // grid[0] % grid[1], at // grid[0] // grid[1]
            block = Block(program, constants, memory, index, count, assume)
            running = [Warp(block, n, threads).run() for n in range(-(-threads // 32))]
            while running:  # all warps to their next barrier, again and again
                running = [warp for warp in running if next(warp, "ended") is None]
    return count
