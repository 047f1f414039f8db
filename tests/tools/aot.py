"""Ahead-of-time gate: compiles the Triton tile table without a GPU and judges the machine code.

The launches are recorded from the real host code, run on CPU tensors, and compiled for an
architecture as Triton's launcher would specialise them. The gate looks at registers, spills and
shared memory (cuobjdump) and at the instructions (PTX; for gfx942 the assembly).
``triton_table`` keeps what was found.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import attnpool_kernels.impl.triton as backend
from attnpool_kernels.impl.triton import tile_table
from attnpool_kernels.operands import Cotangents, Operands, Options, Result, Tangents

TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
GFX942 = 942
# KiB of shared memory that a block may have, by architecture
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, GFX942: 64}
NVIDIA = tuple(sm for sm in SHARED_LIMIT if sm != GFX942)
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}
DTYPES = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp16": torch.float16,
    "tf32": torch.float32,
}
WARPGROUPS = ("wgmma", "tcgen05.mma")
SPILLS = 256  # bytes a thread that a tile may spill: fewer instructions count for more
THOROUGH = 90  # where calls with options are compiled in every dtype, width and schedule
NONE, ALL, NO_KEY_BIAS = "none", "all", "all but key_bias"  # options of a variant
WIDE = r"ld\.global\S*\.v[24]\.b(32|64)|cp\.async"


def short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Variant:
    """options: ALL are both biases, dropout and a cotangent of lse."""

    sm: int
    row: str
    width: int
    pass_name: str
    options: str = NONE

    @property
    def key(self) -> str:
        chip = "gfx942" if self.sm == GFX942 else f"sm_{self.sm}"
        options = "" if self.options == NONE else f" {self.options}"
        return f"{self.row} {self.width} {self.pass_name} {chip}{options}"

    @property
    def line(self) -> tuple[str, str, str, str]:
        """The line of the summary that it belongs to."""
        chip = "gfx942" if self.sm == GFX942 else "sm_80 to sm_120"
        return chip, self.row, self.pass_name, self.options

    @property
    def capability(self) -> tuple[int, int]:
        return tile_table.GFX942 if self.sm == GFX942 else divmod(self.sm, 10)

    @property
    def tile(self) -> dict[str, Any] | None:
        """The entry of the table that it is compiled with."""
        place = self.pass_name, self.capability, self.row, self.width
        return tile_table.tile(*place, self.options != NONE, self.options == ALL)


@dataclass(frozen=True)
class Record:
    registers: int
    stack: int
    shared: int
    unit: str

    def line(self) -> list:
        return [self.registers, self.stack, self.shared, self.unit]


@dataclass
class Launch:
    """A kernel with the arguments and compiler options that the host code gave it."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        names = {param.name for param in self.kernel.params}
        return {name: x for name, x in self.arguments.items() if name not in names}

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.rsplit('.', 1)[-1]}{self.kernel.__name__}".strip("_")

    def source(self) -> ASTSource:
        """Signature, constants and alignment, as the launcher would find them."""
        signature: dict[str, Any] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}

        def describe(value: Any, path: tuple[int, ...], annotation: str, fixed: bool) -> Any:
            if isinstance(value, tuple):
                members = [describe(x, (*path, i), "", fixed) for i, x in enumerate(value)]
                return value._make(members) if hasattr(value, "_make") else tuple(members)
            if value is None or (isinstance(value, int) and value == 1 and not fixed):
                constants[path] = value
                return "constexpr"
            if isinstance(value, torch.Tensor):
                attributes[path] = [["tt.divisibility", 16]]
                return f"*{TYPES[value.dtype]}"
            if isinstance(value, int) and not fixed and value % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return annotation or ("fp32" if isinstance(value, float) else "i32")

        for param in self.kernel.params:
            value, path = self.arguments[param.name], (param.num,)
            if param.is_constexpr:
                signature[param.name] = "constexpr"
                constants[path] = value
            else:
                fixed = param.do_not_specialize or param.annotation_type.startswith("fp")
                signature[param.name] = describe(value, path, param.annotation_type, fixed)
        return ASTSource(self.kernel, signature, constants, attributes)

    def compile(self, architecture: int):
        target, options = GPUTarget("cuda", architecture, 32), self.options
        if architecture == GFX942:
            target = GPUTarget("hip", "gfx942", 64)
            del options["maxnreg"]
        return triton.compile(self.source(), target=target, options=options)

    def digest(self) -> str:
        """Of everything that the machine code follows from, but Triton and the architecture.

        An absent member of a tuple leaves no trace in the code, and none here.
        """
        lines = [self.kernel.cache_key, repr(sorted(self.options.items()))]

        def describe(value: Any, name: str, fixed: bool) -> None:
            if isinstance(value, tuple):
                names = getattr(value, "_fields", range(len(value)))
                for member, x in zip(names, value):
                    describe(x, f"{name}.{member}", False)
            elif isinstance(value, torch.Tensor):
                lines.append(f"{name} {TYPES[value.dtype]}")
            elif isinstance(value, int) and not fixed:  # as the launcher specialises it
                lines.append(f"{name} {'1' if value == 1 else value % 16 == 0}")
            elif value is not None:
                lines.append(f"{name} {type(value).__name__}")

        for param in self.kernel.params:
            value = self.arguments[param.name]
            if param.is_constexpr:
                lines.append(f"{param.name} = {value!r}")
            else:
                lines.append(f"{param.name}: {param.annotation_type}")
                fixed = param.do_not_specialize or param.annotation_type.startswith("fp")
                describe(value, param.name, fixed)
        return short("\n".join(lines))


@contextlib.contextmanager
def on_launch(call: Callable[[Launch], None]) -> Iterator[None]:
    """Hands every kernel launch to ``call`` instead of a GPU."""
    run = JITFunction.run

    def replaced(self, *args, grid, warmup, **kwargs):
        call(Launch(self, grid, dict(zip(self.arg_names, args)) | kwargs))

    JITFunction.run = replaced
    try:
        yield
    finally:
        JITFunction.run = run


@contextlib.contextmanager
def as_device(capability: tuple[int, int], row: str, **changes: Any) -> Iterator[None]:
    """The tile table's view of a GPU, with changes to its entries; the tensors stay on the CPU."""
    tile, precision = tile_table.tile, tile_table.precision

    def changed(pass_name, _, *rest):
        entry = tile(pass_name, capability, *rest)
        return None if entry is None else entry | changes

    tile_table.tile, tile_table.precision = changed, lambda dtype: row
    try:
        yield
    finally:
        tile_table.tile, tile_table.precision = tile, precision


def launches(variant: Variant) -> list[Launch]:
    """The kernels of a pass, for so few rows that there is no other schedule, and where one tile
    serves all molecules also for so many that a program finds its tile by a search; with options
    the latter on one architecture only."""
    name, place = variant.pass_name, (variant.capability, variant.row, variant.width)
    if name in tile_table.FEW_PASSES:
        return launches_of(variant, tile_table.SPLIT + 16)
    if name in tile_table.LONG_PASSES:
        return launches_of(variant, tile_table.LONG)
    if name in tile_table.MEDIUM_PASSES:
        return launches_of(variant, tile_table.MEDIUM + 15)
    found = launches_of(variant, 16)
    thorough = variant.sm == THOROUGH
    if variant.options == NONE:
        thorough = tile_table.tile(f"{name}_long", *place, False) is None
    if thorough:
        found += launches_of(variant, tile_table.LONG + 16)
    return found


def launches_of(variant: Variant, rows: int) -> list[Launch]:
    """Those with one molecule of so many rows."""
    found: list[Launch] = []
    few = variant.pass_name in tile_table.FEW_PASSES
    dtype, options = DTYPES[variant.row], variant.options != NONE
    k = torch.empty(rows, 16, variant.width, dtype=dtype)
    q = k[: tile_table.FEW] if few else k
    out = k.new_empty(1, *q.shape) if few else torch.empty_like(k)
    kind = torch.float64 if variant.row == "fp64" else torch.float32
    lse, ptr = torch.empty(out.shape[:-1], dtype=kind), torch.tensor([0, rows])
    bias = torch.empty(len(q) * rows, 16, dtype=dtype) if options else None
    key_bias = torch.empty(rows, 16, dtype=dtype) if variant.options == ALL else None
    pairs = torch.tensor([0, len(q) * rows]) if options else None
    seed = torch.zeros(1, dtype=torch.int64) if options else None
    dropout, dlse = (0.1, lse) if options else (0.0, None)
    x = Operands.plain(q, k, k, None if few else ptr, ptr)
    x = x._replace(bias=bias, key_bias=key_bias, pair_ptr=pairs, seed=seed)
    y, dy, given = Result(out, lse), Cotangents(out, dlse), Options(0.125, dropout)
    # gfx942 has a tensor core for exact float32
    exact = {"PRECISION": "ieee"} if variant.sm == GFX942 else {}
    with as_device(variant.capability, variant.row, **exact), on_launch(found.append):
        if "double_backward" in variant.pass_name:
            backend.double_backward(x, y, dy, Tangents(q, k, k, bias, key_bias), given)
        elif "backward" in variant.pass_name:
            backend.backward(x, y, dy, given, options)
        else:
            backend.forward(x, given)
    found = [launch for launch in found if not launch.name.endswith("sum_parts_kernel")]
    if few:
        return found
    kernel = variant.pass_name.removesuffix("_long").removesuffix("_medium")
    kernel = {"forward": "forward_forward"}.get(kernel, kernel) + "_kernel"
    starts = {"long": tile_table.LONG, "medium": tile_table.MEDIUM}
    shortest = starts.get(variant.pass_name.rpartition("_")[2], 0)
    found = [launch for launch in found if launch.name == kernel]
    return [launch for launch in found if launch.arguments["SHORTEST"] == shortest]


def tool(name: str, *arguments: Any) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True)
    return done.stdout + done.stderr


def resources(compiled) -> Record:
    """Registers and local memory of the machine code; shared memory; the unit that multiplies."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        names = ("vgpr_count", "private_segment_fixed_size", "group_segment_fixed_size")
        numbers = [int(re.search(rf"\.{name}: +(\d+)", text)[1]) for name in names]
        return Record(*numbers, "mfma" if "v_mfma" in text else "fma")
    ptx = compiled.asm["ptx"]
    unit = next((unit for unit in ("tcgen05.mma", "wgmma", "mma.sync") if unit in ptx), "fma")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump: {usage.strip()[:200]}")
    registers, stack, shared, local = map(int, found.groups())
    return Record(registers, stack + local, max(shared, compiled.metadata.shared), unit)


def limits_of(variant: Variant) -> Iterator[int]:
    """KiB of shared memory of a block on the architectures that a variant stands for."""
    yield SHARED_LIMIT[variant.sm]
    if variant.options != NONE and variant.sm == THOROUGH:
        for sm in NVIDIA:
            if replace(variant, sm=sm).tile == variant.tile:
                yield SHARED_LIMIT[sm]


def findings(variant: Variant, launch: Launch, compiled, record: Record) -> list[str]:
    """What the gate does not let pass."""
    warps = launch.options["num_warps"]
    dots = "PRECISION" in launch.arguments
    # statistics alone are computed from slices, and a small tile has 4 bytes or fewer a thread
    row = variant.width * DTYPES[variant.row].itemsize
    wide = dots and not launch.arguments.get("STATISTICS")
    wide = wide and launch.arguments["BLOCK_N"] * row >= 8 * 32 * warps
    amd = variant.sm == GFX942
    # their sources are executed as mma.sync of other architectures
    hopper = variant.sm == 90 and variant.pass_name.endswith(("_medium", "_long"))
    text = compiled.asm["amdgcn" if amd else "ptx"]
    wanted = {"tf32": ".tf32", "tf32x3": ".tf32"}.get(launch.arguments.get("PRECISION"))
    half = variant.row in ("fp16", "bf16")
    atomics = r"atomic_(add|fadd|pk_add)_(f|bf)" if amd else r"\b(atom|red)\.[^;]*\.b?f(16|32|64)"
    tests = {
        f"{record.stack} bytes of spills": record.stack > SPILLS,
        "shared memory over the limit": record.shared > 1024 * min(limits_of(variant)),
        "registers of a block": not amd and record.registers * warps * 32 > 65536,
        "no tensor core instruction": dots and (half or amd) and record.unit == "fma",
        "not mma.sync, which CI can execute": record.unit in WARPGROUPS and not hopper,
        "no tf32 instruction": wanted is not None and wanted not in text,
        "tf32 in another precision": wanted is None and ".tf32" in text,
        "float atomics": re.search(atomics, text) is not None,
        "no wide loads": wide and not amd and variant.row != "fp64" and not re.search(WIDE, text),
    }
    return [name for name, bad in tests.items() if bad]


def examine(variant: Variant) -> tuple[Record, list[str]]:
    """Compiles the kernels of a variant: (the most that one needs, what the gate finds)."""
    records, found = [], []
    for launch in launches(variant):
        compiled = launch.compile(variant.sm)
        records.append(resources(compiled))
        found += findings(variant, launch, compiled, records[-1])
    worst = [max(numbers) for numbers in zip(*(record.line()[:3] for record in records))]
    return Record(*worst, records[0].unit), list(dict.fromkeys(found))


def digest(variant: Variant) -> str:
    return "".join(launch.digest() for launch in launches(variant))


def variants() -> Iterator[Variant]:
    """Every entry of the table on every architecture, the likeliest to be used first.

    Tiles of medium and long sets serve calls without options only; few seeds are compiled with all
    of them, and without where they have other tiles then.
    Without a key bias, options have variants of their own where they have other tiles. With options
    everything is compiled on one architecture, and on the others bfloat16 and float32 of width 64:
    the table is to take an hour. What their tiles share is compared with the limits of all.
    """
    widths = (32, 64, 128, 16, 256)
    everywhere = [(row, w, sm) for w, row, sm in itertools.product(widths, DTYPES, NVIDIA)]
    amd = [(row, width, GFX942) for row in ("bf16", "fp32", "fp64") for width in tile_table.WIDTHS]
    for passes, options, where in (
        (tile_table.PASSES, NONE, everywhere),
        (tile_table.PASSES, ALL, everywhere),
        (tile_table.FEW_PASSES, ALL, everywhere),
        (tile_table.LONG_PASSES, NONE, everywhere),
        (tile_table.MEDIUM_PASSES, NONE, everywhere),
        (tile_table.FEW_PASSES, NONE, [place for place in everywhere if place[2] == 90]),
        (tile_table.PASSES, NONE, amd),
    ):
        for row, width, sm in where:
            if row == "fp64" and backend.version() < backend._FLOAT64:
                continue
            typical = width == 64 and row in ("bf16", "fp32")
            if options == ALL and sm != THOROUGH and not typical:
                continue
            for name in passes:
                found = [Variant(sm, row, width, name, options)]
                other = replace(found[0], options=NO_KEY_BIAS)
                if options == ALL and other.tile != found[0].tile:
                    found.append(other)
                yield from (variant for variant in found if variant.tile is not None)
