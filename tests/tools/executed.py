"""Warp-instructions that a launch issues, counted from its machine code without a GPU.

The path is *executed*, not estimated: ``tools.sass`` runs the disassembled kernel with the launch's
own parameters and boundaries, follows every integer, predicate and branch, and counts each
instruction that a warp issues. No trip count is passed in; all follow from the sizes in the
boundaries. Of a large grid some hundred blocks are run, spread over all of it, and scaled up.

    measured = measure(cubin, "kernel", grid, threads, parameters, buffers, shared)
    measured.instructions / (molecules * heads), measured.resources.blocks, ...

What the number is: issued warp-instructions, those whose guard is off included; what it is not: a
time. What an unknown float decides has to be said by the caller (``assume``), or it raises. Bytes
are what lanes ask of global memory, caches left out. Error: none on blocks that are run
(tests/test_sass.py counts two kernels by hand); a sample of a grid is as good as its choice: whole
periods of a regular batch have none, and 64 blocks spread over 12,816 are some percent off.

``executed_triton`` has the table of Triton's kernels. ``executed_cuda`` counts what csrc/cuda
launches for a batch: a kernel of it that is compiled for one type and width by ATTN_ONLY_TYPE and
ATTN_ONLY_WIDTH appears by itself. Any other kernel is counted by ``measure``: its parameters are
its arguments one after the other, each aligned to its size (``packed``), a struct as its bytes.

    python -m tools.executed FILE.cubin [KERNEL]             registers, shared memory, barriers
    python -m tools.executed_triton report "bf16 forward"
    python -m tools.executed_cuda --row bf16 --width 64 --rows 18 --passes forward backward
"""

from __future__ import annotations

import functools
import math
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton

from tools import sass
from tools.sass.parser import Instruction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SAMPLE = 64  # blocks of a launch that are run
GOLDEN = (math.sqrt(5) - 1) / 2

# of a multiprocessor of sm_90
REGISTERS, WARPS, BLOCKS, SHARED, BARRIERS, QUARTERS = 65536, 64, 32, 228 * 1024, 64, 4


@dataclass(frozen=True)
class Resources:
    """What a block takes, and how many of them a multiprocessor of sm_90 holds."""

    registers: int
    shared: int  # bytes of a block
    warps: int  # of a block
    barriers: int
    stack: int
    bytes_of_code: int

    @property
    def blocks(self) -> int:
        """The least of what registers, shared memory, warps and barriers allow.

        Registers are given to warps in units of 256 out of the 16,384 of a quarter; a block takes
        1 KB of shared memory beside its own, in units of 128 bytes.
        """
        of_warp = -(-max(self.registers, 1) * 32 // 256) * 256
        limits = [
            BLOCKS,
            WARPS // self.warps,
            REGISTERS // QUARTERS // of_warp * QUARTERS // self.warps,
            SHARED // (-(-self.shared // 128) * 128 + 1024),
            BARRIERS // max(self.barriers, 1),
        ]
        return min(limits)


@dataclass(frozen=True)
class Measured:
    """Of a launch: everything that all its blocks issue."""

    kernel: str
    instructions: float
    requested: float  # bytes of global memory
    products: float  # tensor core instructions
    grid: int
    resources: Resources
    assumed: tuple[str, ...]

    def renamed(self, kernel: str) -> Measured:
        return replace(self, kernel=kernel)


def tool(name: str, *arguments: Any) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()[:300]}")
    return done.stdout


@functools.lru_cache(maxsize=64)
def disassembled(cubin: bytes, kernel: str | None) -> tuple[sass.Program, str]:
    """The code of a kernel, and what cuobjdump says about its resources."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        program = sass.Program(tool("nvdisasm", "-c", file.name), kernel)
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
    found = re.search(rf"Function {re.escape(program.name or '')}:\s*\n(.*)", usage)
    return program, found[1] if found else usage


def resources(cubin: bytes, kernel: str | None, threads: int, shared: int = 0) -> Resources:
    """shared: bytes given at launch, beside those in the code."""
    program, usage = disassembled(cubin, kernel)
    numbers = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    return Resources(
        registers=int(numbers["REG"]),
        shared=max(int(numbers["SHARED"]), shared),
        warps=-(-threads // 32),
        barriers=program.barriers,
        stack=int(numbers["STACK"]) + int(numbers["LOCAL"]),
        bytes_of_code=16 * len(program.code),
    )


def packed(sizes: Iterable[int], values: Sequence[Any]) -> bytes:
    """The constant bank of a launch: tensors by address, numbers as they are, each aligned."""
    out = b""
    for size, value in zip(sizes, values, strict=True):
        out += b"\0" * (-len(out) % min(size, 8))
        if isinstance(value, bytes):
            out += value
        elif isinstance(value, float):
            out += struct.pack("<f" if size == 4 else "<d", value)
        else:
            number = value.data_ptr() if hasattr(value, "data_ptr") else int(value)
            out += (number % 2**64).to_bytes(8, "little")[:size]
    return out


def spread(total: int, wanted: int) -> list[int]:
    """Some of so many blocks, evenly and in no step with any pattern; all where they are few."""
    if total <= wanted:
        return list(range(total))
    return sorted({int(math.modf(n * GOLDEN)[0] * total) for n in range(1, wanted + 1)})


def measure(
    cubin: bytes, kernel: str | None, grid: Sequence[int], threads: int, parameters: bytes,
    buffers: Sequence[Any], shared: int = 0, blocks: Sequence[int] | None = None,
    assume: Callable[[Instruction], bool | None] = lambda i: None,
) -> Measured:  # fmt: skip
    """Counts a launch. buffers: the tensors that decide a path (boundaries); see ``tools.sass``.

    blocks: those that are run, which stand for all; None: some hundred, spread over the grid.
    """
    program, _ = disassembled(cubin, kernel)
    total = math.prod(grid)
    chosen = spread(total, SAMPLE) if blocks is None else blocks
    count = sass.execute(program, grid, threads, parameters, buffers, 90, chosen, assume)
    scale = total / len(chosen)
    return Measured(
        program.name or "",
        scale * count.instructions,
        scale * count.requested,
        scale * count.of(r"[A-Z]*MMA"),
        total,
        resources(cubin, kernel, threads, shared),
        tuple(sorted({text for text, _ in count.assumed})),
    )


def main() -> None:
    cubin = Path(sys.argv[1]).read_bytes()
    program, usage = disassembled(cubin, sys.argv[2] if len(sys.argv) > 2 else None)
    print(program.name, usage.strip(), f"{16 * len(program.code)} bytes of code")
    print(f"{program.barriers} barriers")


if __name__ == "__main__":
    main()
