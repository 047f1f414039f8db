"""What a pooling meets at the edges: empty batches, any dtype and strides, torch's modes."""

import copy

import pytest
import torch

from attnpool_kernels import Ragged
from attnpool_kernels.nn import PYG, SetTransformer

from .test_module_state import MODULES, C

OF_TORCH = ("mean", "max", "softmax", "gated", "weighted")  # no operator of this package inside
PTR = torch.tensor([0, 2, 2, 9])
MODULES = MODULES | {"absorbed": lambda: SetTransformer(C, C, 2, heads=1, seeds=1, **PYG)}


def made(name, dtype=torch.float32):
    torch.manual_seed(0)
    return MODULES[name]().to(dtype), torch.randn(9, C, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODULES)
def test_empty_batches_and_single_atoms(name, dtype):
    module, _ = made(name, dtype)
    for counts in ([], [0, 0], [1], [0, 3, 0], [1, 1, 1]):
        x = torch.randn(sum(counts), C, dtype=dtype, requires_grad=True)
        ptr = Ragged.from_counts(counts).ptr
        out = module(x, ptr.int())
        assert out.dtype == dtype and out.shape[0] == len(counts) and out.isfinite().all()
        assert torch.equal(out, module(x, ptr))
        gradients = torch.autograd.grad(out.sum(), [x, *module.parameters()])
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("name", MODULES)
def test_strides(name):
    module, x = made(name, torch.float64)
    wide = torch.randn(9, 2 * C + 1, dtype=torch.float64)
    wide[:, 1::2] = x
    spread, turned = wide[:, 1::2], x.t().contiguous().t()
    results = []
    for same in (x, spread, turned):
        leaf = same.detach().requires_grad_()
        out = module(leaf, PTR)
        results.append((out, *torch.autograd.grad(out.sum(), [leaf, *module.parameters()])))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODULES)
def test_modes(name):
    module, x = made(name)
    wanted = module(x, PTR)
    with torch.inference_mode():
        assert torch.equal(module(x.clone(), PTR), wanted)
    parameters = {key: p.detach().clone() for key, p in module.named_parameters()}
    assert torch.equal(torch.func.functional_call(module, parameters, (x, PTR)), wanted)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(module(leaf, PTR).square().sum(), leaf)
    frozen = copy.deepcopy(module).requires_grad_(False)
    assert not frozen(x, PTR).requires_grad
    (alone,) = torch.autograd.grad(frozen(leaf, PTR).square().sum(), leaf)
    torch.testing.assert_close(alone, dx)
    total = module(leaf, PTR).sum()
    first, second = (torch.autograd.grad(total, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    module, x = made(name)
    wanted = module(x, PTR)
    with torch.autocast("cpu", dtype):
        leaf = x.clone().requires_grad_()
        out = module(leaf, PTR)
    out.float().sum().backward()
    assert leaf.grad.isfinite().all()
    assert (out.float() - wanted).abs().max() <= 0.05 * wanted.abs().max()


@pytest.mark.parametrize("name", [name for name in MODULES if name not in OF_TORCH])
def test_transforms_are_refused_with_a_reason(name):
    module, x = made(name)
    stacked = {key: torch.stack([p, p]) for key, p in module.state_dict().items()}

    def call(parameters, x):
        return torch.func.functional_call(module, parameters, (x, PTR))

    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(lambda x: module(x, PTR))(torch.stack([x, x]))
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(call, (0, None))(stacked, x)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda x: module(x, PTR).sum())(x)
    with pytest.raises(NotImplementedError, match=r"forward-mode|torch\.func"):
        torch.func.jvp(lambda x: module(x, PTR), (x,), (x,))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="forward-mode"),
    ):
        module(torch.autograd.forward_ad.make_dual(x, x), PTR)


@pytest.mark.parametrize("name", MODULES)
def test_traces_and_other_dtypes_are_refused(name):
    module, x = made(name)
    with pytest.raises(NotImplementedError, match=r"torch\.export"):
        torch.jit.trace(module, (x, PTR))
    if list(module.parameters()):
        with pytest.raises(TypeError, match=r"x must have the dtype"):
            module(x.double(), PTR)
