"""Variance, Set2Set, poolings side by side and by batch index: formulas, and exact zeros."""

import pytest
import torch

from attnpool_kernels import Ragged
from attnpool_kernels.nn import (
    BatchPooling,
    MaxPooling,
    MeanPooling,
    Multi,
    SeedPooling,
    Set2Set,
    StdPooling,
    SumPooling,
    VarPooling,
)

COUNTS = (4, 0, 7, 1)
SETS = Ragged.from_counts(COUNTS)


def atoms(nobody=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(COUNTS) + nobody, 5, dtype=torch.float64, generator=generator)
    return x.requires_grad_()


def molecules(x):
    return x[: sum(COUNTS)].split(COUNTS)


def set2set(pool, x):
    """One molecule, written out; an empty one has r = 0."""
    state, out = None, x.new_zeros(1, 10)
    for _ in range(pool.steps):
        q, state = pool.lstm(out, state)
        r = (x @ q[0]).softmax(0) @ x if len(x) else x.new_zeros(5)
        out = torch.cat([q, r[None]], 1)
    return out[0]


POOLINGS = {
    "var": (VarPooling(), lambda p, x: x.var(0, correction=0)),
    "std": (StdPooling(), lambda p, x: x.var(0, correction=0).sqrt()),
    "set2set": (Set2Set(5, 3), set2set),
    "set2set, two layers": (Set2Set(5, 2, layers=2), set2set),
    "multi": (
        Multi([MeanPooling(), MaxPooling(), VarPooling()]),
        lambda p, x: torch.cat([x.mean(0), x.max(0).values, x.var(0, correction=0)]),
    ),
    "multi, sum": (Multi([MeanPooling(), SumPooling()], "sum"), lambda p, x: x.mean(0) + x.sum(0)),
    "multi, mean": (
        Multi([MeanPooling(), SumPooling()], "mean"),
        lambda p, x: (x.mean(0) + x.sum(0)) / 2,
    ),
}


@pytest.mark.parametrize("name", POOLINGS)
def test_formula(name):
    pool, formula = POOLINGS[name]
    pool.double()
    x = atoms()
    out = pool(x, SETS)
    for i, part in enumerate(molecules(x)):
        empty = not len(part) and "set2set" not in name
        wanted = torch.zeros_like(out[i]) if empty else formula(pool, part)
        torch.testing.assert_close(out[i], wanted, rtol=0, atol=1e-13)
    torch.testing.assert_close(pool(x, SETS.ptr), out, rtol=0, atol=0)
    assert not torch.autograd.grad(out.sum(), x)[0][sum(COUNTS) :].any()
    assert torch.autograd.gradcheck(lambda x: pool(x, SETS).sin(), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: pool(x, SETS).sin(), x, fast_mode=True)


def test_equal_rows_have_no_deviation():
    """Not the square root's infinite slope: rows of a symmetric molecule are equal."""
    x = torch.full((3, 2), 1e3).requires_grad_()
    for pool in (StdPooling(), VarPooling()):
        out = pool(x, torch.tensor([0, 3]))
        assert not out.any()
        (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        assert torch.equal(dx, torch.zeros_like(dx))


def test_variance_of_distant_rows():
    """Squares of 1e4 would cancel to nothing in float32."""
    x = torch.tensor([[1e4], [1e4 + 1], [1e4 + 2]])
    for dtype in (torch.float32, torch.float64):
        assert VarPooling()(x.to(dtype), torch.tensor([0, 3])).item() == pytest.approx(2 / 3)


def test_rows_of_no_molecule_may_hold_anything():
    """Also where the boundaries have not been read, as those on a device."""
    unread = Ragged.from_counts(COUNTS)
    unread.last = None
    x = atoms().detach()
    x[sum(COUNTS) :] = torch.nan
    x.requires_grad_()
    for pool in (VarPooling(), StdPooling()):
        (dx,) = torch.autograd.grad(pool(x, unread).sum(), x)
        assert dx.isfinite().all() and not dx[sum(COUNTS) :].any()


def test_by_batch_index():
    """Chemprop's call, agg(H, batch)."""
    pool = MeanPooling()
    x = atoms(nobody=0)
    agg = BatchPooling(pool)
    found = agg(x, SETS.batch())
    assert torch.equal(found, pool(x, SETS))
    assert agg.hparams == {"cls": BatchPooling, "pool": pool}
    with pytest.raises(ValueError, match="sorted"):
        agg(x, SETS.batch().flip(0))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: StdPooling(0.0), ValueError, "eps must be positive"),
        (lambda: StdPooling("small"), TypeError, "eps"),
        (lambda: Set2Set(5, 0), ValueError, "steps must be at least 1"),
        (lambda: Set2Set(5, 1)(torch.zeros(3, 4), torch.tensor([0, 3])), ValueError, "[N, 5]"),
        (lambda: Multi([]), ValueError, "at least 1 pooling"),
        (lambda: Multi([MeanPooling], "sum"), TypeError, "torch.nn.Module"),
        (lambda: Multi([MeanPooling()], "cat"), ValueError, "concat, sum, mean"),
        (
            lambda: Multi([MeanPooling(), SeedPooling(4, 2)], "sum")(
                torch.zeros(3, 4), torch.tensor([0, 3])
            ),
            ValueError,
            "got 4, 2",
        ),
        (lambda: BatchPooling(None), TypeError, "NoneType"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


def test_in_chemprop(tmp_path):
    """Its model takes the adapter for an aggregation, and keeps it in a checkpoint."""
    chemprop = pytest.importorskip("chemprop")
    smiles = ["CCO", "c1ccccc1", "CC(=O)C", "CCN"]
    points = [chemprop.data.MoleculeDatapoint.from_smi(x, [1.0]) for x in smiles]
    data = chemprop.data.MoleculeDataset(points)
    (batch,) = chemprop.data.build_dataloader(data, batch_size=4, shuffle=False)
    messages, mean = chemprop.nn.BondMessagePassing(), chemprop.nn.MeanAggregation()
    ours = chemprop.models.MPNN(
        messages, BatchPooling(MeanPooling()), chemprop.nn.RegressionFFN()
    ).eval()
    theirs = chemprop.models.MPNN(messages, mean, ours.predictor).eval()
    torch.testing.assert_close(ours(batch.bmg), theirs(batch.bmg))
    path = tmp_path / "model.pt"
    chemprop.models.utils.save_model(path, ours)
    again = chemprop.models.utils.load_model(path)
    assert type(again.agg) is BatchPooling
    torch.testing.assert_close(again.eval()(batch.bmg), ours(batch.bmg))
