"""The float64 oracle, and the three passes of a backend as a dictionary of results.

The oracle is a dense masked softmax over the whole batch, differentiated by torch; it shares no
code with ``impl.reference`` and none with the equations of ``rounding``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dropout import keep_mask
from ..functional import seed_pool, set_attention
from ..impl import KernelBackend
from ..ragged import Ragged
from .cases import Batch


def dense(batch: Batch, dtype: torch.dtype, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Softmax over all keys of the batch with other molecules masked, in ``dtype``.

    inputs: q, k, v and, where there are any, bias and key_bias. Differentiable in any order.
    """
    q, k, v = (inputs[name].to(dtype) for name in "qkv")
    case, molecules = batch.case, len(batch.case.counts)
    k_of = torch.full((k.shape[0],), -1, device=q.device)
    k_of[: sum(case.counts)] = torch.repeat_interleave(
        torch.arange(molecules, device=q.device),
        torch.tensor(case.counts, device=q.device, dtype=torch.int64),
    )
    if case.seeds is not None:
        q_of = torch.arange(molecules, device=q.device).repeat_interleave(case.seeds)
        q = q.repeat(molecules, 1, 1)
    else:
        counts = case.q_counts or case.counts
        q_of = torch.full((q.shape[0],), -2, device=q.device)
        q_of[: sum(counts)] = torch.repeat_interleave(
            torch.arange(molecules, device=q.device),
            torch.tensor(counts, device=q.device, dtype=torch.int64),
        )
    own = (q_of[:, None] == k_of[None, :]).to(q.device)  # row-major order is the order of pairs
    logits = torch.einsum("ihd,jhd->hij", q, k) * batch.scale
    if "bias" in inputs:
        spread = logits.new_zeros(logits.shape[1], logits.shape[2], logits.shape[0])
        spread = spread.index_put(tuple(own.nonzero().T), inputs["bias"].to(dtype))
        logits = logits + spread.permute(2, 0, 1)
    if "key_bias" in inputs:
        logits = logits + inputs["key_bias"].to(dtype).T[:, None]
    allowed = own[None] & (logits != -torch.inf)
    dead = ~allowed.any(2, keepdim=True)
    logits = torch.where(allowed, logits, logits.new_full((), -torch.inf)).masked_fill(dead, 0.0)
    weights = torch.where(dead, 0.0, torch.softmax(logits, 2)) if logits.shape[2] else logits
    if batch.seed is not None:
        weights = weights * _dense_keep(batch, own) / (1.0 - case.dropout)
    out = torch.einsum("hij,jhd->ihd", weights.to(dtype), v)
    lse = logits.logsumexp(2) if logits.shape[2] else logits.sum(2)
    lse = lse.masked_fill(dead.squeeze(2), -torch.inf).T
    if case.seeds is not None:
        out = out.reshape(molecules, case.seeds, *out.shape[1:])
        lse = lse.reshape(molecules, case.seeds, *lse.shape[1:])
    return out, lse


def _dense_keep(batch: Batch, own: Tensor) -> Tensor:
    case = batch.case
    assert batch.seed is not None
    keep = torch.zeros(case.heads, *own.shape, dtype=torch.bool, device=own.device)
    q_counts = [case.seeds] * len(case.counts) if case.seeds else case.q_counts or case.counts
    row = column = 0
    for molecule, (n, m) in enumerate(zip(q_counts, case.counts)):
        block = keep_mask(batch.seed, molecule, case.heads, n, m, case.dropout)
        keep[:, row : row + n, column : column + m] = block
        row, column = row + n, column + m
    return keep


def differentiate(
    run: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]],
    batch: Batch,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """All outputs of the three passes through torch's autograd.

    dtype: cast inputs and cotangents to it first (None: leave the layout and dtype alone).
    """

    def leaf(x: Tensor) -> Tensor:
        return (x if dtype is None else x.to(dtype)).detach().requires_grad_()

    named = {name: leaf(x) for name, x in batch.inputs().items()}
    out, lse = run(named)
    inputs = list(named.values())
    outputs, cotangents = [out], [leaf(batch.dout).to(out.dtype)]
    if batch.dlse is not None:
        outputs.append(lse)
        cotangents.append(leaf(batch.dlse).to(lse.dtype))
    first = torch.autograd.grad(
        outputs, inputs, cotangents, create_graph=True, materialize_grads=True
    )
    seconds = [getattr(batch, f"dd{name}") for name in named]
    wanted = [*inputs, *cotangents]
    second = torch.autograd.grad(
        [x for x in first if x.requires_grad],
        wanted,
        [y.to(x.dtype) for x, y in zip(first, seconds) if x.requires_grad],
        materialize_grads=True,
        allow_unused=True,
    )
    names = list(named)
    result = {"out": out.detach(), "lse": lse.detach()}
    result |= {f"d{name}": x.detach() for name, x in zip(names, first)}
    names += ["dout", "dlse"][: len(cotangents)]
    return result | {f"g{name}": x for name, x in zip(names, second)}


def run_public(batch: Batch, backend: str | None) -> dict[str, Tensor]:
    """The three passes through ``set_attention`` or ``seed_pool``."""

    def run(inputs: dict[str, Tensor]) -> Any:
        q, k, v = (inputs[name] for name in "qkv")
        options: dict[str, Any] = {
            "bias": inputs.get("bias"),
            "key_bias": inputs.get("key_bias"),
            "scale": batch.scale,
            "dropout": batch.case.dropout,
            "backend": backend,
            "return_lse": True,
        }
        torch.manual_seed(0)  # the seed that ``make`` has drawn
        if batch.q_ptr is None:
            return seed_pool(q, k, v, batch.k_ptr, **options)
        keys = None if batch.q_ptr is batch.k_ptr else Ragged.from_ptr(batch.k_ptr)
        return set_attention(q, k, v, batch.q_ptr, keys, **options)

    return differentiate(run, batch, None)


def run_kernels(batch: Batch, kernels: KernelBackend) -> dict[str, Tensor]:
    """The three passes of a kernel backend, called directly."""
    x, dy, options = batch.operands, batch.cotangents, batch.options
    y = kernels.forward(x, options)
    dx = kernels.backward(x, y, dy, options, batch.bias is not None)
    gx = kernels.double_backward(x, y, dy, batch.tangents, options)
    result = y._asdict() | dx._asdict() | gx._asdict()
    for name in ("bias", "key_bias"):
        if getattr(batch, name) is None:
            del result[f"d{name}"], result[f"g{name}"]
    if batch.dlse is None:
        del result["gdlse"]
    return result
