"""Planted bugs: the host build must notice each missing barrier and wait, and broken arithmetic.

Every place where threads wait is found by running, then left out; some schedule of the emulated
threads (tests/tools/host/fibers.h) must give other bits or an error. Bugs in the text of the
kernels are compiled and judged by the budget.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from tools import cuda_host

from attnpool_kernels import testing

pytestmark = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())

# Keys of one step and of two that stay in their tile past queries that stream, and the other way
# round; keys and queries that both stream, in an odd and an even number of steps; two small sets.
CASE = testing.Case(
    "bugs",
    (24, 60, 90, 70, 70, 60, 24),
    q_counts=(70, 70, 97, 40, 30, 62, 30),
    heads=1,
    dim=8,
    bias="pair",
    key_bias="pair",
    nobody=3,
)
KERNELS = [f"{x}backward_{y}_kernel" for x in ("", "double_") for y in ("queries", "keys")]
EDITS = [
    ("forward.cu", "column < rows", "column < rows + 1", "mask of the last keys"),
    ("forward.cu", "out[m][e] *= shrink[e / 2];", "", "rescaling of the sum"),
    ("backward.cu", "const bool exists = j < keys &&", "const bool exists = true &&", "mask"),
    ("pairs.cuh", "int64_t(i) * keys + j", "int64_t(i) * (keys + 1) + j", "offset of a pair"),
    ("double_backward.cu", "own.t = quad_sum(own.t)", "own.t = (own.t)", "sum over the quad"),
    ("copies.cuh", "|| !last_sweep)", "|| last_sweep)", "first step of the next sweep"),
    ("copies.cuh", "HALVES ? at ^ STAGE : 0);", "at);", "copies over the step that is computed"),
    ("backward.cu", "&tiles.rows[to].norm", "&tiles.rows[0].norm", "place of the statistics"),
    ("double_backward.cu", "lse[(walk.at ^ STAGE) +", "lse[walk.at +", "place of lse"),
    ("tiles.h", "axis.molecules + 2;", "axis.molecules + 1;", "last tile"),
    ("backward.cu", ".dkey_bias.data && begin", ".dkey_bias.data && at > 0 && begin", "(B8)"),
    ("double_backward.cu", "logit(weight[n][e], i, j)", "logit(weight[n][e], i, j, 0)", "key bias"),
    ("pairs.cuh", "key_value(p.ddkey_bias, j)", "0", "cotangent of dkey_bias"),
    ("key_sums.cuh", "own[32 * half] += sum", "own[32 * half] = sum", "sum over steps of queries"),
]
SMALL_EDITS = [
    ("small_sets.cuh", "key(n, e) >= set.keys.size", "key(n, e) > set.keys.size", "mask"),
    ("small_sets.cuh", "x[i][n][e] *= inverse;", "x[i][n][e] *= 2 * inverse;", "sum of weights"),
    ("small_sets.cuh", "sum += __shfl_xor_sync(WARP, sum, 8);", "", "sum over the rows of a tile"),
    ("small_sets.cuh", "w < S::WARPS; ++w", "w < 1; ++w", "sum over the warps"),
    ("nobody.cuh", "side ? edge(axis, axis.molecules)", "side ? axis.rows", "rows of nobody"),
    ("small_rows.cuh", "2 * t + e < columns_left", "2 * t + e + 1 < columns_left", "last row"),
    ("small_rows.cuh", "mma_tf32(small, a.low,", "mma_tf32(small, a.high,", "rest of a float"),
    ("small_backward.cu", "weight_tiles.read(of_key, part", "weight_tiles.read(of_key, 0", "keys"),
    ("small_double_backward.cu", "OfQueries{of_p, c}", "OfQueries{of_u, c}", "(D11)"),
    (
        "small_double_backward.cu",
        "multiply_tiles<T>(t, x, of_b",
        "multiply_tiles<T>(t, x, y",
        "(D1)",
    ),
    ("small_sets.cuh", "* (PLAIN ? 1.0f : p.scale_float);", "* 1.0f;", "scale"),
]


CASES = [CASE, replace(CASE, dim=7)]  # with and without the kernels for small sets


def run(module, schedule: int = 0) -> dict[str, torch.Tensor]:
    found = {}
    for case in CASES:
        batch = case.make(torch.float32)
        result = testing.run_kernels(batch, cuda_host.Kernels(module, schedule))
        found |= {f"{name} {case.dim}": x for name, x in result.items()}
    return found


def unnoticed(module, expected: dict[str, torch.Tensor], sites: list[tuple[str, int]]) -> list[str]:
    """The places that can be left out without an error or other bits, under 32 schedules."""
    found = []
    try:
        for kind, line in sites:
            module.skip(kind, line)
            for schedule in range(1, 33):
                try:
                    result = run(module, schedule)
                except RuntimeError:
                    break
                if any(not torch.equal(result[name], expected[name]) for name in expected):
                    break
            else:
                found.append(f"{kind}:{line}")
    finally:
        module.skip("", 0)
    return found


def test_every_barrier_and_every_wait_is_needed():
    module = cuda_host.build()
    expected = run(module)
    sites = [site for site in sorted(module.sites()) if not site[0].endswith("copies.cuh")]
    # The emulated products between a warp's writes and its reads keep its lanes together anyway.
    small = (cuda_host.ROOT / "csrc" / "cuda" / "small_sets.cuh").read_text().split("\n")
    of_warp = next(i for i, line in enumerate(small, 1) if line.endswith(" warp_barrier();"))
    sites.remove(("barrier small_sets.cuh", of_warp))
    assert len([kind for kind, _ in sites if kind.startswith("barrier")]) >= 4
    assert len([kind for kind, _ in sites if kind.startswith("wait")]) >= 1
    assert not unnoticed(module, expected, sites)
    found = run(module, 3)  # and the module is whole again
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_every_kernel_needs_each_place_of_the_walk_that_they_share():
    """copies.cuh: here the places of Walk are named after the kernel they are inlined in."""
    text = (cuda_host.ROOT / "csrc" / "cuda" / "copies.cuh").read_text()
    body = text[text.index("bool arrive(") : text.index("return more;")]
    named = body.replace("GROUP_THREADS)", "GROUP_THREADS, __PRETTY_FUNCTION__)")
    named = re.sub(r"(copy_wait<\w+>)\(\)", r"\1(__PRETTY_FUNCTION__)", named)
    module = cuda_host.build(edit=("copies.cuh", body, named))
    expected = run(module)
    for kernel in KERNELS:
        sites = [x for x in sorted(module.sites()) if f"::{kernel}<" in x[0]]
        assert len([kind for kind, _ in sites if kind.startswith("barrier")]) == 3
        assert len([kind for kind, _ in sites if kind.startswith("wait")]) == 3
        assert not unnoticed(module, expected, sites)


@pytest.mark.parametrize("edit", [*EDITS, *SMALL_EDITS], ids=lambda edit: edit[3])
def test_a_bug_in_the_text_is_noticed(edit):
    module = cuda_host.build(edit=edit[:3])
    assert module.__file__ != cuda_host.build().__file__
    kernels = cuda_host.Kernels(module)

    def judge() -> None:
        for case in CASES:
            testing.judge(case, torch.float32, lambda batch: testing.run_kernels(batch, kernels))

    with pytest.raises((AssertionError, RuntimeError)):
        judge()
