"""NaN and infinities in every input of every module: they stay in their molecule."""

import inspect

import pytest
import torch

from attnpool_kernels import Ragged, nn

C, HEADS = 8, 2
COUNTS = (3, 4, 1, 5)
BAD = 1  # the molecule
VALUES = (float("nan"), float("inf"), -float("inf"))
EDGES = torch.tensor([[0, 1, 3, 4, 5, 7, 8, 9, 10], [1, 2, 4, 5, 6, 7, 9, 10, 11]])
BLOCK = {"heads": HEADS}
# Modules of rows: called (x, ptr) → [N, D] or [B, ...].
MODULES = {
    "attention": lambda: nn.SetAttention(C, HEADS),
    "attention without W_o": lambda: nn.SetAttention(C, HEADS, out_projection=False),
    "mab": lambda: nn.MAB(C, HEADS, residual="input", out_projection=True, norm=True),
    "sab": lambda: nn.SAB(C, HEADS),
    "sab, silu": lambda: nn.SAB(C, HEADS, activation="silu", out_projection=True),
    "isab": lambda: nn.ISAB(C, 3, HEADS),
    "pma": lambda: nn.PMA(C, 3, HEADS),
    "pma, one seed": lambda: nn.PMA(16, 1, 1, in_dim=C),
    "pma, before": lambda: nn.PMA(C, 3, HEADS, pre_linear=True),
    "transformer": lambda: nn.SetTransformer(C, C, 2, seeds=2, **BLOCK),
    "transformer, points": lambda: nn.SetTransformer(C, C, 2, points=3, **BLOCK, **nn.PYG),
    "abp": lambda: nn.AttentionPooling(C, C, 2, seeds=2, **BLOCK),
    "abp, phantoms": lambda: nn.AttentionPooling(C, C, 2, seeds=2, phantom="batch_max", **BLOCK),
    "seeds": lambda: nn.SeedPooling(C, C, seeds=2, **BLOCK),
    "sum": nn.SumPooling,
    "mean": nn.MeanPooling,
    "max": nn.MaxPooling,
    "softmax": nn.SoftmaxPooling,
    "gated": lambda: nn.AttentionalPooling(C, 3, hidden=4),
    "weighted": lambda: nn.WeightedAverage(C, 2, hidden=(4,)),
    "orbitals": lambda: nn.OrbitalWeightedAverage(C, hidden=(4,)),
    "var": nn.VarPooling,
    "std": nn.StdPooling,
    "set2set": lambda: nn.Set2Set(C, 2),
    "multi": lambda: nn.Multi([nn.MeanPooling(), nn.VarPooling()]),
    "edge encoder": lambda: nn.EdgeSetEncoder(C, layers="SS", **BLOCK),
    "edges": lambda: nn.EdgeSetAttention(C, 2, layers="SSPS", seeds=3, **BLOCK),
    "multihead": lambda: Packed(nn.MultiheadAttention(C, HEADS)),
    "chemprop": lambda: Indexed(nn.BatchPooling(nn.MeanPooling())),
}


class Packed(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, ptr):
        return self.layer(x, x, x, need_weights=False, ptr=ptr)[0]


class Indexed(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, ptr):
        return self.layer(x, Ragged(ptr).batch())


def given(tail=0):
    torch.manual_seed(0)
    ptr = Ragged.from_counts(COUNTS).ptr
    return torch.randn(sum(COUNTS) + tail, C), ptr


def of(out, ptr, molecule):
    """The part of a result that a molecule owns."""
    return out[ptr[molecule] : ptr[molecule + 1]] if len(out) >= int(ptr[-1]) else out[molecule]


def test_every_module_is_here():
    kinds = {type(m) for make in MODULES.values() for m in make().modules()}
    modules = {x for x in vars(nn).values() if inspect.isclass(x)}
    assert modules - kinds == set()


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", MODULES)
def test_rows(name, value):
    """One row of one molecule: results and gradients of the others' rows have the same bits."""
    module = MODULES[name]()
    x, ptr = given()
    wanted = module(x.requires_grad_(), ptr)
    others = [m for m in range(len(COUNTS)) if m != BAD]
    (dx,) = torch.autograd.grad(sum(of(wanted, ptr, m).sum() for m in others), x)
    bad = x.detach().clone()
    bad[ptr[BAD] + 1, C // 2] = value
    bad.requires_grad_()
    out = module(bad, ptr)
    (found,) = torch.autograd.grad(out.sum(), bad)
    for m in others:
        assert torch.equal(of(out, ptr, m), of(wanted, ptr, m)), m
        assert torch.equal(of(found, ptr, m), of(dx, ptr, m)), m
    if value != value:
        assert of(out, ptr, BAD).isnan().any()


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("known", [True, False], ids=["end known", "end unknown"])
@pytest.mark.parametrize("name", [x for x in MODULES if x != "chemprop"])  # it has no such rows
def test_rows_of_no_molecule(name, known, value, monkeypatch):
    """Behind the last molecule anything may lie: nothing of it reaches a result or a gradient."""
    if not known:  # as where boundaries are on a device: reading their end would wait
        monkeypatch.setattr(Ragged, "last", property(lambda self: None, lambda self, x: None))
    module = MODULES[name]()
    x, ptr = given()
    parameters = list(module.parameters())
    wanted = module(x, ptr)
    longer = torch.cat([x, torch.full((3, C), value)]).requires_grad_()
    out = module(longer, ptr)
    # Other numbers of rows: other bits of the products of the layers around the operator.
    torch.testing.assert_close(out[: len(wanted)], wanted)
    assert out.isfinite().all()
    if len(out) > len(wanted) and name in ("attention", "multihead", "edge encoder"):
        assert not out[len(wanted) :].any()
    cotangent = torch.randn_like(wanted)
    right = torch.autograd.grad(wanted, parameters, cotangent) if parameters else ()
    dx, *found = torch.autograd.grad(out[: len(wanted)], [longer, *parameters], cotangent)
    assert dx.isfinite().all() and not dx[len(x) :].any()
    for a, b in zip(found, right):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("layer", ["attention", "mab", "sab", "pma"])
def test_biases(layer, value):
    """One pair's bias, and one key's: nothing outside of its molecule changes."""
    module = MODULES[layer]()
    x, ptr = given()
    sets = Ragged(ptr)
    pairs = sets.pairs() if layer != "pma" else 3 * ptr
    bias, key_bias = torch.randn(int(pairs[-1]), HEADS), torch.randn(len(x), HEADS)
    wanted = module(x, ptr, bias=bias, key_bias=key_bias)
    for which in ("bias", "key_bias"):
        added = {"bias": bias.clone(), "key_bias": key_bias.clone()}
        added[which][pairs[BAD] + 1 if which == "bias" else ptr[BAD] + 1] = value
        added = {k: v.requires_grad_() for k, v in added.items()}
        leaf = x.clone().requires_grad_()
        out = module(leaf, ptr, **added)
        dx, *_ = torch.autograd.grad(out.sum(), [leaf, *added.values()])
        assert not torch.equal(out, wanted)
        for m in range(len(COUNTS)):
            if m != BAD:
                assert torch.equal(of(out, ptr, m), of(wanted, ptr, m))
                assert of(dx, ptr, m).isfinite().all()


@pytest.mark.parametrize("value", VALUES)
def test_a_key_bias_of_no_molecule(value):
    """Of packed keys and of seeds."""
    x, ptr = given(tail=2)
    bias = torch.randn(len(x), HEADS)
    bias[-2:] = value
    for name in ("attention", "mab", "sab", "pma", "pma, before", "multihead"):
        module = MODULES[name]()
        call = module.layer if name == "multihead" else module
        rows = {"need_weights": False, "ptr": ptr} if name == "multihead" else {}
        first = (x, x, x) if name == "multihead" else (x, ptr)
        out = call(*first, key_bias=bias, **rows)
        out = out[0] if name == "multihead" else out
        right = torch.cat([bias[:-2], torch.zeros(2, HEADS)])
        again = call(*first, key_bias=right, **rows)
        again = again[0] if name == "multihead" else again
        assert torch.equal(out, again) and out.isfinite().all()


@pytest.mark.parametrize("value", VALUES)
def test_keys_of_their_own(value):
    """x over y: NaN in a row of y stays in its molecule, and behind the last one it is nothing."""
    x, ptr = given()
    y, y_ptr = torch.randn(12, C), torch.tensor([0, 2, 7, 7, 10])
    for name in ("attention", "mab"):
        module = MODULES[name]()
        wanted = module(x, ptr, y, y_ptr)
        bad = y.clone()
        bad[10:] = value
        bad.requires_grad_()
        out = module(x, ptr, bad, y_ptr)
        assert torch.equal(out, wanted)
        parameters = list(module.parameters())
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), [bad, *parameters]))
        bad = y.clone()
        bad[y_ptr[BAD]] = value
        out = module(x, ptr, bad, y_ptr)
        for m in (0, 2, 3):
            assert torch.equal(of(out, ptr, m), of(wanted, ptr, m))


@pytest.mark.parametrize("value", VALUES)
def test_masked_edges(value):
    sets, bias = nn.edge_sets(EDGES, torch.tensor([0, 3, 7, 12]))
    module = nn.EdgeSetAttention(C, 2, layers="MSP", seeds=3, heads=HEADS)
    x = torch.randn(EDGES.shape[1], C)
    wanted = module(x, sets, bias)
    x[3, 1] = value  # of the second graph
    out = module(x, sets, bias)
    assert torch.equal(out[0], wanted[0]) and torch.equal(out[2], wanted[2])


@pytest.mark.parametrize("value", VALUES)
def test_parameters(value):
    """A weight that is not finite gives numbers that are not, and neither a crash nor a hang."""
    for name, make in MODULES.items():
        module = make()
        x, ptr = given()
        for parameter in module.parameters():
            with torch.no_grad():
                before = parameter.flatten()[0].item()
                parameter.view(-1)[0] = value
            leaf = x.clone().requires_grad_()
            out = module(leaf, ptr)
            out.sum().backward()
            assert out.shape[0] in (len(COUNTS), len(x)), name
            with torch.no_grad():
                parameter.view(-1)[0] = before


@pytest.mark.parametrize("value", VALUES)
def test_padded_multihead(value):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(C, HEADS, batch_first=True)
    x = torch.randn(3, 5, C)
    wanted, _ = layer(x, x, x, need_weights=False)
    x[1, 2, 3] = value
    out, _ = layer(x, x, x, need_weights=False)
    assert torch.equal(out[0], wanted[0]) and torch.equal(out[2], wanted[2])


def test_a_dropout_that_cannot_be_is_refused_when_the_layer_is_built():
    for bad in (1.0, -0.1, 2, float("nan"), "0.1", True, None):
        with pytest.raises((TypeError, ValueError), match="dropout"):
            nn.MultiheadAttention(C, HEADS, dropout=bad)
    with pytest.raises(ValueError, match="dropout"):
        nn.MultiheadAttention.from_torch(torch.nn.MultiheadAttention(C, HEADS, dropout=1.0))
    assert nn.MultiheadAttention(C, HEADS, 0.5, batch_first=True).dropout == 0.5
