"""Attention weights on demand: against softmax, through the LSE, and the largest ones."""

import itertools

import pytest
import torch

from attnpool_kernels import Ragged, attention_weights, seed_pool, set_attention
from attnpool_kernels.operands import accumulator

COUNTS = (3, 0, 5, 1)
SETS = Ragged.from_counts(COUNTS)
ROWS, HEADS = sum(COUNTS) + 2, 2  # two rows of no molecule
PAIRS = sum(n * n for n in COUNTS)


def rows(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def expected(q, k, bias, key_bias, scale):
    """Softmax of each molecule by itself, [n_q, n_k, H] each."""
    found, pairs, ptr = [], SETS.pairs().tolist(), SETS.ptr.tolist()
    for i, (a, b) in enumerate(itertools.pairwise(ptr)):
        if a < b:
            logits = torch.einsum("ihd,jhd->ijh", q[a:b], k[a:b]) * scale
            logits = logits + bias[pairs[i] : pairs[i + 1]].view(b - a, b - a, -1)
            found.append((logits + key_bias[a:b]).softmax(1))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved", [True, False])
def test_weights_are_softmax(dtype, saved):
    q, k, v = (rows(ROWS, HEADS, 4, seed=i, dtype=dtype) for i in range(3))
    bias, key_bias = rows(PAIRS, HEADS, seed=3).float(), rows(ROWS, HEADS, seed=4).float()
    options = {"bias": bias, "key_bias": key_bias, "scale": 0.7}
    out, lse = set_attention(q, k, v, SETS, **options, return_lse=True)
    found = attention_weights(q, k, SETS, lse=lse if saved else None, **options)
    exact = expected(q.double(), k.double(), bias.double(), key_bias.double(), 0.7)
    assert found.shape == (PAIRS, HEADS) and found.dtype == accumulator(dtype)
    flat = torch.cat([p.flatten(0, 1) for p in exact])
    error = 1e-12 if dtype == torch.float64 else 1e-5
    assert torch.allclose(found.double(), flat, rtol=error, atol=error)
    sums = torch.einsum("ijh,jhd->ihd", found[: 3 * 3].view(3, 3, HEADS).double(), v[:3].double())
    assert torch.allclose(
        sums, out[:3].double(), rtol=0, atol=0.02 if dtype == torch.bfloat16 else error
    )


def test_derivatives_go_through_the_lse():
    q, k = (rows(ROWS, HEADS, 4, seed=i).requires_grad_() for i in range(2))
    bias, key_bias = (rows(n, HEADS, seed=n).requires_grad_() for n in (PAIRS, ROWS))
    leaves = q, k, bias, key_bias
    weight = rows(PAIRS, HEADS, seed=9)

    def derivatives(p):
        first = torch.autograd.grad((p * weight).sum(), leaves, create_graph=True)
        return first + torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    found = attention_weights(q, k, SETS, bias=bias, key_bias=key_bias)
    exact = torch.cat([p.flatten(0, 1) for p in expected(q, k, bias, key_bias, 0.5)])
    for x, y in zip(derivatives(found), derivatives(exact)):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-11)


def test_the_largest_keys_of_each_query():
    q, k = (rows(ROWS, HEADS, 4, seed=i) for i in range(2))
    key_bias = torch.zeros(ROWS, dtype=torch.float64)
    key_bias[1] = -torch.inf  # leaves the first molecule two keys
    full = attention_weights(q, k, SETS, key_bias=key_bias)
    weights, keys = attention_weights(q, k, SETS, key_bias=key_bias, top=3)
    assert weights.shape == keys.shape == (ROWS, HEADS, 3)
    start, pairs = 0, full.split([n * n for n in COUNTS])
    for n, p in zip(COUNTS, pairs):
        for i in range(n):
            for head in range(HEADS):
                own = p.view(n, n, HEADS)[i, :, head] if n else None
                order = sorted(range(n), key=lambda j: -own[j].item())
                there = [j for j in order if own[j] > 0][:3]
                missing = [-1] * (3 - len(there))
                assert keys[start + i, head].tolist() == [start + j for j in there] + missing
                assert weights[start + i, head].tolist() == [
                    *own[there].tolist(),
                    *[0.0] * len(missing),
                ]
        start += n
    assert (keys[start:] == -1).all() and not weights[start:].any()


def test_seeds():
    seeds, k, v = rows(2, HEADS, 4), rows(ROWS, HEADS, 4, seed=1), rows(ROWS, HEADS, 3, seed=2)
    out, lse = seed_pool(seeds, k, v, SETS, return_lse=True)
    found = attention_weights(seeds, k, None, SETS, lse=lse)
    assert torch.allclose(found, attention_weights(seeds, k, None, SETS), rtol=1e-12)
    pairs = found.split([2 * n for n in COUNTS])
    for i, (p, a, b) in enumerate(zip(pairs, SETS.ptr.tolist(), SETS.ptr.tolist()[1:])):
        again = torch.einsum("sjh,jhd->shd", p.view(2, b - a, HEADS), v[a:b])
        assert torch.allclose(again, out[i], rtol=1e-12, atol=1e-12)
    weights, keys = attention_weights(seeds, k, None, SETS, top=2)
    assert weights.shape == keys.shape == (4, 2, HEADS, 2)
    assert (
        (keys[1] == -1).all() and (keys[3, :, :, 0] == 8).all() and (weights[3, ..., 0] == 1).all()
    )


def test_queries_without_a_finite_logit_have_weights_zero():
    q = rows(3, HEADS, 4).requires_grad_()
    found = attention_weights(
        q, q.detach(), torch.tensor([0, 3]), key_bias=torch.full((3,), -torch.inf).double()
    )
    assert not found.any()
    assert not torch.autograd.grad(found.sum(), q)[0].any()
    assert attention_weights(q[:0], q[:0], torch.tensor([0])).shape == (0, HEADS)


@pytest.mark.parametrize("value", [-1e9, 1e6, torch.finfo(torch.float32).min])
def test_large_numbers_on_every_logit_of_a_query(value):
    """As masks have them: nothing of the weights is left in the LSE."""
    q, v = rows(3, 1, 4, dtype=torch.float32), rows(3, 1, 3, seed=1, dtype=torch.float32)
    ptr, key_bias = torch.tensor([0, 3]), torch.full((3,), value)
    out = set_attention(q, q, v, ptr, key_bias=key_bias)
    found = attention_weights(q, q, ptr, key_bias=key_bias).view(3, 3)
    assert torch.allclose(found.sum(1), torch.ones(3))
    if value < 0:  # at 1e6 the last bit of a logit is worth 6 %
        assert torch.allclose(found @ v[:, 0], out[:, 0], rtol=1e-5, atol=1e-5)
    weights, keys = attention_weights(q, q, ptr, key_bias=key_bias, top=3)
    assert keys.sort(2).values[:, 0].tolist() == [[0, 1, 2]] * 3
    assert torch.allclose(weights.sum(2), torch.ones(3, 1))


def test_autocast_rounds_nothing_but_the_rows():
    q = rows(6, 1, 32, dtype=torch.float32) * 4
    ptr = torch.tensor([0, 6])
    with torch.autocast("cpu", torch.bfloat16):
        _, lse = set_attention(q, q, q, ptr, return_lse=True)
        for given in (None, lse):
            found = attention_weights(q, q, ptr, lse=given)
            assert torch.allclose(found.view(6, 6).sum(1), torch.ones(6), atol=1e-4)
    half = q.bfloat16()
    assert torch.allclose(found, attention_weights(half, half, ptr), rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lse": [0.0]}, TypeError, "lse must be a torch.Tensor, got list"),
        ({"lse": torch.zeros(3, 2)}, TypeError, "lse must be torch.float64"),
        ({"lse": torch.zeros(2, 3).double()}, ValueError, "lse must have shape (3, 2)"),
        ({"top": 0}, ValueError, "top must be at least 1"),
        ({"top": True}, TypeError, "top must be an int"),
        ({"ptr": None}, TypeError, "k_ptr must be given"),
        ({"scale": "large"}, TypeError, "scale"),
        ({"k": torch.zeros(3, 1, 4)}, TypeError, "dtype"),
    ],
)
def test_bad_input(options, error, words):
    q = rows(3, HEADS, 4)
    with pytest.raises(error) as caught:
        attention_weights(**{"q": q, "k": q, "ptr": torch.tensor([0, 3])} | options)
    assert words in str(caught.value)
