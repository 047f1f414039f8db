"""The CUDA kernels for sets of at most 64 rows, on the CPU.

Sizes at the edges of their shapes, with and without options, beside larger sets that others serve.
"""

from __future__ import annotations

import pytest
import torch
from test_cuda import different
from tools import cuda_host

from attnpool_kernels import Ragged, autograd, testing
from attnpool_kernels.operands import Operands, Options

pytestmark = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())

TYPES = [torch.float32, torch.bfloat16, torch.float16]
LOW, HIGH = (0, 1, 7, 8, 9, 16, 17, 24, 25, 32), (33, 48, 49, 63, 64)
CASES = [
    testing.Case("plain", (*LOW, *HIGH, 65), heads=1, dim=32, lse=True, nobody=3),
    testing.Case("plain 64", (18, 33, 3), heads=5, dim=64),
    testing.Case("plain 128", (23, 64), heads=1, dim=128, lse=True, nobody=1),
    testing.Case("narrow", (*LOW, 33, 64), heads=1, dim=16, value_dim=8, lse=True, nobody=2),
    testing.Case(
        "options",
        (1, 18, 0, 33, 64, 65),
        q_counts=(9, 64, 3, 0, 40, 2),
        heads=2,
        dim=24,
        bias="pair",
        key_bias="float32",
        dropout=0.3,
        lse=True,
        nobody=2,
    ),
    testing.Case("forbidden", (6, 19, 40), heads=2, dim=32, key_bias="mask", lse=True),
    testing.Case("seeds", (18, 0, 64, 65), seeds=33, heads=2, dim=32, key_bias="pair", lse=True),
    testing.Case("large logits", (18, 40), heads=1, dim=64, logits=30.0),
]


def launched(case: testing.Case, longest: int = 0) -> set[str]:
    """Families of kernels that the three passes launch."""
    names = set()

    class Noted(cuda_host.Kernels):
        def _launch(self, name: str, plain: dict, values: list) -> int:
            names.update(x[0].split("= ")[1].split("<")[0] for x in self.module.plan(name, plain))
            return 0

    testing.run_kernels(case.make(torch.float32), Noted(cuda_host.build(), longest=longest))
    return names


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_budget(case, dtype):
    kernels = cuda_host.Kernels(cuda_host.build(), schedule=2)
    testing.judge(case, dtype, lambda batch: testing.run_kernels(batch, kernels))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_small_sets_take_their_kernels(case):
    passes = ("forward", "backward", "double_backward")
    assert {f"small_{name}_kernel" for name in passes} <= launched(case)


def test_what_no_set_needs_is_not_launched():
    case = testing.Case("known", (18, 24, 5), heads=2, dim=32)
    unknown, known = launched(case), launched(case, longest=24)
    assert {"forward_kernel", "backward_keys_kernel"} <= unknown
    assert known == {f"small_{x}_kernel" for x in ("forward", "backward", "double_backward")}


def test_a_ragged_that_knows_its_sizes_saves_launches():
    backend, names = cuda_host.registered(cuda_host.Kernels(cuda_host.build())), []
    launch = backend._launch
    backend._launch = lambda name, plain, values: (
        names.extend(x[0].split("= ")[1].split("<")[0] for x in backend.module.plan(name, plain)),
        launch(name, plain, values),
    )[1]
    sets = Ragged.from_counts([5, 18, 24])
    x = Operands.plain(*torch.randn(3, 47, 2, 32), sets.ptr, sets.ptr)
    unknown = autograd.attention(backend.OPERATORS, x, Options(0.2))
    assert len(names) == 3
    names.clear()
    assert sets.sizes.longest == 24
    known = autograd.attention(backend.OPERATORS, x, Options(0.2))
    assert names == ["small_forward_kernel"]
    assert torch.equal(known.out, unknown.out) and torch.equal(known.lse, unknown.lse)


@pytest.mark.parametrize(("counts", "longest"), [((5, 33), 24), ((5, 65), 64), ((65,), 1)])
def test_a_set_larger_than_any_that_was_known_stops_the_device(counts, longest):
    batch = testing.Case("larger", counts, heads=2, dim=32).make(torch.float32)
    with pytest.raises(RuntimeError, match="stopped the device"):
        testing.run_kernels(batch, cuda_host.Kernels(cuda_host.build(), longest=longest))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("counts", [(5, 18, 31, 0), (5, 40, 64)], ids=str)
@pytest.mark.parametrize("key_bias", [None, "pair"])
def test_what_is_known_of_the_sizes_changes_no_bit(dtype, counts, key_bias):
    case = testing.Case("known", counts, heads=2, dim=32, key_bias=key_bias, lse=True, nobody=2)
    batch, module = case.make(dtype), cuda_host.build()
    expected = testing.run_kernels(batch, cuda_host.Kernels(module))
    for longest in (max(counts), 64, 65):
        kernels = cuda_host.Kernels(module, longest=longest)
        assert not different(expected, testing.run_kernels(batch, kernels))


def test_layouts_that_cannot_be_read_by_16_bytes_are_left_to_the_others():
    for case in (
        testing.Case("odd", (18,), dim=5, value_dim=7),
        testing.Case("strided", (18,), dim=32, layout="transposed"),
        testing.Case("wide", (18,), dim=72, key_bias="pair"),
        testing.Case("few", (18,), seeds=3, dim=32),
    ):
        small = {x for x in launched(case) if x.startswith("small_")}
        assert not small or case.name == "strided"


def test_every_nan_stays_one():
    """GPUs make NaN of all ones, which arithmetic on its bits would turn into zero."""
    batch = testing.Case("nan", (18, 40), heads=1, dim=32).make(torch.float32)
    for x in (batch.q, batch.k, batch.v, batch.dout):
        x.view(torch.int32)[17] = 0x7FFFFFFF
    found = testing.run_kernels(batch, cuda_host.Kernels(cuda_host.build()))
    for name in ("out", "lse", "dq", "dk", "dv", "gq", "gk", "gv", "gdout"):
        assert bool(found[name][17].isnan().all()), name
        assert bool(found[name][18:].isfinite().all()), name


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_infinite_values(dtype):
    """An infinite value is the result of every row that gives it a weight, and no NaN beside it."""
    case = testing.Case("infinite", (18, 40), heads=1, dim=32)
    batch = case.make(dtype)
    batch.v[17] = float("inf")  # the last row of a set, beside which tiles are filled up
    y = cuda_host.Kernels(cuda_host.build()).forward(batch.operands, batch.options)
    assert bool((y.out[:18] == float("inf")).all())
    assert bool(y.out[18:].isfinite().all())
