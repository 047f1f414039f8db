"""torch's MultiheadAttention and ours with the same weights: numbers, derivatives, refusals."""

import copy

import pytest
import torch

from attnpool_kernels import Ragged
from attnpool_kernels.nn import MultiheadAttention

COUNTS = (4, 1, 6)
BEYOND = torch.arange(6) >= torch.tensor(COUNTS)[:, None]


def pair(*arguments, **options):
    """torch's module in float64 with weights that are not its first ones, and ours."""
    options = {"dtype": torch.float64} | options
    theirs = torch.nn.MultiheadAttention(*arguments, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in theirs.parameters():
            x.copy_(torch.randn(x.shape, generator=generator, dtype=x.dtype) / 3)
    ours = MultiheadAttention(*arguments, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def rows(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def derivatives(module, call, leaves, order):
    out = call(module)
    wanted = [*leaves, *module.parameters()]
    found = torch.autograd.grad(out.square().sum(), wanted, create_graph=order > 1)
    if order > 1:
        loss = sum(x.square().sum() for x in found[: len(leaves)])
        found = *found, *torch.autograd.grad(loss, wanted, allow_unused=True)
    return out, *(torch.zeros(()) if x is None else x for x in found)


def agree(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert torch.allclose(x, y.expand_as(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_self_attention_of_a_padded_batch(bias, batch_first, mask):
    theirs, ours = pair(8, 2, bias=bias, batch_first=batch_first)
    x = rows(3, 6, 8).requires_grad_()
    padding = {"bool": BEYOND, "float": rows(3, 6, seed=2).requires_grad_(), None: None}[mask]

    def call(module):
        y = x if batch_first else x.transpose(0, 1)
        # torch's fused path has no second derivative; with weights it multiplies by hand
        return module(y, y, y, padding, need_weights=module is theirs)[0]

    leaves = [x, padding] if mask == "float" else [x]
    agree(derivatives(ours, call, leaves, 2), derivatives(theirs, call, leaves, 2))


@pytest.mark.parametrize("widths", [{}, {"kdim": 5, "vdim": 3}])
@pytest.mark.parametrize("kind", ["key is value", "all differ", "one set"])
def test_cross_attention(widths, kind):
    theirs, ours = pair(8, 2, batch_first=True, **widths)
    first = () if kind == "one set" else (3,)
    x = rows(*first, 4, 8).requires_grad_()
    y = rows(*first, 6, widths.get("kdim", 8), seed=3).requires_grad_()
    z = y
    if kind == "all differ" or widths:
        z = rows(*first, 6, widths.get("vdim", 8), seed=4).requires_grad_()
    padding = BEYOND[0] if kind == "one set" else BEYOND

    def call(module):
        return module(x, y, z, padding, need_weights=module is theirs)[0]

    leaves = list({id(a): a for a in (x, y, z)}.values())
    agree(derivatives(ours, call, leaves, 2), derivatives(theirs, call, leaves, 2))


def test_packed_rows_are_the_rows_of_the_padded_batch():
    theirs, ours = pair(8, 2, batch_first=True)
    x, y = rows(3, 6, 8), rows(3, 6, 8, seed=5)
    expected = theirs(x, x, x, BEYOND, need_weights=False)[0][~BEYOND]
    sets = Ragged.from_counts(COUNTS)
    packed = x[~BEYOND]
    found, weights = ours(packed, packed, packed, ptr=sets)
    assert weights is None and torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    cross = theirs(x[:, :2], y, y, BEYOND, need_weights=False)[0].flatten(0, 1)
    keys, ends = y[~BEYOND], torch.arange(4) * 2
    found, _ = ours(x[:, :2].flatten(0, 1), keys, keys, ptr=ends, key_ptr=sets)
    assert torch.allclose(found, cross, rtol=1e-12, atol=1e-12)
    bias = rows(3, 6, seed=6)
    biased = bias.masked_fill(BEYOND, -torch.inf)
    expected = theirs(x, x, x, biased, need_weights=False)[0][~BEYOND]
    found, _ = ours(packed, packed, packed, ptr=sets, key_bias=bias[~BEYOND])
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_what_no_kernel_gives_is_torchs():
    theirs, ours = pair(8, 2, batch_first=True)
    x = rows(3, 6, 8)
    for options in (
        {},
        {"average_attn_weights": False},
        {"need_weights": False, "attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(1)},
    ):
        for found, expected in zip(ours(x, x, x, **options), theirs(x, x, x, **options)):
            assert found is expected is None or torch.equal(found, expected)
    theirs, ours = pair(8, 2, add_bias_kv=True, add_zero_attn=True)
    found, expected = (m(x, x, x, need_weights=False)[0] for m in (ours, theirs))
    assert torch.equal(found, expected)


def test_a_query_without_keys_gets_the_bias():
    _, ours = pair(8, 2, batch_first=True)
    x = rows(2, 3, 8).requires_grad_()
    mask = torch.tensor([[False] * 3, [True] * 3])
    out = ours(x, x, x, mask, need_weights=False)[0]
    assert torch.equal(out[1], ours.out_proj.bias.expand(3, 8))
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert not dx[1].any() and dx[0].any()


def test_a_module_is_turned_in_place():
    theirs, _ = pair(8, 2, batch_first=True)
    before, parameters = copy.deepcopy(theirs), list(theirs.parameters())
    seen = []
    theirs.register_forward_hook(lambda *_: seen.append(1))
    ours = MultiheadAttention.from_torch(theirs, "cpu")
    assert ours is theirs and all(x is y for x, y in zip(ours.parameters(), parameters))
    assert list(ours.state_dict()) == list(before.state_dict())
    x = rows(2, 3, 8)
    found = ours(x, x, x, need_weights=False)[0]
    assert torch.allclose(found, before(x, x, x, need_weights=False)[0], rtol=1e-12) and seen
    assert isinstance(ours, torch.nn.MultiheadAttention) and ours.backend == "cpu"
    assert MultiheadAttention.from_torch(ours).backend is None
    torch.nn.init.constant_(ours.out_proj.weight, 0.0)
    assert torch.equal(
        copy.deepcopy(ours)(x, x, x, need_weights=False)[0][0, 0], ours.out_proj.bias
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_float_mask_may_have_another_type_than_the_rows(dtype):
    ours = MultiheadAttention(8, 2, batch_first=True)
    x, mask = rows(2, 4, 8).float(), torch.tensor([[0.0, 1.5, -2.0, 0.5], [0.0, 3.0, 0.0, 1.0]])
    found, expected = (ours(x, x, x, y, need_weights=False)[0] for y in (mask.to(dtype), mask))
    assert torch.equal(found, expected)


def test_a_float_mask_keeps_its_digits():
    """300.3 and 301.4 are one number in bfloat16, and the least of float32 is none of float16."""
    ours = MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    x = rows(2, 4, 8)
    mask = torch.tensor([[300.3, 301.4, 300.9, 299.0], [torch.finfo(torch.float32).min] * 4])
    half = copy.deepcopy(ours)
    expected = ours(x, x, x, mask.double(), need_weights=False)[0]
    expected[1] = ours(x[1:], x[1:], x[1:], need_weights=False)[0]
    expected[1] = ours.out_proj(ours._projected(*[x[1]] * 3)[2].mean(0))
    found = half.bfloat16()(*[x.bfloat16()] * 3, mask, need_weights=False)[0]
    assert torch.allclose(found.double(), expected, atol=0.03)


def test_rows_of_no_set():
    """They are 0, and what they hold reaches no weight."""
    _, ours = pair(8, 2)
    x = rows(6, 8)
    x[4:] = torch.nan
    sets = torch.tensor([0, 3, 4])
    out, _ = ours(x, x, x, ptr=sets)
    assert not out[4:].any() and out[:4].isfinite().all()
    gradients = torch.autograd.grad(out.sum(), list(ours.parameters()))
    assert all(bool(g.isfinite().all()) for g in gradients)
    cross, _ = ours(x[:5], x, x, ptr=torch.tensor([0, 3, 4]), key_ptr=sets)
    assert torch.allclose(cross[:4], out[:4], rtol=1e-12) and cross.shape == (5, 8)
    assert not cross[4:].any()
    biased, _ = ours(x, x, x, ptr=sets, key_bias=torch.zeros(6))
    assert torch.allclose(biased[:4], out[:4])
    for option in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(NotImplementedError, match="add_bias_kv"):
            pair(8, 2, **{option: True})[1](x, x, x, ptr=sets)


def test_dropout_in_training_only():
    _, ours = pair(8, 2, batch_first=True, dropout=0.5)
    x = rows(2, 30, 8)
    torch.manual_seed(0)
    a, b = (ours(x, x, x, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(a, b)
    ours.eval()
    a, b = (ours(x, x, x, need_weights=False)[0] for _ in range(2))
    assert torch.equal(a, b)


def call(*shapes, mask=None, **options):
    module = MultiheadAttention(8, 2, batch_first=True)
    shapes = shapes if len(shapes) == 3 else shapes * 3
    return module(*map(torch.zeros, shapes), mask, need_weights=False, **options)


PTR = torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (lambda: call((4, 8), (4, 8), (3, 8), ptr=PTR), ValueError, "value must have"),
        (lambda: call((1, 2, 4, 8)), ValueError, "query must have 3 dimensions"),
        (lambda: call((2, 4, 8), ptr=PTR), ValueError, "query must have 2 dimensions, the last 8"),
        (lambda: call((4, 7), ptr=PTR), ValueError, "got (4, 7)"),
        (lambda: call((2, 4, 8), (3, 4, 8), (3, 4, 8)), ValueError, "batch size of query, 2"),
        (lambda: call((2, 4, 8), (4, 8), (4, 8)), ValueError, "key must have 3 dimensions"),
        (lambda: call((2, 4, 8), mask=torch.zeros(2, 3)), ValueError, "(2, 4), got (2, 3)"),
        (lambda: call((2, 4, 8), mask=torch.zeros(2, 4).int()), TypeError, "int32"),
        (lambda: call((4, 8), mask=torch.zeros(4), ptr=PTR), TypeError, "without masks"),
        (lambda: call((4, 8), key_ptr=PTR), TypeError, "ptr must be given"),
        (
            lambda: MultiheadAttention.from_torch(torch.nn.Linear(2, 2)),
            TypeError,
            "torch.nn.MultiheadAttention, got Linear",
        ),
        (
            lambda: MultiheadAttention.from_torch(torch.nn.MultiheadAttention(2, 1), "no"),
            ValueError,
            "no",
        ),
    ],
)
def test_bad_input(wrong, error, words):
    with pytest.raises(error) as caught:
        wrong()
    assert words in str(caught.value)
