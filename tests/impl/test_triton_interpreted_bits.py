"""The Triton backend in Triton's interpreter, under the guard: what changes no bit of a molecule,
and which memory is touched.

Runs where TRITON_INTERPRET=1 was set before triton was imported; test_triton_bits.py starts it so.
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (see test_triton_bits.py)", allow_module_level=True)

import functools
import itertools
import mmap
from dataclasses import replace

import numpy as np
import torch
import triton
import triton.language as tl
from tools.interpreted import MIXED, run, with_red_zones
from tools.triton_guard import guard, padded

import attnpool_kernels.impl.triton as backend
from attnpool_kernels import ragged, testing
from attnpool_kernels.impl.triton import primitives, tile_table
from attnpool_kernels.impl.triton._backward import sum_parts
from attnpool_kernels.testing import Case

OF_KEYS = ("k", "v", "ddk", "ddv")


@pytest.fixture
def short_limits(monkeypatch):
    monkeypatch.setattr(tile_table, "LONG", 40)
    monkeypatch.setattr(tile_table, "SPLIT", 32)


def test_schedule_of_a_molecule_depends_on_itself_only(short_limits):
    """The same bits alone, where few launches are, and beside molecules of other schedules."""
    for seeds in (None, 3):
        added = "pair" if seeds else None  # with it sets have no schedule of long ones
        case = Case("mixed", (7, 45), heads=1, dim=16, seeds=seeds, key_bias=added, lse=True)
        batch, start = case.make(torch.float32), 0
        together = run(batch)
        for at, n in enumerate(case.counts):
            rows = slice(start, start + n)
            mine = slice(at, at + 1) if seeds else rows
            alone = replace(case, counts=(n,)).make(torch.float32)
            for name in (*OF_KEYS, "key_bias", "ddkey_bias") if seeds else OF_KEYS:
                setattr(alone, name, getattr(batch, name)[rows])
            for name in ("dout", "dlse"):
                setattr(alone, name, getattr(batch, name)[mine])
            for name in ("q", "ddq"):
                setattr(alone, name, getattr(batch, name)[slice(None) if seeds else rows])
            for name, x in run(alone).items():
                if not (seeds and name in ("dq", "gq")):  # sums over the molecules
                    where = rows if name[1:] in ("k", "v", "key_bias") else mine
                    assert torch.equal(x, together[name][where]), (seeds, n, name)
            start += n


@functools.cache
def mixed(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return run(MIXED.make(dtype), seed=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_of_programs_changes_no_bit(dtype):
    for name, x in run(MIXED.make(dtype), seed=5).items():
        assert torch.equal(x, mixed(dtype)[name]), name


def single(batch: testing.Batch, molecule: int) -> testing.Batch:
    """The batch of one molecule of a batch of equal queries and keys."""
    case = batch.case
    rows = slice(*batch.k_ptr[molecule : molecule + 2].tolist())
    pairs = slice(*batch.pair_ptr[molecule : molecule + 2].tolist())
    cut = {name: getattr(batch, name)[rows] for name in ("q", "k", "v", "dout", "dlse")}
    names = ("ddq", "ddk", "ddv", "key_bias", "ddkey_bias")
    cut |= {name: getattr(batch, name)[rows] for name in names}
    cut |= {name: getattr(batch, name)[pairs] for name in ("bias", "ddbias")}
    made = replace(case, counts=(case.counts[molecule],)).make(batch.q.dtype)
    for name, x in cut.items():
        setattr(made, name, x)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_molecule_alone_has_the_same_bits(dtype):
    batch, together = MIXED.make(dtype), mixed(dtype)
    for molecule in (0, 2, 3):
        rows = slice(*batch.k_ptr[molecule : molecule + 2].tolist())
        pairs = slice(*batch.pair_ptr[molecule : molecule + 2].tolist())
        for name, x in run(single(batch, molecule)).items():
            mine = together[name][pairs if name[1:] == "bias" else rows]
            assert torch.equal(x, mine), (molecule, name)


def test_nan_stays_in_its_molecule():
    """In every input that is read by rows at once: what leaks from any of them shows."""
    batch = MIXED.make(torch.float32)
    for name in ("q", "k", "v", "bias", "key_bias", "dout", "ddk"):
        pointer = batch.pair_ptr if name == "bias" else batch.k_ptr
        getattr(batch, name)[pointer[2] : pointer[3]] = torch.nan
    expected = mixed(torch.float32)
    for name, x in run(batch).items():
        pointer = batch.pair_ptr if name[1:] == "bias" else batch.k_ptr
        for rows in (slice(0, pointer[2]), slice(pointer[3], None)):
            assert torch.equal(x[rows], expected[name][rows]), name


@pytest.mark.parametrize("seeds", [None, 3])
@pytest.mark.parametrize("draw", range(4))
def test_no_content_of_ptr_reaches_memory_outside(monkeypatch, seeds, draw):
    case = Case("garbage", (9, 4, 51), heads=1, seeds=seeds, bias="pair", key_bias="pair")
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
    batch = Case("shifted", (5, 6), heads=1, key_bias="pair").make(torch.float32)
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


def test_sum_of_many_parts():
    """A running sum of 5,000 equal parts is 16 roundings off; the rows of one part are infinite."""
    partial, like = torch.full((5000, 2, 1, 16), 3.3), torch.empty(2, 1, 16)
    partial[7, 0] = torch.inf
    with guard():
        found = sum_parts(partial, like).double()
    expected = partial.double().sum(0)
    assert torch.equal(found.isinf(), expected.isinf())
    assert ((found - expected).abs() <= 1.2e-7 * expected)[expected.isfinite()].all()


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


def passes(batch: testing.Batch, sizes: ragged.Sizes | None) -> dict[str, torch.Tensor]:
    """Results with the sizes of the molecules known so, or unknown."""
    batch = with_red_zones(batch)
    if sizes is not None:
        ragged.remember(batch.k_ptr, sizes)
    if batch.q_ptr is not None:
        batch.q_ptr = batch.k_ptr
    with guard(seed=1):
        return testing.run_kernels(batch, backend)


@pytest.mark.parametrize("added", [None, "pair"])
def test_known_sizes_change_no_bit(short_limits, added):
    """Every schedule alone and beside others; rows of no molecule longer than any."""
    for counts, rest in (((5, 0, 17), 0), ((20, 34), 3), ((45, 41), 0), ((3, 30), 60)):
        case = Case("known", counts, heads=1, dim=16, nobody=rest, key_bias=added, lse=True)
        unknown = passes(case.make(torch.float32), None)
        found = passes(
            case.make(torch.float32), ragged.Sizes(min(counts), max(counts), sum(counts))
        )
        for name, x in found.items():
            assert torch.equal(x, unknown[name]), (counts, name)


def test_sizes_known_wrongly_are_right_or_nan():
    """As after a change behind torch's back: results as ever, or NaN gradients of keys."""
    case = Case("stale", (20, 70, 7), heads=1, dim=16, nobody=2)
    expected = passes(case.make(torch.float32), None)
    for sizes in (ragged.Sizes(7, 20, 97), ragged.Sizes(300, 400, 97), ragged.Sizes(7, 20, 400)):
        found = passes(case.make(torch.float32), sizes)
        for name, x in found.items():
            other = expected[name]
            if name in ("dk", "dv", "gk", "gv") and sizes.longest <= 32:
                assert x[20:90].isnan().all(), name
                x, other = torch.cat([x[:20], x[90:]]), torch.cat([other[:20], other[90:]])
            torch.testing.assert_close(x, other, rtol=1e-4, atol=1e-5, msg=name)


@triton.jit
def _find_long_kernel(ptr, found, B: tl.int64, n: tl.int64, BLOCK: tl.constexpr):
    at = tl.program_id(0)
    molecule, start, first, end = primitives.find_long_tile(at, ptr, B, n, BLOCK)
    tl.store(found + 4 * at, molecule)
    tl.store(found + 4 * at + 1, start)
    tl.store(found + 4 * at + 2, first)
    tl.store(found + 4 * at + 3, end)


@pytest.mark.parametrize("draw", range(6))
def test_tiles_of_long_segments_are_found_once(draw):
    """Every tile of a segment of a block or more, those of no molecule being segments, too."""
    block, generator = 16, torch.Generator().manual_seed(draw)
    counts = torch.randint(0, (5, 40, 90)[draw % 3], (60,), generator=generator)
    before, behind = (0, 37) if draw % 2 else (19, 0)
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]) + before
    n = int(ptr[-1]) + behind
    edges = [0, *ptr.tolist(), n]
    expected = [
        (segment - 1, start, first, end)
        for segment, (start, end) in enumerate(itertools.pairwise(edges))
        for first in range(start, end, block)
        if end - start >= block
    ]
    programs = 2 * (n // block + 1)
    found = torch.full((programs, 4), -7)
    with guard():
        _find_long_kernel[(programs,)](ptr, found, 60, n, BLOCK=block)
    long = [tuple(x) for x in found.tolist() if x[2] < x[3] and x[3] - x[1] >= block]
    assert sorted(long) == expected
