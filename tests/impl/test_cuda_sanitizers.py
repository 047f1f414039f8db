"""The CUDA kernels on the CPU under AddressSanitizer and UndefinedBehaviorSanitizer.

In a process of its own, because the sanitizer must be loaded first: all passes on tile edges, with
biases, dropout and seeds, on strided inputs, and on garbage boundaries, under two schedules.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tools import cuda_host

from attnpool_kernels import testing
from attnpool_kernels.operands import Operands, Options

pytestmark = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())

CASES = [
    testing.Case(
        "edges",
        (1, 16, 17, 0, 33),
        heads=2,
        dim=8,
        bias="pair",
        key_bias="mask",
        lse=True,
        nobody=3,
    ),
    testing.Case("large", (70,), q_counts=(66,), heads=1, dim=5, value_dim=7, dropout=0.3),
    testing.Case("seeds", (9, 0, 66), seeds=9, heads=2, dim=16, bias="float32", layout="fused"),
    testing.Case("keys", (33, 70), q_counts=(70, 0), dim=16, key_bias="heads", nobody=1),
    testing.Case("wide", (17,), heads=1, dim=72, layout="transposed"),
    testing.Case(
        "few",
        (9, 0, 70, 33),
        seeds=3,
        dim=5,
        value_dim=40,
        bias="pair",
        key_bias="float32",
        nobody=2,
    ),
    testing.Case("few wide", (40, 3), seeds=8, heads=1, dim=72, dropout=0.3, lse=True),
]
SPLIT = 32  # keys of a part of a molecule with few seeds
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class TooManyKeys(cuda_host.Kernels):
    def _call(self, *arguments) -> dict:
        call = super()._call(*arguments)
        return call | {"key_rows": call["key_rows"] + 3}


def main() -> None:
    from test_cuda import garbage

    module = cuda_host.build(sanitize=True)
    if "overrun" in sys.argv:  # the test of the test: the last molecule ends 3 rows behind k
        batch = CASES[2].make(torch.float32)
        batch.k_ptr[-1] += 3
        x = Operands.plain(batch.q, batch.k, batch.v, None, batch.k_ptr)
        TooManyKeys(module).forward(x, Options(1.0))
        return
    for schedule in (0, 2):
        kernels = cuda_host.Kernels(module, schedule, split=SPLIT)
        for case in CASES:
            for dtype in DTYPES:
                batch = case.make(dtype)
                result = testing.run_kernels(batch, kernels)
                assert not any(x.isnan().any() for x in result.values()), case.name
    for batch in garbage():
        testing.run_kernels(batch, cuda_host.Kernels(module, split=SPLIT))
    print("clean")


def run(*arguments: str) -> subprocess.CompletedProcess:
    libraries = [  # both: the sanitizer must find the C++ library's throw
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(x.strip() for x in libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": os.pathsep.join(map(str, (cuda_host.ROOT / "tests", cuda_host.ROOT))),
    }
    return subprocess.run(
        [sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True
    )


def test_no_access_outside_and_no_undefined_behaviour():
    cuda_host.compile_module(sanitize=True)
    done = run()
    assert done.stdout.strip().endswith("clean"), done.stdout[-2000:] + done.stderr[-4000:]


def test_an_overrun_is_seen():
    cuda_host.compile_module(sanitize=True)
    done = run("overrun")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


if __name__ == "__main__":
    main()
