"""Runs a parsed kernel block by block: registers, memories, warps, barriers, and their checks.

A group of threads steps together: the whole block (schedule "block"), or one warp until its barrier
and then another, in random order (schedule "warp"), which makes a missing block barrier visible.
Inside the group the lowest program counter goes first, so divergent lanes meet again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from .parser import (
    PRED,
    U8,
    U32,
    U64,
    Address,
    Immediate,
    Instruction,
    Kernel,
    PtxError,
    Register,
    Symbol,
    Type,
)  # fmt: skip

UINT = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SINT = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
MASK64 = 2**64 - 1
# Generic addresses of the other memories, where no tensor can be.
WINDOWS = {"local": 1 << 56, "shared": 1 << 57, "param": 1 << 58}

# Instructions of whole warps: the lanes of a diverged warp wait for each other there.
TOGETHER = {"shfl", "vote", "redux", "match", "mma", "ldmatrix", "stmatrix"}
HANDLERS = {}  # opcode's first word -> handler(block, instruction, lanes)


def handles(*names):
    """Registers a function as the implementation of instructions."""

    def register(function):
        HANDLERS.update(dict.fromkeys(names, function))
        return function

    return register


def not_implemented(i: Instruction):
    return PtxError(f"not implemented: {i.text}")


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


class GlobalMemory:
    """The bytes of the buffers a launch may touch; anything else is out of bounds."""

    def __init__(self, buffers: Sequence):
        known = {}
        for x in buffers:
            size = x.numel() * x.element_size()
            if size:
                known[x.data_ptr()] = max(size, known.get(x.data_ptr(), 0))
        self.starts = np.array(sorted(known), np.uint64)
        self.ends = np.array([s + known[s] for s in sorted(known)], np.uint64)
        self.bytes = [_view(start, known[start]) for start in sorted(known)]

    def locate(self, addresses: np.ndarray, nbytes: int, what: str):
        """(buffer, offset) of each address."""
        if not self.bytes:
            raise PtxError(f"global memory out of bounds, no buffers: {what}")
        which = np.searchsorted(self.starts, addresses, "right").astype(np.int64) - 1
        bad = (which < 0) | (addresses + np.uint64(nbytes) > self.ends[which])
        if bad.any():
            first = int(addresses[bad].min())
            raise PtxError(f"global memory out of bounds, {bad.sum()} lanes, {first:#x}: {what}")
        return which, (addresses - self.starts[which]).astype(np.int64)

    def each_buffer(self, addresses, nbytes, what):
        which, offsets = self.locate(addresses, nbytes, what)
        for buffer in np.unique(which):
            lanes = which == buffer
            yield self.bytes[buffer], lanes, offsets[lanes][:, None] + np.arange(nbytes)


def _view(start: int, size: int) -> np.ndarray:
    import ctypes

    return np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(start))


class Block:
    """One thread block: registers of all threads, shared and local memory, program counters."""

    def __init__(self, kernel, arguments, memory, index, grid, threads, dynamic_shared):
        self.kernel, self.arguments, self.memory = kernel, arguments, memory
        self.index, self.grid, self.threads = index, grid, threads
        self.thread = np.arange(threads)
        self.pc = np.zeros(threads, np.int64)
        self.waiting = np.full(threads, -1)  # program counter of the barrier where a thread waits
        self.barrier = np.zeros(threads, np.int64)  # its number
        self.wanted = np.zeros(threads, np.int64)  # how many threads it is for; 0: all
        self.alive = np.ones(threads, bool)
        self.registers: dict[str, np.ndarray] = {}
        # 0xFF is NaN in every float type: reading what nobody wrote shows
        self.shared = np.full(kernel.shared_bytes + dynamic_shared, 0xFF, np.uint8)
        self.local = np.full((threads, kernel.local_bytes), 0xFF, np.uint8)
        self.open_copies = [[] for _ in range(-(-threads // 32))]  # cp.async not yet committed
        self.copy_groups = [[] for _ in range(-(-threads // 32))]  # committed, not yet landed
        self.steps = 0
        self.parameters, self.parameter_at = np.zeros(0, np.uint8), {}
        for name, raw in arguments.items():
            self.parameters = _padded(self.parameters, 16)
            self.parameter_at[name] = self.parameters.size
            piece = np.frombuffer(raw, np.uint8)
            self.parameters = np.concatenate([self.parameters, piece])

    # registers -----------------------------------------------------------------------------------
    def special(self, name: str):
        values = {
            "%laneid": self.thread % 32, "%warpid": self.thread // 32, "%tid.x": self.thread,
            "%tid.y": 0, "%tid.z": 0, "%ntid.x": self.threads, "%ntid.y": 1, "%ntid.z": 1,
            "%lanemask_lt": (1 << (self.thread % 32)) - 1,
        }  # fmt: skip
        for axis, letter in enumerate("xyz"):
            values[f"%ctaid.{letter}"] = self.index[axis]
            values[f"%nctaid.{letter}"] = self.grid[axis]
        return values.get(name)

    def bits(self, operand, width: int) -> np.ndarray:
        """An operand of all threads as unsigned integers of a width."""
        if isinstance(operand, Register):
            found = self.registers.get(operand.name)
            if found is None:
                found = self.special(operand.name)
                if found is None:
                    raise PtxError(f"register {operand.name} is read before any write")
                found = np.broadcast_to(np.asarray(found), (self.threads,))
            return found if found.dtype == UINT[width] else found.astype(UINT[width])
        if isinstance(operand, Immediate):
            value = operand.bits & (2**width - 1)
        elif isinstance(operand, Symbol) and operand.name in self.kernel.shared:
            value = self.kernel.shared[operand.name]
        elif isinstance(operand, Symbol) and operand.name in self.kernel.local:
            value = self.kernel.local[operand.name]
        elif isinstance(operand, Symbol) and operand.name in self.parameter_at:
            value = self.parameter_at[operand.name]
        else:
            raise PtxError(f"not implemented: operand {operand}")
        return np.full(self.threads, value, UINT[width])

    def read(self, operand, kind: Type, lanes) -> np.ndarray:
        """Values of an operand in the given lanes (bool mask or slice), as the given type."""
        bits = np.ascontiguousarray(self.bits(operand, kind.bits)[lanes])
        if kind.kind == "p":
            return bits != 0
        if kind.kind == "h":
            return bf16_to_f32(bits)
        return bits.view({"f": FLOAT, "s": SINT}.get(kind.kind, UINT)[kind.bits])

    def write(self, operand, value, kind: Type, lanes) -> None:
        if not isinstance(operand, Register):
            raise PtxError(f"not implemented: destination {operand}")
        if operand.name == "_":
            return
        value = np.asarray(value)
        if kind.kind == "h":
            bits = f32_to_bf16(value)
        elif kind.kind == "f":
            bits = value.astype(FLOAT[kind.bits], copy=False).view(UINT[kind.bits])
        elif kind.kind == "s":  # a wider register is filled by sign extension
            bits = value.astype(SINT[kind.bits], copy=False)
        else:
            bits = value
        register = self.register(operand.name)
        register[lanes] = bits.astype(register.dtype, copy=False)

    def register(self, name: str) -> np.ndarray:
        """Bits of a register in all threads; NaN (or true) where nobody has written yet."""
        if name not in self.registers:
            width = self.kernel.width(name)
            self.registers[name] = np.full(self.threads, 2**width - 1, UINT[width])
        return self.registers[name]

    # memory --------------------------------------------------------------------------------------
    def address(self, operand: Address, lanes) -> np.ndarray:
        return self.read(operand.base, U64, lanes) + np.uint64(operand.offset & MASK64)

    def space(self, i: Instruction) -> str:
        for part in i.opcode:
            if part.split("::")[0] in ("shared", "global", "local", "param"):
                return part.split("::")[0]
        return "generic"

    def resolve(self, addresses: np.ndarray, space: str):
        """Space and address inside it; a generic address names its space by its window."""
        if space == "generic" and addresses.size:
            first = int(addresses[0])
            space = next((x for x, bit in WINDOWS.items() if first & bit), "global")
            addresses = addresses & np.uint64(WINDOWS["local"] - 1)
        return space, addresses

    def _place(self, addresses, nbytes: int, space: str, lanes, what: str):
        if (addresses % np.uint64(nbytes)).any():
            raise PtxError(f"misaligned access of {nbytes} bytes: {what}")
        space, addresses = self.resolve(addresses, space)
        if space == "global":
            return space, addresses
        size = {"shared": self.shared.size, "local": self.local.shape[1]}.get(
            space, self.parameters.size
        )
        if addresses.size and int(addresses.max()) + nbytes > size:
            last = int(addresses.max())
            raise PtxError(f"{space} memory out of bounds, {last}+{nbytes} > {size}: {what}")
        return space, addresses.astype(np.int64)[:, None] + np.arange(nbytes)

    def load(self, addresses, nbytes: int, space: str, lanes, what: str) -> np.ndarray:
        """Bytes [lanes, nbytes]."""
        space, place = self._place(addresses, nbytes, space, lanes, what)
        if space == "shared":
            return self.shared[place]
        if space == "local":
            return self.local[self.thread[lanes][:, None], place]
        if space == "param":
            return self.parameters[place]
        data = np.empty((len(addresses), nbytes), np.uint8)
        for buffer, mine, offsets in self.memory.each_buffer(place, nbytes, what):
            data[mine] = buffer[offsets]
        return data

    def store(self, addresses, data: np.ndarray, space: str, lanes, what: str) -> None:
        space, place = self._place(addresses, data.shape[1], space, lanes, what)
        if space == "shared":
            self.shared[place] = data
        elif space == "local":
            self.local[self.thread[lanes][:, None], place] = data
        elif space == "param":
            raise PtxError(f"a kernel cannot write its parameters: {what}")
        else:
            for buffer, mine, offsets in self.memory.each_buffer(place, data.shape[1], what):
                buffer[offsets] = data[mine]

    # execution -----------------------------------------------------------------------------------
    def step(self, group: np.ndarray) -> None:
        live = group & self.alive & (self.waiting < 0)
        code, places = self.kernel.code, self.pc[live]
        pc = int(places.min())
        if code[pc].opcode[0] in TOGETHER and places.max() != pc:
            # its other lanes may still be on their way, in a block that lies behind
            on_their_way = (x for x in np.unique(places) if code[x].opcode[0] not in TOGETHER)
            pc = int(next(on_their_way, pc))
        active = live & (self.pc == pc)
        i = code[pc]
        self.steps += 1
        self.pc[active] = pc + 1
        lanes = active
        if i.guard:
            value = self.read(Register(i.guard), PRED, slice(None))
            lanes = active & (~value if i.negated else value)
        name = i.opcode[0]
        if name == "bra":
            self.pc[lanes] = self.kernel.labels[i.operands[0].name]
        elif name == "brx":
            table = [self.kernel.labels[label] for label in self.kernel.tables[i.operands[1].name]]
            self.pc[lanes] = np.array(table)[self.read(i.operands[0], U32, lanes)]
        elif name in ("ret", "exit"):
            self.alive[lanes] = False
        elif name in ("bar", "barrier"):
            if "warp" not in i.opcode:  # a warp steps together: its own barriers are no-ops
                if "sync" not in i.opcode or not 1 <= len(i.operands) <= 2:
                    raise not_implemented(i)
                self.barrier[lanes] = self.read(i.operands[0], U32, lanes)
                self.wanted[lanes] = (
                    0 if len(i.operands) == 1 else self.read(i.operands[1], U32, lanes)
                )
                self.waiting[lanes] = pc
        elif lanes.any():
            self._execute(i, slice(None) if lanes.all() else lanes)
        elif i.operands:  # Triton's reductions then shuffle it, and use it in no other lane
            for x in getattr(i.operands[0], "parts", i.operands[:1]):
                if isinstance(x, Register) and x.name != "_":
                    self.register(x.name)

    def _execute(self, i: Instruction, lanes) -> None:
        handler = HANDLERS.get(i.opcode[0])
        if handler is None:
            raise not_implemented(i)
        try:
            handler(self, i, lanes)
        except PtxError:
            raise
        except Exception as error:
            raise PtxError(
                f"not implemented ({type(error).__name__}: {error}): {i.text}"
            ) from error

    def run(self, schedule: str, rng: random.Random) -> None:
        warps = [self.thread // 32 == w for w in range(-(-self.threads // 32))]
        while self.alive.any():
            groups = rng.sample(warps, len(warps))
            if schedule == "block":
                groups = [np.ones(self.threads, bool)]
            for group in groups:
                while (group & self.alive & (self.waiting < 0)).any():
                    self.step(group)
            if self.alive.any():
                self._release()

    def _release(self) -> None:
        """Opens the barriers that have all their threads; every living thread waits at one."""
        opened = False
        for number in np.unique(self.barrier[self.alive]):
            here = self.alive & (self.barrier == number) & (self.waiting >= 0)
            wanted = set(self.wanted[here].tolist())
            count = self.alive.sum() if wanted == {0} else max(wanted)
            if number > 15 or len(wanted) > 1 or (count % 32 and wanted != {0}):
                raise PtxError(f"invalid barrier {number} for {sorted(wanted)} threads")
            if here.sum() == count:
                places = sorted(set(self.waiting[here].tolist()))
                if len(places) > 1:
                    raise PtxError(f"threads of one barrier wait at barriers {places}")
                self.waiting[here] = -1
                opened = True
        if not opened:
            places = sorted(set(self.waiting[self.alive].tolist()))
            raise PtxError(f"threads of one block wait at barriers {places}")


def _padded(data: np.ndarray, align: int) -> np.ndarray:
    return np.concatenate([data, np.zeros(-data.size % align, np.uint8)])


def launch(
    kernel: Kernel, grid, threads: int, arguments: Sequence, buffers: Sequence,
    dynamic_shared: int = 0, schedule: str = "block", seed: int = 0,
) -> int:  # fmt: skip
    """Runs a kernel; returns the number of group instructions.

    arguments: tensors, ints, floats or bytes in the order of the parameters. buffers: every tensor
    that may be accessed. A seed other than 0 shuffles the blocks; it also orders the warps of
    schedule "warp". Raises PtxError for what is invalid on a GPU.
    """
    grid = (*grid, 1, 1)[:3]
    if grid[0] >= 2**31 or max(grid[1:]) > 65535 or 0 in grid or not 1 <= threads <= 1024:
        raise PtxError(f"invalid launch: grid {grid}, {threads} threads")
    if len(arguments) != len(kernel.params):
        raise PtxError(f"{len(kernel.params)} parameters, got {len(arguments)} arguments")
    raw = {name: _raw(x, size) for (name, size), x in zip(kernel.params, arguments)}
    memory, rng = GlobalMemory(buffers), random.Random(seed)
    blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    if seed:
        rng.shuffle(blocks)
    steps = 0
    with np.errstate(all="ignore"):
        for index in blocks:
            block = Block(kernel, raw, memory, index, grid, threads, dynamic_shared)
            block.run(schedule, rng)
            steps += block.steps
    return steps


def _raw(value, size: int) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, float):
        return FLOAT[size * 8](value).tobytes()
    number = value.data_ptr() if hasattr(value, "data_ptr") else int(value)
    return (number & MASK64).to_bytes(8, "little")[:size]


__all__ = ["HANDLERS", "PRED", "U8", "Block", "Kernel", "PtxError", "handles", "launch"]
