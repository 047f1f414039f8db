"""The aggregations in torch_geometric: same numbers as its own, and what its own refuses."""

import pytest
import torch

pytest.importorskip("torch_geometric")

import torch_geometric.nn.aggr
from torch_geometric.nn import GINConv, SchNet
from torch_geometric.nn.resolver import aggregation_resolver

from attnpool_kernels import Ragged
from attnpool_kernels.nn import AttentionPooling, MeanPooling
from attnpool_kernels.zoo import pyg
from attnpool_kernels.zoo.pyg import MoleculeGraph, PoolingAggregation, SetTransformerAggregation

THEIRS = torch_geometric.nn.aggr.SetTransformerAggregation
INDEX = torch.tensor([0, 0, 1, 1, 1, 3, 4, 4, 4, 4, 4])
VARIANTS = [
    {"heads": 2},
    {"heads": 4, "num_seed_points": 3, "concat": False},
    {"heads": 2, "num_seed_points": 2, "layer_norm": True, "num_encoder_blocks": 2},
    {"num_encoder_blocks": 0, "num_decoder_blocks": 0},
    {"heads": 2, "num_decoder_blocks": 2, "dropout": 0.3},
]


def pair(options, dtype=torch.float64):
    theirs, ours = THEIRS(16, **options), SetTransformerAggregation(16, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    THEIRS(16, **options).load_state_dict(ours.state_dict(), strict=True)
    assert [name for name, _ in ours.named_parameters()] == [
        name for name, _ in theirs.named_parameters()
    ]
    return theirs.to(dtype), ours.to(dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("options", VARIANTS)
def test_same_numbers(options, dtype, tol, training):
    theirs, ours = pair(options, dtype)
    theirs.train(training and not options.get("dropout"))
    ours.train(training and not options.get("dropout"))
    x = torch.randn(len(INDEX), 16, dtype=dtype, requires_grad=True)
    wanted = theirs(x, INDEX)
    ptr = torch.tensor([0, 2, 5, 5, 6, 11])
    for out in (ours(x, INDEX), ours(x, ptr=ptr), ours(x, INDEX, ptr=ptr, dim=0)):
        assert out.dtype == dtype and out.shape == wanted.shape
        assert (out - wanted).abs().max() <= tol * max(1, wanted.abs().max())
    cotangent = torch.randn_like(wanted)
    found = torch.autograd.grad(ours(x, INDEX), [x, *ours.parameters()], cotangent)
    wanted = torch.autograd.grad(wanted, [x, *theirs.parameters()], cotangent)
    for a, b in zip(found, wanted):
        assert (a - b).abs().max() <= 5 * tol * max(1, b.abs().max())
    with torch.no_grad():
        assert (ours(x, INDEX, dim_size=7)[:5] - theirs(x, INDEX)).abs().max() <= 10 * tol


def test_contract_of_the_class():
    options = {"num_seed_points": 2, "heads": 2}
    theirs, ours = pair(options)
    assert repr(ours) == repr(theirs)
    for name in ("channels", "num_seed_points", "heads", "concat", "layer_norm", "dropout"):
        assert getattr(ours, name) == getattr(theirs, name)
    before = ours.pma.seed.clone()
    ours.reset_parameters()
    assert not torch.equal(ours.pma.seed, before)
    assert not ours.encoders[0].mab.attn.in_proj_bias.any()  # as torch's MultiheadAttention


def test_unsorted_index():
    _, ours = pair({"heads": 2, "num_seed_points": 2})
    x = torch.randn(len(INDEX), 16, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(len(INDEX))
    out, wanted = ours(x[order], INDEX[order]), ours(x, INDEX)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-13)
    (a,) = torch.autograd.grad(out.square().sum(), x)
    (b,) = torch.autograd.grad(wanted.square().sum(), x)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_empty_groups():
    theirs, ours = pair({"heads": 2, "num_seed_points": 2})
    x = torch.randn(len(INDEX), 16, dtype=torch.float64, requires_grad=True)
    out = ours(x, INDEX)
    torch.testing.assert_close(out, theirs(x, INDEX), rtol=0, atol=1e-12)
    assert out[2].any()
    ours.empty = "zero"
    zero = ours(x, INDEX)
    assert not zero[2].any() and torch.equal(zero[[0, 1, 3, 4]], out[[0, 1, 3, 4]])
    for empty in ("attention", "zero"):
        ours.empty = empty
        assert ours(x[:0], INDEX[:0]).shape == (0, 32)
        nothing = ours(x[:0], INDEX[:0], dim_size=3)
        assert nothing.shape == (3, 32) and nothing.isfinite().all()
        gradients = torch.autograd.grad(nothing.sum(), ours.parameters(), allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in gradients)


def test_second_derivatives_where_torch_geometric_raises():
    theirs, ours = pair({"heads": 2, "num_seed_points": 3, "layer_norm": True})
    x = torch.randn(len(INDEX), 16, dtype=torch.float64, requires_grad=True)
    (force,) = torch.autograd.grad(theirs(x, INDEX).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative"):
        force.square().sum().backward()
    (force,) = torch.autograd.grad(ours(x, INDEX).square().sum(), x, create_graph=True)
    found = torch.autograd.grad(force.square().sum(), [x, *ours.parameters()])
    # torch's math attention has second derivatives: the same module through it
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (force,) = torch.autograd.grad(theirs(x, INDEX).square().sum(), x, create_graph=True)
        wanted = torch.autograd.grad(force.square().sum(), [x, *theirs.parameters()])
    for a, b in zip(found, wanted):
        assert (a - b).abs().max() <= 1e-10 * max(1, b.abs().max())


def test_resolver_and_message_passing():
    x = torch.randn(4, 16)
    edges = torch.tensor([[0, 1, 2, 3, 0], [1, 0, 1, 2, 2]])  # targets are not sorted
    found = aggregation_resolver("ragged_set_transformer", 16, heads=2)
    assert isinstance(found, SetTransformerAggregation)
    options = {"in_features": 16, "hidden": 8, "heads": 2, "seeds": 2}
    aggregations = [found, PoolingAggregation(MeanPooling())]
    convolutions = [GINConv(torch.nn.Identity(), aggr=aggregation) for aggregation in aggregations]
    convolutions += [
        GINConv(torch.nn.Identity(), aggr="attention_pooling", aggr_kwargs=options),
        GINConv(torch.nn.Identity(), aggr="mean"),
    ]
    outs = [conv(x, edges) for conv in convolutions]
    assert all(out.shape == (4, 16) for out in outs)
    torch.testing.assert_close(outs[1], outs[3])


def test_register_can_replace_the_name(monkeypatch):
    monkeypatch.setattr(torch_geometric.nn.aggr, "SetTransformerAggregation", THEIRS)
    assert type(aggregation_resolver("set_transformer", 16)) is THEIRS
    pyg.register(replace=True)
    assert type(aggregation_resolver("set_transformer", 16)) is SetTransformerAggregation


def test_compile():
    _, ours = pair({"heads": 2, "num_seed_points": 3}, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for counts in ([3, 1, 5, 2, 7], [4, 2, 9, 1, 6, 8]):
        ptr = Ragged.from_counts(counts).ptr
        x = torch.randn(sum(counts), 16, requires_grad=True)
        out = compiled(x, ptr=ptr)
        torch.testing.assert_close(out, ours(x, ptr=ptr))
        out.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"index": INDEX[:-1]}, ValueError, "index"),
        ({"index": INDEX - 1}, ValueError, "index"),
        ({"index": INDEX, "dim_size": 4}, ValueError, "dim_size"),
        ({"index": INDEX.float()}, TypeError, "index"),
        ({"index": INDEX, "dim": 1}, ValueError, "dim"),
        ({"index": INDEX, "dim": 2}, ValueError, "dimension"),
        ({"index": INDEX, "max_num_elements": 4}, ValueError, "max_num_elements"),
        ({"ptr": torch.tensor([0, 2, 10])}, ValueError, "ptr"),
        ({"ptr": torch.tensor([0, 2, 12])}, ValueError, "ptr"),
        ({"ptr": torch.tensor([0, 9, 5, 11])}, ValueError, "ptr"),
        ({"ptr": torch.tensor([0, 11]), "dim_size": 2}, ValueError, "dim_size"),
        ({"x": torch.randn(11, 15), "index": INDEX}, ValueError, "x"),
        ({"x": torch.randn(2, 11, 16), "index": INDEX}, ValueError, "x"),
    ],
)
def test_bad_input(arguments, error, names):
    ours = SetTransformerAggregation(16, heads=2)
    with pytest.raises(error, match=rf"\b{names}\b"):
        ours(**{"x": torch.randn(11, 16), **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {"x": None},
        {"x": True},
        {"x": [[0.0] * 16]},
        {"index": INDEX.tolist()},
        {"index": 3},
        {"index": INDEX.to(torch.int16)},
        {"ptr": [0, 11]},
        {"ptr": 11},
        {"dim_size": "5"},
        {"dim_size": True},
        {"index": INDEX, "dim": "0"},
        {"index": INDEX, "max_num_elements": 5.0},
    ],
    ids=str,
)
def test_arguments_of_other_kinds(arguments):
    """torch_geometric looks into them before ``forward``: AttributeError."""
    (name,) = set(arguments) - {"index"} or {"index"}
    for ours in (SetTransformerAggregation(16, heads=2), pyg.Set2Set(16, 2)):
        with pytest.raises(TypeError, match=name):
            ours(**{"x": torch.randn(11, 16), **arguments})


def test_boundaries_as_ragged():
    ours, x = SetTransformerAggregation(16, heads=2), torch.randn(11, 16)
    ragged = Ragged.from_batch(INDEX)
    assert torch.equal(ours(x, ptr=ragged), ours(x, ptr=ragged.ptr))


def test_bad_options():
    with pytest.raises(ValueError, match="heads"):
        SetTransformerAggregation(16, heads=3)
    with pytest.raises(ValueError, match="empty"):
        SetTransformerAggregation(16, empty="nan")
    model = SchNet(16, 16, 1, atomref=torch.zeros(100, 1))
    with pytest.raises(ValueError, match="atomref"):
        pyg.pooled_schnet(model, MeanPooling())


def molecules():
    pos = torch.randn(9, 3, dtype=torch.float64) * 2
    return torch.randint(1, 9, (9,)), pos, torch.tensor([0, 0, 0, 0, 1, 2, 2, 2, 2])


def test_molecule_graph():
    _, pos, batch = molecules()
    edges, lengths = MoleculeGraph(3.0)(pos, batch)
    found = {tuple(pair) for pair in edges.T.tolist()}
    wanted = {
        (i, j)
        for i in range(9)
        for j in range(9)
        if i != j and batch[i] == batch[j] and (pos[i] - pos[j]).norm() <= 3.0
    }
    assert found == wanted and len(edges.T) == len(wanted)
    torch.testing.assert_close(lengths, (pos[edges[0]] - pos[edges[1]]).norm(dim=1))


def test_schnet_with_abp_has_forces():
    z, pos, batch = molecules()
    pos.requires_grad_()
    model = SchNet(16, 16, 2, num_gaussians=8, cutoff=4.0, interaction_graph=MoleculeGraph(4.0))
    model = pyg.pooled_schnet(
        model, AttentionPooling(16, 16, heads=2, seeds=4, activation="silu")
    ).double()
    energy = model(z, pos, batch)
    assert energy.shape == (3, 1)
    (force,) = torch.autograd.grad(energy.sum(), pos, create_graph=True)
    parameters = [p for p in model.parameters() if p is not model.embedding.weight]
    gradients = torch.autograd.grad(force.square().sum(), parameters, allow_unused=True)
    assert sum(g is not None and bool(g.any()) for g in gradients) > 20
    order = torch.tensor([3, 1, 0, 2, 4, 8, 6, 7, 5])
    torch.testing.assert_close(model(z[order], pos[order], batch), energy)
    atom, slopes = 6, []
    for step in (1e-4, 2e-4):
        ends = []
        for sign in (1, -1):
            moved = pos.detach().clone()
            moved[atom, 1] += sign * step
            ends.append(float(model(z, moved, batch).detach().sum()))
        slopes.append((ends[0] - ends[1]) / (2 * step))
    # A central difference errs by c·h², so two of them differ by 3·c·h²; and by rounding.
    between, wanted = abs(slopes[1] - slopes[0]), float(force[atom, 1])
    assert abs(slopes[0] - wanted) <= between + 1e-10
    assert between <= 1e-3 * max(abs(wanted), 1e-6)
