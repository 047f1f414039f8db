"""The equations of the three passes, and the graph that connects them.

Per molecule and head; c = scale, b = bias, e = key bias (one number per column),
R = keep/(1 - p) elementwise under dropout, else 1::

    (F1) S = c·QKᵀ + b + 1eᵀ       (F2) L = log Σ_j exp S_j,  P = exp(S - L)     (F3) O = (P∘R)V

    (B1) dP = R∘(dO Vᵀ)            (B2) δ = rowsum(O∘dO),  δ' = δ - dL
    (B3) dS = P∘(dP - δ')          (B4) dV = (P∘R)ᵀdO        (B5) dQ = c·dS·K
    (B6) dK = c·dSᵀQ               (B7) db = dS               (B8) de = dSᵀ1

Second order, with A, B, C, E, f the cotangents of dQ, dK, dV, db, de::

    (D1) T = c(AKᵀ + QBᵀ) + E + 1fᵀ              (D2) t = rowsum(P∘T),  s = rowsum(P∘T∘dP)
    (D3) G = R∘(dO Cᵀ),  w = rowsum(P∘G)         (D4) y = s - (δ + δ')t + w
    (D5) U = P∘(T - t)             (D6) Z = P∘(T∘(dP - δ') - t·dP + G - y)
    (D7) gQ = c(dS·B + Z·K)        (D8) gK = c(dSᵀA + ZᵀQ)   (D9) gV = (U∘R)ᵀdO
    (D10) gb = Z                   (D11) gdO = (U∘R)V + (P∘R)C      (D12) gdL = t
    (D13) ge = Zᵀ1

δ is rowsum(P∘dP), which (B2) writes with O. O and L are functions of the inputs here, so the saved
copies get no gradient of their own. Rows without a finite logit have P = 0: every term is 0.

Each registered operator has its derivative in the dispatcher: that of the first is the second, that
of the second is the third, and that of the third raises. So eager calls, tracers, exporters and
compilers that run a recorded graph all meet the same derivatives, at whatever level they keep
autograd. All residuals go through ``save_for_backward``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import impl, ops
from .impl import CompositeBackend, library
from .operands import (
    Cotangents,
    Gradients,
    Operands,
    Options,
    Result,
    SecondGradients,
    split,
)
from .problem import Problem
from .ragged import Sets
from .tracing import recording, watched

_NOTHING = Operands(*[None] * len(Operands._fields))  # type: ignore[arg-type]
_NO_OPTIONS = (None,) * len(Options._fields)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, namespace, *flat):
        x, options = split(flat, Operands, Options)
        y = _run(ops.PASSES[namespace].forward, flat)
        ctx.save_for_backward(*x, *y)
        ctx.namespace, ctx.options = namespace, options
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, dout, dlse):
        _refuse_tangents(dout, dlse)
        if dout is None and dlse is None:  # reached through the saved copies of a second derivative
            return None, *_NOTHING, *_NO_OPTIONS
        x, y = split(ctx.saved_tensors, Operands, Result)
        needs, *_ = split(ctx.needs_input_grad[1:], Operands)
        dx = _gradients(ctx.namespace, x, y, Cotangents(dout, dlse), ctx.options, needs)
        return None, *dx, *_NO_OPTIONS


def _gradients(namespace, x, y, dy, options, needs) -> Operands:
    """The second pass; gradients in the places of the operands."""
    need_dbias = x.bias is not None and needs.bias
    if dy.dout is None:
        dy = dy._replace(dout=y.out.new_zeros(1).expand(y.out.shape))
    dx = Gradients(*CALLS[namespace].backward(*x, *y, *dy, *options, need_dbias))
    dbias = dx.dbias if need_dbias else None
    dkey_bias = None if x.key_bias is None else dx.dkey_bias
    return _NOTHING._replace(q=dx.dq, k=dx.dk, v=dx.dv, bias=dbias, key_bias=dkey_bias)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, namespace, *flat):
        x, y, dy, options, need_dbias = split(flat, Operands, Result, Cotangents, Options)
        dx = Gradients(*_run(ops.PASSES[namespace].backward, flat))
        ctx.save_for_backward(*x, *y, *dy)
        ctx.namespace, ctx.options = namespace, options
        if not need_dbias:
            ctx.mark_non_differentiable(dx.dbias)
        if x.key_bias is None:
            ctx.mark_non_differentiable(dx.dkey_bias)
        ctx.set_materialize_grads(False)
        return tuple(dx)

    @staticmethod
    def backward(ctx, *cotangents):
        _refuse_tangents(*cotangents)
        if all(x is None for x in cotangents):
            nothing = (None,) * len(Result._fields + Cotangents._fields)
            return None, *_NOTHING, *nothing, *_NO_OPTIONS, None
        x, y, dy = split(ctx.saved_tensors, Operands, Result, Cotangents)
        double_backward = CALLS[ctx.namespace].double_backward
        g = SecondGradients(*double_backward(*x, *y, *dy, *cotangents, *ctx.options))
        gx = _NOTHING._replace(
            q=g.gq,
            k=g.gk,
            v=g.gv,
            bias=None if x.bias is None else g.gbias,
            key_bias=None if x.key_bias is None else g.gkey_bias,
        )
        gdy = Cotangents(g.gdout, None if dy.dlse is None else g.gdlse)
        # out and lse are functions of x: their gradients are in gx. Last, need_dbias.
        return None, *gx, *(None for _ in y), *gdy, *_NO_OPTIONS, None


class _DoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, namespace, *flat):
        ctx.namespace, ctx.device = namespace, flat[0].device.type
        return _run(ops.PASSES[namespace].double_backward, flat)

    @staticmethod
    def backward(ctx, *_):
        backend = ctx.device if ctx.namespace == "attnpool" else ctx.namespace[len("attnpool_") :]
        raise NotImplementedError(
            f"backend {backend!r} has no third derivative; backend='reference' has every order"
        )


_below_autograd = torch._C._AutoDispatchBelowAutograd


def _run(operator: Callable[..., tuple[Tensor, ...]], flat: tuple) -> tuple[Tensor, ...]:
    """What is registered for the device, without its derivative."""
    with _below_autograd():
        return library.call(operator, flat)


def differentiable(namespace: str) -> None:
    """Registers the derivatives of the operators of a namespace, as torch's own are.

    ``attention`` then calls what the dispatcher would call, without its detour, where no compiler
    or tracer is there to see the operator.
    """
    own = ops.library_of(namespace)
    functions = _Forward, _Backward, _DoubleBackward
    calls = [
        _differentiable(own, namespace, operator, function)
        for operator, function in zip(ops.PASSES[namespace], functions)
    ]
    CALLS[namespace] = ops.Passes(*calls)


def _differentiable(own, namespace, operator, function) -> Callable[..., tuple[Tensor, ...]]:
    def differentiate(*flat):
        if flat[0] is None:  # torch takes None for any tensor
            raise RuntimeError(f"{operator}: q must be a tensor, got None")
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*flat):
            return function.apply(namespace, *flat)
        return _run(operator, flat)

    def call(*flat):
        return operator(*flat) if watched() else differentiate(*flat)

    own.impl(operator, differentiate, "Autograd")
    return call


CALLS: dict[str, ops.Passes] = {}  # by namespace: what ``attention`` calls
for _namespace in ops.PASSES:
    differentiable(_namespace)


def _for_torchscript() -> None:
    """``attnpool_autograd::attention``, as csrc/autograd.cpp has it for programs without Python.

    Whichever of the two comes first defines it. It is no operator of its own: tracers see through.
    """
    known = torch._C._dispatch_has_kernel("attnpool_autograd::attention")
    if known or "attnpool" not in ops.PASSES:
        return
    own = ops.library_of("attnpool_autograd")
    own.define(ops.SIGNATURES["forward"].schema())
    own.impl("attention", ops.PASSES["attnpool"].forward, "CompositeImplicitAutograd")


_for_torchscript()


def attention(namespace: str, x: Operands, options: Options) -> Result:
    """The first pass by the operators of a namespace, differentiable to second order."""
    return Result(*CALLS[namespace].forward(*x, *options))


def _refuse_tangents(*cotangents: Tensor | None) -> None:
    """Forward mode over reverse mode: the operators would drop the tangent without a word."""
    mode = torch.autograd.forward_ad
    if torch.compiler.is_compiling() or mode._current_level < 0:
        return
    if any(x is not None and mode.unpack_dual(x).tangent is not None for x in cotangents):
        raise NotImplementedError(
            "an incoming gradient has a forward-mode tangent: reverse mode only"
        )


def composite(
    backend: CompositeBackend, x: Operands, options: Options, sets: Sets | None
) -> tuple[Tensor, Tensor | None]:
    """The operation by a composite backend, differentiable as far as it is exact.

    One that is exact to first order only is guarded: see ``_Composite``. Compilers must not look
    into that, since sizes are read on the host and the guard has to stand outside of their graphs.
    """
    if backend.NEEDS.order > 2:
        return backend.attention(x, options, sets)
    if torch.compiler.is_compiling():
        return _outside_of_graphs(backend, x, options, None)
    return _first_order(backend, x, options, sets)


def _first_order(backend, x, options, sets):
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in x)):
        return backend.attention(x, options, sets)
    if recording():
        raise NotImplementedError(
            f"backend {impl.name_of(backend)!r} cannot be recorded by make_fx with inputs that "
            "require grad: the graph would have no derivative; leave backend=None or name a kernel "
            "backend"
        )
    return _Composite.apply(backend, options, sets, *x)


class _Composite(torch.autograd.Function):
    """Calls another library: its first derivative, and ours where it has none.

    Inside a backward, grad mode is on exactly when a graph of the gradient was asked for; a library
    whose backward is opaque would then return a gradient without one, and force training would be
    silently wrong. There, and where the LSE has a cotangent, a native kernel backend computes the
    gradient from the inputs; where none can serve the call, it raises.
    """

    @staticmethod
    def forward(ctx, backend, options, sets, *flat):
        leaves = [x if x is None else x.detach().requires_grad_(x.requires_grad) for x in flat]
        with torch.enable_grad():
            out, lse = backend.attention(Operands(*leaves), options, sets)  # type: ignore[arg-type]
        ctx.save_for_backward(*flat)
        ctx.backend, ctx.options = backend, options
        ctx.kept = out, [x for x in leaves if x is not None and x.requires_grad]
        ctx.set_materialize_grads(False)
        return out.detach(), None if lse is None else lse.detach()

    @staticmethod
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return None, None, None, *_NOTHING
        x, needs = Operands(*ctx.saved_tensors), Operands(*ctx.needs_input_grad[3:])
        if torch.is_grad_enabled() or dlse is not None:
            found = _native_gradients(ctx, x, Cotangents(dout, dlse), needs)
            return None, None, None, *(g if need else None for g, need in zip(found, needs))
        out, inputs = ctx.kept
        gradients = iter(_library_gradients(out, inputs, dout))
        return None, None, None, *(next(gradients) if need else None for need in needs)


def _library_gradients(out, inputs, dout):
    if dout is None or not out.requires_grad:  # no molecule has both queries and keys
        return [torch.zeros_like(x) for x in inputs]
    if not dout.is_contiguous() or dout.data_ptr() % 16:  # libraries read vectors of 16 bytes
        dout = dout.clone(memory_format=torch.contiguous_format)
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    return torch.autograd.grad(
        out, inputs, dout, retain_graph=keep, allow_unused=True, materialize_grads=True
    )


def _native_gradients(ctx, x: Operands, dy: Cotangents, needs: Operands) -> Operands:
    namespace = _native(x, ctx.options)
    if namespace is None:
        what = "derivative of its LSE" if dy.dlse is not None else "second derivative"
        asked = " (create_graph=True was asked for)" if torch.is_grad_enabled() else ""
        raise NotImplementedError(
            f"backend {impl.name_of(ctx.backend)!r} has no {what}{asked}, and no native kernel "
            "can serve this call in its place; leave backend=None or name 'reference', which has "
            "every order"
        )
    with torch.no_grad():
        y = Result(*ops.PASSES[namespace].forward(*x, *ctx.options))
    return _gradients(namespace, x, y, dy, ctx.options, needs)


def _native(x: Operands, options: Options) -> str | None:
    """The operators of the first kernel backend that can serve these tensors to second order."""
    problem = Problem.of(x, options, grad_order=2, return_lse=True)
    for name in impl.order(problem):
        backend = impl.load(name)
        if backend.KIND == "kernel" and not backend.why_not(problem):
            return backend.OPERATORS
    return None


# torch.compiler.disable with a reason, which would import the compiler now and not when it calls.
_outside_of_graphs: Any = torch._disable_dynamo(_first_order)
_outside_of_graphs._torchdynamo_disable = True
_outside_of_graphs._torchdynamo_disable_msg = "adapters read sizes on the host"
