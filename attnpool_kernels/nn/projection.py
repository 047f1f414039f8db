"""The linear layers around the operator, with few passes over memory and no copy of a head.

Each is a plain formula; as one autograd node each it saves less and reads less than the same
formula from torch's layers: the gradients of q, k and v go into their matrix products directly
(an ``unbind`` would copy them into one tensor first), and residuals are added by the product or in
place. Their backward passes are torch operators, so every order of derivative exists.

Under a compiler and under autocast the plain formula is used: a compiler fuses it by itself. Under
torch.func and in forward mode too, so that the operator gives its own reason against them. And so
it is for every layer that is more than its weight and bias, see ``bare``: that one is called.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn.functional import linear
from torch.nn.modules.module import _has_any_global_hook

from ..tracing import PLAIN, autocasting, recording


def bare(layer: Module) -> bool:
    """Whether a call of the layer is x Wᵀ + b and nothing else, so that its parameters will do.

    Not so with hooks (pruning and the old weight norm are hooks), parametrisations, adapters,
    quantised layers or weights, a ``forward`` put in its place, or without a bias.
    """
    return (
        type(layer) is Linear
        and not (layer._forward_pre_hooks or layer._forward_hooks)
        and not (layer._backward_pre_hooks or layer._backward_hooks)
        and not _has_any_global_hook()
        and "forward" not in layer.__dict__
        and type(layer.weight) in PLAIN
        and type(layer.bias) in PLAIN
    )


def project(x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, parts: str) -> list[Tensor]:
    """Queries, keys and values from one stacked weight: the ``parts`` of "qkv" that are wanted.

    Args:
        x: [N, C] rows of the queries, and of keys and values where y is None.
        y: None, or [M, C] rows of keys and values.
        weight: [3·D, C], the matrices of q, k and v; bias: [3·D].
        parts: "qkv"; or "v" or "qv" for sets of one row, where the weight of its only key is 1.

    Returns:
        One [N, D] or [M, D] tensor a part: strided views of one matrix product for each input.

    The gradient of the keys' bias is returned as 0, which it is: it shifts all logits of a row.
    """
    if _plain(x):
        return _project(x, y, weight, bias, parts)
    return list(_Project.apply(x, y, weight, bias, parts))


def add_linear(residual: Tensor, x: Tensor, layer: Module) -> Tensor:
    """residual + layer(x) for x [N, C]; the residual is [N, D], or [S, D] repeated N/S times."""
    if _plain(x) or not bare(layer):
        return (residual + _like(residual, layer(x))).view(-1, residual.shape[1])
    return _AddLinear.apply(residual, x, layer.weight, layer.bias)


def add_relu_linear(x: Tensor, layer: Module) -> Tensor:
    """x + relu(layer(x)) for x [N, D]."""
    if _plain(x) or not bare(layer):
        return x + layer(x).relu()
    return _AddReluLinear.apply(x, layer.weight, layer.bias)


def relu_linear(x: Tensor, layer: Module) -> Tensor:
    """relu(layer(x)), in the memory of layer(x) where nobody else can hold that."""
    return layer(x).relu_() if bare(layer) else layer(x).relu()


def _plain(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or autocasting(x.device.type):
        return True
    functorch = torch._C._functorch
    return functorch.peek_interpreter_stack() is not None or (
        torch.autograd.forward_ad._current_level >= 0
    )


def _like(residual: Tensor, x: Tensor) -> Tensor:
    """x as [N/S, S, D] where the residual has S rows, to be repeated by broadcasting."""
    return x if residual.shape[0] == x.shape[0] else x.view(-1, *residual.shape)


# (input, first, last): rows first·D to last·D of the stacked weight are applied to that input.
_RUNS: dict[tuple[str, bool], tuple[tuple[int, int, int], ...]] = {
    ("qkv", False): ((0, 0, 3),),
    ("qkv", True): ((0, 0, 1), (1, 1, 3)),
    ("qv", False): ((0, 0, 1), (0, 2, 3)),
    ("v", False): ((0, 2, 3),),
}
_KEYS = 1  # their place in the stack


def _project(x, y, weight, bias, parts) -> list[Tensor]:
    dim = weight.shape[0] // 3
    found: list[Tensor] = []
    for source, first, last in _RUNS[parts, y is not None]:
        rows = slice(first * dim, last * dim)
        stacked = linear(y if source else x, weight[rows], bias[rows])
        found += stacked.unflatten(1, (last - first, dim)).unbind(1)
    return found


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, weight, bias, parts):
        ctx.save_for_backward(x, y, weight)
        ctx.parts = parts
        return tuple(_project(x, y, weight, bias, parts))

    @staticmethod
    def backward(ctx, *gradients):
        x, y, weight = ctx.saved_tensors
        dim = weight.shape[0] // 3
        runs = _RUNS[ctx.parts, y is not None]
        sources = [(source, i) for source, first, last in runs for i in range(first, last)]
        graph = torch.is_grad_enabled() or recording()  # no writing into a tensor of a graph
        inputs: list[Tensor | None] = [None, None]
        products: list[Tensor | None] = [None] * 3
        sums: list[Tensor | None] = [None] * 3
        dweight = None
        if ctx.needs_input_grad[2] and not graph:
            dweight = torch.empty_like(weight) if len(sources) == 3 else torch.zeros_like(weight)
        for (source, i), d in zip(sources, gradients):
            rows = slice(i * dim, (i + 1) * dim)
            if ctx.needs_input_grad[source]:
                so_far = inputs[source]
                if so_far is None:
                    inputs[source] = d @ weight[rows]
                elif graph:
                    inputs[source] = torch.addmm(so_far, d, weight[rows])
                else:
                    so_far.addmm_(d, weight[rows])
            if dweight is not None:
                torch.mm(d.t(), y if source else x, out=dweight[rows])
            elif ctx.needs_input_grad[2]:
                products[i] = d.t() @ (y if source else x)
            if ctx.needs_input_grad[3] and i != _KEYS:
                sums[i] = d.sum(0)
        if ctx.needs_input_grad[2] and graph:
            dweight = torch.cat(
                [weight.new_zeros(dim, weight.shape[1]) if p is None else p for p in products]
            )
        dbias = None
        if ctx.needs_input_grad[3]:
            dbias = torch.cat([weight.new_zeros(dim) if s is None else s for s in sums])
        return *inputs, dweight, dbias, None


class _AddLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.rows = residual.shape[0]
        # The product adds to what is there: residual and bias cost one pass before it.
        out = residual + bias
        if out.shape[0] != x.shape[0]:
            out = out.repeat(x.shape[0] // out.shape[0], 1)
        return out.addmm_(x, weight.t())

    @staticmethod
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        dresidual = None
        if ctx.needs_input_grad[0]:
            repeated = ctx.rows != dout.shape[0]
            dresidual = dout.view(-1, ctx.rows, dout.shape[1]).sum(0) if repeated else dout
        dx = dout @ weight if ctx.needs_input_grad[1] else None
        return dresidual, dx, *_parameters(ctx, dout, x)


class _AddReluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        on = linear(x, weight, bias).relu_()
        # A mask of bytes would be smaller, but torch multiplies by one three times slower.
        ctx.save_for_backward(x, weight, on)
        return x + on

    @staticmethod
    def backward(ctx, dout):
        x, weight, on = ctx.saved_tensors
        d = torch.ops.aten.threshold_backward(dout, on.detach(), 0)
        dx = torch.addmm(dout, d, weight) if ctx.needs_input_grad[0] else None
        return dx, *_parameters(ctx, d, x)


def _parameters(ctx, d: Tensor, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias, the last two inputs, from that of the linear layer's result."""
    dweight = d.t() @ x if ctx.needs_input_grad[-2] else None
    return dweight, d.sum(0) if ctx.needs_input_grad[-1] else None
