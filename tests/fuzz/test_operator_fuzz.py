"""Properties of the operator that ``test_properties`` does not have, on any backend of this CPU."""

from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from test_properties import DTYPES, cases, out_of, parts
from tools.drawn import drawn

from attnpool_kernels import Problem, Ragged, backends, impl, ragged, seed_pool, testing
from attnpool_kernels import set_attention as attention

FALLBACKS = [  # flex compiles for a minute
    name
    for name in backends()
    if name not in ("cpu", "flex")
    and not impl.load(name).why_not(Problem("cpu", torch.float32, 8, 8))
]
KEY_BIASES = st.sampled_from([None, None, "pair", "float32", "heads", "mask"])
SMALL = st.sampled_from([0, 1, 2, 3, 5, 9, 17, 33])


@st.composite
def full_cases(draw, **fixed):
    """Those of ``test_properties``, with key biases, larger logits and cotangents of lse."""
    case = draw(cases(**fixed))
    return replace(
        case,
        key_bias=draw(KEY_BIASES) if case.counts else None,
        logits=draw(st.sampled_from([case.logits, 1e3])),
        lse=draw(st.booleans()),
    )


def within_range(case, dtype):
    """Squares of 1000 are inf in float16, and in float64 the oracle is as far off as kernels."""
    exact = dtype in (torch.float32, torch.bfloat16)
    return case if exact else replace(case, logits=min(case.logits, 30.0))


@pytest.fixture
def kernels():
    if impl.load("cpu").why_not(Problem("cpu", torch.float32, 8, 8)):
        pytest.skip("the C++ library is not built")
    return impl.load("cpu")


@drawn(
    20,
    case=full_cases(),
    dtype=DTYPES,
    dropout=st.sampled_from([0.0, 0.0, 0.4, 0.99]),
    threads=st.sampled_from([1, 2, 5]),
)
def test_all_options_inside_the_budget(kernels, case, dtype, dropout, threads):
    before = torch.get_num_threads()
    case = within_range(case, dtype)
    torch.set_num_threads(threads)
    try:
        testing.judge(replace(case, dropout=dropout), dtype, lambda x: out_of(x, kernels))
    finally:
        torch.set_num_threads(before)


@drawn(20, case=full_cases(), dtype=DTYPES, name=st.sampled_from([None, *FALLBACKS]))
def test_fallbacks_inside_the_budget(case, dtype, name):
    """Through the public functions: every other backend that runs here, and the choice of one."""
    counts = tuple(min(n, 33) for n in case.counts)
    q_counts = case.q_counts and tuple(min(n, 33) for n in case.q_counts)
    case = within_range(replace(case, counts=counts, q_counts=q_counts), dtype)
    fits = {"grad_order": 2, "bias": case.bias is not None, "key_bias": case.key_bias is not None}
    problem = Problem(
        "cpu",
        dtype,
        case.dim,
        case.value_dim or case.dim,
        seeds=case.seeds,
        return_lse=True,
        **fits,
    )
    if name is not None and impl.load(name).why_not(problem):
        return
    # torch's own operators err more in single numbers where logits are large (tools/accuracy.csv).
    slack = 1.0 if name is None else 8.0
    testing.judge(case, dtype, lambda batch: testing.run_public(batch, name), slack=slack)


@drawn(20, case=full_cases(index=torch.int64), dtype=DTYPES, zone=st.integers(1, 40))
def test_memory_around_the_tensors_is_not_read(kernels, case, dtype, zone):
    """NaN around every tensor, and in the rows of no molecule, changes no bit of a molecule."""
    batch = case.make(dtype)
    wanted = out_of(batch, kernels)
    for name in ("q", "k", "v", "bias", "key_bias", "dout", "dlse", "ddq", "ddk", "ddv"):
        x = getattr(batch, name)
        if x is not None:
            setattr(batch, name, between_nans(x, zone))
    ends = [(case.q_counts or case.counts, "q dout dlse ddq"), (case.counts, "k v ddk ddv")]
    for counts, names in ends[bool(case.seeds) :]:
        for name in names.split():
            if getattr(batch, name) is not None and case.layout != "expanded":
                getattr(batch, name)[sum(counts) :] = torch.nan
    found = out_of(batch, kernels)
    for name, x in wanted.items():
        assert torch.equal(found[name], x), name


def between_nans(x, zone):
    """The same values and strides, with NaN before, after and between the rows."""
    if not x.numel():
        return x
    span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride()))
    storage = x.new_full((span + 2 * zone,), torch.nan)
    out = storage.as_strided(x.shape, x.stride(), zone)
    return out.copy_(x) if 0 not in x.stride() else _expanded(out, x)


def _expanded(out, x):
    one = tuple(slice(0, 1) if step == 0 else slice(None) for step in x.stride())
    out[one].copy_(x[one])
    return out


@drawn(20, case=full_cases(nobody=0, seeds=None), factor=st.sampled_from([0.5, 2.0, -4.0]))
def test_linear_in_values_and_convex(kernels, case, factor):
    """out(a v + w) = a out(v) + out(w) in float64; each output lies between its values."""
    batch = replace(case, bias=None, key_bias=None, q_counts=None, logits=1.0).make(torch.float64)
    v, w = batch.v.clone(), torch.randn_like(batch.v)

    def of(values):
        batch.v = values
        return out_of(batch, kernels)["out"]

    assert torch.allclose(of(factor * v + w), factor * of(v) + of(w), atol=1e-11)
    out, start = of(v), 0
    for n in case.counts:
        mine, values = out[start : start + n], v[start : start + n]
        if n:
            assert (mine <= values.amax(0) + 1e-12).all() and (mine >= values.amin(0) - 1e-12).all()
        start += n


@drawn(20, case=full_cases(seeds=None), dtype=DTYPES, power=st.sampled_from([-3, -1, 1, 2]))
def test_scales_by_powers_of_two_change_no_bit(kernels, case, dtype, power):
    case = replace(case, logits=1.0)
    one, other = case.make(dtype), case.make(dtype)
    other.q = (other.q * 2.0**power).to(dtype)
    if not torch.equal((other.q * 2.0**-power).to(dtype), one.q):
        return  # left the range of a half type
    other.scale = one.scale * 2.0**-power
    assert torch.equal(out_of(one, kernels)["out"], out_of(other, kernels)["out"])


@drawn(15, case=full_cases(), dtype=DTYPES)
def test_index_types_layouts_and_repeats_change_no_bit(kernels, case, dtype):
    wanted = out_of(case.make(dtype), kernels)
    again = out_of(replace(case, index=torch.int32).make(dtype), kernels)
    for name, x in wanted.items():
        assert torch.equal(again[name], x), name
    if case.layout != "expanded":  # that has other values
        other = out_of(replace(case, layout="contiguous").make(dtype), kernels)
        testing_equal = [name for name, x in wanted.items() if not torch.equal(other[name], x)]
        assert not testing_equal


@drawn(15, n=SMALL, copies=st.integers(2, 5), heads=st.integers(1, 3), dim=st.integers(1, 40))
def test_equal_molecules_have_equal_bits(kernels, n, copies, heads, dim):
    one = testing.Case("one", (n,), heads=heads, dim=dim, lse=True).make(torch.float32)
    many = testing.Case("many", (n,) * copies, heads=heads, dim=dim, lse=True).make(torch.float32)
    for name in ("q", "k", "v", "dout", "dlse", "ddq", "ddk", "ddv"):
        x = getattr(one, name)
        setattr(many, name, x.repeat(copies, *[1] * (x.dim() - 1)))
    wanted = out_of(one, kernels)
    for name, x in out_of(many, kernels).items():
        assert torch.equal(x, wanted[name].repeat(copies, *[1] * (x.dim() - 1))), name


@drawn(15, case=full_cases(seeds=None, bias=None, layout="contiguous"), angle=st.floats(-3, 3))
def test_rotations_and_translations_of_keys(kernels, case, angle):
    """Rotating q and k together, or moving all keys of a molecule, changes nothing."""
    case = replace(case, logits=1.0, dim=max(2, case.dim), nobody=0, key_bias=None, lse=False)
    batch = case.make(torch.float64)
    wanted = out_of(batch, kernels)["out"]
    turn = torch.eye(case.dim, dtype=torch.float64)
    c, s = torch.tensor(angle).double().cos(), torch.tensor(angle).double().sin()
    turn[0, 0], turn[0, 1], turn[1, 0], turn[1, 1] = c, -s, s, c
    batch.q, batch.k = batch.q @ turn, batch.k @ turn
    assert torch.allclose(out_of(batch, kernels)["out"], wanted, atol=1e-11)
    moved = torch.randn(len(case.counts), case.heads, case.dim, dtype=torch.float64)
    batch.k = batch.k + moved.repeat_interleave(torch.tensor(case.counts, dtype=torch.long), 0)
    assert torch.allclose(out_of(batch, kernels)["out"], wanted, atol=1e-10)


@drawn(10, case=full_cases(index=torch.int64), seed=st.integers(0, 99))
def test_gradients_are_slopes(kernels, case, seed):
    """u·∇f against (f(x + h u) - f(x - h u)) / 2h, of the first pass and of the second."""
    case = replace(
        case,
        counts=tuple(min(n, 9) for n in case.counts),
        q_counts=case.q_counts and tuple(min(n, 9) for n in case.q_counts),
        logits=1.0,
        bias=case.bias and "pair",
        key_bias=case.key_bias and "pair",
        layout="contiguous",
        lse=False,
    )
    batch = case.make(torch.float64, seed=seed)
    names = list(batch.inputs())
    torch.manual_seed(seed)
    u = {name: torch.randn_like(x) for name, x in batch.inputs().items()}
    start = {name: x.clone() for name, x in batch.inputs().items()}

    def at(h):
        for name in names:
            setattr(batch, name, start[name] + h * u[name])
        found = out_of(batch, kernels)
        second = sum((getattr(batch, f"dd{name}") * found[f"d{name}"]).sum() for name in names)
        return (batch.dout * found["out"]).sum(), second, found

    h = 1e-5
    (up, up2, _), (down, down2, _), (_, _, found) = at(h), at(-h), at(0)
    for slope, prefix in (((up - down) / (2 * h), "d"), ((up2 - down2) / (2 * h), "g")):
        exact = sum((u[name] * found[f"{prefix}{name}"]).sum() for name in names)
        size = sum((u[name] * found[f"{prefix}{name}"]).abs().sum() for name in names)
        assert abs(float(slope - exact)) <= 1e-6 * (1 + float(size)), prefix


BOUNDARY = st.one_of(
    st.integers(-3, 25), st.integers(-3, 25), st.sampled_from([-(2**31), 2**31 - 1])
)


@drawn(
    60,
    values=st.lists(BOUNDARY, max_size=6),
    zero=st.sampled_from([True, True, True, False]),
    ordered=st.booleans(),
    index=st.sampled_from([torch.int32, torch.int64]),
    kind=st.sampled_from(["q", "k", "pool", "ragged", "check"]),
)
def test_boundaries_are_taken_where_they_can_be(values, zero, ordered, index, kind):
    """Accepted exactly where 0 = ptr[0] ≤ ... ≤ ptr[-1] ≤ rows."""
    values = ([0] if zero else []) + (sorted(values) if ordered else values)
    ptr, rows = torch.tensor(values, dtype=index), 20
    rising = bool(values) and values[0] == 0 and values == sorted(values)
    fits = rising and (kind == "ragged" or values[-1] <= rows)
    q = torch.randn(rows, 1, 4)
    full = torch.zeros(max(len(values), 1), dtype=index)
    call = {
        "q": lambda: attention(q, q, q, ptr),
        "k": lambda: attention(q, q, q, full, ptr),
        "pool": lambda: seed_pool(q[:2], q, q, ptr),
        "ragged": lambda: Ragged.from_ptr(ptr),
        "check": lambda: ragged.check(ptr, rows),
    }[kind]
    if fits:
        found = call()
        if kind == "q":
            assert not found[values[-1] :].any() and found.isfinite().all()
    else:
        with pytest.raises(ValueError, match="ptr"):
            call()


@drawn(
    10,
    n=st.sampled_from([64, 100, 257]),
    p=st.sampled_from([0.1, 0.5, 0.9]),
    seed=st.integers(0, 2**31),
    heads=st.integers(1, 3),
)
def test_masks_of_dropout(kernels, n, p, seed, heads):
    """The kept share is a binomial's, the same in all passes; another seed has another mask."""
    case = testing.Case("dropout", (n,), heads=heads, dim=1, value_dim=n, dropout=p, logits=0.0)
    batch = case.make(torch.float32)
    batch.seed = torch.tensor([seed])
    batch.v = torch.eye(n)[:, None].expand(n, heads, n)
    batch.dout = torch.ones_like(batch.dout)
    found = out_of(batch, kernels)
    kept = found["out"] > 0
    assert torch.allclose(found["out"][kept], torch.tensor(1 / n / (1 - p)), rtol=1e-5)
    count = n * n * heads
    assert abs(float(kept.sum()) - count * (1 - p)) < 6 * (count * p * (1 - p)) ** 0.5
    shares = kept.sum(0).T.float() / n / (1 - p)  # [key, head]: dv of cotangents of 1
    assert torch.allclose(found["dv"], shares[..., None].expand(n, heads, n), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(x, found[name]) for name, x in out_of(batch, kernels).items())
    batch.seed = torch.tensor([seed + 1])
    assert not torch.equal(out_of(batch, kernels)["out"] > 0, kept)


@drawn(15, case=full_cases(seeds=None, layout="contiguous", nobody=0), bad=st.integers(0, 5))
def test_one_bad_molecule_stays_alone(kernels, case, bad):
    """NaN and inf in every tensor of one molecule: no bit of the others changes."""
    if not case.counts:
        return
    case, bad = replace(case, logits=1.0), bad % len(case.counts)
    wanted, batch = out_of(case.make(torch.float32), kernels), case.make(torch.float32)
    q_ends, k_ends = (
        [sum(c[:i]) for i in range(len(c) + 1)] for c in (case.q_counts or case.counts, case.counts)
    )
    pairs = [n * m for n, m in zip(case.q_counts or case.counts, case.counts)]
    p_ends = [sum(pairs[:i]) for i in range(len(pairs) + 1)]
    own = [slice(ends[bad], ends[bad + 1]) for ends in (q_ends, k_ends, p_ends)]
    for name, rows in parts(case, *own):
        if getattr(batch, name) is not None:
            getattr(batch, name)[rows] = torch.nan if name != "v" else torch.inf
    found = out_of(batch, kernels)
    for name, x in wanted.items():
        kind = {"k": 1, "v": 1, "y": 1, "b": 2}.get(name[1], 0)
        rows = own[1] if "key_bias" in name else own[kind]
        keep = torch.ones(len(x), dtype=torch.bool)
        keep[rows] = False
        assert torch.equal(found[name][keep], x[keep]), name
