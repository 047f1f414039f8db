"""Executed warp-instructions of the kernels in csrc/cuda on sm_90, for a batch of equal molecules.

    python -m tools.executed_cuda --row bf16 --width 64 --rows 18 --passes forward backward

The launches are those of the shipped host code, noted by the host module (tools.cuda_host): grid,
threads, shared memory, parameters. Each kernel is compiled by nvcc for its type and width alone.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from attnpool_kernels.operands import Cotangents, Operands, Options, Result, Tangents, accumulator
from tools import cuda_host, executed

NAMES = {"Bfloat16": "__nv_bfloat16", "Half": "__half"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TYPES = {"bf16": "Bfloat16", "fp16": "Half", "fp32": "float"}


def bare(name: str) -> str:
    """A kernel and its template arguments, however a compiler spells them."""
    start = re.search(r"\w+<", name.partition("= ")[2] or name)
    if not start:
        return name
    text, depth = "", 0
    for char in start.string[start.start() :]:
        text += char
        depth += (char == "<") - (char == ">")
        if char == ">" and not depth:
            break
    text = re.sub(r"\((?:bool|int|unsigned int)\)|attnpool::|\s", "", text)
    text = re.sub(r"\btrue\b", "1", re.sub(r"\bfalse\b", "0", text))
    return re.sub(r"\b(Bfloat16|Half)\b", lambda x: NAMES[x[1]], text)


def sources(kernel: str) -> list[Path]:
    """Files that name a kernel."""
    files = sorted((cuda_host.ROOT / "csrc" / "cuda").glob("*.cu"))
    named = [path for path in files if re.search(rf"\b{kernel}\b", path.read_text())]
    return named or files


@cache
def compiled(path: Path, row: str, width: int) -> bytes:
    only = [f"-DATTN_ONLY_TYPE={TYPES[row]}", f"-DATTN_ONLY_WIDTH={width}"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "x.cubin"
        command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_90", "-cubin", *only, "-o", out, path]
        subprocess.run(command, check=True)
        return out.read_bytes()


@cache
def found(noted: str, row: str, width: int) -> tuple[bytes, str]:
    """(cubin, symbol) of a kernel as the host module notes it."""
    wanted = bare(noted)
    for path in sources(wanted.partition("<")[0]):
        cubin = compiled(path, row, width)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            usage = executed.tool("cuobjdump", "--dump-resource-usage", file.name)
        symbols = re.findall(r"Function (\S+):", usage)
        plain = subprocess.run(
            ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
        ).stdout.split("\n")
        for symbol, text in zip(symbols, plain):
            if bare(text) == wanted:
                return cubin, symbol
    raise LookupError(f"no compiled kernel is {wanted}")


class Counted(cuda_host.Kernels):
    """A backend whose launches are counted; nothing is computed."""

    def __init__(self, row: str, width: int, heads: int) -> None:
        super().__init__(cuda_host.build())
        self.row, self.width, self.heads = row, width, heads
        self.measured: list[executed.Measured] = []

    def _launch(self, name: str, plain: dict, values: list) -> int:
        known = [x for x in values if isinstance(x, torch.Tensor) and x.dim() == 1]
        for noted, blocks, threads, shared, params in self.module.plan(name, plain):
            cubin, symbol = found(noted, self.row, self.width)
            measured = executed.measure(cubin, symbol, (blocks,), threads, params, known, shared)
            self.measured.append(measured.renamed(bare(noted)))
        return 0


def run(kernels: Counted, name: str, rows: int, molecules: int) -> list[executed.Measured]:
    """The launches of a pass over equal molecules."""
    dtype = DTYPES[kernels.row]
    q = torch.empty(rows * molecules, kernels.heads, kernels.width, dtype=dtype)
    ptr = torch.arange(molecules + 1) * rows
    lse = torch.full(q.shape[:-1], 3.0, dtype=accumulator(dtype))
    x, options = Operands.plain(q, q, q, ptr, ptr), Options(0.125)
    y, dy = Result(q, lse), Cotangents(q, None)
    kernels.measured = []
    if name == "forward":
        kernels.forward(x, options)
    elif name == "backward":
        kernels.backward(x, y, dy, options, False)
    else:
        kernels.double_backward(x, y, dy, Tangents(q, q, q), options)
    return kernels.measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", default="bf16", choices=DTYPES)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[18])
    parser.add_argument("--molecules", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--passes", nargs="+", default=["forward", "backward", "double_backward"])
    given = parser.parse_args()
    if reason := cuda_host.missing() or ("" if shutil.which("nvcc") else "nvcc is not installed"):
        print(reason)
        return
    kernels = Counted(given.row, given.width, given.heads)
    unit = given.molecules * given.heads
    for name in given.passes:
        for rows in given.rows:
            total = 0.0
            for x in run(kernels, name, rows, given.molecules):
                total += x.instructions / unit
                print(
                    f"   {x.kernel}: {x.instructions / unit:.0f}, {x.requested / unit:.0f} bytes, "
                    f"{x.products / unit:.0f} products, {x.resources}, {x.resources.blocks} blocks"
                )
            print(f"{given.row} {name} {rows} rows: {total:.0f}", flush=True)


if __name__ == "__main__":
    main()
