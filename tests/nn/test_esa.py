"""Edge-set attention against the formula on one graph at a time, dense."""

import itertools

import pytest
import torch
from torch.nn.functional import mish, silu

from attnpool_kernels import Ragged
from attnpool_kernels.nn import EdgeSetAttention, EdgeSetEncoder, edge_sets

ATOMS = Ragged.from_counts((4, 1, 0, 3, 2))
# a path, a lone atom, nothing, a triangle, one directed edge
EDGES = torch.tensor(
    [
        [0, 1, 1, 2, 2, 3, 5, 6, 6, 7, 7, 5, 8],
        [1, 0, 2, 1, 3, 2, 6, 5, 7, 6, 5, 7, 9],
    ]
)
COUNTS = {"edges": (6, 0, 0, 6, 1), "atoms": (4, 1, 0, 3, 2)}


def rows(sets, dim=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sum(COUNTS[sets]), dim, dtype=torch.float64, generator=generator)


def by_hand(sets):
    """Masks [n, n], True where allowed, from sets of atoms."""
    ptr = ATOMS.ptr.tolist()
    masks = []
    for a, b in itertools.pairwise(ptr):
        edges = [(i, j) for i, j in EDGES.t().tolist() if a <= i < b]
        if sets == "atoms":
            mask = [[(i, j) in edges for j in range(a, b)] for i in range(a, b)]
        else:
            mask = [
                [i != j and bool(set(x) & set(y)) for j, y in enumerate(edges)]
                for i, x in enumerate(edges)
            ]
        masks.append(torch.tensor(mask, dtype=torch.bool).view(len(mask), len(mask)))
    return masks


@pytest.mark.parametrize("sets", ["edges", "atoms"])
def test_who_is_adjacent(sets):
    found, bias = edge_sets(EDGES, ATOMS, sets)
    assert found.counts().tolist() == list(COUNTS[sets])
    assert bias.shape == (sum(n * n for n in COUNTS[sets]), 1) and bias.dtype == torch.float32
    wanted = torch.cat([mask.flatten() for mask in by_hand(sets)])
    assert torch.equal(bias[:, 0] == 0, wanted) and torch.equal(bias[:, 0] == -torch.inf, ~wanted)


def attention(block, x, y, mask):
    """A(x) over y, head by head."""
    attn = block.attn
    weights, biases = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    q, k, v = (z @ w.t() + b for z, w, b in zip((x, y, y), weights, biases))
    heads = []
    for a, b, c in zip(*(z.chunk(attn.heads, 1) for z in (q, k, v))):
        logits = (a @ b.t()) * a.shape[1] ** -0.5
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        alive = (logits > -torch.inf).any(1, keepdim=True) if len(y) else len(y) > 0
        p = torch.where(torch.as_tensor(alive), logits, 0.0).softmax(1) if len(y) else logits
        heads.append((p * alive) @ c)
    a = torch.cat(heads, 1)
    return a + mish(block.out(a))


def mlp(block, x):
    for step in block.mlp:
        if hasattr(step, "outer"):
            y, gate = step.inner(x).chunk(2, 1)
            x = mish(step.outer(silu(gate) * y))
        else:
            x = step(x)
    return x


def formula(model, x, mask):
    first = x
    kinds = model.encoder.layers + "P" + "S" * (len(model.decoder) - 1)
    for kind, block in zip(kinds, [*model.encoder.blocks, *model.decoder]):
        if kind == "P":
            x = x + first
        n = block.norm(x) if block.pre and block.norm is not None else x
        if kind == "P":
            h = attention(block, model.seeds, n, None)
        else:
            h = n + attention(block, n, n, mask if kind == "M" else None)
            h = h if block.pre else block.norm(h)
        if block.mlp is not None and block.pre:
            h = h + mlp(block, block.norm_mlp(h))
        elif block.mlp is not None:
            h = block.norm_mlp(h + mlp(block, h))
        x = h
    return mish(model.head(x.mean(0)))


OPTIONS = [
    {"layers": "MSMSMP", "heads": 2, "seeds": 3},
    {"layers": "MMPSS", "norm": "post", "mlp": "gated", "mlp_hidden": 5},
    {"layers": "P", "mlp": "none", "out_features": 3},
    {"layers": "SMP", "mlp_layers": 1, "norm": "post", "seeds": 1},
    {"layers": "MPS", "mlp_layers": 3, "mlp_hidden": 4},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sets", ["edges", "atoms"])
def test_formula(options, sets):
    torch.manual_seed(0)
    model = EdgeSetAttention(8, **options).double()
    x = rows(sets).requires_grad_()
    found, bias = edge_sets(EDGES, ATOMS, sets)
    wanted = [x, *model.parameters()]

    def derivatives(out):
        first = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), wanted, allow_unused=True)
        return out, *first, *(torch.zeros(1) if y is None else y for y in second)

    parts = x.split(COUNTS[sets])
    dense = torch.stack([formula(model, *given) for given in zip(parts, by_hand(sets))])
    for a, b in zip(derivatives(model(x, found, bias)), derivatives(dense)):
        assert torch.allclose(a, b.to(a), rtol=1e-8, atol=1e-10)


def test_kinds_of_mlp():
    """The formula above takes the module's own, of whichever kind it is."""
    x = torch.randn(5, 8)
    for kind, layers in (("gated", 2), ("small", 2), ("small", 1)):
        options = {"mlp": kind, "mlp_hidden": 5, "mlp_layers": layers}
        mlp = EdgeSetEncoder(8, layers="S", **options).blocks[0].mlp
        w = dict(mlp.named_parameters())
        y = x
        if kind == "gated":
            for i in range(layers):
                y, gate = (y @ w[f"{i}.inner.weight"].T + w[f"{i}.inner.bias"]).chunk(2, 1)
                y = mish((silu(gate) * y) @ w[f"{i}.outer.weight"].T + w[f"{i}.outer.bias"])
        else:
            for i in range(0, 2 * layers, 2):
                y = y @ w[f"{i}.weight"].T + w[f"{i}.bias"]
                y = mish(y) if i == 0 else y
        assert torch.allclose(mlp(x), y, rtol=1e-5, atol=1e-6)


def test_a_graph_is_itself_in_any_batch():
    """What the published program does not keep: padding, and the graphs beside it."""
    model = EdgeSetAttention(8, heads=2, seeds=2)
    x = rows("edges").float()
    together = model(x, *edge_sets(EDGES, ATOMS))
    alone = model(x[6:12], *edge_sets(EDGES[:, 6:12] - 5, torch.tensor([0, 3])))
    assert torch.allclose(together[3], alone[0], rtol=1e-5, atol=1e-6)
    changed = x.clone()
    changed[:6] = torch.nan
    assert torch.equal(model(changed, *edge_sets(EDGES, ATOMS))[3:], together[3:])


def test_rows_of_no_set():
    encoder = EdgeSetEncoder(8, layers="MS", heads=2).double()
    sets, bias = edge_sets(EDGES, ATOMS)
    x = torch.cat([rows("edges"), torch.full((2, 8), torch.nan, dtype=torch.float64)])
    out = encoder(x, sets, bias)
    assert torch.equal(out[:-2], encoder(rows("edges"), sets, bias)) and not out[-2:].any()
    gradients = torch.autograd.grad(out.sum(), list(encoder.parameters()))
    assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: edge_sets(EDGES.flip(1), ATOMS), ValueError, "sorted"),
        (lambda: edge_sets(EDGES + 1, ATOMS), ValueError, "one graph"),
        (lambda: edge_sets(EDGES + 90, ATOMS), ValueError, "outside 0 to 9"),
        (lambda: edge_sets(EDGES - 1, ATOMS), ValueError, "one graph"),
        (lambda: edge_sets(EDGES[0], ATOMS), ValueError, "[2, E]"),
        (lambda: edge_sets(EDGES.double(), ATOMS), TypeError, "float64"),
        (lambda: edge_sets(EDGES, ATOMS, "bonds"), ValueError, "edges, atoms"),
        (lambda: EdgeSetAttention(8, layers="MM"), ValueError, "one P"),
        (lambda: EdgeSetAttention(8, layers="PM"), ValueError, "one P"),
        (lambda: EdgeSetAttention(8, norm="layer"), ValueError, "pre, post"),
        (
            lambda: EdgeSetAttention(8)(torch.zeros(2, 8), torch.tensor([0, 2])),
            TypeError,
            "edge_sets",
        ),
        (lambda: EdgeSetEncoder(8, layers="MSP"), ValueError, "any M and S"),
        (lambda: EdgeSetEncoder(8, layers=3), TypeError, "layers must be a str"),
        (
            lambda: EdgeSetAttention(8)(torch.zeros(2, 7), torch.tensor([0, 2])),
            ValueError,
            "[N, 8]",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
