"""Plain torch, one molecule at a time: the readable definition, on any device, in any order.

Serves what no kernel serves (dimensions over 512, other devices, third derivatives, forward mode)
and needs no compiler. Half types are computed in float32, and molecules of more than ``LONG`` keys
in float64: torch's running float32 sums of 10^6 equal weights are off in the third digit. Reads the
boundaries on the host, so it synchronises on an accelerator.

torch's ``make_fx`` records softmax, as every function whose derivative uses its result, with that
result detached: a recorded gradient would have a wrong derivative. So recording one raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dropout import keep_mask
from ..operands import Operands, Options, accumulator
from ..problem import Problem
from ..ragged import Sets
from ..tracing import recording
from .needs import Needs

KIND = "composite"
EVERY_ORDER = 1_000_000  # plain differentiable torch
NEEDS = Needs(order=EVERY_ORDER)
LONG = 4096


def why_not(problem: Problem) -> list[str]:
    return []


def attention(x: Operands, options: Options, sets: Sets | None) -> tuple[Tensor, Tensor]:
    """Equations (F1)-(F3) of ``autograd``."""
    out, lse = _attention(x, options)
    if recording():
        for result in (out, lse):
            if result.requires_grad:
                result.register_hook(_refuse_recorded)
    return out, lse


def _refuse_recorded(gradient: Tensor) -> None:
    raise NotImplementedError(
        "backend 'reference': a gradient recorded by make_fx would have a wrong derivative (torch "
        "detaches the result of softmax in its graph); leave backend=None or name a kernel backend"
    )


def _attention(x: Operands, options: Options) -> tuple[Tensor, Tensor]:
    scale, dropout = options
    dtype, wide = x.q.dtype, accumulator(x.q.dtype)
    q, k, v = (rows.to(wide).transpose(0, 1) for rows in (x.q, x.k, x.v))  # [H, N, D]
    heads, rows = q.shape[:2]
    k_edges = _edges(x.k_ptr, k.shape[1])
    q_edges = [0, rows] if x.q_ptr is None else _edges(x.q_ptr, rows)
    pairs = None if x.pair_ptr is None else x.pair_ptr.tolist()
    outs, lses = [], []
    for i in range(len(k_edges) - 1):
        own = slice(q_edges[i], q_edges[i + 1]) if not x.shared else slice(None)
        keys = slice(k_edges[i], k_edges[i + 1])
        sums = torch.float64 if k_edges[i + 1] - k_edges[i] > LONG else wide
        logits = scale * (q[:, own].to(sums) @ k[:, keys].to(sums).transpose(1, 2))
        if x.bias is not None and pairs is not None:
            mine = x.bias[pairs[i] : pairs[i + 1]].to(sums)
            logits = logits + mine.view(*logits.shape[1:], heads).permute(2, 0, 1)
        if x.key_bias is not None:
            logits = logits + x.key_bias[keys].to(sums).T[:, None]
        n, m = logits.shape[1:]
        keep = None if x.seed is None else keep_mask(x.seed, i, heads, n, m, dropout)
        out, lse = _softmax_times(logits, v[:, keys].to(sums), keep, dropout)
        outs.append(out.to(wide))
        lses.append(lse.to(wide))
    if x.shared:
        shape = (0, heads, rows, v.shape[2])
        out = torch.stack(outs) if outs else _zeros(q, v).expand(shape)
        lse = torch.stack(lses) if lses else _zeros(q, v).expand(shape[:3])
        return out.transpose(1, 2).to(dtype).contiguous(), lse.transpose(1, 2).contiguous()
    nobody = rows - q_edges[-1]
    outs.append(_zeros(q, v).expand(heads, nobody, v.shape[2]))
    lses.append(q.new_full((heads, nobody), -torch.inf) + _zeros(q, v))
    out, lse = torch.cat(outs, 1), torch.cat(lses, 1)
    return out.transpose(0, 1).to(dtype).contiguous(), lse.transpose(0, 1).contiguous()


def _edges(ptr: Tensor, rows: int) -> list[int]:
    """The boundaries as ints, clamped: they were checked on the CPU only."""
    edges, last = [], 0
    for edge in ptr.tolist():
        last = min(max(edge, last), rows)
        edges.append(last)
    return edges


def _zeros(q: Tensor, v: Tensor) -> Tensor:
    """A zero that depends on q and v, so that a batch without molecules has gradients (zeros)."""
    return q[:0].sum() + v[:0].sum()


def _softmax_times(
    logits: Tensor, v: Tensor, keep: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """(F2) and (F3) for [H, n, m] logits; a row without a finite logit gives 0 and LSE -inf."""
    if logits.shape[2] == 0:
        out = logits.sum(2, keepdim=True) * v.sum(1, keepdim=True)
        return out, out[..., 0] - torch.inf
    dead = (logits == -torch.inf).all(2, keepdim=True)
    logits = logits.masked_fill(dead, 0.0)  # keeps NaN out of the gradient of a dead row
    # Not exp(logits - lse): with large logits the rounding of lse would leave rows that do not sum
    # to 1, and the gradient is a difference of such sums.
    weights = logits.softmax(2).masked_fill(dead, 0.0)
    lse = logits.logsumexp(2)
    if keep is not None:
        weights = weights * keep / (1.0 - dropout)
    return weights @ v, lse.masked_fill(dead.squeeze(2), -torch.inf)
