"""Blocks against their formula written per molecule, in values, gradients and second gradients."""

import pytest
import torch
from tools import padded

from attnpool_kernels import Ragged
from attnpool_kernels.nn import (
    ISAB,
    MAB,
    ORIGINAL,
    PAPER,
    PMA,
    PYG,
    SAB,
    AttentionPooling,
    SetAttention,
    SetTransformer,
)

SETTINGS = {"original": ORIGINAL, "paper": PAPER, "pyg": PYG}
COUNTS = (4, 1, 7, 2)


def molecules(x, counts=COUNTS):
    return x.split(counts)


def batch(width, dtype=torch.float64, counts=COUNTS):
    x = torch.randn(sum(counts), width, dtype=dtype, requires_grad=True)
    return x, Ragged.from_counts(counts)


def scrambled(module):
    """Parameters away from symmetric initial values: zero biases and unit scales hide errors."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return module.double()


def assert_same(ours, theirs, inputs, tol=1e-12):
    """Values and gradients of the same random projection."""
    assert ours.shape == theirs.shape
    cotangent = torch.randn_like(theirs)
    found = torch.autograd.grad(ours, inputs, cotangent, create_graph=True)
    wanted = torch.autograd.grad(theirs, inputs, cotangent, create_graph=True)
    pairs = [(ours, theirs), *zip(found, wanted)]
    second = [torch.randn_like(x) for x in wanted]
    double = []
    for gradients in (found, wanted):
        total = sum((g * c).sum() for g, c in zip(gradients, second) if g.requires_grad)
        double.append(torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True))
    for a, b in [*pairs, *zip(*double)]:
        assert (a - b).abs().max() <= tol * (1 + b.abs().max())


@pytest.mark.parametrize("points", [None, 3])
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("setting", SETTINGS)
def test_set_transformer_is_its_formula(setting, seeds, points):
    width = 6 if setting == "original" else 8  # the others add x itself: C = D
    model = scrambled(
        SetTransformer(
            width, 8, 5, heads=2, seeds=seeds, points=points, decoder_blocks=2, **SETTINGS[setting]
        )
    )
    x, ragged = batch(width)
    wanted = torch.stack([padded.set_transformer(model, part) for part in molecules(x)])
    assert_same(model(x, ragged), wanted, [x, *model.parameters()], tol=1e-11)


@pytest.mark.parametrize("activation", padded.ACTIVATIONS)
@pytest.mark.parametrize("scale", ["head", "width", 0.3])
def test_mab_options(activation, scale):
    block = scrambled(
        MAB(8, 4, query_dim=3, key_dim=5, scale=scale, activation=activation, norm=True)
    )
    x, ragged = batch(3)
    y, keys = batch(5, counts=(2, 3, 1, 6))
    parts = zip(molecules(x), molecules(y, (2, 3, 1, 6)))
    wanted = torch.cat([padded.mab(block, a, b) for a, b in parts])
    assert_same(block(x, ragged, y, keys), wanted, [x, y, *block.parameters()])


def test_blocks_follow_their_definitions():
    x, ragged = batch(8)
    for block in (SAB(8, 2, **_blocks(PYG)), ISAB(8, 3, 2, **_blocks(PAPER))):
        scrambled(block)
        wanted = torch.cat([padded.encoder(block, part) for part in molecules(x)])
        assert_same(block(x, ragged), wanted, [x, *block.parameters()])
    block = scrambled(PMA(8, 3, 2, **PAPER))
    wanted = torch.stack([padded.pma(block, part) for part in molecules(x)])
    assert_same(block(x, ragged), wanted, [x, *block.parameters()])


@pytest.mark.parametrize("in_dim", [32, 5])
@pytest.mark.parametrize("setting", SETTINGS)
def test_few_seeds_absorb_their_projections(setting, in_dim):
    block = scrambled(PMA(32, 2, 2, in_dim=in_dim, **SETTINGS[setting]))
    assert block.mab.attn._absorbs(2, torch.float64) and not block.mab.attn._absorbs(3, torch.half)
    x, ragged = batch(in_dim)
    wanted = torch.stack([padded.pma(block, part) for part in molecules(x)])
    assert_same(block(x, ragged), wanted, [x, *block.parameters()], tol=1e-11)
    out = block(x, Ragged.from_counts([0, 4, 1, 7, 0, 2]))  # no atoms: no bias of the values
    block.mab.attn._absorbs = lambda seeds, dtype: False
    plain = block(x, Ragged.from_counts([0, 4, 1, 7, 0, 2]))
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-12)


def _blocks(setting):
    return {name: value for name, value in setting.items() if name != "pre_linear"}


def test_set_attention_is_torch_multihead_attention():
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    ours = SetAttention(8, 2, init="xavier").double()
    ours.load_state_dict(theirs.state_dict())
    x, ragged = batch(8)
    wanted = [theirs(part[None], part[None], part[None])[0][0] for part in molecules(x)]
    torch.testing.assert_close(ours(x, ragged), torch.cat(wanted), rtol=0, atol=1e-12)


@pytest.mark.parametrize("init", ["linear", "xavier"])
def test_initial_values(init):
    block = SetAttention(64, 4, key_dim=16, query_dim=64, init=init)
    if init == "xavier":
        assert not block.in_proj_bias.any() and not block.out_proj.bias.any()
        return
    for rows, fan_in in ((slice(0, 64), 64), (slice(64, None), 16)):
        top = block.in_proj_bias[rows].abs().max()
        assert 0.8 * fan_in**-0.5 < top <= fan_in**-0.5


def test_molecules_do_not_see_each_other_and_empty_ones_are_defined():
    model = SetTransformer(6, 8, 4, heads=2, seeds=2).double()
    x, ragged = batch(6)
    alone = torch.cat([model(p, torch.tensor([0, len(p)])) for p in molecules(x)])
    torch.testing.assert_close(model(x, ragged), alone, rtol=0, atol=1e-13)
    with_empty = Ragged.from_counts([0, 4, 1, 0, 7, 2])
    out = model(x, with_empty)
    torch.testing.assert_close(out[[1, 2, 4, 5]], alone, rtol=0, atol=1e-13)
    assert torch.equal(out[0], out[3]) and out.isfinite().all()
    gradients = torch.autograd.grad(out.sum(), model.parameters())
    assert all(g.isfinite().all() for g in gradients)
    spoilt = x.detach().clone()
    spoilt[0] = torch.nan
    out = model(spoilt, ragged)
    assert out[0].isnan().all()
    torch.testing.assert_close(out[1:], alone[1:], rtol=0, atol=1e-13)


def test_no_molecules():
    model = SetTransformer(6, 8, 4, heads=2, seeds=2)
    for counts in ([], [0, 0]):
        out = model(torch.randn(0, 6, requires_grad=True), Ragged.from_counts(counts))
        assert out.shape == (len(counts), 2, 4)
        out.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_one_seed_computes_no_logits_but_draws_its_dropout():
    block = SAB(8, 2, dropout=0.5)
    x = torch.randn(2000, 8)
    block.eval()
    torch.testing.assert_close(block(x, 1), block(x, torch.arange(2001)))
    block.train()
    assert not torch.allclose(block(x, 1), block.eval()(x, 1))


def test_dropout_acts_in_training_only():
    model = SetTransformer(6, 8, heads=2, seeds=2, dropout=0.5)
    x, ragged = batch(6, torch.float32)
    assert not torch.equal(model(x, ragged), model(x, ragged))
    model.eval()
    assert torch.equal(model(x, ragged), model(x, ragged))


def test_gradgradcheck():
    model = scrambled(SetTransformer(3, 4, 2, heads=2, seeds=2, encoder_blocks=1))
    x, ragged = batch(3, counts=(3, 0, 2))
    names, parameters = zip(*model.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values)), (x, ragged)).square()

    inputs = (x, *(p.detach().clone().requires_grad_() for p in parameters))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def force_loss(model, x, ragged):
    energy = model(x.square() @ x.new_ones(x.shape[1], model.encoders[0].mab.attn.key_dim), ragged)
    force = -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]
    return (force - 0.1).square().mean() + energy.square().mean()


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_on_forces_in_float32(setting):
    model = SetTransformer(8, 8, 1, heads=2, seeds=3, reduce="mean", **SETTINGS[setting])
    x, ragged = batch(3, torch.float32)
    x = x.detach().mul_(0.5).requires_grad_()
    found = torch.autograd.grad(force_loss(model, x, ragged), model.parameters())
    wide = x.detach().double().requires_grad_()
    wanted = torch.autograd.grad(force_loss(model.double(), wide, ragged), model.parameters())
    flat = [torch.cat([g.flatten().double() for g in gradients]) for gradients in (found, wanted)]
    assert (flat[0] - flat[1]).norm() <= 2e-5 * flat[1].norm()


def test_autocast_and_half():
    model = SetTransformer(6, 8, 4, heads=2, seeds=2)
    x, ragged = batch(6, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, ragged)
    assert out.dtype == torch.bfloat16
    wanted = model(x, ragged)
    torch.testing.assert_close(out.float(), wanted, rtol=0.05, atol=0.05)
    out.float().sum().backward()
    half = model.bfloat16()(x.detach().bfloat16(), ragged)
    torch.testing.assert_close(half.float(), wanted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (lambda: SetAttention(8, 3), ValueError, "heads"),
        (lambda: SetAttention(0), ValueError, "dim"),
        (lambda: SetAttention(8.0), TypeError, "dim"),
        (lambda: SetAttention(8, True), TypeError, "heads"),
        (lambda: SetAttention(8, key_dim=-1), ValueError, "key_dim"),
        (lambda: SetAttention(8, scale="depth"), ValueError, "scale"),
        (lambda: SetAttention(8, scale=None), TypeError, "scale"),
        (lambda: SetAttention(8, dropout=1.0), ValueError, "dropout"),
        (lambda: SetAttention(8, init="zeros"), ValueError, "init"),
        (lambda: MAB(8, residual="x"), ValueError, "residual"),
        (lambda: MAB(8, residual="input", query_dim=4), ValueError, "query_dim"),
        (lambda: MAB(8, activation="tanh"), ValueError, "activation"),
        (lambda: MAB(8, pre_linear=True), TypeError, "pre_linear"),
        (lambda: ISAB(8, 0), ValueError, "points"),
        (lambda: PMA(8, 0), ValueError, "seeds"),
        (lambda: SetTransformer(6, 8, encoder_blocks=-1), ValueError, "encoder_blocks"),
        (lambda: SetTransformer(6, 8, decoder_blocks=1.5), TypeError, "decoder_blocks"),
        (lambda: SetTransformer(6, 8, reduce="sum"), ValueError, "reduce"),
        (lambda: SetTransformer(6, 8, 0), ValueError, "out_features"),
        (lambda: SAB(8)(torch.randn(3, 7), torch.tensor([0, 3])), ValueError, "x"),
        (lambda: SAB(8)(torch.randn(3, 8, 1), torch.tensor([0, 3])), ValueError, "x"),
        (lambda: SAB(8)([1.0], torch.tensor([0, 3])), TypeError, "x"),
        (lambda: SAB(8)(torch.ones(3, 8).long(), torch.tensor([0, 3])), TypeError, "x"),
        (lambda: SAB(8)(torch.randn(3, 8), torch.tensor([0, 4])), ValueError, "ptr"),
        (lambda: PMA(8)(torch.randn(3, 7), torch.tensor([0, 3])), ValueError, "x"),
        (
            lambda: MAB(8)(
                torch.randn(3, 8), torch.tensor([0, 3]), torch.randn(2, 8), torch.tensor([0, 1, 2])
            ),
            ValueError,
            "k_ptr",
        ),
    ],
)
def test_bad_input(call, error, names):
    with pytest.raises(error, match=rf"\b{names}\b"):
        call()


@pytest.mark.parametrize("top", [None, 2])
def test_weights_of_the_seeds(top):
    """They average the encoder's values to what the seeds get."""
    counts, heads, seeds = (4, 0, 6), 2, 3
    sets = Ragged.from_counts(counts)
    torch.manual_seed(0)
    model = AttentionPooling(8, 8, heads=heads, seeds=seeds).double()
    x = torch.randn(10, 8, dtype=torch.float64)
    rows = x
    for block in model.encoders:
        rows = block(rows, sets)
    attn, seed = model.pma.mab.attn, model.pma.seed[0]
    found = model.weights(x, sets, top)
    direct = attn.weights(seed, None, rows, sets, top=top)
    w_q, w_k, _ = attn.in_proj_weight.chunk(3)
    b_q, b_k, _ = attn.in_proj_bias.chunk(3)
    q, k = (seed @ w_q.t() + b_q).view(-1, 2, 4), (rows @ w_k.t() + b_k).view(-1, 2, 4)
    wanted = [
        (torch.einsum("shd,nhd->shn", q, part) * 8**-0.5).softmax(2) for part in k.split(counts)
    ]
    if top is None:
        flat = torch.cat([w.transpose(1, 2).flatten(0, 1) for w in wanted])
        assert torch.allclose(found, flat, rtol=1e-12) and torch.equal(found, direct)
        return
    for i, w in enumerate(wanted):
        if w.shape[2]:
            best = w.topk(top, 2)
            assert torch.allclose(found[0][i], best.values, rtol=1e-12)
            assert torch.equal(found[1][i], best.indices + sum(counts[:i]))
    assert (found[1][1] == -1).all() and torch.equal(found[1], direct[1])
    with pytest.raises(ValueError, match="phantom must be None for weights"):
        AttentionPooling(8, 8, heads=2, phantom=9).weights(x.float(), sets)


@pytest.mark.parametrize("points", [None, 3])
@pytest.mark.parametrize("setting", SETTINGS)
def test_recompute_keeps_bits_and_less(setting, points):
    """The inputs of blocks are kept, and every derivative has the same bits, dropout included."""
    x, ragged = batch(32, torch.float32, (40, 12, 0, 25))
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = SetTransformer(
            *(32, 32, 5),
            heads=4,
            seeds=3,
            points=points,
            dropout=0.2,
            recompute=recompute,
            **SETTINGS[setting],
        )
        kept = {}

        def keep(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            torch.manual_seed(1)
            out = model(x, ragged)
        first = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        torch.manual_seed(1)
        first = torch.autograd.grad(
            model(x, ragged).square().sum(), [x, *model.parameters()], create_graph=True
        )
        second = torch.autograd.grad(first[0].square().sum(), [x, *model.parameters()])
        parameters = sum(p.nbytes for p in model.parameters())
        results.append((sum(kept.values()) - parameters, [out, *first, *second]))
    (all_kept, expected), (some_kept, found) = results
    assert some_kept < all_kept / 3
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


def test_recompute_leaves_compilers_and_inference_alone():
    x, ragged = batch(16, torch.float32)
    block = SAB(16, heads=4, recompute=True)
    with torch.no_grad():
        expected = block(x, ragged)
    assert torch.equal(block(x, ragged), expected)
    scripted = torch.jit.script(block)
    assert torch.allclose(scripted(x, ragged.ptr), expected, atol=1e-6)
