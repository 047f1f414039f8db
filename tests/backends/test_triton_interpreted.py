"""The Triton backend in Triton's interpreter, under the guard.

Runs where TRITON_INTERPRET=1 was set before triton was imported; test_triton.py starts it so.
"""

import functools
import mmap
import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (see test_triton.py)", allow_module_level=True)

import triton
import triton.language as tl
from triton_guard import GuardError, guard, padded

import attnpool_kernels.backends.triton as backend
from attnpool_kernels import ops, testing
from attnpool_kernels.backends.triton import primitives, tile_table
from attnpool_kernels.backends.triton._backward import sum_parts
from attnpool_kernels.dispatch import Problem
from attnpool_kernels.operands import Cotangents, Operands, Options
from attnpool_kernels.testing import Case

HALF = (
    Case("edges", (1, 16, 33, 0, 17), heads=1, dim=16, nobody=1),
    Case("everything", (18, 5), bias="pair", dropout=0.3, lse=True, dim=12, value_dim=20),
    Case("other keys", (4, 0, 37, 2), q_counts=(6, 5, 0, 34), dim=24, heads=1, nobody=1),
    Case("seeds", (18, 3, 0, 40), seeds=3, bias="float32", heads=1, dim=16, nobody=2),
    Case("more seeds", (20, 6), seeds=19, dim=8, heads=1, nobody=1),
    Case("many seeds", (20, 6), seeds=33, dim=8, heads=1),
    Case("expanded", (18,), layout="expanded"),
    Case("large logits", (18, 11), logits=30.0),
)
# a long molecule from 40 rows on, keys of few seeds in parts of 32: molecules below, at, above
SCHEDULES = (
    Case("parts of seeds", (18, 0, 65, 33, 32), seeds=3, heads=1, dim=16, nobody=40),
    Case("parts and options", (5, 65), seeds=2, bias="pair", dropout=0.3, lse=True),
    Case("far logits in parts", (70,), seeds=5, heads=1, logits=30.0),
    Case("far logits", (40,), heads=1, logits=30.0),
    Case("long ones", (39, 41, 5), heads=1, dim=16, nobody=40, lse=True),
)
MATRIX = [(case, torch.float32) for case in testing.CASES]
MATRIX += [
    (case, dtype)
    for dtype in (torch.float16, torch.bfloat16, torch.float64)
    if not backend.why_not(Problem("cpu", dtype, 16, 16))
    for case in HALF
]


def run(batch: testing.Batch, seed: int | None = 1) -> dict[str, torch.Tensor]:
    """All three passes under the guard, with red zones around every input."""
    names = ("q", "k", "v", "bias", "q_ptr", "k_ptr", "pair_ptr", "seed", "dout", "dlse")
    for name in (*names, "ddq", "ddk", "ddv", "ddbias"):
        setattr(batch, name, padded(getattr(batch, name)))
    with guard(seed):
        return testing.run_kernels(batch, backend)


@pytest.mark.parametrize(
    ("case", "dtype"), MATRIX, ids=lambda x: getattr(x, "name", str(x).removeprefix("torch."))
)
def test_error_budget(case, dtype):
    testing.judge(case, dtype, run)


@pytest.fixture
def short_limits(monkeypatch):
    monkeypatch.setattr(tile_table, "LONG", 40)
    monkeypatch.setattr(tile_table, "SPLIT", 32)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in SCHEDULES]
    + [(case, torch.bfloat16) for case in SCHEDULES[1::3]],
    ids=lambda x: getattr(x, "name", str(x).removeprefix("torch.")),
)
def test_error_budget_of_schedules(short_limits, case, dtype):
    testing.judge(case, dtype, run)


def test_schedule_of_a_molecule_depends_on_itself_only(short_limits):
    """The same bits alone, where few launches are, and beside molecules of other schedules."""
    for seeds in (None, 3):
        case = Case("mixed", (7, 45), heads=1, dim=16, seeds=seeds, lse=True)
        batch, start = case.make(torch.float32), 0
        together = run(batch)
        for at, n in enumerate(case.counts):
            rows = slice(start, start + n)
            mine = slice(at, at + 1) if seeds else rows
            alone = Case("alone", (n,), 1, 16, seeds=seeds, lse=True).make(torch.float32)
            for name in ("k", "v", "ddk", "ddv"):
                setattr(alone, name, getattr(batch, name)[rows])
            for name in ("dout", "dlse"):
                setattr(alone, name, getattr(batch, name)[mine])
            for name in ("q", "ddq"):
                setattr(alone, name, getattr(batch, name)[slice(None) if seeds else rows])
            for name, x in run(alone).items():
                if not (seeds and name in ("dq", "gq")):  # sums over the molecules
                    where = rows if name[1:] in ("k", "v") else mine
                    assert torch.equal(x, together[name][where]), (seeds, n, name)
            start += n


MIXED = Case("mixed", (20, 0, 7, 41), heads=1, dim=16, bias="pair", lse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_of_programs_changes_no_bit(dtype):
    first = run(MIXED.make(dtype), seed=None)
    for name, x in run(MIXED.make(dtype), seed=5).items():
        assert torch.equal(x, first[name]), name


def single(batch: testing.Batch, molecule: int) -> testing.Batch:
    """The batch of one molecule of a batch of equal queries and keys."""
    case = batch.case
    rows = slice(*batch.k_ptr[molecule : molecule + 2].tolist())
    pairs = slice(*batch.pair_ptr[molecule : molecule + 2].tolist())
    cut = {name: getattr(batch, name)[rows] for name in ("q", "k", "v", "dout", "dlse")}
    cut |= {name: getattr(batch, name)[rows] for name in ("ddq", "ddk", "ddv")}
    cut |= {name: getattr(batch, name)[pairs] for name in ("bias", "ddbias")}
    alone = Case("alone", (case.counts[molecule],), case.heads, case.dim, bias="pair", lse=True)
    made = alone.make(batch.q.dtype)
    for name, x in cut.items():
        setattr(made, name, x)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_molecule_alone_has_the_same_bits(dtype):
    batch = MIXED.make(dtype)
    together = run(batch)
    for molecule in (0, 2, 3):
        rows = slice(*batch.k_ptr[molecule : molecule + 2].tolist())
        pairs = slice(*batch.pair_ptr[molecule : molecule + 2].tolist())
        for name, x in run(single(batch, molecule)).items():
            mine = together[name][pairs if "bias" in name else rows]
            assert torch.equal(x, mine), (molecule, name)


@functools.cache
def expected_of_mixed() -> dict[str, torch.Tensor]:
    return run(MIXED.make(torch.float32))


@pytest.mark.parametrize("poisoned", ["q", "k", "v", "bias", "dout", "ddk"])
def test_nan_stays_in_its_molecule(poisoned):
    batch = MIXED.make(torch.float32)
    pointer = batch.pair_ptr if poisoned == "bias" else batch.k_ptr
    getattr(batch, poisoned)[pointer[2] : pointer[3]] = torch.nan
    expected = expected_of_mixed()
    for name, x in run(batch).items():
        pointer = batch.pair_ptr if "bias" in name else batch.k_ptr
        for rows in (slice(0, pointer[2]), slice(pointer[3], None)):
            assert torch.equal(x[rows], expected[name][rows]), name


@pytest.mark.parametrize("seeds", [None, 3])
@pytest.mark.parametrize("draw", range(4))
def test_no_content_of_ptr_reaches_memory_outside(monkeypatch, seeds, draw):
    case = Case("garbage", (9, 4, 51), heads=1, seeds=seeds, bias="pair")
    batch = case.make(torch.float32)
    index = torch.int32 if draw % 2 else torch.int64
    info, generator = torch.iinfo(index), torch.Generator().manual_seed(draw)

    def garbage(like, dtype):
        x = torch.randint(-60, 90, like.shape, generator=generator).to(dtype)
        x[draw % len(x)] = torch.iinfo(dtype).max
        x[(draw + 1) % len(x)] = torch.iinfo(dtype).min
        return padded(x)

    assert info.bits in (32, 64)
    batch.k_ptr = garbage(batch.k_ptr, index)
    batch.q_ptr = None if seeds else garbage(batch.k_ptr, index)
    batch.pair_ptr = garbage(batch.pair_ptr, torch.int64)
    monkeypatch.setattr(tile_table, "SPLIT", 32 if draw > 1 else 512)
    with guard(races=False):
        testing.run_kernels(batch, backend)


def test_rows_before_the_first_molecule_are_zero():
    batch = Case("shifted", (5, 6), heads=1).make(torch.float32)
    batch.k_ptr = batch.q_ptr = torch.tensor([3, 5, 11])
    found = run(batch)
    assert not any(x[:3].any() for name, x in found.items() if name != "lse")
    assert (found["lse"][:3] == -torch.inf).all()


def test_offsets_beyond_2_to_the_31():
    """Rows 2^25 elements apart; only the pages that are touched exist."""
    rows, stride = 70, 2**25
    batch = Case("far", (2, 68), heads=1, dim=16).make(torch.float16)
    expected = run(batch)
    for name in ("q", "v", "dout", "ddk"):
        near = getattr(batch, name)
        pages = mmap.mmap(-1, ((rows - 1) * stride + 16) * 2)
        storage = torch.from_numpy(np.frombuffer(pages, np.float16))
        far = storage.as_strided(near.shape, (stride, 16, 1))
        setattr(batch, name, far.copy_(near))
    with guard():
        found = testing.run_kernels(batch, backend)
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name


def test_units_2_to_the_31_apart():
    """The head dimension outermost; the last unit lies 15 * 2^28 elements behind the first."""
    batch = Case("far units", (2, 9), heads=1, dim=16).make(torch.float16)
    expected = run(batch)
    for name in ("q", "v", "dout", "ddk"):
        near = getattr(batch, name)
        pages = mmap.mmap(-1, 15 * 2**29 + 4096)
        storage = torch.from_numpy(np.frombuffer(pages, np.float16))
        setattr(batch, name, storage.as_strided(near.shape, (1, 16, 2**28)).copy_(near))
    with guard():
        found = testing.run_kernels(batch, backend)
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("infinite", [False, True])
def test_sum_of_many_parts(infinite):
    """A running sum of 5,000 equal parts is 16 roundings off."""
    partial, like = torch.full((5000, 2, 1, 16), 3.3), torch.empty(2, 1, 16)
    partial[7, 0] = torch.inf if infinite else 3.3
    with guard():
        found = sum_parts(partial, like).double()
    expected = partial.double().sum(0)
    assert torch.equal(found.isinf(), expected.isinf())
    assert ((found - expected).abs() <= 1.2e-7 * expected)[expected.isfinite()].all()


@pytest.mark.parametrize("left_out", ["ddq", "ddk", "ddv", "ddbias", "all"])
def test_cotangents_that_are_none_are_zero(left_out):
    case = Case("some", (9, 33), heads=1, bias="pair", lse=True)
    absent, zero = case.make(torch.float32), case.make(torch.float32)
    for name in ("ddq", "ddk", "ddv", "ddbias") if left_out == "all" else (left_out,):
        setattr(absent, name, None)
        getattr(zero, name).zero_()
    expected = run(zero)
    for name, x in run(absent).items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-5, msg=name)


def operands(batch: testing.Batch) -> Operands:
    """Without dropout."""
    return Operands(*(getattr(batch, name) for name in Operands._fields))._replace(seed=None)


def test_unwanted_gradient_of_bias_is_empty():
    batch = Case("small", (3,), heads=2, bias="pair").make(torch.float32)
    x, options = operands(batch), Options(1.0)
    with guard():
        y = backend.forward(x, options)
        first = backend.backward(x, y, Cotangents(batch.dout, None), options, False)
    assert first.dbias.shape == (0, 2)


@pytest.mark.parametrize("name", ["forward", "backward", "double_backward"])
@pytest.mark.parametrize("seeds", [None, 2])
def test_opcheck(name, seeds):
    """torch's own checks of the registered operators, with this backend behind them."""
    batch = Case("small", (3, 4), seeds=seeds, heads=1, bias="pair", lse=True).make(torch.float32)
    x, options = operands(batch), Options(0.3)
    known = (*x, *backend.forward(x, options), batch.dout, batch.dlse)
    arguments = {
        "forward": (*x, *options),
        "backward": (*known, *options, True),
        "double_backward": (*known, batch.ddq, None, batch.ddv, batch.ddbias, *options),
    }[name]
    torch.library.opcheck(getattr(ops, name), (*arguments, "triton"))


@triton.jit
def _find_kernel(ptr, tiles_of, found, B: tl.int64, n: tl.int64, BLOCK: tl.constexpr):
    at = tl.program_id(0)
    molecule, start, first, end = primitives.find_tile(tl.load(tiles_of + at), ptr, B, n, BLOCK)
    tl.store(found + 4 * at, molecule)
    tl.store(found + 4 * at + 1, start)
    tl.store(found + 4 * at + 2, first)
    tl.store(found + 4 * at + 3, end)


@pytest.mark.parametrize("molecules", [0, 1, 31, 32, 33, 1023, 1025, 40000])
def test_tiles_cover_every_row_once(molecules):
    block, generator = 16, torch.Generator().manual_seed(molecules)
    counts = torch.randint(0, 60, (molecules,), generator=generator)
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]) + 5
    n = int(ptr[-1]) + 37
    edges = torch.cat([torch.tensor([0]), ptr, torch.tensor([n])])  # of the segments
    first_tile = edges // block + torch.arange(len(edges))
    total = n // block + molecules + 2
    some = torch.randint(0, total, (40,), generator=generator)
    some = torch.cat([some, torch.tensor([0, total - 1])]) if total < 60000 else some
    found = torch.full((len(some), 4), -7)
    with guard():
        _find_kernel[(len(some),)](ptr, some, found, molecules, n, BLOCK=block)
    segment = torch.searchsorted(first_tile, some, right=True) - 1
    first = edges[segment] + (some - first_tile[segment]) * block
    ends = edges[(segment + 1).clamp(max=len(edges) - 1)]
    expected = torch.stack([segment - 1, edges[segment], first, ends], 1)
    assert torch.equal(found, expected)
    covered = (edges[1:] - edges[:-1] + block - 1) // block
    assert (first_tile[1:] - first_tile[:-1] >= covered).all() and first_tile[-1] >= total - 1


@triton.jit
def _bug_kernel(x, y, n, BUG: tl.constexpr):
    o = tl.program_id(0) * 16 + tl.arange(0, 16)
    if BUG == "load outside":
        tl.store(y + o, tl.load(x + o + 1), mask=o < n)
    elif BUG == "store outside":
        tl.store(y + o + 1, tl.load(x + o, mask=o < n, other=0.0))
    elif BUG == "two writers":
        tl.store(y + o % 16, tl.load(x + o, mask=o < n, other=0.0))
    elif BUG == "reads another's result":
        tl.store(y + o, tl.load(y + (o + 16) % 32))
    elif BUG == "atomic":
        tl.atomic_add(y + o, 1.0)
    elif BUG == "bfloat16 sum":
        z = tl.load(x + o).to(tl.bfloat16)
        tl.store(y + o, (z + z).to(tl.float32))
    elif BUG == "unwritten":
        tl.store(y + o, tl.load(x + o), mask=o < n - 1)


BUGS = {
    "load outside": "load of 1",
    "store outside": "store of 1",
    "two writers": "two programs",
    "reads another's result": "a program reads",
    "atomic": "atomics",
    "bfloat16 sum": "arithmetic",
}


@pytest.mark.parametrize("bug", BUGS)
def test_guard_sees(bug):
    with guard() as g, pytest.raises(GuardError, match=BUGS[bug]):
        _bug_kernel[(2,)](padded(torch.ones(32)), torch.empty(32), 32, BUG=bug)
    assert g.launches == 1


def test_guard_poisons_what_nobody_writes():
    with guard():
        y = torch.empty(32)
        _bug_kernel[(2,)](padded(torch.ones(32)), y, 32, BUG="unwritten")
    assert y.isnan().tolist() == [False] * 31 + [True]
