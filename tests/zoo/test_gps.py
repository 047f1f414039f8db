"""torch_geometric's GPSConv and ours with the same weights."""

import pytest
import torch

pyg = pytest.importorskip("torch_geometric.nn")

from attnpool_kernels import Ragged  # noqa: E402
from attnpool_kernels.zoo.gps import GPSConv  # noqa: E402

COUNTS = (4, 0, 1, 6)
SETS = Ragged.from_counts(COUNTS)
BATCH = SETS.batch()
EDGES = torch.tensor([[0, 1, 2, 3, 5, 6, 7], [1, 0, 3, 2, 6, 7, 8]])


def conv():
    return pyg.GINConv(torch.nn.Linear(8, 8))


def pair(**options):
    """Both with the same weights; double precision."""
    theirs = pyg.GPSConv(8, conv(), heads=2, **options).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in theirs.parameters():
            x.copy_(torch.randn(x.shape, generator=generator, dtype=x.dtype) / 3)
    ours = GPSConv(8, conv(), heads=2, **options).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def rows():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sum(COUNTS), 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": None, "attn_kwargs": {"bias": False}},
        {"norm": "layer_norm", "act": "elu", "norm_kwargs": {"mode": "node"}},
        {"norm": "graph_norm", "dropout": 0.4},
        {"attn_type": "performer"},
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_same_numbers(options, train):
    found = []
    for module in pair(**options):
        module.train(train)
        x = rows().requires_grad_()
        torch.manual_seed(0)  # of the dropouts, which PyG's order of layers draws from, too
        out = module(x, EDGES, BATCH)
        found.append((out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])))
    for x, y in zip(*found):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-10)


def test_without_a_batch_or_a_conv():
    theirs, ours = pair()
    theirs.conv = ours.conv = None
    assert torch.allclose(ours(rows(), None), theirs(rows(), None), rtol=1e-9, atol=1e-10)


def test_layers_share_boundaries():
    for options in (
        {"norm": "batch_norm"},
        {"norm": "graph_norm"},
        {"norm": "batch_norm", "attn_type": "performer"},  # not ours: it takes no boundaries
    ):
        _, ours = pair(**options)
        assert torch.equal(ours.eval()(rows(), EDGES, SETS), ours(rows(), EDGES, BATCH))


def test_forces_train_where_theirs_raises():
    """Second derivatives, against a graph of its own at a time (which needs no padding)."""
    theirs, ours = pair(norm="layer_norm", norm_kwargs={"mode": "node"})

    def second(module, batch, x, edges):
        module.train()
        x = x.detach().requires_grad_()
        (forces,) = torch.autograd.grad(module(x, edges, batch).sum(), x, create_graph=True)
        wanted = list(module.parameters())
        return torch.autograd.grad(forces.square().sum(), wanted, allow_unused=True)

    with pytest.raises(RuntimeError, match="derivative"):
        second(theirs, BATCH, rows(), EDGES)
    found = second(ours, BATCH, rows(), EDGES)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = [0.0] * len(found)
        for first, last in zip(SETS.ptr.tolist(), SETS.ptr.tolist()[1:]):
            if last > first:
                inside = (EDGES[0] >= first) & (EDGES[0] < last)
                alone = second(theirs, None, rows()[first:last], EDGES[:, inside] - first)
                expected = [x if y is None else x + y for x, y in zip(expected, alone)]
    assert any(x is not None and bool(x.any()) for x in found)
    for x, y in zip(found, expected):
        assert torch.allclose(
            torch.zeros(1).double() if x is None else x, torch.as_tensor(y, dtype=torch.float64)
        )


def test_bad_input():
    _, ours = pair()
    for batch, words in (
        (BATCH.flip(0), "sorted"),
        (BATCH[:-1], r"shape \[11\], got \(10,\)"),
        (Ragged.from_counts([4, 6]), "the 11 rows of x, got 10"),
    ):
        with pytest.raises(ValueError, match=words):
            ours(rows(), EDGES, batch)
    with pytest.raises(ValueError, match=r"\[N, 8\]"):
        ours(rows()[:, :7], EDGES, BATCH)
    with pytest.raises(ValueError, match="add_bias_kv"):
        GPSConv(8, conv(), attn_kwargs={"add_bias_kv": True})
    positional = 2, 0.0, "relu", None, "batch_norm", None, "multihead"
    with pytest.raises(ValueError, match="add_zero_attn"):
        GPSConv(8, None, *positional, {"add_zero_attn": True})
