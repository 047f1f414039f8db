"""Planted bugs: the host build must notice each missing barrier and wait, and broken arithmetic.

Every place where threads wait is found by running, then left out; some schedule of the emulated
threads (tests/csrc/fibers.h) must give other bits or an error. Bugs in the text of the kernels are
compiled and judged by the budget.
"""

from __future__ import annotations

import cuda_host
import pytest
import torch

from attnpool_kernels import testing

pytestmark = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())

# One molecule in one tile, one across several, and queries without the same keys.
CASE = testing.Case(
    "bugs", (24, 140, 60), q_counts=(30, 130, 62), heads=1, dim=8, bias="pair", nobody=3
)
EDITS = [
    ("forward.cu", "column < rows", "column < rows + 1", "mask of the last keys"),
    ("forward.cu", "out[m][e] *= shrink[e / 2];", "", "rescaling of the sum"),
    ("backward.cu", "const bool exists = j < keys &&", "const bool exists = true &&", "mask"),
    ("tile.cuh", "int64_t(i) * keys + j", "int64_t(i) * (keys + 1) + j", "offset of a pair"),
    ("double_backward.cu", "own.t = quad_sum(own.t)", "own.t = (own.t)", "sum over the quad"),
    ("../tiles.h", "axis.molecules + 2;", "axis.molecules + 1;", "last tile"),
]


def run(module, schedule: int = 0) -> dict[str, torch.Tensor]:
    batch = CASE.make(torch.float32)
    return testing.run_kernels(batch, cuda_host.Kernels(module, schedule))


def test_every_barrier_and_every_wait_is_needed():
    module = cuda_host.build()
    expected = run(module)
    sites = sorted(module.sites())
    assert len([kind for kind, _ in sites if kind.startswith("barrier")]) >= 12
    assert len([kind for kind, _ in sites if kind.startswith("wait")]) >= 7
    unseen = []
    try:
        for kind, line in sites:
            module.skip(kind, line)
            for schedule in range(1, 33):
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
    module = cuda_host.build(edit=edit[:3])
    assert module.__file__ != cuda_host.build().__file__
    kernels = cuda_host.Kernels(module)
    with pytest.raises((AssertionError, RuntimeError)):
        testing.judge(CASE, torch.float32, lambda batch: testing.run_kernels(batch, kernels))
