"""The contract: every row of the table of bad inputs, and odd inputs that must be right."""

import itertools

import numpy as np
import pytest
import torch

from attnpool_kernels import BackendError, Ragged, explain, seed_pool, set_attention
from attnpool_kernels.impl import PRIORITY

PTR = torch.tensor([0, 3, 3, 8])


def tensors(rows=8, heads=2, dim=4, value_dim=None, dtype=torch.float32):
    return [torch.randn(rows, heads, d, dtype=dtype) for d in (dim, dim, value_dim or dim)]


def call(**changes):
    """set_attention on 3 molecules and 8 rows with some arguments replaced."""
    q, k, v = tensors()
    arguments = {"q": q, "k": k, "v": v, "ptr": PTR} | changes
    return set_attention(**arguments)


def pool(**changes):
    q, k, v = tensors()
    arguments = {"seeds": q[:2], "k": k, "v": v, "ptr": PTR} | changes
    return seed_pool(**arguments)


X = torch.randn(8, 2, 4)
TE, VE, NIE = TypeError, ValueError, NotImplementedError
BIAS = torch.zeros(34, 2)

# (row of the table, arguments, error, words the message must hold)
WRONG = [
    (1, {"q": None}, TE, ("q", "NoneType")),
    (1, {"q": [1.0]}, TE, ("q", "list")),
    (1, {"k": np.zeros((8, 2, 4))}, TE, ("k", "ndarray")),
    (2, {"q": X.long()}, TE, ("q", "int64")),
    (2, {"v": X.bool()}, TE, ("v", "bool")),
    (3, {"k": X.to(torch.complex64)}, TE, ("k", "complex64")),
    (4, {"q": X.to(torch.float8_e4m3fn)}, NIE, ("q", "float8_e4m3fn")),
    (4, {"q": torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)}, NIE, ("q", "qint8")),
    (5, {"q": X.to_sparse()}, NIE, ("q", "sparse")),
    (6, {"k": torch.nested.nested_tensor([X[:3], X[3:]])}, NIE, ("k", "nested")),
    (6, {"k": torch.nested.nested_tensor([X], layout=torch.jagged)}, NIE, ("k", "nested")),
    (8, {"q": X[0]}, VE, ("q", "[N, H, D]", "(2, 4)")),
    (8, {"v": X[None]}, VE, ("v", "(1, 8, 2, 4)")),
    (9, {"v": X[:7]}, VE, ("k and v", "8", "7")),
    (9, {"v": X[:, :1]}, VE, ("heads", "2", "1")),
    (10, {"q": torch.randn(8, 4, 4)}, VE, ("heads", "4", "2")),
    (11, {"q": torch.randn(8, 2, 5)}, VE, ("head dimension", "5", "4")),
    (12, {"q": torch.randn(9, 2, 4)}, VE, ("k_ptr", "9", "8")),
    (13, {"q": X.double()}, TE, ("float64", "float32")),
    (14, {"k": X.to("meta"), "v": X.to("meta")}, VE, ("device", "cpu", "meta")),
    (15, {n: X[:, :0] for n in "qkv"}, VE, ("at least 1 head", "(8, 0, 4)")),
    (15, {"v": X[..., :0]}, VE, ("v", "(8, 2, 0)")),
    (20, {"ptr": None}, TE, ("ptr", "NoneType")),
    (20, {"ptr": [0, 8]}, TE, ("ptr", "list")),
    (21, {"ptr": PTR.float()}, TE, ("ptr", "float32")),
    (22, {"ptr": PTR.bool()}, TE, ("ptr", "bool")),
    (22, {"ptr": PTR.to(torch.uint8)}, TE, ("ptr", "uint8")),
    (22, {"ptr": PTR.to(torch.int16)}, TE, ("ptr", "int16")),
    (23, {"ptr": PTR[0]}, VE, ("ptr", "[B + 1]", "()")),
    (23, {"ptr": PTR[None]}, VE, ("ptr", "(1, 4)")),
    (24, {"ptr": PTR[:0]}, VE, ("ptr", "at least 1 element", "0")),
    (30, {"ptr": PTR + 1}, VE, ("ptr[0]", "0", "1")),
    (31, {"ptr": torch.tensor([0, 5, 3, 8])}, VE, ("ptr[1] = 5", "ptr[2] = 3")),
    (32, {"ptr": torch.tensor([0, 9])}, VE, ("ptr[-1]", "8", "9")),
    (34, {"ptr": torch.tensor([0, -1, 8])}, VE, ("ptr", "-1")),
    (34, {"ptr": torch.tensor([-(2**63), 8])}, VE, ("ptr[0]", str(-(2**63)))),
    (34, {"ptr": torch.tensor([0, 2**63 - 1])}, VE, ("ptr[-1]", str(2**63 - 1))),
    (34, {"ptr": torch.tensor([0, 2**63 - 1, -(2**63)])}, VE, ("ptr", str(2**63 - 1))),
    (35, {"k_ptr": PTR[:3]}, VE, ("k_ptr", "4", "3")),
    (37, {"k_ptr": [0, 8]}, TE, ("k_ptr", "list")),
    (37, {"k_ptr": PTR.float()}, TE, ("k_ptr", "float32")),
    (37, {"k_ptr": PTR[None]}, VE, ("k_ptr", "(1, 4)")),
    (37, {"k_ptr": torch.tensor([0, 3, 2, 8])}, VE, ("k_ptr[1] = 3", "k_ptr[2] = 2")),
    (40, {"bias": 1.0}, TE, ("bias", "float")),
    (41, {"bias": torch.zeros(34)}, VE, ("bias", "[P, 2]", "(34,)")),
    (41, {"bias": torch.zeros(34, 3)}, VE, ("bias", "[P, 2]", "(34, 3)")),
    (42, {"bias": torch.zeros(35, 2)}, VE, ("bias", "34", "35")),
    (43, {"bias": BIAS.half()}, TE, ("bias", "float32", "float16")),
    (40, {"key_bias": 1.0}, TE, ("key_bias", "float")),
    (41, {"key_bias": torch.zeros(7, 2)}, VE, ("key_bias", "[8] or [8, 2]", "(7, 2)")),
    (41, {"key_bias": torch.zeros(8, 3)}, VE, ("key_bias", "[8] or [8, 2]", "(8, 3)")),
    (41, {"key_bias": torch.zeros(34)}, VE, ("key_bias", "[8] or [8, 2]", "(34,)")),
    (41, {"key_bias": torch.zeros(8, 2, 1)}, VE, ("key_bias", "(8, 2, 1)")),
    (43, {"key_bias": torch.zeros(8).half()}, TE, ("key_bias", "float32", "float16")),
    (44, {"key_bias": torch.zeros(8).to("meta")}, VE, ("key_bias", "cpu", "meta")),
    (5, {"key_bias": torch.zeros(8).to_sparse()}, NIE, ("key_bias", "sparse")),
    (5, {"bias": BIAS.to_sparse()}, NIE, ("bias", "sparse")),
    (5, {"ptr": PTR.to_sparse()}, NIE, ("ptr", "sparse")),
    (44, {"bias": BIAS.to("meta")}, VE, ("bias", "cpu", "meta")),
    (48, {"scale": torch.tensor(1.0)}, TE, ("scale", "Tensor")),
    (48, {"scale": "1"}, TE, ("scale", "str")),
    (49, {"scale": float("nan")}, VE, ("scale", "nan")),
    (49, {"scale": float("inf")}, VE, ("scale", "inf")),
    (49, {"scale": 1e39}, VE, ("scale", "1e+39")),
    (49, {"scale": 10**400}, VE, ("scale", "1000")),
    (51, {"dropout": True}, TE, ("dropout", "bool")),
    (51, {"dropout": "0.1"}, TE, ("dropout", "str")),
    (51, {"dropout": torch.tensor(0.1)}, TE, ("dropout", "Tensor")),
    (52, {"dropout": -0.1}, VE, ("dropout", "-0.1")),
    (52, {"dropout": 1.0}, VE, ("dropout", "1.0")),
    (52, {"dropout": float("nan")}, VE, ("dropout", "nan")),
    (53, {"dropout": 0.1, "backend": "sdpa"}, BackendError, ("sdpa", "dropout")),
    (54, {"return_lse": True, "backend": "sdpa"}, BackendError, ("sdpa", "return_lse")),
    (55, {"max_seqlen": 8}, TE, ("max_seqlen",)),
    (55, {"dropuot": 0.1}, TE, ("dropuot",)),
    (59, {"backend": "fastest"}, VE, ("backend", "fastest", "reference")),
    (59, {"backend": 3}, TE, ("backend", "int")),
    (59, {"return_lse": 1}, TE, ("return_lse", "int")),
]


@pytest.mark.parametrize(("row", "changes", "error", "words"), WRONG)
def test_bad_input(row, changes, error, words):
    with pytest.raises(error) as caught:
        call(**changes)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value), f"row {row}"


def test_biases_of_all_heads(native):
    """[N] and [P, 1] are the same numbers in every head, and so are their derivatives."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (x.double() for x in tensors())
    of_pairs, of_keys = (
        torch.randn(n, 1, generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (34, 8)
    )

    def derivatives(bias, key_bias):
        out = set_attention(q, k, v, PTR, bias=bias, key_bias=key_bias, backend=native)
        leaves = of_pairs, of_keys
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
        return out, *first, *second

    spread = derivatives(of_pairs.expand(-1, 2).contiguous(), of_keys.expand(-1, 2).contiguous())
    for keys in (of_keys, of_keys[:, 0]):
        for x, y in zip(derivatives(of_pairs, keys), spread):
            assert torch.allclose(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_least_finite_bias_forbids_nothing(native, dtype):
    """Many masks are made of it; in units of log 2 it would be -inf."""
    q, k, v = (x.to(dtype) for x in tensors())
    for value in (torch.finfo(dtype).min, torch.finfo(dtype).max):
        wanted = set_attention(torch.zeros_like(q), k, v, PTR)
        of_keys = torch.full((8,), value, dtype=dtype)
        of_pairs = torch.full((34, 2), value, dtype=dtype)
        for options in ({"key_bias": of_keys}, {"bias": of_pairs}):
            found = set_attention(q, k, v, PTR, backend=native, **options)
            assert torch.allclose(found, wanted, atol=1e-6 if dtype != torch.bfloat16 else 2e-2)


def test_a_key_bias_is_a_bias_of_pairs(native):
    q, k, v = tensors()
    key_bias = torch.randn(8, 2)
    key_bias[4] = -torch.inf
    counts = PTR.diff()
    rows = [key_bias[a:b].repeat(int(n), 1) for a, b, n in zip(PTR, PTR[1:], counts)]
    expected = set_attention(q, k, v, PTR, bias=torch.cat(rows), backend=native)
    found = set_attention(q, k, v, PTR, key_bias=key_bias, backend=native)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    ptr = torch.tensor([0, 4, 8])
    pooled = seed_pool(q[:2], k, v, ptr, key_bias=key_bias, backend=native)
    changed = v.clone()
    changed[4] = 7.0
    assert torch.equal(pooled, seed_pool(q[:2], k, changed, ptr, key_bias=key_bias, backend=native))


SEEDS_WRONG = [
    (41, {"key_bias": torch.zeros(7)}, VE, ("key_bias", "[8] or [8, 2]", "(7,)")),
    (1, {"seeds": None}, TE, ("seeds", "NoneType")),
    (56, {"seeds": X[0]}, VE, ("seeds", "[S, H, D]", "(2, 4)")),
    (56, {"seeds": X[:2, :1]}, VE, ("seeds", "heads")),
    (56, {"seeds": X[:2, :, :3]}, VE, ("seeds", "head dimension", "3", "4")),
    (57, {"seeds": X[:0]}, VE, ("seeds", "at least 1 seed")),
    (58, {"seeds": X[:2].double()}, TE, ("seeds", "float64")),
    (58, {"seeds": X[:2].to("meta")}, VE, ("seeds", "meta")),
    (55, {"k_ptr": PTR}, TE, ("k_ptr",)),
    (42, {"bias": torch.zeros(15, 2)}, VE, ("bias", "16", "15")),
]


@pytest.mark.parametrize(("row", "changes", "error", "words"), SEEDS_WRONG)
def test_bad_seeds(row, changes, error, words):
    with pytest.raises(error) as caught:
        pool(**changes)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value), f"row {row}"


def test_every_dimension_plus_one():
    """Rows 8-12 and 56: each dimension of each tensor, off by one, is refused."""
    for name, axis in itertools.product(("q", "k", "v"), range(3)):
        if (name, axis) == ("v", 2):
            continue  # D_v is free
        shape = [8, 2, 4]
        shape[axis] += 1
        with pytest.raises(ValueError, match=r"q|k|v"):
            call(**{name: torch.randn(shape)})
    for axis in (1, 2):
        shape = [3, 2, 4]
        shape[axis] += 1
        with pytest.raises(ValueError, match="seeds"):
            pool(seeds=torch.randn(shape))


def test_other_subclasses_are_refused():
    class Labelled(torch.Tensor):
        pass

    with pytest.raises(NotImplementedError, match="Labelled"):
        call(q=X.as_subclass(Labelled))


def test_positional_extras_are_refused():
    with pytest.raises(TypeError, match="positional"):
        set_attention(X, X, X, PTR, PTR, None)


def test_int32_boundaries_of_many_rows():
    many = torch.empty(1, 1, 1).expand(2**31, 1, 1)
    with pytest.raises(ValueError, match="int64 for 2147483648 rows"):
        set_attention(many, many, many, torch.tensor([0, 1], dtype=torch.int32))


def test_meta_tensors():
    q, k, v = (x.to("meta") for x in tensors(value_dim=6))
    out, lse = set_attention(q, k, v, PTR.to("meta"), return_lse=True)
    assert out.is_meta and out.shape == (8, 2, 6) and lse.shape == (8, 2)
    assert seed_pool(q[:5], k, v, PTR).shape == (3, 5, 2, 6)


def test_over_512_falls_back():
    q, k, v = tensors(dim=520)
    out = set_attention(q, k, v, PTR)
    assert torch.allclose(out, set_attention(q, k, v, PTR, backend="reference"), atol=1e-5)
    for name in PRIORITY:
        if name in ("cpu", "cuda", "triton"):
            with pytest.raises(BackendError, match="520"):
                set_attention(q, k, v, PTR, backend=name)


def test_backend_error_lists_every_backend():
    with pytest.raises(BackendError) as caught:
        call(dropout=0.5, backend="sdpa")
    for name in PRIORITY:
        assert name in str(caught.value)


def test_forward_mode_and_vmap_are_refused():
    q, k, v = tensors()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: set_attention(q, k, v, PTR), (q,), (q,))
    with pytest.raises(NotImplementedError, match=r"bias.*forward-mode"):
        torch.func.jvp(lambda b: set_attention(q, k, v, PTR, bias=b), (BIAS,), (BIAS,))
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(lambda q: set_attention(q, k, v, PTR))(q[None])
    with pytest.raises(NotImplementedError, match=r"bias.*vmap"):
        torch.vmap(lambda b: set_attention(q, k, v, PTR, bias=b))(BIAS[None])
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda q: set_attention(q, k, v, PTR).sum())(q)


def test_forward_over_reverse_is_refused(native):
    """A tangent of the incoming gradient must not be lost in silence."""
    q, k, v = tensors()
    mode = torch.autograd.forward_ad
    with mode.dual_level():
        q.requires_grad_()
        out = set_attention(q, k, v, PTR, backend=native)
        dual = mode.make_dual(torch.ones_like(out), torch.ones_like(out))
        if native == "reference":
            (gradient,) = torch.autograd.grad(out, q, dual)
            assert mode.unpack_dual(gradient).tangent is not None
        else:
            with pytest.raises(NotImplementedError, match="forward-mode"):
                torch.autograd.grad(out, q, dual)


def test_zero_and_negative_scale(native):
    q, k, v = tensors()
    out = set_attention(q, k, v, PTR, scale=0, backend=native)
    assert torch.allclose(out[:3], v[:3].mean(0).expand(3, 2, 4), atol=1e-6)
    flipped = set_attention(-q, k, v, PTR, scale=-0.5, backend=native)
    assert torch.equal(flipped, set_attention(q, k, v, PTR, scale=0.5, backend=native))


def test_boundaries_of_every_kind_give_the_same_bits(native):
    q, k, v = tensors()
    expected = set_attention(q, k, v, PTR, backend=native)
    spaced = torch.stack([PTR, PTR], 1)[:, 0]
    assert not spaced.is_contiguous()
    batch = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2])
    for ptr in (
        PTR.int(),
        spaced,
        Ragged.from_ptr(PTR),
        Ragged.from_counts([3, 0, 5]),
        Ragged.from_batch(batch),
    ):
        assert torch.equal(set_attention(q, k, v, ptr, backend=native), expected)
    mixed = set_attention(q, k, v, PTR.int(), PTR.long(), backend=native)
    assert torch.equal(mixed, expected)


def test_rows_of_no_molecule(native):
    q, k, v = (x.requires_grad_() for x in tensors(10))
    out, lse = set_attention(q, k, v, PTR, backend=native, return_lse=True)
    assert not out[8:].any() and (lse[8:] == -torch.inf).all()
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all() and not x.grad[8:].any()


def test_negative_bit_and_views(native):
    q, k, v = tensors(dtype=torch.float64)
    z = torch.complex(q, k)
    negated = torch.conj(z).imag
    assert negated.is_neg()
    expected = set_attention(q, -k, v, PTR, backend=native)
    assert torch.equal(set_attention(q, negated, v, PTR, backend=native), expected)
    flipped = set_attention(q.flip(1), -k.flip(1), v.flip(1), PTR, backend=native)
    assert torch.equal(flipped.flip(1), expected)


def test_the_same_tensor_three_times(native):
    x = torch.randn(8, 2, 4, dtype=torch.float64, requires_grad=True)
    set_attention(x, x, x, PTR, backend=native).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    set_attention(y, y, y, PTR, backend="reference").square().sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-12)


def test_nan_stays_in_its_molecule(native):
    ptr = torch.arange(0, 71, 7)
    for name, bad in itertools.product(range(3), (float("nan"), float("inf"))):
        clean = [torch.randn(70, 2, 8) for _ in range(3)]
        dirty = [x.clone() for x in clean]
        dirty[name][30, 1, 3] = bad
        results = []
        for values in (clean, dirty):
            leaves = [x.requires_grad_() for x in values]
            out = set_attention(*leaves, ptr, backend=native)
            out.backward(torch.ones_like(out))
            results.append([out.detach(), *(x.grad for x in leaves)])
        for a, b in zip(*results):
            assert torch.equal(a[:28], b[:28]) and torch.equal(a[35:], b[35:])
            assert torch.equal(a[28:35, 0], b[28:35, 0])  # nor another head


def test_many_tiny_and_one_giant(native):
    ptr = torch.arange(70_001)
    x = torch.randn(70_000, 1, 2)
    assert torch.allclose(set_attention(x, x, x, ptr, backend=native), x, atol=1e-6)
    if native == "cpu":
        x = torch.randn(20_000, 1, 8)
        ptr = torch.tensor([0, 20_000])
        out = set_attention(x, x, x, ptr, backend=native)
        weights = torch.softmax(x[:50, 0].double() @ x[:, 0].double().T / 8**0.5, 1)
        assert torch.allclose(out[:50, 0].double(), weights @ x[:, 0].double(), atol=1e-6)


def test_autocast():
    linear = torch.nn.Linear(8, 24)
    x = torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = linear(x).view(8, 3, 2, 4).unbind(1)
        out = set_attention(q, k, v, PTR)
        pooled = seed_pool(torch.randn(3, 2, 4), k, v, PTR)  # a float32 parameter
        double = set_attention(*tensors(dtype=torch.float64), PTR)
    assert out.dtype == pooled.dtype == torch.bfloat16 and double.dtype == torch.float64
    out.float().sum().backward()
    assert linear.weight.grad.dtype == torch.float32


def test_explain_names_every_backend(capsys):
    q, k, v = tensors()
    explain(q, k, v, PTR)
    text = capsys.readouterr().out
    assert all(name in text for name in PRIORITY) and text.count("*") == 1
    explain(q[:2], k, v, PTR, shared=True, dropout=0.5)
    assert "seeds=2" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"ptr\[0\]"):
        explain(q, k, v, PTR + 1)


@pytest.mark.parametrize("leaf", ["q", "k", "v", "bias", "key_bias"])
def test_facts_of_a_call_are_those_of_its_arguments(capsys, leaf):
    """The order of the derivative, dropout and biases decide which backend is chosen."""
    q, k, v = tensors()
    given = {"q": q, "k": k, "v": v, "ptr": PTR}

    def facts(**changes):
        explain(**(given | changes))
        return capsys.readouterr().out.split("\n")[0]

    assert facts() == "torch.float32 on cpu, head_dim=4, value_dim=4, deterministic=True"
    assert "dropout=True" in facts(dropout=0.5)
    more = {"bias": torch.zeros(34, 2), "key_bias": torch.zeros(8, 2)}
    assert not [x for x in ("bias=True", "grad_order") if x in facts(key_bias=None)]
    x = (given | more)[leaf].clone().requires_grad_()
    text = facts(**{leaf: x})
    assert "grad_order=2" in text and (f" {leaf}=True" in text) == (leaf in more)
    assert "grad_order=1" in facts(**{leaf: x}, backend="reference")
    with torch.no_grad():
        assert "grad_order" not in facts(**{leaf: x})
