"""Compile, export, copies, checkpoints, and no wait for the device."""

import copy
import io
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from attnpool_kernels import Ragged
from attnpool_kernels.nn import (
    PAPER,
    AttentionalPooling,
    AttentionPooling,
    MaxPooling,
    MeanPooling,
    SeedPooling,
    SoftmaxPooling,
    WeightedAverage,
)

C = 12
MODULES = {
    "abp": lambda: AttentionPooling(C, 16, heads=2, seeds=3),
    "one seed": lambda: AttentionPooling(C, 16, heads=2, seeds=1, activation="silu"),
    "paper": lambda: AttentionPooling(C, C, heads=2, seeds=3, **PAPER),
    "induced": lambda: AttentionPooling(C, 16, heads=2, seeds=3, points=4),
    "seeds": lambda: SeedPooling(C, 16, heads=2, seeds=2),
    "mean": MeanPooling,
    "max": MaxPooling,
    "softmax": SoftmaxPooling,
    "gated": lambda: AttentionalPooling(C, 5, hidden=4),
    "weighted": lambda: WeightedAverage(C, 2, hidden=(4,)),
}
BATCHES = ([3, 0, 5, 2, 4], [2, 7, 1, 4, 1, 1], [6, 6, 6, 6, 9, 1, 1], [20, 3, 8, 1, 1, 1, 1, 11])


def atoms(counts):
    generator = torch.Generator().manual_seed(sum(counts))
    x = torch.randn(sum(counts), C, generator=generator)
    return x.requires_grad_(), Ragged.from_counts(counts).ptr


@pytest.mark.parametrize("name", MODULES)
def test_compile(name):
    torch._dynamo.reset()
    module = MODULES[name]()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for counts in BATCHES:
        x, ptr = atoms(counts)
        inputs = [x, *module.parameters()]
        out, wanted = compiled(x, ptr), module(x, ptr)
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
        cotangent = torch.randn_like(wanted)
        for a, b in zip(
            torch.autograd.grad(out, inputs, cotangent),
            torch.autograd.grad(wanted, inputs, cotangent),
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", MODULES)
def test_export(name):
    module = MODULES[name]()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        module, tuple(t.detach() for t in atoms(BATCHES[0])), dynamic_shapes=({0: auto}, {0: auto})
    )
    x, ptr = atoms(BATCHES[1])
    torch.testing.assert_close(program.module()(x.detach(), ptr), module(x, ptr))


@pytest.mark.parametrize("name", MODULES)
def test_copies_and_checkpoints(name):
    module = MODULES[name]()
    x, ptr = atoms(BATCHES[0])
    wanted = module(x, ptr)
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()}
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(x, ptr), wanted)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = MODULES[name]()
    other.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    assert torch.equal(other(x, ptr), wanted)


def test_state_does_not_depend_on_the_backend():
    one, other = (
        AttentionPooling(C, 16, heads=2, seeds=3, backend=backend)
        for backend in ("reference", None)
    )
    other.load_state_dict(one.state_dict())
    x, ptr = atoms(BATCHES[0])
    torch.testing.assert_close(one(x, ptr), other(x, ptr))


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_read_back_from_the_device(name):
    """Fake tensors have no contents: whatever reads one, forward or backward, raises."""
    module = MODULES[name]()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(15, C, requires_grad=True)
        ptr = torch.empty(6, dtype=torch.int64)
        out = module(x, ptr)
        assert out.shape[0] == 5
        out.sum().backward()
        assert x.grad.shape == x.shape


def test_rows_of_no_molecule_reach_nothing():
    """NaN behind the last molecule: results, gradients and weights' gradients are as without."""
    for make in MODULES.values():
        module = make()
        x, ptr = atoms(BATCHES[0])
        longer = torch.cat([x.detach(), torch.full((2, C), torch.nan)]).requires_grad_()
        parameters = list(module.parameters())
        out, wanted = module(longer, ptr), module(x, ptr)
        assert torch.equal(out, wanted)
        dx, *found = torch.autograd.grad(out.sum(), [longer, *parameters])
        _, *wanted = torch.autograd.grad(wanted.sum(), [x, *parameters])
        assert not dx[-2:].any() and dx.isfinite().all()
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))
