"""Molecules larger than a tile, whose keys and queries stream through it by halves (Walk).

The CUDA kernels on the CPU, as in test_cuda.py, and compiled ones in the PTX simulator. A stage
holds 8 to 32 rows, so every case has three steps or more on both axes, with an odd row at the end,
and most have rows that stay in their tile while those of the other axis stream.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import test_cuda
import test_cuda_ptx
import torch
from tools import cuda_host

from attnpool_kernels import testing

pytestmark = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())

# Named after the widths of the kernels.
CASES = [
    testing.Case(
        "32",
        (97, 20, 70, 65),
        q_counts=(70, 97, 40, 65),
        heads=1,
        dim=20,
        value_dim=32,
        bias="pair",
        key_bias="pair",
        dropout=0.2,
        lse=True,
        nobody=2,
    ),
    testing.Case(
        "64",
        (97, 70),
        q_counts=(81, 33),
        heads=1,
        dim=64,
        value_dim=40,
        bias="mask",
        key_bias="mask",
        dropout=0.2,
        lse=True,
    ),
    testing.Case(
        "128",
        (67, 9),
        q_counts=(75, 40),
        heads=1,
        dim=100,
        value_dim=128,
        bias="pair",
        key_bias="float32",
        dropout=0.2,
        lse=True,
        layout="fused",
    ),
    testing.Case("seeds", (70, 130), seeds=66, heads=1, dim=72, bias="pair", lse=True),
]


@pytest.fixture(scope="module")
def module():
    return cuda_host.build()


@pytest.mark.parametrize("dtype", test_cuda.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_budget(module, case, dtype):
    kernels = cuda_host.Kernels(module)
    testing.judge(case, dtype, lambda batch: testing.run_kernels(batch, kernels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES[1:3], ids=lambda case: case.name)
def test_bits_do_not_depend_on_the_schedule_or_on_16_byte_loads(module, case, dtype):
    batch = case.make(dtype)
    expected = testing.run_kernels(batch, cuda_host.Kernels(module))
    for schedule, vector in ((1, False), (2, True)):
        kernels = cuda_host.Kernels(module, schedule, vector)
        assert not test_cuda.different(expected, testing.run_kernels(batch, kernels))


@pytest.mark.parametrize("width", [32, 128])
def test_a_molecule_has_the_same_bits_alone_and_behind_others(module, width):
    case = testing.Case(
        "alone", (81,), q_counts=(97,), heads=1, dim=width, key_bias="pair", lse=True
    )
    alone = case.make(torch.float32)
    batch = replace(case, counts=(7, 81, 70), q_counts=(70, 97, 3)).make(torch.float32)
    queries, keys = slice(70, 70 + 97), slice(7, 7 + 81)
    for name in ("q", "dout", "dlse", "ddq"):
        getattr(batch, name)[queries] = getattr(alone, name)
    for name in ("k", "v", "key_bias", "ddk", "ddv", "ddkey_bias"):
        getattr(batch, name)[keys] = getattr(alone, name)
    kernels = cuda_host.Kernels(module)
    of_keys = ("dk", "dv", "dkey_bias", "gk", "gv", "gkey_bias")
    together = {
        name: x[keys if name in of_keys else queries]
        for name, x in testing.run_kernels(batch, kernels).items()
    }
    assert not test_cuda.different(testing.run_kernels(alone, kernels), together)


@pytest.mark.parametrize("width", [32, 128])
def test_an_infinite_cotangent_of_an_empty_row_changes_nothing(module, width):
    """The lse of a row without a finite logit is -inf, and so may be the slope of a loss there."""
    case = testing.Case("empty", (30, 70), heads=1, dim=width, bias="mask", lse=True)
    kernels = cuda_host.Kernels(module)
    batch = case.make(torch.float32)
    batch.bias[30 * 30 : 30 * 30 + 70] = -torch.inf  # the first query of both molecules
    expected = testing.run_kernels(batch, kernels)
    assert (expected["lse"][[0, 30]] == -torch.inf).all()
    batch.dlse[[0, 30]] = torch.inf
    assert not test_cuda.different(expected, testing.run_kernels(batch, kernels))


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
def test_compiled_code_is_inside_the_budget(module):
    """float64 of width 128 has the smallest stages, of 8 rows."""
    case = testing.Case(
        "ptx",
        (21, 5),
        q_counts=(5, 18),
        heads=1,
        dim=36,
        value_dim=33,
        key_bias="pair",
        lse=True,
    )
    kernels = test_cuda_ptx.Simulated(module)
    testing.judge(case, torch.float64, lambda batch: testing.run_kernels(batch, kernels))
