"""The equations of the three passes, and the graph that connects them.

Per molecule and head; c = scale, b = bias, R = keep/(1 - p) elementwise under dropout, else 1::

    (F1) S = c·QKᵀ + b             (F2) L = log Σ_j exp S_j,  P = exp(S - L)     (F3) O = (P∘R)V

    (B1) dP = R∘(dO Vᵀ)            (B2) δ = rowsum(O∘dO),  δ' = δ - dL
    (B3) dS = P∘(dP - δ')          (B4) dV = (P∘R)ᵀdO        (B5) dQ = c·dS·K
    (B6) dK = c·dSᵀQ               (B7) db = dS

Second order, with A, B, C, E the cotangents of dQ, dK, dV, db::

    (D1) T = c(AKᵀ + QBᵀ) + E      (D2) t = rowsum(P∘T),  s = rowsum(P∘T∘dP)
    (D3) G = R∘(dO Cᵀ),  w = rowsum(P∘G)                    (D4) y = s - (δ + δ')t + w
    (D5) U = P∘(T - t)             (D6) Z = P∘(T∘(dP - δ') - t·dP + G - y)
    (D7) gQ = c(dS·B + Z·K)        (D8) gK = c(dSᵀA + ZᵀQ)   (D9) gV = (U∘R)ᵀdO
    (D10) gb = Z                   (D11) gdO = (U∘R)V + (P∘R)C      (D12) gdL = t

δ is rowsum(P∘dP), which (B2) writes with O. O and L are functions of the inputs here, so the saved
copies get no gradient of their own. Rows without a finite logit have P = 0: every term is 0.

Three nested Functions: the backward of the first applies the second, whose backward applies the
third, whose backward raises. All residuals go through ``save_for_backward``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import ops

_TENSORS = 8  # q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed: the first arguments of every pass


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout, backend):
        out, lse = ops.forward(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout, backend)
        ctx.save_for_backward(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, out, lse)
        ctx.options = scale, dropout, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        *problem, out, lse = ctx.saved_tensors
        scale, dropout, backend = ctx.options
        need_dbias = problem[3] is not None and ctx.needs_input_grad[3]
        if dout is None:
            dout = out.new_zeros(1).expand(out.shape)
        # A compiler traces this with grad mode on although its graphs end at first order; it
        # raises by itself when someone differentiates them again.
        nested = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        run = _Backward.apply if nested else ops.backward
        dq, dk, dv, dbias = run(*problem, out, lse, dout, dlse, scale, dropout, need_dbias, backend)
        return dq, dk, dv, dbias if need_dbias else None, *[None] * 7


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        gradients = ops.backward(*arguments)
        *tensors, scale, dropout, need_dbias, backend = arguments
        ctx.save_for_backward(*tensors)
        ctx.options = scale, dropout, backend
        if not need_dbias:
            ctx.mark_non_differentiable(gradients[3])
        ctx.set_materialize_grads(False)
        return gradients

    @staticmethod
    def backward(ctx, ddq, ddk, ddv, ddbias):
        tensors = ctx.saved_tensors
        run = _DoubleBackward.apply if torch.is_grad_enabled() else ops.double_backward
        gq, gk, gv, gbias, gdout, gdlse = run(*tensors, ddq, ddk, ddv, ddbias, *ctx.options)
        gradients = [gq, gk, gv, gbias if tensors[3] is not None else None]
        gradients += [None] * (_TENSORS - len(gradients) + 2)  # boundaries, seed, out, lse
        gradients += [gdout, gdlse if tensors[-1] is not None else None]
        return *gradients, *[None] * 4


class _DoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        ctx.backend = arguments[-1]
        return ops.double_backward(*arguments)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            f"backend {ctx.backend!r} has no third derivative; backend='reference' has every order"
        )


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, q_ptr: Tensor | None, k_ptr: Tensor,
    pair_ptr: Tensor | None, seed: Tensor | None, scale: float, dropout: float, backend: str,
    differentiable: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(F1)-(F3) through a kernel backend, with a graph to second order where it is wanted."""
    run = _Forward.apply if differentiable else ops.forward
    return run(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout, backend)


class _FirstOrder(torch.autograd.Function):
    """Calls a composite that is exact to first order only, and refuses a second derivative.

    Inside a backward, grad mode is on exactly when a graph of the gradient was asked for; a library
    whose backward is opaque would then return a gradient without one, and force training would be
    silently wrong.
    """

    @staticmethod
    def forward(ctx, call, name, *inputs):
        detached = [
            x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
            for x in inputs
        ]
        with torch.enable_grad():
            out = call(*detached)
        ctx.name, ctx.out = name, out
        ctx.wanted = [
            i for i, x in enumerate(detached) if isinstance(x, Tensor) and x.requires_grad
        ]
        ctx.inputs = [detached[i] for i in ctx.wanted]
        ctx.count = len(inputs)
        return out.detach()

    @staticmethod
    def backward(ctx, dout):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f"backend {ctx.name!r} has no second derivative (create_graph=True was asked for); "
                "leave backend=None or name 'cpu', 'triton', 'cuda' or 'reference'"
            )
        found = torch.autograd.grad(ctx.out, ctx.inputs, dout, retain_graph=True)
        gradients: list[Tensor | None] = [None] * (ctx.count + 2)
        for i, gradient in zip(ctx.wanted, found):
            gradients[i + 2] = gradient
        return tuple(gradients)


def first_order(call: Callable[..., Tensor], name: str, *inputs: object) -> Tensor:
    """``call(*inputs)`` with its own first derivative and an error instead of a second one."""
    return _FirstOrder.apply(call, name, *inputs)
