"""Properties that hold for every batch, on drawn batches (fixed examples, see ``tools.drawn``)."""

from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from tools.drawn import drawn

from attnpool_kernels import seed_pool, set_attention, testing
from attnpool_kernels.impl import load

COUNTS = st.sampled_from([0, 1, 2, 3, 5, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129])
WIDTHS = st.sampled_from([1, 3, 4, 7, 8, 15, 16, 17, 24, 31, 32, 33, 48, 64, 80, 128, 160, 256])
LAYOUTS = st.sampled_from(["contiguous", "fused", "transposed", "expanded", "offset"])


@st.composite
def cases(draw, **fixed):
    counts = tuple(draw(st.lists(COUNTS, max_size=6)))
    other = draw(st.booleans())
    seeds = draw(st.sampled_from([None, None, 1, 3, 8, 17]))
    return testing.Case(
        **{
            "name": "drawn",
            "counts": counts,
            "q_counts": tuple(draw(COUNTS) for _ in counts) if other and seeds is None else None,
            "heads": draw(st.sampled_from([1, 2, 3, 4, 8])),
            "dim": draw(WIDTHS),
            "value_dim": draw(st.one_of(st.none(), WIDTHS)),
            "seeds": seeds,
            "bias": draw(st.sampled_from([None, None, "pair", "mask"])),
            "nobody": draw(st.sampled_from([0, 0, 3])),
            "layout": draw(LAYOUTS),
            "logits": draw(st.sampled_from([0.0, 1e-4, 1.0, 30.0])),
            "index": draw(st.sampled_from([torch.int32, torch.int64])),
        }
        | fixed
    )


@pytest.fixture
def kernels(native):
    if load(native).KIND == "composite":
        pytest.skip("the C++ library is not built")
    return load(native)


def out_of(batch, kernels):
    return testing.run_kernels(batch, kernels)


DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@drawn(120, case=cases(), dtype=DTYPES, dropout=st.sampled_from([0.0, 0.0, 0.4]), lse=st.booleans())
def test_inside_the_budget(kernels, case, dtype, dropout, lse):
    """Values, gradients and second gradients against float64."""
    case = replace(case, dropout=dropout, lse=lse)
    testing.judge(case, dtype, lambda batch: testing.run_kernels(batch, kernels))


@drawn(60, case=cases(), threads=st.sampled_from([1, 2, 5]), seed=st.integers(0, 9))
def test_molecules_do_not_see_each_other(kernels, case, threads, seed):
    """Concatenation: the same bits alone and in the batch; NaN batch mates change nothing."""
    case = replace(case, seeds=None, layout="contiguous")
    batch = case.make(torch.float32, seed=seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    whole = out_of(batch, kernels)
    torch.set_num_threads(before)
    q_counts = case.q_counts or case.counts
    q_start = k_start = p_start = 0
    for i, (n, m) in enumerate(zip(q_counts, case.counts)):
        rows, keys = slice(q_start, q_start + n), slice(k_start, k_start + m)
        pairs = slice(p_start, p_start + n * m)
        alone = replace(case, counts=(m,), q_counts=(n,) if case.q_counts else None, nobody=0).make(
            torch.float32
        )
        for name, part in parts(case, rows, keys, pairs):
            if getattr(batch, name) is not None:
                setattr(alone, name, getattr(batch, name)[part].clone())
        found = out_of(alone, kernels)
        results = {
            "out": rows,
            "lse": rows,
            "dq": rows,
            "dk": keys,
            "dv": keys,
            "dbias": pairs,
            "gq": rows,
            "gk": keys,
            "gv": keys,
            "gbias": pairs,
            "gdout": rows,
        }
        for name, part in results.items():
            if name in found:
                assert torch.equal(found[name], whole[name][part]), f"{name} of molecule {i}"
        q_start, k_start, p_start = rows.stop, keys.stop, pairs.stop


def parts(case, rows, keys, pairs):
    by_query, by_key, by_pair = ("q", "dout", "ddq"), ("k", "v", "ddk", "ddv"), ("bias", "ddbias")
    yield from ((name, rows) for name in by_query)
    yield from ((name, keys) for name in by_key)
    yield from ((name, pairs) for name in by_pair)


@drawn(40, case=cases(bias=None), shift=st.integers(0, 5))
def test_order_of_atoms_and_molecules(kernels, case, shift):
    """Attention follows a permutation of the atoms, pooling ignores it."""
    case = replace(case, q_counts=None, logits=1.0, nobody=0)
    batch = case.make(torch.float64)
    order = torch.cat(
        [start + torch.arange(n).roll(shift) for start, n in zip(batch.k_ptr.tolist(), case.counts)]
        or [torch.arange(0)]
    )
    expected = out_of(batch, kernels)["out"]
    names = ("k", "v") if case.seeds else ("q", "k", "v")
    for name in names:
        setattr(batch, name, getattr(batch, name)[order])
    found = out_of(batch, kernels)["out"]
    expected = expected if case.seeds else expected[order]
    assert torch.allclose(found, expected, atol=1e-12)


@drawn(40, case=cases(bias=None, nobody=0))
def test_output_is_an_average(kernels, case):
    """Convexity; constant values are kept; twice the values give twice the output, bit for bit."""
    batch = case.make(torch.float32)
    ptr = batch.k_ptr.long()
    out = out_of(batch, kernels)["out"]
    batch.v = 2 * batch.v
    assert torch.equal(out_of(batch, kernels)["out"], 2 * out)
    batch.v = torch.ones_like(batch.v)
    ones = out_of(batch, kernels)["out"]
    ends = (
        ptr
        if case.seeds or not case.q_counts
        else testing.cases._ptr(case.q_counts, ptr.dtype, "cpu")
    )
    for i, n in enumerate(case.counts):
        mine = ones[i] if case.seeds else ones[ends[i] : ends[i + 1]]
        assert torch.allclose(mine, torch.full_like(mine, float(n > 0)), atol=1e-6)


@drawn(30, n=st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128]), dim=WIDTHS, heads=st.integers(1, 3))
def test_exact_sums(kernels, n, dim, heads):
    """Equal logits and small integers: the mean, bit for bit; one dominating logit: its value.

    Its weight is not 1 where keys come in several blocks: there the exponent is cut by a whole
    power of two, so that long sums lose nothing. The division then is one rounding off at most.
    """
    ptr = torch.tensor([0, n, 2 * n])
    zero = torch.zeros(2 * n, heads, dim)
    v = torch.randint(-8, 9, (2 * n, heads, dim)).float()
    name = kernels.__name__.rpartition(".")[2]
    out = set_attention(zero, zero, v, ptr, backend=name)
    assert torch.equal(out[:n], v[:n].mean(0).expand(n, heads, dim))
    keys = torch.zeros(2 * n, heads, dim)
    keys[n - 1] = 1e4 / dim
    out = set_attention(torch.ones_like(zero), keys, v, ptr, scale=1.0, backend=name)
    off = (out[:n] - v[n - 1]).abs()
    assert (off <= v[n - 1].abs() * torch.finfo(torch.float32).eps).all()


@drawn(30, case=cases(bias="pair", seeds=None))
def test_bias_of_a_whole_row_changes_nothing(kernels, case):
    batch = replace(case, logits=1.0).make(torch.float64)
    expected = out_of(batch, kernels)
    q_counts = case.q_counts or case.counts
    keys_of_row = [m for n, m in zip(q_counts, case.counts) for _ in range(n)]
    rows = torch.tensor([i for i, m in enumerate(keys_of_row) for _ in range(m)], dtype=torch.long)
    batch.bias = batch.bias + torch.randn(max(sum(q_counts), 1), case.heads).double()[rows]
    found = out_of(batch, kernels)
    assert torch.allclose(found["out"], expected["out"], atol=1e-11)
    # and the gradient of the bias sums to zero over the keys of each query
    sums = torch.zeros(max(sum(q_counts), 1), case.heads, dtype=torch.float64)
    assert sums.index_add(0, rows, expected["dbias"]).abs().max() < 1e-11


@drawn(40, garbage=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=7))
def test_garbage_boundaries_are_refused(native, garbage):
    q = torch.randn(20, 1, 4)
    ptr = torch.tensor([0, *garbage])
    if ptr[-1] <= 20 and (ptr.diff() >= 0).all() and ptr.min() >= 0:
        return
    with pytest.raises(ValueError, match="ptr"):
        set_attention(q, q, q, ptr, backend=native)
    with pytest.raises(ValueError, match="k_ptr"):
        set_attention(q, q, q, torch.zeros(len(ptr), dtype=torch.long), ptr, backend=native)


@drawn(20, case=cases(bias=None, index=torch.int64), seed=st.integers(0, 99))
def test_hessian_is_symmetric(kernels, case, seed):
    """u·Hv = v·Hu for a scalar function through both passes."""
    case = replace(case, logits=1.0, layout="contiguous")
    batch = case.make(torch.float64, seed=seed)
    name = kernels.__name__.rpartition(".")[2]
    inputs = [x.requires_grad_() for x in batch.inputs().values()]

    def product(direction):
        if case.seeds is None:
            keys = None if batch.q_ptr is batch.k_ptr else batch.k_ptr
            out = set_attention(*inputs, batch.q_ptr, keys, backend=name)
        else:
            out = seed_pool(*inputs, batch.k_ptr, backend=name)
        first = torch.autograd.grad((out**3).sum(), inputs, create_graph=True)
        return torch.autograd.grad(first, inputs, direction)

    u, v = ([torch.randn_like(x) for x in inputs] for _ in range(2))
    left = sum((a * b).sum() for a, b in zip(u, product(v)))
    right = sum((a * b).sum() for a, b in zip(v, product(u)))
    assert torch.allclose(left, right, rtol=1e-9, atol=1e-9)
