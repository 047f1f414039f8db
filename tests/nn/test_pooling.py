"""Each pooling against its formula per molecule, and the exact zeros of empty molecules."""

import pytest
import torch
from tools import padded

from attnpool_kernels import Ragged
from attnpool_kernels.nn import (
    AttentionalPooling,
    AttentionPooling,
    MaxPooling,
    MeanPooling,
    OrbitalWeightedAverage,
    SeedPooling,
    SoftmaxPooling,
    SumPooling,
    WeightedAverage,
)

COUNTS = (4, 0, 7, 1)
POOLINGS = {
    "sum": (SumPooling(), lambda p, x: x.sum(0)),
    "mean": (MeanPooling(), lambda p, x: x.mean(0)),
    "max": (MaxPooling(), lambda p, x: x.max(0).values),
    "softmax": (SoftmaxPooling(), lambda p, x: (x * x.softmax(0)).sum(0)),
    "gated": (
        AttentionalPooling(5, 3, hidden=4),
        lambda p, x: (p.gate(x).softmax(0) * p.transform(x)).sum(0),
    ),
    "gated plain": (AttentionalPooling(5), lambda p, x: (p.gate(x).softmax(0) * x).sum(0)),
    "weighted average": (
        WeightedAverage(5, 2, hidden=(4, 3), mean=0.7, std=1.3),
        lambda p, x: (p.gate(x).softmax(0) * (1.3 * p.value(x) + 0.7)).sum(0),
    ),
}


def atoms(seed=0, nobody=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(COUNTS) + nobody, 5, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), Ragged.from_counts(COUNTS)


@pytest.mark.parametrize("name", POOLINGS)
def test_formula(name):
    pool, formula = POOLINGS[name]
    pool.double()
    x, ragged = atoms()
    out = pool(x, ragged)
    parts = x[: sum(COUNTS)].split(COUNTS)
    for i, part in enumerate(parts):
        wanted = formula(pool, part) if len(part) else torch.zeros_like(out[i])
        torch.testing.assert_close(out[i], wanted, rtol=0, atol=1e-13)
    torch.testing.assert_close(pool(x, ragged.ptr), out, rtol=0, atol=0)
    (dx,) = torch.autograd.grad(out.square().sum(), x)
    total = sum(formula(pool, part).square().sum() for part in parts if len(part))
    (wanted,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(dx, wanted, rtol=0, atol=1e-12)
    assert not dx[sum(COUNTS) :].any()
    assert torch.autograd.gradcheck(lambda x: pool(x, ragged).sin(), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: pool(x, ragged).sin(), x, fast_mode=True)


@pytest.mark.parametrize("name", POOLINGS)
def test_nan_stays_where_it_is(name):
    pool = POOLINGS[name][0].double()
    x, ragged = atoms()
    clean = pool(x, ragged)
    spoilt = x.detach().clone()
    spoilt[5], spoilt[-1] = torch.nan, torch.nan  # an atom of molecule 2, and one of no molecule
    spoilt.requires_grad_()
    out = pool(spoilt, ragged)
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])
    assert out[2].isnan().any()
    (dx,) = torch.autograd.grad(out[[0, 1, 3]].sum(), spoilt)
    inside = dx[[0, 1, 2, 3, 11]]
    assert inside.isfinite().all() and inside.any() and not dx[-1].any()


def test_large_gates_do_not_overflow():
    x = torch.tensor([[1e4], [1e4 - 1], [-1e30]])
    out = SoftmaxPooling()(x, torch.tensor([0, 2, 3]))
    weights = torch.tensor([0.0, -1.0]).softmax(0)
    torch.testing.assert_close(out, torch.stack([(x[:2, 0] * weights).sum()[None], x[2]]))


def test_max_takes_the_first_of_equal_elements():
    x = torch.tensor([[1.0], [2.0], [2.0], [2.0]], requires_grad=True)
    MaxPooling()(x, torch.tensor([0, 3, 4])).sum().backward()
    assert x.grad.flatten().tolist() == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("reduce", ["mean", "concat"])
def test_seed_pooling(reduce):
    pool = SeedPooling(5, 8, seeds=3, heads=2, reduce=reduce).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    parts = torch.stack([padded.pma(pool.pma, part) for part in x.split((2, 4))])
    wanted = parts.mean(1) if reduce == "mean" else parts.flatten(1)
    torch.testing.assert_close(pool(x, torch.tensor([0, 2, 6])), wanted)


def test_orbital_weighted_average_is_trained_towards_coefficients():
    pool = OrbitalWeightedAverage(5, hidden=(4,)).double()
    x, ragged = atoms(nobody=0)
    y, weights = pool.with_weights(x, ragged)
    for i, part in enumerate(x.split(COUNTS)):
        own = slice(*ragged.ptr[i : i + 2].tolist())
        torch.testing.assert_close(weights[own], pool.gate(part).softmax(0).squeeze(1))
    target, coefficients = torch.randn_like(y), torch.rand_like(weights)
    wanted = 0.1 * (y - target).square().mean() + (weights - coefficients).square().mean()
    torch.testing.assert_close(pool.loss(x, ragged, target, coefficients), wanted)
    assert torch.equal(pool(x, ragged), y)
    with pytest.raises(ValueError, match="coefficients"):
        pool.loss(x, ragged, target, coefficients[1:])
    with pytest.raises(ValueError, match="target"):
        pool.loss(x, ragged, target[:, 0], coefficients)


def test_pooling_ignores_the_order_of_atoms():
    x, ragged = atoms(nobody=0)
    x = x.detach()
    order = torch.cat([torch.randperm(n) + s for n, s in zip(COUNTS, ragged.ptr.tolist())])
    pools = [pool for pool, _ in POOLINGS.values()] + [AttentionPooling(5, 8, heads=2, seeds=3)]
    for pool in pools:
        pool.double()
        torch.testing.assert_close(pool(x, ragged), pool(x[order], ragged), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (lambda: AttentionalPooling(0), ValueError, "channels"),
        (lambda: AttentionalPooling(4, hidden=-1), ValueError, "hidden"),
        (lambda: AttentionalPooling(4, activation="exp"), ValueError, "activation"),
        (lambda: WeightedAverage(4, hidden=(4, 0)), ValueError, "hidden"),
        (lambda: WeightedAverage(4, "1"), TypeError, "out_features"),
        (lambda: SeedPooling(4, heads=3), ValueError, "heads"),
        (lambda: SeedPooling(4, reduce="none"), ValueError, "reduce"),
        (lambda: SumPooling()(torch.randn(3), torch.tensor([0, 3])), ValueError, "x"),
        (lambda: SumPooling()(torch.randn(3, 2), torch.tensor([0, 4])), ValueError, "ptr"),
        (lambda: SumPooling()(torch.randn(3, 2), torch.tensor([1, 3])), ValueError, "ptr"),
        (lambda: SumPooling()(torch.randn(3, 2), [0, 3]), TypeError, "ptr"),
        (lambda: WeightedAverage(4)(torch.randn(3, 5), torch.tensor([0, 3])), ValueError, "x"),
    ],
)
def test_bad_input(call, error, names):
    with pytest.raises(error, match=rf"\b{names}\b"):
        call()


@pytest.mark.parametrize("pooling", [SumPooling, MeanPooling, SoftmaxPooling])
@pytest.mark.parametrize("rows", [10**3, 10**4, 10**6])
def test_sums_of_many_equal_rows(pooling, rows):
    """A running float32 sum of 10^6 rows of 1.1 is 1 % off."""
    x = torch.full((rows + 3, 2), 1.1)
    found = pooling()(x, torch.tensor([0, 3, rows + 3]))
    exact = torch.tensor([3.0, rows]) if pooling is SumPooling else torch.ones(2)
    expected = exact[:, None].double() * x[0].double()
    assert ((found.double() - expected).abs() <= 64 * 1.2e-7 * expected).all()


@pytest.mark.parametrize("rows", [63, 64, 65, 4095, 4096, 9000])
def test_sums_have_the_bits_of_the_molecule_alone(rows):
    x = torch.randn(rows + 70, 2)
    together = SumPooling()(x, torch.tensor([0, 33, 33, rows + 33, rows + 70]))
    assert torch.equal(together[2:3], SumPooling()(x[33 : rows + 33], torch.tensor([0, rows])))


def test_the_mean_of_halves_does_not_overflow_on_the_way():
    """Neither the sum of 70,000 rows of 3 nor their count fits into float16."""
    x = torch.full((70_000, 2), 3.0, dtype=torch.float16)
    ptr = torch.tensor([0, 70_000])
    assert torch.equal(MeanPooling()(x, ptr), torch.full((1, 2), 3.0, dtype=torch.float16))
    assert torch.allclose(SoftmaxPooling()(x[:, :1], ptr).float(), torch.tensor(3.0), rtol=1e-2)
