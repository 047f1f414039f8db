"""The PTX that nvcc makes of the CUDA kernels for sm_80, executed by the simulator tests/tools/ptx.

One small case for each pass and dtype, two heads, so that a block of small tiles holds two groups
of warps with barriers of their own. The launches (grid, threads, shared memory, parameters) are
those of the shipped code, noted by the host module.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache

import pytest
import torch
from tools import cuda_host, ptx

from attnpool_kernels import testing

pytestmark = [
    pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing()),
    pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed"),
]

SYMBOLS = {"Bfloat16": "13__nv_bfloat16", "Half": "6__half", "float": "f", "double": "d"}
NOTED = re.compile(r"= (?:attnpool::)?(\w+)<(?:attnpool::)?(\w+)(?:, (\d+))?(?:, (\d))?>")


@cache
def compiled(source: str, dtype: str, width: int) -> str:
    """PTX of one instance."""
    path = cuda_host.ROOT / "csrc" / "cuda" / f"{source}.cu"
    only = [f"-DATTN_ONLY_TYPE={dtype}", f"-DATTN_ONLY_WIDTH={width}"]
    command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_80", "-ptx", *only, "-o", "-", path]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@cache
def kernel(source: str, noted: str, width: int) -> ptx.Kernel:
    name, dtype, *numbers = NOTED.search(noted).groups()
    numbers = "".join(f"Li{number}E" for number in numbers if number)
    symbol = f"{len(name)}{name}I{SYMBOLS[dtype]}{numbers}E"
    return ptx.Kernel(compiled(source, dtype, width), symbol)


class Simulated(cuda_host.Kernels):
    """The kernels as compiled PTX."""

    def _launch(self, name: str, plain: dict, values: list) -> int:
        buffers = [x for x in values if isinstance(x, torch.Tensor)]
        launches = self.module.plan(name, plain)
        width = int(NOTED.search(launches[0][0])[3])
        for noted, blocks, threads, shared, params in launches:
            # Sums and merges are compiled with each source that launches them.
            few = "few_seeds_" if "few_seeds" in launches[0][0] else ""
            family = few or ("small_" if "= small_" in noted or "::small_" in noted else "")
            entry = kernel(f"{family}{name}", noted, width)
            assert [size for _, size in entry.params] == [len(params)]
            ptx.launch(entry, (blocks,), threads, [params], buffers, shared, "warp", seed=1)
        return 0


@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.float32, 24), (torch.bfloat16, 24), (torch.float16, 72), (torch.float64, 8)],
    ids=str,
)
def test_compiled_code_is_inside_the_budget(dtype, dim):
    case = testing.Case(
        "ptx",
        (5, 17),
        heads=2,
        dim=dim,
        bias="pair",
        key_bias="float32",
        lse=True,
        nobody=1,
    )
    kernels = Simulated(cuda_host.build())
    testing.judge(case, dtype, lambda batch: testing.run_kernels(batch, kernels))


@pytest.mark.parametrize(
    ("dtype", "counts"),
    [(torch.bfloat16, (9, 18, 27)), (torch.float32, (16, 20)), (torch.float16, (35, 49))],
    ids=str,
)
def test_small_sets_without_options(dtype, counts):
    case = testing.Case("ptx small", counts, heads=1, dim=32, lse=True, nobody=1)
    kernels = Simulated(cuda_host.build(), longest=max(counts))
    testing.judge(case, dtype, lambda batch: testing.run_kernels(batch, kernels))


def test_seeds_and_dropout():
    case = testing.Case("ptx seeds", (6, 3), seeds=9, heads=1, dim=24, dropout=0.3)
    kernels = Simulated(cuda_host.build())
    testing.judge(case, torch.float32, lambda batch: testing.run_kernels(batch, kernels))


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 24), (torch.bfloat16, 72)], ids=str)
def test_few_seeds(dtype, dim):
    case = testing.Case(
        "ptx few",
        (6, 40),
        seeds=2,
        heads=2,
        dim=dim,
        bias="pair",
        key_bias="pair",
        dropout=0.3,
        nobody=1,
    )
    kernels = Simulated(cuda_host.build(), split=32)
    testing.judge(case, dtype, lambda batch: testing.run_kernels(batch, kernels))
