"""The registered operators under torch's own checks, compilers and exporters."""

import copy
import io
import pickle

import pytest
import torch

from attnpool_kernels import Ragged, ops, seed_pool, set_attention, testing
from attnpool_kernels.impl import load

CASES = [
    case
    for case in testing.CASES
    if case.name
    in {
        "empty among them",
        "other keys",
        "four seeds",
        "bias",
        "both biases",
        "key bias of seeds",
        "dropout of seeds",
        "no molecules",
    }
]


def arguments(case, native, dtype=torch.float32):
    """Arguments of the three operators for a case."""
    batch = case.make(dtype)
    x, dy, options = batch.operands, batch.cotangents, batch.options
    y = passes(native).forward(*x, *options)
    tangents = batch.tangents._replace(ddv=None)
    return {
        "forward": (*x, *options),
        "backward": (*x, *y, *dy, *options, batch.bias is not None),
        "double_backward": (*x, *y, *dy, *tangents, *options),
    }


def passes(native):
    return ops.PASSES[load(native).OPERATORS]


def test_schemas_are_those_of_the_tuples():
    """csrc/library.cpp spells the schemas out; a C++ program finds them without Python."""
    for namespace, operators in ops.PASSES.items():
        for signature, operator in zip(ops.SIGNATURES.values(), operators):
            assert str(operator._schema) == f"{namespace}::{signature.schema()}"


@pytest.fixture
def kernel(native):
    if load(native).KIND == "composite":
        pytest.skip("the C++ library is not built")
    return native


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["forward", "backward", "double_backward"])
def test_opcheck(kernel, case, name):
    op = getattr(passes(kernel), name)
    torch.library.opcheck(op, arguments(case, kernel)[name])


@pytest.mark.parametrize("name", ["q", "k", "v", "k_ptr"])
@pytest.mark.parametrize("grad", [False, True])
def test_none_in_the_place_of_a_tensor(kernel, name, grad):
    """torch passes it on as a tensor that is not defined."""
    x = torch.randn(3, 1, 4, requires_grad=grad)
    ptr = torch.tensor([0, 3])
    given = {"q": x, "k": x, "v": x, "k_ptr": ptr} | {name: None}
    with pytest.raises(RuntimeError):
        torch.ops.attnpool.attention(
            *(given[n] for n in "qkv"), None, None, ptr, given["k_ptr"], None, None, 1.0, 0.0
        )


class Pooling(torch.nn.Module):
    """A module around the operators: fused projection, attention, seed pooling."""

    def __init__(self, backend=None):
        super().__init__()
        self.project = torch.nn.Linear(6, 24)
        self.seeds = torch.nn.Parameter(torch.randn(3, 2, 4))
        self.backend = backend

    def forward(self, x, ptr):
        q, k, v = self.project(x).unflatten(1, (3, 2, 4)).unbind(1)
        x = set_attention(q, k, v, ptr, backend=self.backend)
        return seed_pool(self.seeds, x, x, ptr, backend=self.backend).flatten(1)


def batches(count):
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        counts = torch.randint(0, 20, (2 + i % 7,), generator=generator)
        ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        yield torch.randn(int(ptr[-1]), 6, generator=generator), ptr


@pytest.mark.parametrize("wrap", [lambda ptr: ptr, Ragged.from_ptr], ids=["ptr", "Ragged"])
def test_compiles_at_most_twice_for_20_batches(kernel, wrap):
    torch._dynamo.reset()
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph.forward

    model = Pooling(kernel)
    fast = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for x, ptr in batches(20):
        assert torch.equal(fast(x, wrap(ptr)), model(x, ptr))
    assert len(compilations) <= 2


def test_compiled_gradients(kernel):
    torch._dynamo.reset()
    model = Pooling(kernel)
    fast = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for x, ptr in batches(3):
        gradients = []
        for run in (model, fast):
            model.zero_grad()
            run(x, ptr).square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_compiled_code_has_no_silent_second_derivative(kernel):
    torch._dynamo.reset()
    fast = torch.compile(Pooling(kernel), fullgraph=True, dynamic=True, backend="aot_eager")
    x, ptr = next(iter(batches(1)))
    energy = fast(x.requires_grad_(), ptr).square().sum()
    with pytest.raises(RuntimeError, match=r"create_graph|double backward"):
        torch.autograd.grad(energy, x, create_graph=True)[0].square().sum().backward()


def test_compiled_dropout_and_bias(kernel):
    torch._dynamo.reset()
    ptr = torch.tensor([0, 3, 8])

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def run(x, bias, ptr):
        return set_attention(x, x, x, ptr, bias=bias, dropout=0.5, backend=kernel)

    x = torch.randn(8, 2, 4, requires_grad=True)
    out = run(x, torch.randn(34, 2), ptr)
    out.sum().backward()
    assert x.grad.isfinite().all() and out.isfinite().all()


@pytest.mark.parametrize("strict", [False, True])
def test_export(kernel, strict):
    model = Pooling(kernel).eval()
    (x, ptr), (other, other_ptr) = list(batches(7))[5:]
    # torch's exporter treats sizes 0 and 1 apart: at least 2 molecules, so at least 3 boundaries.
    rows, molecules = torch.export.Dim("rows", min=2), torch.export.Dim("molecules", min=3)
    program = torch.export.export(
        model, (x, ptr), dynamic_shapes=({0: rows}, {0: molecules}), strict=strict
    )
    assert torch.equal(program.module()(other, other_ptr), model(other, other_ptr))
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    assert torch.equal(torch.export.load(stream).module()(x, ptr), model(x, ptr))


def test_copies_and_pickles(kernel):
    model = Pooling(kernel)
    x, ptr = next(iter(batches(1)))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, ptr), model(x, ptr))


def test_make_fx_traces_both_derivatives(kernel):
    from torch.fx.experimental.proxy_tensor import make_fx

    ptr = torch.tensor([0, 3, 8])

    def run(x, ptr):
        out = set_attention(x, x, x, ptr, backend=kernel)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    x = torch.randn(8, 2, 4, requires_grad=True)
    for mode in ("fake", "symbolic"):
        graph = make_fx(run, tracing_mode=mode)(x, ptr)
        names = {str(node.target) for node in graph.graph.nodes}
        assert f"{load(kernel).OPERATORS}.attention_double_backward.default" in names
        assert torch.allclose(graph(x, ptr), run(x, ptr))


def test_bits_do_not_depend_on_batch_or_threads(kernel):
    """P6: out, lse and gradients of both orders, alone and in a batch at another position."""
    counts = [5, 18, 1, 33, 0, 64, 17]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        case = testing.Case("batch", tuple(counts), heads=3, dim=24, lse=True)
        batch = case.make(dtype)
        threads = torch.get_num_threads()
        whole = testing.run_kernels(batch, load(kernel))
        torch.set_num_threads(1)
        single = testing.run_kernels(batch, load(kernel))
        torch.set_num_threads(threads)
        for name, x in whole.items():
            assert torch.equal(x, single[name]), name
        start = 0
        for n in counts:
            alone = testing.Case("alone", (n,), heads=3, dim=24, lse=True).make(dtype)
            for field in ("q", "k", "v", "dout", "dlse", "ddq", "ddk", "ddv"):
                setattr(alone, field, getattr(batch, field)[start : start + n])
            for name, x in testing.run_kernels(alone, load(kernel)).items():
                assert torch.equal(x, whole[name][start : start + n]), (name, n)
            start += n
