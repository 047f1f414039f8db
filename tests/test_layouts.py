"""Packed rows from padded batches and neighbour lists, and back."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from attnpool_kernels import Ragged, layouts, set_attention
from attnpool_kernels.layouts import pack, padded_attention, unpack, with_centres

COUNTS = (3, 0, 5, 1)
PAIR = torch.tensor([0, 2])  # one atom with two neighbours


def attend(lengths, *given, **options):
    x = torch.zeros(4, 2, 6, 4)
    return padded_attention(x, x, x, lengths, *given, **options)


def padded(*shape, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(COUNTS), size, *shape, generator=generator, dtype=torch.float64)


def test_pack_and_unpack_are_inverse():
    x, sets = padded(2, 3), Ragged.from_counts(COUNTS)
    rows = pack(x, sets)
    assert torch.equal(rows, torch.cat([x[i, :n] for i, n in enumerate(COUNTS)]))
    assert torch.equal(pack(x, sets, rows=9), rows)
    back = unpack(rows, sets, 6, value=-1.0)
    for i, n in enumerate(COUNTS):
        assert torch.equal(back[i, :n], x[i, :n]) and bool((back[i, n:] == -1).all())
    assert unpack(rows, sets).shape == (4, 5, 2, 3)
    assert torch.equal(unpack(torch.cat([rows, rows]), sets, 6, value=-1.0), back)


def test_a_mask_with_holes():
    x = padded(2)
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.4
    sets = Ragged.from_mask(mask)
    assert sets.counts().tolist() == mask.sum(1).tolist()
    expected = torch.cat([x[i][mask[i]] for i in range(4)])
    assert torch.equal(pack(x, mask), expected)
    assert torch.equal(pack(x, mask, rows=len(expected)), expected)


def test_twice_differentiable():
    x, sets = padded(2).requires_grad_(), Ragged.from_counts(COUNTS)

    def there_and_back(x):
        return unpack(pack(x, sets) ** 3, sets, 6)

    assert torch.autograd.gradgradcheck(there_and_back, (x,))


def test_centres_stand_in_front_of_their_neighbours():
    row_ptr = torch.tensor([0, 2, 2, 5])
    centres = torch.tensor([[10.0], [20.0], [30.0]], requires_grad=True)
    neighbours = torch.arange(5.0)[:, None].requires_grad_()
    rows, sets = with_centres(centres, neighbours, row_ptr)
    assert rows[:, 0].tolist() == [10, 0, 1, 20, 30, 2, 3, 4]
    assert sets.ptr.tolist() == [0, 3, 4, 8]
    assert torch.equal(rows[sets.ptr[:-1]], centres)
    (dc, dn) = torch.autograd.grad((rows * torch.arange(8.0)[:, None]).sum(), (centres, neighbours))
    assert dc[:, 0].tolist() == [0, 3, 4] and dn[:, 0].tolist() == [1, 2, 5, 6, 7]
    assert torch.equal(Ragged.from_csr(row_ptr).ptr, row_ptr)


@pytest.mark.parametrize("heads_apart", [False, True])
def test_padded_attention_is_that_of_the_formula(heads_apart):
    q, k, v = (padded(2, 4, seed=i).transpose(1, 2).requires_grad_() for i in range(3))
    key_bias = padded(2, seed=4).transpose(1, 2) if heads_apart else padded(seed=4)
    key_bias = key_bias.clone().requires_grad_()
    lengths = torch.tensor(COUNTS)
    found = padded_attention(q, k, v, lengths, key_bias)

    there = torch.arange(6) < lengths[:, None]
    logits = (q @ k.mT) / 2 + (key_bias if heads_apart else key_bias[:, None])[:, :, None]
    logits = logits.masked_fill(~there[:, None, None], -1e300)
    expected = (logits.softmax(3) @ v) * there[:, None, :, None]
    assert found.shape == expected.shape == (4, 2, 6, 4)
    leaves = q, k, v, key_bias

    def derivatives(out):
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
        return out, *first, *second

    for x, y in zip(derivatives(found), derivatives(expected)):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-10)


def test_what_the_padding_holds_reaches_nothing():
    q = padded(2, 4).transpose(1, 2)
    bias = padded()
    lengths = torch.tensor(COUNTS)
    beyond = torch.arange(6) >= lengths[:, None]
    of_rows = beyond[:, None, :, None]

    def derivatives(q, bias, cotangent):
        q, bias = q.detach().requires_grad_(), bias.detach().requires_grad_()
        out = padded_attention(q, q, q, lengths, bias)
        first = torch.autograd.grad(out, (q, bias), cotangent, create_graph=True)
        spoilable = torch.where(of_rows, 0, first[0]).square().sum()
        return out, *first, *torch.autograd.grad(spoilable, (q, bias))

    found = derivatives(
        q.masked_fill(of_rows, torch.nan),
        bias.masked_fill(beyond, torch.nan),
        q.cos().masked_fill(of_rows, torch.nan),
    )
    for x, y in zip(found, derivatives(q, bias, q.cos())):
        assert torch.equal(x, y)
        assert not x[beyond].any() if x.dim() == 2 else not (x * of_rows).any()


def test_padded_rows_are_served_where_they_lie(monkeypatch):
    """Rows of a fused projection: the operator gets its memory, and gives a view of its result."""
    seen = []

    def spy(q, k, v, *args, **options):
        seen.extend((q, k, v))
        return attend(q, k, v, *args, **options)

    attend = layouts.set_attention
    monkeypatch.setattr(layouts, "set_attention", spy)
    fused = padded(3, 2, 4)
    lengths = torch.tensor(COUNTS)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    out = padded_attention(q, k, v, lengths)
    for rows, given in zip(seen, (q, k, v)):
        assert rows.data_ptr() == given.data_ptr()
    assert out.transpose(1, 2).is_contiguous()
    sets = Ragged.from_counts(lengths)
    packed = attend(*(pack(x.transpose(1, 2), sets) for x in (q, k, v)), sets)
    assert torch.equal(pack(out.transpose(1, 2), sets), packed)


def test_padded_attention_of_other_strides_and_no_sets():
    q = padded(2, 4).transpose(1, 2)
    lengths = torch.tensor(COUNTS, dtype=torch.int32)
    apart = padded_attention(*[q.contiguous()] * 3, lengths)
    assert torch.equal(apart, padded_attention(q, q, q, lengths))
    for shape in ((0, 2, 6, 4), (4, 2, 0, 4)):
        x = torch.zeros(shape)
        assert padded_attention(x, x, x, torch.zeros(shape[0], dtype=torch.long)).shape == shape


def test_padded_attention_can_be_compiled():
    q, lengths = padded(2, 4).transpose(1, 2), torch.tensor(COUNTS)
    compiled = torch.compile(padded_attention, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, q, q, lengths), padded_attention(q, q, q, lengths))


def test_padded_attention_can_be_recorded():
    q, lengths = padded(2, 4).transpose(1, 2), torch.tensor(COUNTS)
    for mode in ("real", "fake", "symbolic"):
        recorded = make_fx(lambda q, n: padded_attention(q, q, q, n), tracing_mode=mode)(q, lengths)
        assert torch.equal(recorded(q, lengths), padded_attention(q, q, q, lengths))


def test_only_the_centre_asks():
    row_ptr = torch.tensor([0, 2, 2, 5])
    x, e = torch.randn(3, 2, 4), torch.randn(5, 2, 4)
    rows, sets = with_centres(x, e, row_ptr)
    all_rows = set_attention(rows, rows, rows, sets)
    one = set_attention(x, rows, rows, torch.arange(4), sets)
    assert torch.allclose(one, all_rows[sets.ptr[:-1]], atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: pack(torch.zeros(4), Ragged.from_counts(COUNTS)), ValueError, "[B, S, ...]"),
        (lambda: pack(padded(), Ragged.from_counts([1])), ValueError, "4, got 1"),
        (lambda: pack(padded(), [1, 2]), TypeError, "list"),
        (lambda: pack(padded(), torch.zeros(4, 6)), TypeError, "float32"),
        (lambda: pack(padded(), torch.zeros(4, 5) == 0), ValueError, "(4, 6), got (4, 5)"),
        (lambda: pack(padded(), Ragged.from_counts([7, 0, 0, 0])), ValueError, "at most 6"),
        (lambda: unpack(torch.zeros(9), torch.tensor([0, 9])), TypeError, "Ragged"),
        (lambda: unpack(torch.zeros(9), Ragged.from_counts(COUNTS), 4), ValueError, "at least 5"),
        (lambda: unpack(torch.zeros(8), Ragged.from_counts(COUNTS)), ValueError, "8 rows"),
        (lambda: pack(padded(), Ragged.from_counts(COUNTS), 8), ValueError, "9, got 8"),
        (lambda: pack(padded(), torch.ones(4, 6) == 1, 5), ValueError, "rows must be"),
        (lambda: pack(padded(), torch.ones(4, 6) == 1, 2.0), TypeError, "rows must be an int"),
        (lambda: pack([1], Ragged.from_counts(COUNTS)), TypeError, "x must be"),
        (lambda: unpack([1], Ragged.from_counts(COUNTS)), TypeError, "x must be"),
        (lambda: unpack(torch.zeros(9), Ragged.from_counts(COUNTS), 6.0), TypeError, "longest"),
        (lambda: with_centres(torch.zeros(1), torch.zeros(3), PAIR), ValueError, "2 rows, got 3"),
        (lambda: with_centres(torch.zeros(1), torch.zeros(1), PAIR), ValueError, "2 rows, got 1"),
        (lambda: with_centres(torch.zeros(1), [0.0], PAIR), TypeError, "neighbours"),
        (lambda: with_centres(torch.tensor(0), torch.zeros(2), PAIR), ValueError, "[A, ...]"),
        (lambda: with_centres(torch.zeros(1), torch.tensor(0), PAIR), ValueError, "[E, ...]"),
        (
            lambda: with_centres(torch.zeros(1), torch.zeros(2).double(), PAIR),
            TypeError,
            "centres must have the dtype of neighbours",
        ),
        (lambda: attend(torch.tensor([3, 0, 7, 1])), ValueError, "lengths must be from 0 to 6"),
        (lambda: attend(torch.tensor([3, 0, -1, 1])), ValueError, "lengths must be from 0 to 6"),
        (lambda: attend(torch.tensor([3.0, 0, 1, 1])), TypeError, "lengths must be int32 or int64"),
        (lambda: attend(torch.tensor([3, 0])), ValueError, "lengths must have shape (4,)"),
        (lambda: attend(COUNTS), TypeError, "lengths must be a torch.Tensor"),
        (lambda: pack(padded(), Ragged.from_counts(COUNTS), rows=8), ValueError, "rows must be"),
        (lambda: attend(torch.tensor(COUNTS), [0.0]), TypeError, "key_bias"),
        (lambda: Ragged.from_mask(torch.zeros(2, 2)), TypeError, "float32"),
        (lambda: Ragged.from_mask(torch.zeros(2) == 0), ValueError, "[B, S]"),
        (
            lambda: with_centres(torch.zeros(2), torch.zeros(5), torch.tensor([0, 2, 2, 5])),
            ValueError,
            "(3,), got (2,)",
        ),
        (
            lambda: padded_attention(*[torch.zeros(4, 2, 6, 4)] * 2, torch.zeros(4, 2, 5, 4), None),
            ValueError,
            "v must have shape",
        ),
        (
            lambda: padded_attention(
                *[torch.zeros(4, 2, 6, 4)] * 3, torch.tensor(COUNTS), torch.zeros(4, 5)
            ),
            ValueError,
            "(4, 6) or (4, 2, 6), got (4, 5)",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
