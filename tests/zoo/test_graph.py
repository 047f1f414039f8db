"""Neighbours and pairs of neighbours against their definitions, pair by pair."""

import math

import pytest
import torch

from attnpool_kernels import Ragged
from attnpool_kernels.zoo import graph
from attnpool_kernels.zoo.graph import edges, lengths, triplets

PTR = torch.tensor([0, 5, 5, 6, 40, 80])  # three more atoms belong to no molecule


def defined(pos, ptr, cutoff):
    batch = torch.searchsorted(ptr[1:], torch.arange(len(pos)), right=True)
    same = (batch[:, None] == batch) & (batch < len(ptr) - 1)
    square = (pos[:, None] - pos).square().sum(2)
    near = same & ~torch.eye(len(pos), dtype=torch.bool) & (square <= cutoff**2)
    return set(map(tuple, near.nonzero().tolist()))


@pytest.mark.parametrize("pairs", [graph.ALL_PAIRS, 0])
@pytest.mark.parametrize("cutoff", [0.5, 3.0, 9.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges(monkeypatch, pairs, cutoff, dtype):
    monkeypatch.setattr(graph, "ALL_PAIRS", pairs)
    pos = 4 * torch.randn(83, 3, dtype=dtype)
    if cutoff == 9.0:
        pos[79] += 1e5  # far away: cells must become wider, not too many
    for ptr in (PTR, Ragged(PTR)):
        index = edges(pos, ptr, cutoff)
        found = list(map(tuple, index.T.tolist()))
        assert set(found) == defined(pos, PTR, cutoff) and len(set(found)) == len(found)
        assert bool((index[1].diff() >= 0).all())


@pytest.mark.parametrize("pairs", [graph.ALL_PAIRS, 0])
def test_all_neighbours_at_the_cutoff_itself(monkeypatch, pairs):
    """40 atoms around one, all at the cutoff: none is left out, whichever cell it falls into."""
    monkeypatch.setattr(graph, "ALL_PAIRS", pairs)
    steps = torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0, 3], [1, 2, 2], [2, 2, 1], [2, 1, 2]])
    around = torch.cat([steps, -steps, steps * torch.tensor([1, -1, 1])])
    for corner in (0.0, 3.0, -1e3):
        pos = torch.cat([torch.zeros(1, 3), around]) + corner
        index = edges(pos, torch.tensor([0, len(pos)]), 3.0)
        assert int((index[1] == 0).sum()) == len(around) == int((index[0] == 0).sum())
    pos = 0.1 * torch.randn(41, 3)
    assert edges(pos, torch.tensor([0, 41]), 3.0).shape == (2, 41 * 40)


def test_memory_of_a_large_molecule(monkeypatch):
    """Beyond 2**20 pairs only adjacent cells are tried: fewer than 12 pairs for one edge."""
    tried = []
    ranges = graph._ranges
    monkeypatch.setattr(graph, "_ranges", lambda *x: tried.append(ranges(*x)) or tried[-1])
    pos = 27.0 * torch.rand(2000, 3)
    index = edges(pos, torch.tensor([0, 2000]), 5.0)
    assert len(tried[0][0]) < 12 * index.shape[1] < 2000**2


def test_nan_stays_visible_and_in_its_molecule():
    pos = torch.randn(6, 3)
    pos[4] = torch.nan
    index = edges(pos, torch.tensor([0, 3, 6]), 1e3)
    assert {4} == set(index[0, index[1] == 3].tolist()) - {5} and int(
        index[:, index[1] < 3].max()
    ) < 3


def test_no_atoms_and_no_neighbours():
    assert edges(torch.empty(0, 3), torch.tensor([0]), 1.0).shape == (2, 0)
    index = edges(torch.tensor([[0.0, 0, 0], [2, 0, 0]]), torch.tensor([0, 2]), 1.0)
    assert index.shape == (2, 0) and index.dtype == torch.int64
    assert all(x.shape == (0,) for x in triplets(index, 2))


@pytest.mark.parametrize(
    ("pos", "ptr", "cutoff", "name"),
    [
        (torch.zeros(4, 2), [0, 4], 1.0, "pos"),
        (torch.zeros(4, 3), [0, 5], 1.0, "ptr"),
        (torch.zeros(4, 3), [0, 4], 0.0, "cutoff"),
        (torch.zeros(4, 3), [0, 4], math.nan, "cutoff"),
    ],
)
def test_bad_input(pos, ptr, cutoff, name):
    with pytest.raises(ValueError, match=name):
        edges(pos, torch.tensor(ptr), cutoff)


@pytest.mark.parametrize("pos", [None, [[0.0, 0.0, 0.0]], torch.ones(1, 3).bool(), "x"])
def test_positions_of_another_kind(pos):
    with pytest.raises(TypeError, match="pos"):
        edges(pos, torch.tensor([0, 1]), 1.0)
    with pytest.raises(NotImplementedError, match="pos"):
        edges(torch.ones(1, 3).to_sparse(), torch.tensor([0, 1]), 1.0)


def test_triplets():
    index = edges(torch.randn(20, 3), torch.tensor([0, 4, 5, 17]), 2.0)
    pairs = index.T.tolist()
    wanted = {
        (i, j, k, pairs.index([k, j]), pairs.index([j, i]))
        for j, i in pairs
        for k, middle in pairs
        if middle == j and k != i
    }
    found = list(zip(*(x.tolist() for x in triplets(index, 20))))
    assert set(found) == wanted and len(found) == len(wanted) > 100 and len(pairs) < 12 + 132
    with pytest.raises(ValueError, match="sorted"):
        triplets(index.flip(1), 20)


def test_lengths_at_zero():
    r = torch.tensor([[0.0, 0, 0], [3, 0, 4]], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(lengths(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum() + first.sum(), r)
    assert lengths(r).tolist() == [0, 5] and not first[0].any()
    torch.testing.assert_close(first[1], r[1] / 5)
    assert bool(second.isfinite().all()) and not second[0].any()
