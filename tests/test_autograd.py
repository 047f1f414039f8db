"""First and second derivatives: exact in float64, inside the budget elsewhere, refused beyond."""

import itertools

import pytest
import torch

from attnpool_kernels import autograd, seed_pool, set_attention, testing
from attnpool_kernels.impl import load

PTR = torch.tensor([0, 3, 3, 4, 9])
ORDERS = [
    subset
    for size in range(1, 5)
    for subset in itertools.combinations(("q", "k", "v", "bias"), size)
]


def leaves(dim=3, value_dim=2, heads=2, bias=True):
    made = {
        "q": torch.randn(9, heads, dim, dtype=torch.float64),
        "k": torch.randn(9, heads, dim, dtype=torch.float64),
        "v": torch.randn(9, heads, value_dim, dtype=torch.float64),
    }
    if bias:
        made["bias"] = torch.randn(35, heads, dtype=torch.float64)
    return made


def check(function, inputs, fast=True):
    options = {"nondet_tol": 0.0, "fast_mode": fast}
    assert torch.autograd.gradcheck(function, inputs, check_undefined_grad=True, **options)
    assert torch.autograd.gradgradcheck(
        function, inputs, gen_non_contig_grad_outputs=True, **options
    )


@pytest.mark.parametrize("subset", ORDERS, ids="+".join)
def test_every_subset_of_inputs(native, subset):
    made = leaves()

    def run(*inputs):
        return set_attention(
            **(made | dict(zip(subset, inputs))), ptr=PTR, backend=native, return_lse=True
        )[0]

    check(run, [made[name].requires_grad_() for name in subset])


@pytest.mark.parametrize(("dim", "value_dim", "heads"), [(1, 1, 1), (2, 3, 1), (8, 8, 2)])
def test_whole_jacobian(native, dim, value_dim, heads):
    """Not the fast mode: every element of both Jacobians."""
    ptr = torch.tensor([0, 2, 2, 5])
    x = [torch.randn(5, heads, d, dtype=torch.float64) for d in (dim, dim, value_dim)]
    inputs = [t.requires_grad_() for t in x]
    check(lambda *t: set_attention(*t, ptr, backend=native), inputs, fast=dim > 2)


def test_lse_has_a_gradient(native):
    made = leaves()

    def run(*inputs):
        out, lse = set_attention(*inputs[:3], PTR, bias=inputs[3], backend=native, return_lse=True)
        return out, lse

    check(run, [x.requires_grad_() for x in made.values()])


def test_lse_alone(native):
    made = leaves(bias=False)

    def run(q, k):
        return set_attention(q, k, made["v"], PTR, backend=native, return_lse=True)[1]

    check(run, [made["q"].requires_grad_(), made["k"].requires_grad_()])


def test_dropout(native):
    made = leaves()

    def run(*inputs):
        torch.manual_seed(3)
        return set_attention(
            *inputs[:3], PTR, bias=inputs[3], dropout=0.4, backend=native, return_lse=True
        )

    check(run, [x.requires_grad_() for x in made.values()])


def test_other_keys(native):
    q, k, v = (torch.randn(n, 2, 3, dtype=torch.float64) for n in (6, 9, 9))
    q_ptr = torch.tensor([0, 2, 4, 4, 5])
    inputs = [x.requires_grad_() for x in (q, k, v)]
    check(lambda *t: set_attention(*t, q_ptr, PTR, backend=native), inputs)


def test_seeds(native):
    seeds = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    made = leaves(bias=False)
    bias = torch.randn(27, 2, dtype=torch.float64, requires_grad=True)
    inputs = [seeds, made["k"].requires_grad_(), made["v"].requires_grad_(), bias]

    def run(seeds, k, v, bias):
        out, lse = seed_pool(seeds, k, v, PTR, bias=bias, backend=native, return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)  # no differences of infinities

    check(run, inputs)


def test_against_the_oracle(native):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        testing.check_backend(native, dtype)


def energy_and_force_loss(x, weight, backend):
    """E from pooled attention of features; a loss on F = -dE/dx as in force training."""
    q, k, v = (x @ weight).unflatten(1, (3, 2, 4)).unbind(1)
    pooled = set_attention(q, k, v, PTR, backend=backend)
    pooled = seed_pool(weight[:1, :8].view(1, 2, 4), pooled, pooled, PTR, backend=backend)
    energy = pooled.square().sum()
    force = -torch.autograd.grad(energy, x, create_graph=True)[0]
    return (force - 1).square().sum()


@pytest.mark.parametrize("style", ["backward", "grad"])
def test_force_training(native, style):
    found = []
    for backend in (native, "reference", None):
        torch.manual_seed(1)
        x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
        loss = energy_and_force_loss(x, weight, backend)
        if style == "backward":
            loss.backward()
            found.append(weight.grad)
        else:
            found.append(torch.autograd.grad(loss, weight)[0])
    for other in found[1:]:
        assert torch.allclose(found[0], other, rtol=1e-10)


@pytest.mark.parametrize("linear", [True, False])
def test_no_pass_without_a_cotangent(linear, monkeypatch):
    """A loss on gradients alone sends nothing through out: no pass may run on zeros for it."""
    if load("cpu").KIND == "composite":
        pytest.skip("the C++ library is not built")
    ran = []

    def counted(passes, flat):
        ran.append(str(passes))
        return run(passes, flat)

    run = autograd._run
    monkeypatch.setattr(autograd, "_run", counted)
    q, k, v = (leaves(bias=False)[name].requires_grad_() for name in "qkv")
    out = set_attention(q, k, v, PTR, backend="cpu")
    energy = out.sum() if linear else out.square().sum()
    forces = torch.autograd.grad(energy, (q, k, v), create_graph=True)
    ran.clear()
    loss = sum(f.square().sum() for f in forces)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, (q, k, v)))
    assert [x.count("double_backward") for x in ran] == [1] if linear else len(ran) == 2


def test_first_order_backends_refuse_a_second_derivative(monkeypatch):
    """Also where the incoming gradient is a constant, and in both call styles."""
    # A native kernel would step in for the second derivative, see tests/impl.
    monkeypatch.setattr(autograd, "_native", lambda *_: None)  # no kernel of ours to take its place
    q, k, v = (torch.randn(9, 2, 4, requires_grad=True) for _ in range(3))
    out = set_attention(q, k, v, PTR, backend="sdpa")
    with pytest.raises(NotImplementedError, match=r"sdpa.*second derivative"):
        torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="sdpa"):
        out.sum().backward(create_graph=True)
    out.sum().backward()
    assert q.grad.isfinite().all()


def test_third_derivative_raises(native):
    if load(native).KIND == "composite":
        pytest.skip("reference has every order")
    x = torch.randn(9, 2, 4, dtype=torch.float64, requires_grad=True)
    out = set_attention(x, x, x, PTR, backend=native)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"'{native}' has no third derivative"):
        torch.autograd.grad(second.sum(), x)


def test_every_gradient_has_a_derivative(native):
    """gradgradcheck leaves out a gradient that has none, as if nobody had asked for it."""
    made = leaves() | {"key_bias": torch.randn(9, 2, dtype=torch.float64)}
    inputs = [x.requires_grad_() for x in made.values()]
    out = set_attention(**made, ptr=PTR, backend=native)
    for dx in torch.autograd.grad(out.square().sum(), inputs, create_graph=True):
        (second,) = torch.autograd.grad(dx.square().sum(), made["q"], retain_graph=True)
        assert second.any()


@pytest.mark.parametrize("wanted", [False, True])
def test_a_gradient_per_pair_is_computed_only_where_it_is_wanted(native, monkeypatch, wanted):
    """It has as many rows as there are pairs of atoms, which no other gradient has."""
    if load(native).KIND == "composite":
        pytest.skip("its gradients are those of torch")
    made, asked = leaves(), []
    passes = autograd.CALLS[load(native).OPERATORS]

    def backward(*flat):
        asked.append(flat[-1])
        return passes.backward(*flat)

    monkeypatch.setitem(autograd.CALLS, load(native).OPERATORS, passes._replace(backward=backward))
    made["q"].requires_grad_()
    made["bias"].requires_grad_(wanted)
    set_attention(**made, ptr=PTR, backend=native).sum().backward()
    assert asked == [wanted]


def test_third_derivative_of_the_reference():
    x = torch.randn(9, 2, 4, dtype=torch.float64, requires_grad=True)
    out = set_attention(x, x, x, PTR, backend="reference")
    for _ in range(3):
        (out,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    assert out.isfinite().all()


def test_unused_and_repeated(native):
    q, k, v = (torch.randn(9, 2, 4, requires_grad=True) for _ in range(3))
    out = set_attention(q, k, v, PTR, backend=native)
    first = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    again = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    with torch.no_grad():
        assert set_attention(q, k, v, PTR, backend=native).grad_fn is None
    with torch.inference_mode():
        assert torch.equal(set_attention(q, k, v, PTR, backend=native), out)


def test_checkpointing_and_functional_grad(native):
    q, k, v = (torch.randn(9, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def run(q):
        return set_attention(q, k, v, PTR, backend=native).square().sum()

    expected = torch.autograd.grad(run(q), q)[0]
    for reentrant in (False, True):
        loss = torch.utils.checkpoint.checkpoint(run, q, use_reentrant=reentrant)
        q.grad = None
        loss.backward()
        assert torch.equal(q.grad, expected)


def test_strange_strides_of_the_incoming_gradient(native):
    q, k, v = (torch.randn(9, 2, 4, requires_grad=True) for _ in range(3))
    out = set_attention(q, k, v, PTR, backend=native)
    dense = torch.randn(9, 2, 4)
    for dout in (
        torch.ones(1).expand(9, 2, 4),
        dense.flip(0).flip(0),
        dense.transpose(0, 2).transpose(0, 2),
        torch.cat([dense, dense], 2)[..., 2:6],
        dense[:, :1].expand(9, 2, 4),
    ):
        given = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        plain = torch.autograd.grad(out, (q, k, v), dout.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(given, plain))


@pytest.mark.parametrize("seeds", [None, 3])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("counts", [(), (0,), (0, 0)])
def test_lse_of_no_molecules_has_a_graph(backend, seeds, counts):
    case = testing.Case("none", counts, seeds=seeds, lse=True, nobody=2)
    testing.judge(case, torch.float32, lambda batch: testing.run_public(batch, backend))
