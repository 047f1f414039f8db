"""Ahead-of-time gate: compiles the Triton tile table without a GPU and judges the machine code.

The launches are recorded from the real host code, run on CPU tensors, and compiled for an
architecture as Triton's launcher would specialise them. The gate looks at registers, spills and
shared memory (cuobjdump) and at the instructions (PTX). ``triton_resources.json`` keeps what was
found, per Triton version, so that a change of it shows in review. While the hash of sources and
table is unchanged, a check recompiles a sample only.

    python tests/backends/aot.py check [--all]        exit code 1 on a finding
    python tests/backends/aot.py update [--minutes M] compile what the snapshot lacks, rewrite it
    python tests/backends/aot.py report               the table with predicted occupancy
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import attnpool_kernels.backends.triton as backend
from attnpool_kernels.backends.triton import tuning

SNAPSHOT = pathlib.Path(__file__).with_name("triton_resources.json")
TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may have
TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
DTYPES = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32,
    "fp64": torch.float64,
}  # fmt: skip


# rows of the table and where they are compiled: what shares another row's tiles on two
ROWS = {"bf16": SHARED_LIMIT, "fp32": SHARED_LIMIT, "fp64": SHARED_LIMIT, "fp16": (80, 90),
        "tf32": (80, 90)}  # fmt: skip
WIDE = r"ld\.global\S*\.v[24]\.b(32|64)|cp\.async"
SAMPLE = 40  # every 40th variant where nothing has changed
# Bytes of spills that are let pass: what ptxas trades for occupancy by itself; with bias and
# dropout at once; and where no tile is without.
MINOR_SPILL, OPTIONS_SPILL = 48, 256
SPILLS = {
    (row, 256, name): 320
    for row in ("fp16", "bf16", "fp32", "tf32")
    for name in ("double_backward_query", "double_backward_key")
}
SPILLS |= {("fp64", width, name): 1024 for width in tuning.WIDTHS for name in tuning.PASSES}


@dataclass(frozen=True)
class Variant:
    sm: int
    row: str
    width: int
    pass_name: str
    options: bool = False  # with bias, dropout and a cotangent of lse

    @property
    def key(self) -> str:
        options = " options" if self.options else ""
        return f"{self.row} {self.width} {self.pass_name} sm_{self.sm}{options}"


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
                return tuple(describe(x, (*path, i), "", fixed) for i, x in enumerate(value))
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
        target = GPUTarget("cuda", architecture, 32)
        return triton.compile(self.source(), target=target, options=self.options)


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
    tile, precision = tuning.tile, tuning.precision
    tuning.tile = lambda name, _, row, width: tile(name, capability, row, width) | changes
    tuning.precision = lambda dtype: row
    try:
        yield
    finally:
        tuning.tile, tuning.precision = tile, precision


def launches(
    architecture: int, row: str, width: int, passes=tuning.PASSES, options: bool = False
) -> list[Launch]:
    """The launches of three passes; options: with bias, dropout and a cotangent of lse."""
    found: list[Launch] = []
    q, out = torch.zeros(16, 16, width, dtype=DTYPES[row]), None
    lse = torch.zeros(16, 16, dtype=torch.float64 if row == "fp64" else torch.float32)
    out, ptr = torch.zeros_like(q), torch.tensor([0, 16])
    bias = torch.zeros(256, 16, dtype=q.dtype) if options else None
    pairs = torch.tensor([0, 256]) if options else None
    seed = torch.zeros(1, dtype=torch.int64) if options else None
    dropout, dlse = (0.1, lse) if options else (0.0, None)
    problem = (q, q, q, bias, ptr, ptr, pairs, seed)
    capability = divmod(architecture, 10)
    with as_device(capability, row), on_launch(found.append):
        if "forward" in passes:
            backend.forward(*problem, 0.125, dropout)
        if {"backward_query", "backward_key"} & set(passes):
            backend.backward(*problem, out, lse, q, dlse, 0.125, dropout, options)
        if {"double_backward_query", "double_backward_key"} & set(passes):
            backend.double_backward(
                *problem, out, lse, q, dlse, q, q, q, bias, 0.125, dropout)  # fmt: skip
    return [launch for launch in found if pass_of(launch) in passes]


def pass_of(launch: Launch) -> str:
    return launch.name.removesuffix("_kernel").replace("forward_forward", "forward")


def tool(name: str, *arguments: Any) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True)
    return done.stdout + done.stderr


def resources(compiled) -> Record:
    """Registers and local memory of the cubin; shared memory; the unit that multiplies."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump: {usage.strip()[:200]}")
    registers, stack, shared, local = map(int, found.groups())
    ptx = compiled.asm["ptx"]
    unit = next((unit for unit in ("tcgen05.mma", "wgmma", "mma.sync") if unit in ptx), "fma")
    return Record(registers, stack + local, max(shared, compiled.metadata.shared), unit)


def findings(variant: Variant, launch: Launch, compiled, record: Record) -> list[str]:
    """What the gate does not let pass."""
    ptx, warps = compiled.asm["ptx"], launch.options["num_warps"]
    wanted = {"tf32": ".tf32", "tf32x3": ".tf32"}.get(launch.arguments["PRECISION"])
    allowed = OPTIONS_SPILL if variant.options else MINOR_SPILL
    allowed = SPILLS.get((variant.row, variant.width, variant.pass_name), allowed)
    tests = {
        f"{record.stack} bytes of spills": record.stack > allowed,
        "shared memory over the limit": record.shared > SHARED_LIMIT[variant.sm] * 1024,
        "registers of a block": record.registers * warps * 32 > 65536,
        "no tensor core instruction": variant.row in ("fp16", "bf16") and record.unit == "fma",
        "not mma.sync, which CI can execute": record.unit in ("wgmma", "tcgen05.mma"),
        "no tf32 instruction": wanted is not None and wanted not in ptx,
        "tf32 in another precision": wanted is None and ".tf32" in ptx,
        "float atomics": re.search(r"\b(atom|red)\.[^;]*\.(f16|f32|f64|bf16)", ptx) is not None,
        "no wide loads": variant.row != "fp64" and not re.search(WIDE, ptx),
    }
    return [name for name, bad in tests.items() if bad]


def examine(variant: Variant) -> tuple[Record, list[str]]:
    """Compiles a variant: (what it needs, what the gate finds)."""
    (launch,) = launches(
        variant.sm, variant.row, variant.width, [variant.pass_name], variant.options
    )
    compiled = launch.compile(variant.sm)
    record = resources(compiled)
    return record, findings(variant, launch, compiled, record)


def variants() -> Iterator[Variant]:
    """Every entry of the table on every architecture; what shares its tiles on two of them."""
    for row in ROWS:
        for sm in ROWS[row]:
            for width in tuning.WIDTHS:
                for name in tuning.PASSES:
                    yield Variant(sm, row, width, name)
    for row in ("bf16", "fp32"):
        for width in tuning.WIDTHS:
            for name in tuning.PASSES:
                yield Variant(90, row, width, name, options=True)


def source_hash() -> str:
    folder = pathlib.Path(backend.__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))
                    if path.name != "__init__.py")  # fmt: skip
    return hashlib.sha256(text).hexdigest()[:16]


def read_snapshot() -> dict[str, Any]:
    """{hash, entries} of this Triton version."""
    known = json.loads(SNAPSHOT.read_text()) if SNAPSHOT.exists() else {}
    return known.get(triton.__version__, {"hash": None, "entries": {}})


def write_snapshot(entries: dict[str, list], complete: bool) -> None:
    known = json.loads(SNAPSHOT.read_text()) if SNAPSHOT.exists() else {}
    digest = source_hash() if complete else f"incomplete {source_hash()}"
    known[triton.__version__] = {"hash": digest, "entries": dict(sorted(entries.items()))}
    text = json.dumps(known, indent=1)
    text = re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+),\s+(\"[^\"]+\")\s+\]", r"[\1, \2, \3, \4]", text)
    SNAPSHOT.write_text(text + "\n")


def check(everything: bool) -> int:
    """Number of findings in a sample, or in all variants where the sources have changed."""
    snapshot = read_snapshot()
    chosen = list(variants())
    if not everything and snapshot["hash"] == source_hash():
        chosen = [v for i, v in enumerate(chosen) if i % SAMPLE == 0]
    bad = 0
    for variant in chosen:
        record, found = examine(variant)
        before = snapshot["entries"].get(variant.key)
        if before is not None and before != record.line():
            print(f"changed: {variant.key}: {before} -> {record.line()}")
        bad += len(found)
        for finding in found:
            print(f"FINDING {variant.key}: {finding} {record.line()}")
    print(f"triton {triton.__version__}: {len(chosen)} variants, {bad} findings")
    return bad


def update(minutes: float) -> int:
    """Compiles the variants that the snapshot lacks, as far as the time goes."""
    snapshot, end = read_snapshot(), time.monotonic() + 60 * minutes
    fresh = snapshot["hash"] in (source_hash(), f"incomplete {source_hash()}")
    entries, bad = dict(snapshot["entries"]) if fresh else {}, 0
    missing = [v for v in variants() if v.key not in entries]
    for done, variant in enumerate(missing):
        if time.monotonic() > end:
            print(f"{len(missing) - done} of {len(missing)} variants left for another call")
            break
        record, found = examine(variant)
        entries[variant.key] = record.line()
        bad += len(found)
        for finding in found:
            print(f"FINDING {variant.key}: {finding} {record.line()}", flush=True)
    write_snapshot(entries, complete=all(v.key in entries for v in variants()))
    return bad


def report() -> int:
    """Registers, shared memory and the warps that fit a multiprocessor, of one molecule a tile."""
    warps_limit = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
    entries = read_snapshot()["entries"]
    for variant in variants():
        if variant.key in entries:
            registers, stack, shared, unit = entries[variant.key]
            tile = tuning.tile(
                variant.pass_name, divmod(variant.sm, 10), variant.row, variant.width)  # fmt: skip
            warps = tile["num_warps"]
            blocks = min(
                65536 // (max(registers, 24) * 32 * warps), 32, warps_limit[variant.sm] // warps,
                SHARED_LIMIT[variant.sm] * 1024 // (shared + 1024))  # fmt: skip
            print(f"{variant.key:42s} {tile['BLOCK_M']:3d} x {tile['BLOCK_N']:3d} {warps} warps "
                  f"{registers:4d} registers {shared:6d} B shared {unit:9s} {blocks:3d} blocks = "
                  f"{blocks * warps:3d} warps of a multiprocessor; {stack} B spilled")  # fmt: skip
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("check", "update", "report"))
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--minutes", type=float, default=60)
    given = parser.parse_args()
    call = {"check": lambda: check(given.all), "update": lambda: update(given.minutes)}
    sys.exit(bool(call.get(given.mode, report)()))
