"""The C++ operators called directly with anything: RuntimeError, or the result of the reference.

Never a crash: ``make fuzz`` draws the same against a library with AddressSanitizer and
UndefinedBehaviorSanitizer (``fuzz.sanitized``).
"""

import pytest
import torch
from hypothesis import strategies as st
from tools.drawn import drawn

from attnpool_kernels import Problem, impl, testing
from attnpool_kernels.impl import reference
from attnpool_kernels.operands import Cotangents, Operands, Options, Result, Tangents

NAMES = {
    "attention": (*Operands._fields, *Options._fields),
    "attention_backward": (
        *Operands._fields,
        *Result._fields,
        *Cotangents._fields,
        *Options._fields,
        "need_dbias",
    ),
    "attention_double_backward": (
        *Operands._fields,
        *Result._fields,
        *Cotangents._fields,
        *Tangents._fields,
        *Options._fields,
    ),
}
TENSORS = [name for name in NAMES["attention_double_backward"] if name not in Options._fields]
COUNTS = st.lists(st.sampled_from([0, 1, 2, 3, 7, 16, 17, 33, 65]), max_size=4).map(tuple)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHERS = (torch.int32, torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn)
HUGE = (2**31 - 1, 2**31, 2**40, 2**62, -(2**31), -(2**63), 2**63 - 1)
# What may be done to a tensor: those of SAME leave its values, shape and dtype alone.
SAME = ("strided", "offset", "transposed", "gaps", "copy", "grad")
CHANGED = (
    "longer",
    "shorter",
    "wider",
    "empty",
    "scalar",
    "dimension",
    "flat",
    "dtype",
    "expanded",
    "huge",
    "meta",
    "sparse",
    "none",
    "other",
    "nan",
    "garbage",
    "overlap",
    "number",
)


@st.composite
def calls(draw):
    """A call that is right, and what is done to some of its arguments."""
    counts = draw(COUNTS)
    seeds = draw(st.sampled_from([None, None, 1, 3, 9]))
    other = seeds is None and draw(st.booleans())
    case = testing.Case(
        "direct",
        counts,
        q_counts=tuple(draw(st.sampled_from([0, 1, 5, 17])) for _ in counts) if other else None,
        heads=draw(st.integers(1, 3)),
        dim=draw(st.sampled_from([1, 3, 8, 16, 17])),
        value_dim=draw(st.sampled_from([None, 1, 5, 24])),
        seeds=seeds,
        bias=draw(st.sampled_from([None, "pair", "float32"])),
        key_bias=draw(st.sampled_from([None, "pair", "float32"])),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.5])),
        nobody=draw(st.sampled_from([0, 2])),
        index=draw(st.sampled_from([torch.int32, torch.int64])),
        lse=draw(st.booleans()),
    )
    changes = draw(
        st.lists(
            st.tuples(
                st.sampled_from(TENSORS + ["k_ptr", "q_ptr", "pair_ptr"] * 3),
                st.sampled_from(SAME + CHANGED + ("garbage",) * 4),
                st.integers(0, 2**31),
            ),
            max_size=3,
        )
    )
    name = draw(st.sampled_from(sorted(NAMES)))
    return name, case, draw(st.sampled_from(DTYPES)), changes


def arguments(case, dtype, kernels):
    batch = case.make(dtype)
    x, dy, options = batch.operands, batch.cotangents, batch.options
    y = kernels.forward(x, options)
    flat = x._asdict() | y._asdict() | dy._asdict() | batch.tangents._asdict()
    return flat | options._asdict() | {"need_dbias": batch.bias is not None}


def changed(x, kind, number):
    """The tensor (or None) with one thing done to it."""
    pick = torch.Generator().manual_seed(number)

    def one_of(values):
        return values[number % len(values)]

    if kind == "number":
        return one_of([0, 1.5, "x", [1], float("nan"), None, True])
    if x is None:
        return torch.randn(one_of([(), (0,), (1,), (3, 2), (2, 1, 4)]), generator=pick)
    if kind == "strided":
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]
    if kind == "offset":
        storage = x.new_zeros(x.numel() + 3)
        return storage[3:].view(x.shape).copy_(x)
    if kind == "transposed":
        order = tuple(range(x.dim()))[::-1]
        return x.permute(order).contiguous().permute(order)
    if kind == "gaps":
        return torch.cat([x, x], 0)[: x.shape[0]] if x.dim() else x
    if kind == "grad":
        return x.clone().requires_grad_(x.is_floating_point())
    if kind == "copy":
        return x.clone()
    if kind in ("longer", "shorter", "wider") and x.dim():
        axis = number % x.dim()
        size = x.shape[axis]
        index = torch.arange(size + (kind != "shorter")) % max(size, 1)
        index = index[: max(0, size - 1)] if kind == "shorter" else index
        return x.index_select(axis, index) if size else x.new_zeros([n + 1 for n in x.shape])
    if kind == "empty":
        return x.new_empty(
            [0 if i == number % max(x.dim(), 1) else n for i, n in enumerate(x.shape)]
        )
    if kind == "scalar":
        return x.new_zeros(())
    if kind == "dimension":
        return one_of([x[None], x[..., None], x.unsqueeze(min(1, x.dim()))])
    if kind == "flat":
        return x.reshape(-1)
    if kind == "dtype":
        return x.to(one_of([*DTYPES, *OTHERS]))
    if kind == "expanded":
        return x[:1].expand(x.shape) if x.dim() and x.shape[0] else x
    if kind == "huge":
        return x.new_zeros([1] * x.dim()).expand(
            [one_of([2**16, 2**40, 2**60])] * min(x.dim(), 1) + [1] * (x.dim() - 1)
        )
    if kind == "meta":
        return x.to("meta")
    if kind == "sparse":
        return (
            one_of([x.to_sparse, x.reshape(-1, 1).to_sparse_csr, x.to_mkldnn])()
            if x.numel()
            else x.to_sparse()
        )
    if kind == "none":
        return None
    if kind == "other":
        return torch.randn(one_of([(), (0,), (3,), (5, 2), (2, 3, 4), (0, 1, 1)]), generator=pick)
    if kind == "nan":
        return torch.full_like(x, torch.nan) if x.is_floating_point() else x
    if kind == "overlap":
        return x.as_strided(x.shape, [1] * x.dim()) if x.numel() else x
    if not x.is_floating_point():  # garbage
        values = [*HUGE, -1, 0, 1, 2, 3, 5, 1000]
        most = torch.iinfo(x.dtype).max
        drawn_ones = [
            values[int(i)] for i in torch.randint(len(values), (x.numel(),), generator=pick)
        ]
        clipped = [max(-most - 1, min(most, value)) for value in drawn_ones]
        out = torch.tensor(clipped, dtype=x.dtype).reshape(x.shape)
        if number % 3 and out.numel():
            out[0] = 0
        return out.sort().values if number % 2 and out.dim() else out
    return x * one_of([1e30, -1e30, 1e-40, torch.inf])


def run(call, kernels):
    """Arguments and results of a call; None for a RuntimeError, which a right call may not give."""
    name, case, dtype, changes = call
    given = arguments(case, dtype, kernels)
    operator, right = getattr(torch.ops.attnpool, name), [given[n] for n in NAMES[name]]
    done = set()
    for target, kind, number in changes:
        if given[target] is None and kind in SAME:
            continue
        try:
            given[target] = changed(given[target], kind, number)
        except (RuntimeError, AttributeError, ValueError, IndexError):
            continue  # torch has no such tensor
        if target in NAMES[name]:
            done.add(kind)
    try:
        found = operator(*(given[n] for n in NAMES[name]))
    except RuntimeError:
        integers = (given[n] for n in ("q_ptr", "k_ptr", "pair_ptr", "seed"))
        refused = not done - set(SAME)  # the Python side makes boundaries contiguous
        assert not refused or any(x is not None and not x.is_contiguous() for x in integers)
        return None
    if not done - set(SAME):
        assert all(torch.equal(x, y) for x, y in zip(found, operator(*right))), "other bits"
    return given, found


@drawn(150, call=calls())
def test_anything_in_any_place(call):
    kernels = impl.load("cpu")
    if kernels.why_not(Problem("cpu", torch.float32, 8, 8)):
        pytest.skip("the C++ library is not built")
    done = run(call, kernels)
    if done is None or any(x.device.type == "meta" for x in done[1]):
        return
    given, found = done
    q, k, v = (given[name] for name in "qkv")
    shared = given["q_ptr"] is None
    rows = (len(given["k_ptr"]) - 1, len(q)) if shared else (len(q),)
    out, lse = (*rows, *q.shape[1:2], v.shape[2]), (*rows, q.shape[1])
    added = [(0, q.shape[1]) if x is None else x.shape for x in (given["bias"], given["key_bias"])]
    if call[0] == "attention":
        shapes = [out, lse]
    elif call[0] == "attention_backward":
        shapes = [q.shape, k.shape, v.shape, added[0] if given["need_dbias"] else (0, q.shape[1])]
        shapes += added[1:]
    else:
        shapes = [q.shape, k.shape, v.shape, *added, out, lse]
    assert [tuple(x.shape) for x in found] == [tuple(x) for x in shapes]
    if call[0] == "attention" and given["k_ptr"].device.type == "cpu":
        agrees_with_the_reference(given, *found)


def agrees_with_the_reference(given, out, lse):
    """Where both are finite: logits of 10^30 are nan in one and 0 in the other."""
    x, options = (kind(*(given[n] for n in kind._fields)) for kind in (Operands, Options))
    if options.scale != options.scale or x.q.shape[0] + x.k.shape[0] > 10_000:
        return
    for found, wanted in zip((out, lse), reference.attention(x, options, None)):
        both = found.isfinite() & wanted.isfinite()
        torch.testing.assert_close(found[both], wanted[both], rtol=0.05, atol=0.05)


@drawn(
    60,
    ptr=st.sampled_from(["plain", "strided", "2-D", "float", "none", "scalar", "meta", "sparse"]),
    values=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6),
    small=st.booleans(),
    rows=st.one_of(st.integers(-3, 30), st.sampled_from(HUGE)),
)
def test_check_ptr(ptr, values, small, rows):
    """0 exactly where the boundaries are right, an error for other tensors."""
    values = [x % 40 - 5 for x in values] if small else values
    x = torch.tensor(values, dtype=torch.int64)
    made = {
        "plain": lambda: x,
        "strided": lambda: torch.stack([x, x], 1)[:, 0],
        "2-D": lambda: x[None],
        "float": x.double,
        "none": lambda: None,
        "scalar": lambda: torch.tensor(0),
        "meta": lambda: x.to("meta"),
        "sparse": x.to_sparse,
    }[ptr]()
    if ptr == "plain" or (ptr == "strided" and made.is_contiguous()):
        rising = values == sorted(values)
        right = not values or (values[0] == 0 and rising and values[-1] <= rows)
        assert (torch.ops.attnpool.check_ptr(made, rows) == 0) == right
    else:
        with pytest.raises(RuntimeError):
            torch.ops.attnpool.check_ptr(made, rows)
