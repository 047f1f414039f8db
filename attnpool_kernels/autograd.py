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

Each registered operator has its derivative in the dispatcher: that of the first is the second, that
of the second is the third, and that of the third raises. So eager calls, tracers, exporters and
compilers that run a recorded graph all meet the same derivatives, at whatever level they keep
autograd. All residuals go through ``save_for_backward``.
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
        tensors = q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed
        with _below_autograd():
            out, lse = ops.forward(*tensors, scale, dropout, backend)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.options = scale, dropout, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        _refuse_tangents(dout, dlse)
        *problem, out, lse = ctx.saved_tensors
        scale, dropout, backend = ctx.options
        need_dbias = problem[3] is not None and ctx.needs_input_grad[3]
        if dout is None:
            dout = out.new_zeros(1).expand(out.shape)
        dq, dk, dv, dbias = _backward(
            *problem, out, lse, dout, dlse, scale, dropout, need_dbias, backend
        )
        return dq, dk, dv, dbias if need_dbias else None, *[None] * 7


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        with _below_autograd():
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
        _refuse_tangents(ddq, ddk, ddv, ddbias)
        tensors = ctx.saved_tensors
        gq, gk, gv, gbias, gdout, gdlse = _double_backward(
            *tensors, ddq, ddk, ddv, ddbias, *ctx.options
        )
        gradients = [gq, gk, gv, gbias if tensors[3] is not None else None]
        gradients += [None] * (_TENSORS - len(gradients) + 2)  # boundaries, seed, out, lse
        gradients += [gdout, gdlse if tensors[-1] is not None else None]
        return *gradients, *[None] * 4


class _DoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        ctx.backend = arguments[-1]
        with _below_autograd():
            return ops.double_backward(*arguments)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            f"backend {ctx.backend!r} has no third derivative; backend='reference' has every order"
        )


_below_autograd = torch._C._AutoDispatchBelowAutograd


def _differentiable(
    operator: torch._ops.OpOverload, function: type[torch.autograd.Function]
) -> Callable[..., tuple[Tensor, ...]]:
    """Makes ``function`` the derivative of an operator, as torch's own derivatives are made.

    Returns the operator as Python calls it: what the dispatcher would do with it, without its
    detour, where no compiler or tracer is there to see the operator.
    """

    def differentiate(*arguments):
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in arguments
        ):
            return function.apply(*arguments)
        with _below_autograd():
            return operator(*arguments)

    def call(*arguments):
        return operator(*arguments) if _recorded() else differentiate(*arguments)

    ops.library.impl(operator, differentiate, "Autograd")
    return call


def _recorded() -> bool:
    """Whether something above autograd has to see the operator itself."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.maybe_current_level() is not None
    )


attention = _differentiable(ops.forward, _Forward)
_backward = _differentiable(ops.backward, _Backward)
_double_backward = _differentiable(ops.double_backward, _DoubleBackward)


def _refuse_tangents(*cotangents: Tensor | None) -> None:
    """Forward mode over reverse mode: the operators would drop the tangent without a word."""
    mode = torch.autograd.forward_ad
    if torch.compiler.is_compiling() or mode._current_level < 0:
        return
    if any(x is not None and mode.unpack_dual(x).tangent is not None for x in cotangents):
        raise NotImplementedError(
            "an incoming gradient has a forward-mode tangent: reverse mode only"
        )


class _Composite(torch.autograd.Function):
    """Calls another library: its first derivative, and ours where it has none.

    Inside a backward, grad mode is on exactly when a graph of the gradient was asked for; a library
    whose backward is opaque would then return a gradient without one, and force training would be
    silently wrong. There, and where the LSE has a cotangent, a native kernel backend computes the
    gradient from the inputs; where none can serve the call, it raises.
    """

    @staticmethod
    def forward(ctx, call, name, *arguments):
        tensors, options = arguments[:_TENSORS], arguments[_TENSORS:]
        leaves = [x if x is None else x.detach().requires_grad_(x.requires_grad) for x in tensors]
        with torch.enable_grad():
            out, lse = call(*leaves, *options)
        ctx.save_for_backward(*tensors)
        ctx.name, ctx.options = name, options
        ctx.kept = out, [x for x in leaves if x is not None and x.requires_grad]
        ctx.set_materialize_grads(False)
        return out.detach(), None if lse is None else lse.detach()

    @staticmethod
    def backward(ctx, dout, dlse):
        tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2 : 2 + _TENSORS]
        if torch.is_grad_enabled() or dlse is not None:
            gradients = _native_gradients(ctx, tensors, dout, dlse)
        else:
            out, inputs = ctx.kept
            found = iter(_library_gradients(out, inputs, dout))
            gradients = [next(found) if want else None for want in wanted]
        gradients = [x if want else None for x, want in zip(gradients, wanted)]
        return None, None, *gradients, *[None] * len(ctx.options)


def _library_gradients(out, inputs, dout):
    if dout is None or not out.requires_grad:  # no molecule has both queries and keys
        return [torch.zeros_like(x) for x in inputs]
    if not dout.is_contiguous() or dout.data_ptr() % 16:  # libraries read vectors of 16 bytes
        dout = dout.clone(memory_format=torch.contiguous_format)
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    return torch.autograd.grad(
        out, inputs, dout, retain_graph=keep, allow_unused=True, materialize_grads=True
    )


def _native_gradients(ctx, tensors, dout, dlse):
    scale, dropout = ctx.options
    backend = _native(tensors, dropout)
    if backend is None:
        what = "derivative of its LSE" if dlse is not None else "second derivative"
        asked = " (create_graph=True was asked for)" if torch.is_grad_enabled() else ""
        raise NotImplementedError(
            f"backend {ctx.name!r} has no {what}{asked}, and no native kernel can serve this call "
            "in its place; leave backend=None or name 'reference', which has every order"
        )
    with torch.no_grad():
        out, lse = ops.forward(*tensors, scale, dropout, backend)
    if dout is None:
        dout = out.new_zeros(1).expand(out.shape)
    need_dbias = tensors[3] is not None and ctx.needs_input_grad[5]
    gradients = _backward(*tensors, out, lse, dout, dlse, scale, dropout, need_dbias, backend)
    return [*gradients, *[None] * (_TENSORS - len(gradients))]


def _native(tensors, dropout: float) -> str | None:
    """The first kernel backend that can serve these tensors to second order."""
    from . import backends, dispatch

    q, _, v, bias, q_ptr = tensors[:5]
    problem = dispatch.Problem(
        device=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[2],
        value_dim=v.shape[2],
        capability=torch.cuda.get_device_capability(q.device) if q.is_cuda else None,
        seeds=q.shape[0] if q_ptr is None else None,
        bias=bias is not None,
        dropout=dropout > 0,
        grad_order=2,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        return_lse=True,
    )
    for name in backends.PRIORITY:
        module = backends.load(name)
        if module.KIND == "kernel" and not module.why_not(problem):
            return name
    return None


def recording() -> bool:
    """Whether ``make_fx`` (or what is built on it) records the operators that run."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def first_order(
    call: Callable[..., tuple[Tensor, Tensor | None]], name: str, *arguments: object
) -> tuple[Tensor, Tensor | None]:
    """``call(*arguments)`` of a composite backend that is exact to first order only.

    arguments: those of a composite's ``attention``. Without an input that requires grad the call
    goes straight through. Compilers stay outside of it, see ``adapters``.
    """
    tracked = any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
    if not (tracked and torch.is_grad_enabled()):
        return call(*arguments)
    if recording():
        raise NotImplementedError(
            f"backend {name!r} cannot be recorded by make_fx with inputs that require grad: the "
            "graph would have no derivative; leave backend=None or name a kernel backend"
        )
    return _Composite.apply(call, name, *arguments)
