"""Planted bugs in the schedule of few seeds: each missing barrier and wait, and broken arithmetic.

As test_cuda_bugs.py, for the other kernels.
"""

from __future__ import annotations

import pytest
import torch
from tools import cuda_host

from attnpool_kernels import testing

pytestmark = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())

SPLIT = 96
# Molecules that fit the stages, that do not, and of several parts, of two molecules in one slot.
CASE = testing.Case(
    "bugs",
    (20, 200, 100, 90),
    seeds=2,
    heads=1,
    dim=8,
    bias="pair",
    key_bias="pair",
    lse=True,
    nobody=3,
)
EDITS = [
    ("few_seeds.cuh", "/ p.split * 2 + (first == 0)", "/ p.split * 2", "slot of a part"),
    ("few_seeds_forward.cu", "out[s][u] *= shrink;", "out[s][u] *= 1;", "rescaling of the sum"),
    ("few_seeds_merge.cuh", "i < last; ++i", "i + 1 < last; ++i", "last part"),
    (
        "few_seeds_backward.cu",
        "const bool real = j < part.last;",
        "const bool real = true;",
        "mask",
    ),
    ("few_seeds_double_backward.cu", "(total * share)", "share", "merging of covariances"),
    ("few_seeds_backward.cu", "sum += ds;", "sum = ds;", "sum over the seeds"),
    ("few_seeds_double_backward.cu", "s, j, of_key) - lse", "s, j, 0 * of_key) - lse", "key bias"),
    (
        "few_seeds.cuh",
        "(row < begin || row >= end))",
        "(row < begin && row >= end))",
        "keys of nobody",
    ),
]


def run(module, schedule: int = 0) -> dict[str, torch.Tensor]:
    batch = CASE.make(torch.float32)
    return testing.run_kernels(batch, cuda_host.Kernels(module, schedule, split=SPLIT))


def test_every_barrier_and_every_wait_is_needed():
    module = cuda_host.build()
    expected = run(module)
    sites = sorted(module.sites(few_seeds=True))
    assert len([kind for kind, _ in sites if kind.startswith("barrier")]) >= 7
    assert len([kind for kind, _ in sites if kind.startswith("wait")]) >= 1
    unseen = []
    try:
        for kind, line in sites:
            module.skip(kind, line)
            for schedule in range(1, 17):
                try:
                    found = run(module, schedule)
                except RuntimeError:
                    break
                if any(not torch.equal(found[name], expected[name]) for name in expected):
                    break
            else:
                unseen.append(f"{kind}:{line}")
    finally:
        module.skip("", 0)
    assert not unseen
    found = run(module, 3)  # and the module is whole again
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit[3])
def test_a_bug_in_the_text_is_noticed(edit):
    kernels = cuda_host.Kernels(cuda_host.build(edit=edit[:3]), split=SPLIT)
    with pytest.raises((AssertionError, RuntimeError)):
        testing.judge(CASE, torch.float32, lambda batch: testing.run_kernels(batch, kernels))
