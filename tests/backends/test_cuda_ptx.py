"""The PTX that nvcc makes of the CUDA kernels for sm_80, executed by the simulator of tests/ptx.

One small case for each pass and dtype. The launches (grid, threads, shared memory, parameters) are
those of the shipped code, noted by the host module. The simulator knows one barrier a block, so the
shapes are such that a block has one group of warps; named barriers run in the host module.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import cuda_host
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import ptx
from ptx import machine

from attnpool_kernels import testing

pytestmark = [
    pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing()),
    pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed"),
]

SYMBOLS = {"Bfloat16": "13__nv_bfloat16", "Half": "6__half", "float": "f", "double": "d"}
NOTED = re.compile(r"= (?:attnpool::)?(\w+)<(?:attnpool::)?(\w+)(?:, (\d+))?>")


@cache
def compiled(source: str) -> str:
    folder = cuda_host.ROOT / "build" / "ptx"
    folder.mkdir(parents=True, exist_ok=True)
    target, path = folder / f"{source}.ptx", cuda_host.ROOT / "csrc" / "cuda" / f"{source}.cu"
    headers = [*path.parent.glob("*.cuh"), *path.parents[1].rglob("*.h"), path]
    if not target.exists() or target.stat().st_mtime < max(x.stat().st_mtime for x in headers):
        command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_80", "-ptx", "-o", target, path]
        subprocess.run(command, check=True)
    return target.read_text()


# Parameters whose address the code takes are read from here: the simulator has no such address.
PARAMETERS = torch.zeros(4096, dtype=torch.uint8)
ADDRESS = PARAMETERS.data_ptr()


@cache
def kernel(source: str, noted: str) -> ptx.Kernel:
    name, dtype, width = NOTED.search(noted).groups()
    symbol = f"{len(name)}{name}I{SYMBOLS[dtype]}{f'Li{width}E' if width else ''}E"
    entry = re.search(rf"\.visible \.entry \S*{symbol}.*?\n}}", compiled(source), re.S)[0]
    entry = re.sub(r"bar\.sync\s+%\w+, %\w+;", "bar.sync 0;", entry)
    entry = re.sub(r"mov\.b64(\s+%\w+), _Z\w+_param_0;", rf"mov.b64\1, {ADDRESS};", entry)
    entry = entry.replace("cvta.to.global.u64", "mov.b64")
    entry = entry.replace("bfind.shiftamt.u32", "clz.b32")  # the same but for zero
    entry = re.sub(r"ld\.param(\.[^\[;]*\[%)", r"ld.global\1", entry)
    # scopes of their own in cuda_bf16.h
    entry = re.sub(r"\{\s+(cvt\.[^;]+;)\s*\}", r"\1", entry)
    entry = re.sub(
        r"\{\s+mov\.b32 (%\w+), \{0,(%\w+)\};\s*\}",
        r"cvt.u32.u16 \1, \2;\nshl.b32 \1, \1, 16;",
        entry,
    )
    shared = "\n".join(re.findall(r"^\.extern \.shared .*;$", compiled(source), re.M))
    return ptx.Kernel(f"{shared}\n{entry}", symbol)


@machine.handles("bfi")
def insert_bits(b: machine.Block, i, lanes) -> None:
    low, into, position, length = (
        b.read(x, machine.U32, lanes).astype("int64") for x in i.operands[1:5]
    )
    mask = ((1 << length) - 1) << position
    b.write(i.operands[0], (into & ~mask) | ((low << position) & mask), machine.U32, lanes)


class Simulated(cuda_host.Kernels):
    """The kernels as compiled PTX."""

    def _launch(self, name: str, plain: dict, values: list) -> int:
        buffers = [x for x in values if isinstance(x, torch.Tensor)]
        for noted, blocks, threads, shared, params in self.module.plan(name, plain):
            entry = kernel(name, noted)
            size = sum(size for _, size in entry.params)
            assert size == len(params)
            PARAMETERS[:size] = torch.frombuffer(bytearray(params), dtype=torch.uint8)
            ptx.launch(
                entry, (blocks,), threads, [params], [*buffers, PARAMETERS], shared, "warp", seed=1
            )
        return 0


@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.float32, 40), (torch.bfloat16, 72), (torch.float16, 72), (torch.float64, 8)],
    ids=str,
)
def test_compiled_code_is_inside_the_budget(dtype, dim):
    case = testing.Case("ptx", (5, 17), heads=1, dim=dim, bias="pair", lse=True, nobody=1)
    kernels = Simulated(cuda_host.build())
    testing.judge(case, dtype, lambda batch: testing.run_kernels(batch, kernels))


def test_seeds_and_dropout():
    case = testing.Case("ptx seeds", (6, 3), seeds=2, heads=1, dim=40, dropout=0.3)
    kernels = Simulated(cuda_host.build())
    testing.judge(case, torch.float32, lambda batch: testing.run_kernels(batch, kernels))
