"""Sums over 10^3 to 10^7 keys, queries and molecules: an error that does not grow with the number.

The budget of the other tests compares with the dense formula in the same dtype, whose own sums run:
from 10^4 near-equal terms on it is hundreds of roundings off. Here it is 8 (``long_sums``).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tools import cuda_host, long_sums

from attnpool_kernels import seed_pool, testing
from attnpool_kernels.impl import cpu
from attnpool_kernels.operands import Operands, Options

OPS = torch.ops.attnpool
WIDTHS = () if cpu.load() else OPS.build_info().split("built for ")[1].split(";")[0].split()
needs_cpu = pytest.mark.skipif(bool(cpu.load()), reason=cpu.load())


@pytest.fixture(params=WIDTHS or [None])
def width(request):
    try:
        OPS._use_isa(request.param)
    except (RuntimeError, AttributeError):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    OPS._use_isa("")


def judge(kernels, units: float = long_sums.UNITS, **sizes) -> None:
    problem = long_sums.near_equal(**sizes)
    found = long_sums.errors(problem, long_sums.run(problem, kernels))
    bad = {name: round(error, 1) for name, error in found.items() if not error <= units}
    assert not bad, f"{sizes}: errors {bad} in units of eps, budget {units}"


KEYS = [{"keys": n} for n in (10**3, 10**4, 10**5)]
KEYS += [{"keys": n, "queries": 70} for n in (10**3, 2200, 10**4)]  # two blocks of queries; parts
QUERIES = [{"keys": 2, "queries": n} for n in (10**3, 10**4, 10**5)]
MOLECULES = [{"keys": 2, "queries": 2, "molecules": n} for n in (10**3, 10**4, 10**5)]
MOLECULES += [{"keys": 5000, "queries": 2, "molecules": 3}]


@needs_cpu
@pytest.mark.parametrize("sizes", [*KEYS, *QUERIES, *MOLECULES], ids=str)
def test_cpu(width, sizes):
    judge(cpu, **sizes)


@needs_cpu
@pytest.mark.parametrize("sizes", [{"keys": 10**6}, {"keys": 1, "queries": 10**6}], ids=str)
def test_cpu_of_a_million(sizes):
    judge(cpu, **sizes)


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [{"keys": 10**7}, {"keys": 1, "queries": 10**7}, {"keys": 1, "queries": 1, "molecules": 10**7}],
    ids=str,
)
def test_cpu_of_ten_million(sizes):
    judge(cpu, width=1, **sizes)


@needs_cpu
@pytest.mark.parametrize("keys", [10**6, pytest.param(2**25 + 10**3, marks=pytest.mark.slow)])
def test_the_mean_of_equal_values_is_their_value(keys):
    """A running float32 count stops at 2^24: 33.5 million values of 3 had the mean 6."""
    v = torch.full((1, 1, 1), 3.0).expand(keys, 1, 1)
    q, k = torch.zeros(1, 1, 1), torch.zeros(1, 1, 1).expand(keys, 1, 1)
    out, lse = seed_pool(q, k, v, torch.tensor([0, keys]), backend="cpu", return_lse=True)
    assert abs(out.item() - 3) <= 3e-7
    assert abs(lse.item() - torch.tensor(keys).double().log().item()) <= 2e-6


def test_the_reference_adds_long_molecules_in_float64():
    """torch's own float32 softmax of 10^6 equal logits is 0.07 % off, its product with v more."""
    v = torch.full((10**6, 1, 1), 3.0)
    q, k = torch.zeros(1, 1, 1), torch.zeros(10**6, 1, 1, requires_grad=True)
    out, _ = seed_pool(q, k, v, torch.tensor([0, 10**6]), backend="reference", return_lse=True)
    assert out.dtype == torch.float32 and abs(out.item() - 3) <= 3e-7
    (dk,) = torch.autograd.grad(out.sum(), k)
    assert dk.dtype == torch.float32 and not dk.any()


@needs_cpu
@pytest.mark.parametrize("sign", [1, -1])
def test_a_maximum_that_rises_in_every_block(width, sign):
    """The sums so far are multiplied whenever the maximum rises; 10^5 keys raise it 800 times."""
    keys = 10**5
    k = sign * torch.linspace(0, 3, keys)[:, None, None]
    v = 3 + 1e-3 * torch.randn(keys, 1, 2)
    q, ptr = torch.ones(1, 1, 1), torch.tensor([0, keys])
    out, lse = cpu.forward(Operands.plain(q, k, v, None, ptr), Options(1.0))
    logits = k.flatten().double()
    expected = logits.softmax(0) @ v.flatten(1).double()
    assert (out.flatten().double() - expected).abs().max() <= long_sums.UNITS * 3 * 1.2e-7
    assert abs(lse.double().item() - logits.logsumexp(0).item()) <= 4e-6


@needs_cpu
def test_logits_that_differ_by_thousands(width):
    """What later blocks make negligible is 0, and the other way round; no NaN between."""
    keys = 6000
    k = torch.linspace(-4000, 4000, keys)[:, None, None]
    v = torch.arange(keys, dtype=torch.float32)[:, None, None]
    ptr = torch.tensor([0, keys])
    for sign, expected in ((1.0, 0), (-1.0, 1)):
        q = torch.full((1, 1, 1), sign)
        out, _ = cpu.forward(Operands.plain(q, k, v, None, ptr), Options(1.0))
        logits = sign * k.flatten().double()
        truth = (logits.softmax(0) @ v.flatten().double()).item()
        assert abs(out.item() - truth) <= 1e-3 * (1 + expected)


@needs_cpu
@pytest.mark.parametrize("keys", [300, 5000])
def test_an_infinite_value_stays_infinite(width, keys):
    """The part of a sum that rounding takes is NaN where the sum is infinite."""
    v = torch.ones(keys, 1, 1)
    v[7] = torch.inf
    q, k, ptr = torch.zeros(1, 1, 1), torch.zeros(keys, 1, 1), torch.tensor([0, keys])
    out, _ = cpu.forward(Operands.plain(q, k, v, None, ptr), Options(1.0))
    assert out.item() == torch.inf


@needs_cpu
@pytest.mark.parametrize("seeds", [None, 2], ids=("queries", "seeds"))
def test_bits_of_long_molecules_alone_and_with_any_threads(width, seeds):
    """Long sums too depend on the molecule alone."""
    counts = (3, 2500, 4200)
    case = testing.Case(
        "long",
        counts,
        q_counts=None if seeds else (5, 70, 66),
        heads=2,
        dim=4,
        seeds=seeds,
        lse=True,
    )
    batch = case.make(torch.float32)
    together = testing.run_kernels(batch, cpu)
    torch.set_num_threads(3)
    for name, x in testing.run_kernels(batch, cpu).items():
        assert torch.equal(x, together[name]), f"{name} depends on the number of threads"
    first_q = first_k = 0
    for i, n in enumerate(counts):
        m = seeds or case.q_counts[i]
        keys, own = slice(first_k, first_k + n), slice(first_q, first_q + m)
        rows = slice(i, i + 1) if seeds else own
        of_q = slice(None) if seeds else own
        alone = replace(
            batch,
            case=replace(case, counts=(n,), q_counts=None if seeds else (m,)),
            q=batch.q[of_q],
            ddq=batch.ddq[of_q],
            dout=batch.dout[rows],
            dlse=batch.dlse[rows],
            k=batch.k[keys],
            v=batch.v[keys],
            ddk=batch.ddk[keys],
            ddv=batch.ddv[keys],
            q_ptr=None if seeds else torch.tensor([0, m]),
            k_ptr=torch.tensor([0, n]),
        )
        for name, x in testing.run_kernels(alone, cpu).items():
            if seeds and name in ("dq", "gq"):
                continue  # sums over the molecules
            place = keys if name[1:] in ("k", "v") else own if name[1:] == "q" else rows
            assert torch.equal(x, together[name][place]), (i, name)
        first_q, first_k = first_q + m, first_k + n


@needs_cpu
@pytest.mark.parametrize("seeds", [None, 3], ids=("queries", "seeds"))
def test_gradients_of_large_logits_over_many_blocks(width, seeds):
    """The rounding of a large LSE is a factor of the weights, unless they have a norm."""
    case = testing.Case("large", (300,), heads=1, dim=8, logits=30.0, seeds=seeds, lse=True)
    testing.judge(case, torch.float32, lambda batch: testing.run_kernels(batch, cpu))


@needs_cpu
@pytest.mark.parametrize(
    "sizes", [KEYS[1], KEYS[-1], QUERIES[-1], MOLECULES[-2], MOLECULES[-1]], ids=str
)
def test_cpu_of_equal_terms(width, sizes):
    """Every addition of a running sum rounds in the same direction. 12: up to 128 of them, n terms
    being n / 12 eps, and 16 blocks."""
    judge(cpu, 12.0, spread=0.0, **sizes)


@pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())
@pytest.mark.parametrize(("keys", "split"), [(20000, 512), (6000, 4)])
def test_cuda_few_seeds(keys, split):
    """Parts of a molecule and their merging, on emulated threads; running sums were 36 roundings
    off. 12: 128 sums of four keys in a register, and weights from a rounded LSE."""
    kernels = cuda_host.Kernels(cuda_host.build(), split=split)
    judge(kernels, 12.0, keys=keys, queries=2, molecules=1, width=16, spread=0.0)
