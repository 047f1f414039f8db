"""First and second derivatives through every way that torch records or compiles a program.

A route takes an energy E(w, x, ptr) and gives back another function of the same arguments. Through
each of them dE/dw and the gradient of a loss on the force -dE/dx are those of the plain program, or
an error says that they cannot be had. No route may give other numbers without a word.
"""

import warnings
from contextlib import nullcontext, suppress

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from attnpool_kernels import Ragged, compat, seed_pool, set_attention
from attnpool_kernels.impl import load
from attnpool_kernels.nn import AttentionPooling

PTR = torch.tensor([0, 3, 3, 4, 9])
ROWS, WIDTH = 9, 5


def projected(w, x):
    return (x @ w).unflatten(1, (3, 2, 4)).unbind(1)


def attention_energy(native):
    def energy(w, x, ptr):
        return set_attention(*projected(w, x), ptr, backend=native).square().sum()

    return energy, torch.randn(WIDTH, 24)


def biased_energy(native):
    def energy(w, x, ptr):
        bias = (x @ w[:, :2]).repeat(4, 1)[:35]
        key_bias = (x @ w[:, 2:4]).cos()
        out, lse = set_attention(
            *projected(w, x),
            Ragged(ptr),
            bias=bias,
            key_bias=key_bias,
            backend=native,
            return_lse=True,
        )
        return out.square().sum() + lse.sin().sum()

    return energy, torch.randn(WIDTH, 24)


def seeds_energy(native):
    def energy(w, x, ptr):
        _, k, v = projected(w, x)
        return seed_pool(w[:1, :8].view(1, 2, 4), k, v, ptr, backend=native).square().sum()

    return energy, torch.randn(WIDTH, 24)


def compat_energy(native):
    def energy(w, x, ptr):
        edges = ptr.int()
        return compat.flash_attn_varlen_func(*projected(w, x), edges, edges, 5, 5).square().sum()

    return energy, torch.randn(WIDTH, 24)


def of_module(module, **keywords):
    """The energy of a pooling module as a function of one vector of all its weights."""
    module = module.double()
    shapes = {name: p.shape for name, p in module.named_parameters()}

    def energy(w, x, ptr):
        parts = w.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shapes[name]) for name, part in zip(shapes, parts)}
        arguments = (x,) if keywords else (x, ptr)
        given = {key: ptr for key in keywords}
        return torch.func.functional_call(module, weights, arguments, given).square().sum()

    return energy, torch.cat([p.detach().flatten() for p in module.parameters()])


def abp_energy(native):
    return of_module(AttentionPooling(WIDTH, 8, heads=2, seeds=2, encoder_blocks=1, backend=native))


def pyg_energy(native):
    pyg = pytest.importorskip("attnpool_kernels.zoo.pyg", exc_type=ImportError)
    module = pyg.SetTransformerAggregation(WIDTH, 2, heads=1, layer_norm=True, backend=native)
    return of_module(module, ptr=None)


ENERGIES = {
    "set_attention": attention_energy,
    "bias": biased_energy,
    "seed_pool": seeds_energy,
    "compat": compat_energy,
    "ABP": abp_energy,
    "PyG": pyg_energy,
}


def compiled(backend):
    def route(function, *arguments):
        torch._dynamo.reset()
        return torch.compile(function, backend=backend)

    return route


def traced(mode):
    def route(function, *arguments):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a missing derivative is said as a warning
            return make_fx(function, tracing_mode=mode)(*arguments)

    return route


def exported(strict):
    def route(function, *arguments):
        class Program(torch.nn.Module):
            def forward(self, w, x, ptr):
                return function(w, x, ptr)

        return torch.export.export(Program(), arguments, strict=strict).module()

    return route


def scripted(function, *arguments):
    return torch.jit.trace(function, arguments)


def functionalized(function, *arguments):
    return torch.func.functionalize(function)


def aot(function, *arguments):
    from functorch.compile import aot_function

    return aot_function(function, lambda graph, _: graph)


ROUTES = {
    "compile eager": compiled("eager"),
    "compile aot_eager": compiled("aot_eager"),
    "compile inductor": compiled("inductor"),
    "make_fx real": traced("real"),
    "make_fx fake": traced("fake"),
    "make_fx symbolic": traced("symbolic"),
    "functionalize": functionalized,
    "AOTAutograd": aot,
    "export": exported(False),
    "strict export": exported(True),
    "jit.trace": scripted,
}
# What torch itself cannot do, for any operator: it raises there, in words that differ by version.
MAY_REFUSE = {
    ("compile aot_eager", "second"),
    ("compile aot_eager", "force inside"),
    ("compile inductor", "second"),
    ("compile inductor", "force inside"),
    ("AOTAutograd", "second"),
    ("functionalize", "force inside"),
    ("export", "force inside"),
    ("strict export", "force inside"),
    ("jit.trace", "force inside"),
}


def leaves(weights):
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
    x = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return weights.double().clone().requires_grad_(), x.requires_grad_(), PTR


def force_loss(energy, create_graph=True):
    def loss(w, x, ptr):
        (force,) = torch.autograd.grad(energy(w, x, ptr), x, create_graph=create_graph)
        return (force + 1).square().sum()

    return loss


def weight_gradient(function, arguments):
    return torch.autograd.grad(function(*arguments), arguments[0])[0]


# Every route for the operators alone, and for the modules those that differ by more than the
# compiler behind them; the rest takes minutes.
QUICK = {
    "set_attention": [route for route in ROUTES if route != "compile inductor"],
    "bias": ["compile eager", "make_fx real"],
    "seed_pool": ["compile eager", "compile aot_eager", "make_fx real", "make_fx symbolic"],
    "compat": ["compile eager", "make_fx real"],
    "ABP": ["compile eager", "make_fx symbolic", "functionalize", "export"],
    "PyG": ["compile eager", "make_fx real", "strict export"],
}


def pairs():
    for name in ENERGIES:
        for route in ROUTES:
            if route == "jit.trace" and name in ("ABP", "PyG"):
                continue  # functional_call, which this test uses, takes no traced module
            marks = () if route in QUICK[name] else pytest.mark.slow
            yield pytest.param(name, route, marks=marks, id=f"{name}-{route}")


@pytest.mark.parametrize("order", ["first", "second", "force inside"])
@pytest.mark.parametrize(("name", "route"), list(pairs()))
def test_right_or_refused(native, name, route, order):
    if load(native).KIND == "composite":
        pytest.skip("the C++ library is not built")
    energy, weights = ENERGIES[name](native)
    arguments = leaves(weights)
    wanted = energy if order == "first" else force_loss(energy)
    expected = weight_gradient(wanted, arguments)
    inside = order == "force inside"

    def through_the_route():
        function = ROUTES[route](wanted if inside else energy, *arguments)
        return weight_gradient(
            force_loss(function) if order == "second" else function, leaves(weights)
        )

    may_refuse = suppress(Exception) if (route, order) in MAY_REFUSE else nullcontext()
    found = expected
    with may_refuse:
        found = through_the_route()
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("route", ["compile eager", "make_fx real", "functionalize", "export"])
def test_third_derivative_raises(native, route):
    if load(native).KIND == "composite":
        pytest.skip("the C++ library is not built")
    energy, weights = attention_energy(native)
    arguments = leaves(weights)
    function = ROUTES[route](energy, *arguments)
    (force,) = torch.autograd.grad(function(*arguments), arguments[1], create_graph=True)
    (second,) = torch.autograd.grad(force.square().sum(), arguments[1], create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative"):
        torch.autograd.grad(second.sum(), arguments[1])


def test_recorded_force_without_create_graph(native):
    """The recorded backward is an operator with a derivative of its own."""
    if load(native).KIND == "composite":
        pytest.skip("the C++ library is not built")
    energy, weights = attention_energy(native)
    graph = make_fx(force_loss(energy, create_graph=False))(*leaves(weights))
    found = weight_gradient(graph, leaves(weights))
    expected = weight_gradient(force_loss(energy), leaves(weights))
    assert torch.allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", ["set_attention", "bias"])
def test_checks_are_not_recorded(native, mode, name):
    """A graph holds what is computed, not how its arguments were checked."""
    energy, weights = ENERGIES[name](native if load(native).KIND == "kernel" else None)
    arguments = [x.detach() for x in leaves(weights)]
    if load(native).KIND == "composite":
        pytest.skip("the C++ library is not built")
    graph = make_fx(energy, tracing_mode=mode)(*arguments)
    names = {str(node.target) for node in graph.graph.nodes}
    assert "attnpool.attention.default" in names
    assert not names & {"attnpool.check_ptr.default", "aten._local_scalar_dense.default"}


def test_checks_still_happen_while_recording():
    def run(x, ptr):
        return set_attention(x, x, x, ptr)

    x = torch.randn(9, 2, 4)
    with pytest.raises(ValueError, match=r"ptr\[-1\] must be at most"):
        make_fx(run)(x, torch.tensor([0, 10]))
    with pytest.raises(ValueError, match="must not decrease"):
        make_fx(lambda x, ptr: run(x, Ragged(ptr)))(x, torch.tensor([0, 5, 3]))


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("sdpa", "cannot be recorded by make_fx"),
        ("reference", "recorded by make_fx"),
    ],
)
def test_composites_refuse_to_be_recorded_with_gradients(backend, words):
    """torch's graph detaches what these need: their recorded gradients would be wrong."""
    energy, weights = attention_energy(backend)
    with pytest.raises(NotImplementedError, match=words):
        make_fx(force_loss(energy))(*leaves(weights))
    arguments = [x.detach() for x in leaves(weights)]
    graph = make_fx(energy)(*arguments)
    assert torch.allclose(graph(*arguments), energy(*arguments))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_composites_under_a_compiler_that_keeps_autograd_outside(backend):
    energy, weights = attention_energy(backend)
    function = compiled("eager")(energy)
    expected = weight_gradient(force_loss(energy), leaves(weights))
    found = weight_gradient(force_loss(function), leaves(weights))
    assert torch.allclose(found, expected, rtol=1e-9)


def test_a_graph_runs_as_the_first_call_of_a_process(native, tmp_path):
    """The library is loaded by whoever needs it first, also where that is a saved graph."""
    import subprocess
    import sys

    if load(native).KIND == "composite":
        pytest.skip("the C++ library is not built")

    class Pool(torch.nn.Module):
        def forward(self, x, ptr):
            return set_attention(x, x, x, ptr, backend=native)

    x = torch.randn(9, 2, 4)
    torch.export.save(torch.export.export(Pool(), (x, PTR)), tmp_path / "pool.pt2")
    torch.save((x, PTR, Pool()(x, PTR)), tmp_path / "expected.pt")
    program = (
        "import sys, torch, attnpool_kernels\n"
        "x, ptr, expected = torch.load(sys.argv[2])\n"
        "module = torch.export.load(sys.argv[1]).module()\n"
        "assert torch.equal(module(x, ptr), expected)\n"
    )
    command = [sys.executable, "-c", program, tmp_path / "pool.pt2", tmp_path / "expected.pt"]
    subprocess.run(command, check=True)
