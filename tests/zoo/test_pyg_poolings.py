"""torch_geometric's Set2Set, GraphMultisetTransformer, Multi, Std and Var, and ours."""

import pytest
import torch

pytest.importorskip("torch_geometric")

import torch_geometric.nn.aggr as theirs

from attnpool_kernels import Ragged
from attnpool_kernels.nn import MeanPooling, Multi, StdPooling, VarPooling
from attnpool_kernels.zoo import pyg

COUNTS = (4, 0, 7, 1)
SETS = Ragged.from_counts(COUNTS)
INDEX = SETS.batch()
PAIRS = {
    "set2set": ("Set2Set", (8, 3), {}),
    "set2set, two layers": ("Set2Set", (8, 2), {"num_layers": 2}),
    "gmt": ("GraphMultisetTransformer", (8, 3), {"heads": 2}),
    "gmt, norm": (
        "GraphMultisetTransformer",
        (8, 2),
        {"heads": 2, "layer_norm": True, "num_encoder_blocks": 2},
    ),
    "gmt, no blocks": ("GraphMultisetTransformer", (8, 1), {"num_encoder_blocks": 0}),
}


def rows():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sum(COUNTS), 8, dtype=torch.float64, generator=generator)


def agree(x, y):
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", PAIRS)
def test_same_weights_and_numbers(name):
    kind, arguments, options = PAIRS[name]
    torch.manual_seed(0)
    modules = [getattr(m, kind)(*arguments, **options).double() for m in (theirs, pyg)]
    modules[1].load_state_dict(modules[0].state_dict())
    assert list(modules[1].state_dict()) == list(modules[0].state_dict())
    assert repr(modules[1]) == repr(modules[0])
    found = []
    for module in modules:
        x = rows().requires_grad_()
        out = module(x, INDEX, dim_size=len(COUNTS))
        loss = out[[0, 2, 3]].square().sum()  # of an empty group, theirs may be NaN
        found.append((out[[0, 2, 3]], *torch.autograd.grad(loss, [x, *module.parameters()])))
    for a, b in zip(*found):
        agree(a, b)
    ours = modules[1]
    out = ours(x, INDEX, dim_size=len(COUNTS))
    assert out.isfinite().all()
    assert torch.equal(ours(x, ptr=SETS.ptr), out)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    agree(ours(x[order], INDEX[order], dim_size=len(COUNTS)), out)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    wanted = list(ours.parameters())
    second = torch.autograd.grad(dx.square().sum(), wanted, allow_unused=True)
    assert any(y is not None and bool(y.any()) for y in second)


@pytest.mark.parametrize(
    ("ours", "other"),
    [
        (VarPooling(), theirs.VarAggregation()),
        (StdPooling(), theirs.StdAggregation()),
        (
            Multi([MeanPooling(), StdPooling()]),
            theirs.MultiAggregation([theirs.MeanAggregation(), theirs.StdAggregation()]),
        ),
    ],
)
def test_statistics(ours, other):
    x = rows()
    x[0:4, 0] = 3.0  # no deviation
    agree(ours(x, SETS), other(x, INDEX, dim_size=len(COUNTS)))


def test_bad_input():
    with pytest.raises(ValueError, match=r"\[N, 8\]"):
        pyg.Set2Set(8, 2)(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="k must be at least 1"):
        pyg.GraphMultisetTransformer(8, 0)
