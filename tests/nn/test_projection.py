"""The fused linear layers are their formulas, to every order, and keep what they promise."""

import pytest
import torch
from torch.nn.functional import linear

from attnpool_kernels.nn.projection import add_linear, add_relu_linear, bare, project


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def layer(weight, bias):
    made = torch.nn.Linear(*weight.shape[::-1])
    made._parameters.update(weight=weight, bias=bias)  # not copied: what is differentiated
    assert bare(made)
    return made


@pytest.mark.parametrize("parts", ["qkv", "qv", "v"])
@pytest.mark.parametrize("pair", [False, True])
def test_project(parts, pair):
    if pair and parts != "qkv":
        pytest.skip("two inputs always need all parts")
    x, y, weight, bias = leaf(5, 3), leaf(4, 3) if pair else None, leaf(12, 3), leaf(12)
    stacks = dict(zip("qkv", zip(weight.chunk(3), bias.chunk(3))))
    wanted = [linear(y if pair and part != "q" else x, *stacks[part]) for part in parts]
    found = project(x, y, weight, bias, parts)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b)
    # The keys' bias moves all logits of a query alike. Attention makes its gradient 0, so here only
    # cotangents are used that sum to 0 over the keys.
    cotangents = [torch.randn_like(x) for x in wanted]
    if "k" in parts:
        cotangents[1] -= cotangents[1].mean(0)
    inputs = [t for t in (x, y, weight, bias) if t is not None]
    for a, b in zip(
        torch.autograd.grad(found, inputs, cotangents),
        torch.autograd.grad(wanted, inputs, cotangents),
    ):
        torch.testing.assert_close(a, b)

    def call(*tensors):
        x, weight, bias = tensors[0], *tensors[-2:]
        q, *rest = project(x, tensors[1] if pair else None, weight, bias, parts)
        return (q.sin().mean() + sum(r.cos().mean(0).sum() for r in rest[-1:])) * q.sum()

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_project_gives_views_of_one_product():
    parts = project(leaf(5, 3), None, leaf(12, 3), leaf(12), "qkv")
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert {part.stride() for part in parts} == {(12, 1)}


@pytest.mark.parametrize("rows", [6, 2])
def test_add_linear(rows):
    residual, x, weight, bias = leaf(rows, 4), leaf(6, 3), leaf(4, 3), leaf(4)
    wanted = residual.repeat(6 // rows, 1) + linear(x, weight, bias)
    torch.testing.assert_close(add_linear(residual, x, layer(weight, bias)), wanted)
    inputs = (residual, x, weight, bias)

    def call(residual, x, weight, bias):
        return add_linear(residual, x, layer(weight, bias))

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_add_relu_linear():
    x, weight, bias = inputs = leaf(6, 4), leaf(4, 4), leaf(4)
    wanted = x + linear(x, weight, bias).relu()

    def call(x, weight, bias):
        return add_relu_linear(x, layer(weight, bias))

    torch.testing.assert_close(call(*inputs), wanted)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("wanted", range(4))
def test_gradients_that_nobody_asks_for_are_not_made(wanted):
    tensors = [leaf(6, 4), leaf(6, 4), leaf(4, 4), leaf(4)]
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i == wanted)
    residual, x, weight, bias = tensors
    stacked = [project(x, None, weight.repeat(3, 1), bias.repeat(3), "qkv")[0]] * (wanted > 0)
    layers = [add_linear(residual, x, layer(weight, bias)), *stacked]
    layers += [add_relu_linear(x, layer(weight, bias))] * (wanted > 0)
    for out in layers:
        (gradient,) = torch.autograd.grad(out.sum(), tensors[wanted])
        assert gradient.isfinite().all() and gradient.any()
