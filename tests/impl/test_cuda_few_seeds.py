"""Pooling with few seeds on the CUDA kernels, run on the CPU: oracle, parts, planted bugs.

Molecules are cut into parts of 512 keys; most tests make that 32, so that small ones have several.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_cuda import different
from tools import cuda_host

from attnpool_kernels import testing
from attnpool_kernels.operands import Cotangents

pytestmark = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SMALL = 32  # keys of a part
SIZES = testing.Case("sizes", (0, 1, 17, 64, 33), seeds=3, heads=2, dim=24, nobody=37)
CASES = [
    SIZES,
    testing.Case(
        "bias", (5, 0, 70, 130), seeds=8, heads=1, dim=40, value_dim=64, bias="pair", lse=True
    ),
    testing.Case("wide", (5, 100), seeds=1, heads=2, dim=128, value_dim=72, dropout=0.3),
    testing.Case(
        "forbidden",
        (20, 40, 1, 66),
        seeds=5,
        heads=2,
        dim=16,
        bias="mask",
        key_bias="mask",
        lse=True,
        dropout=0.2,
        layout="fused",
    ),
    testing.Case(
        "float32 bias",
        (32, 31, 96),
        seeds=2,
        heads=3,
        dim=48,
        bias="float32",
        key_bias="float32",
        layout="transposed",
        index=torch.int32,
    ),
    testing.Case("large logits", (18, 31, 90), seeds=4, heads=2, dim=16, logits=30.0, lse=True),
    testing.Case("key bias", (0, 70, 3, 600), seeds=3, heads=3, dim=8, key_bias="heads", nobody=40),
    testing.Case("only nobody", (), seeds=4, heads=2, dim=8, nobody=70),
    testing.Case("key bias of nobody", (0, 0), seeds=4, heads=2, dim=8, key_bias="pair", nobody=70),
]
PARTS = replace(
    SIZES, counts=(70, 1, 100, 0, 32, 33, 64, 5), bias="pair", key_bias="pair", lse=True
)


@pytest.fixture(scope="module")
def module():
    return cuda_host.build()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_budget(module, case, dtype):
    for split in (512, SMALL):
        kernels = cuda_host.Kernels(module, split=split)
        testing.judge(case, dtype, lambda batch: testing.run_kernels(batch, kernels))  # noqa: B023


@pytest.mark.parametrize("seeds", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_the_real_size(module, seeds, dtype):
    case = testing.Case("parts", (511, 512, 3, 513, 1100), seeds=seeds, heads=1, dim=8, nobody=9)
    if dtype == torch.float64 or seeds == 3:
        case = replace(case, counts=(514, 3), bias="pair", key_bias="pair", lse=True, dropout=0.1)
    kernels = cuda_host.Kernels(module)
    testing.judge(case, dtype, lambda batch: testing.run_kernels(batch, kernels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_schedule_or_on_16_byte_loads(module, dtype):
    batch = PARTS.make(dtype)
    expected = testing.run_kernels(batch, cuda_host.Kernels(module, split=SMALL))
    for schedule in (1, 2, 3, 4):
        kernels = cuda_host.Kernels(module, schedule, vector=schedule % 2 == 0, split=SMALL)
        assert not different(expected, testing.run_kernels(batch, kernels))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_molecule_has_the_same_bits_alone_and_in_a_batch(module, dtype):
    kernels = cuda_host.Kernels(module, split=SMALL)
    case = replace(PARTS, bias=None, nobody=0)
    batch = case.make(dtype)
    together = testing.run_kernels(batch, kernels)
    for molecule, count in enumerate(case.counts):
        first = sum(case.counts[:molecule])
        rows, own = slice(first, first + count), slice(molecule, molecule + 1)
        alone = replace(
            batch,
            case=replace(case, counts=(count,)),
            k=batch.k[rows],
            v=batch.v[rows],
            key_bias=batch.key_bias[rows],
            k_ptr=torch.tensor([0, count]),
            dout=batch.dout[own],
            dlse=batch.dlse[own],
            ddk=batch.ddk[rows],
            ddv=batch.ddv[rows],
            ddkey_bias=batch.ddkey_bias[rows],
        )
        found = testing.run_kernels(alone, kernels)
        of_molecule = ("out", "lse", "gdout", "gdlse")
        cut = {name: x[own if name in of_molecule else rows] for name, x in together.items()}
        for name in ("dq", "gq"):  # sums over the molecules
            del cut[name], found[name]
        assert not different(cut, found)


def test_a_nan_stays_in_its_molecule(module):
    kernels = cuda_host.Kernels(module, split=SMALL)
    case = replace(PARTS, bias=None)
    batch = case.make(torch.float32)
    expected = testing.run_kernels(batch, kernels)
    first, bad = sum(case.counts[:2]), 2
    rows = slice(first, first + case.counts[bad])
    batch.k[first + 50] = batch.v[first + 50] = float("nan")
    for name, x in testing.run_kernels(batch, kernels).items():
        if name in ("dq", "gq"):
            continue
        inside = slice(bad, bad + 1) if name in ("out", "lse", "gdout", "gdlse") else rows
        assert x[inside].isnan().any(), name
        clean, same = x.clone(), expected[name].clone()
        clean[inside] = same[inside] = 0
        assert torch.equal(clean, same), name


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_rows_of_nobody_are_zero(module, index):
    batch = replace(PARTS, index=index).make(torch.float32)
    before = 40  # more than a part
    pad = torch.full((before, 2, 24), float("nan"))
    for name in ("k", "v", "ddk", "ddv"):
        setattr(batch, name, torch.cat([pad, getattr(batch, name)]))
    for name in ("key_bias", "ddkey_bias"):
        setattr(batch, name, torch.cat([pad[..., 0], getattr(batch, name)]))
    batch.k_ptr = batch.k_ptr + before
    more = torch.zeros(7, 2)
    batch.bias, batch.ddbias = torch.cat([batch.bias, more]), torch.cat([batch.ddbias, more])
    rows = sum(PARTS.counts)
    found = testing.run_kernels(batch, cuda_host.Kernels(module, split=SMALL))
    for name, x in found.items():
        assert not x.isnan().any(), name
        if name in ("dk", "dv", "dkey_bias", "gk", "gv", "gkey_bias"):
            assert (torch.cat([x[:before], x[before + rows :]]) == 0).all(), name
        if name in ("dbias", "gbias"):
            assert (x[-7:] == 0).all(), name


def test_absent_cotangents_are_zero(module):
    kernels = cuda_host.Kernels(module, split=SMALL)
    cuda_host.compare_absent_cotangents(kernels, PARTS.make(torch.float32))


def test_several_molecules_a_warp(module):
    """d(seeds) of more molecules than one sum takes; large batches give a warp several of them."""
    case = testing.Case("many", (1, 2, 0) * 700, seeds=2, heads=4, dim=2)
    batch = case.make(torch.float32)

    def run(molecules: int):
        kernels, rows = cuda_host.Kernels(module), slice(0, molecules)
        x = batch.operands._replace(k_ptr=batch.k_ptr[: molecules + 1])
        y = kernels.forward(x, batch.options)
        dy = Cotangents(batch.dout[rows], None)
        return kernels.backward(x, y, dy, batch.options, False)[:3]

    dq, dk, dv = run(2100)
    for one, other in zip((dk, dv), run(30)[1:]):  # one molecule a warp
        assert torch.equal(one[:30], other[:30])
    q, k = (x.double().requires_grad_() for x in (batch.q, batch.k))
    counts = batch.k_ptr.diff()
    of = torch.repeat_interleave(torch.arange(len(counts)), counts)
    weights = (torch.einsum("shd,nhd->nsh", q, k) * batch.scale).exp()
    weights = weights / weights.new_zeros(len(counts), 2, 4).index_add(0, of, weights)[of]
    sums = torch.einsum("nsh,nhd,nshd->", weights, batch.v.double(), batch.dout[of].double())
    for x, y in zip((dq, dk), torch.autograd.grad(sums, (q, k))):
        assert (x - y).abs().max() < 1e-5 * y.abs().max()
