"""torch's own scaled_dot_product_attention on a padded batch: what most programs do today.

Kept as a fallback and as a contender of the benchmark. Molecules are padded to the longest one of
the batch, so memory grows with B times the longest and the boundaries are read on the host. torch
chooses the kernel; ``with torch.nn.attention.sdpa_kernel(...)`` around the call narrows the choice.
Each molecule is its own row of the batch, so a NaN stays in its molecule. The first derivative is
torch's; a second one is ours where a native kernel can serve, else it raises (``autograd``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import adapters

if TYPE_CHECKING:
    from ..dispatch import Problem

KIND = "composite"
GRAD_ORDER = 1


def why_not(problem: Problem) -> list[str]:
    reasons = adapters.first_derivative_reasons(problem)
    if problem.return_lse:
        reasons.append("return_lse: torch does not return the LSE")
    if problem.deterministic and problem.device != "cpu":
        reasons.append("deterministic mode: the fused backward adds in no fixed order")
    return reasons


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, q_ptr: Tensor | None, k_ptr: Tensor,
    pair_ptr: Tensor | None, seed: Tensor | None, scale: float, dropout: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return adapters.attention(
        _padded, "sdpa", q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout
    )


def _padded(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout):
    batch = adapters.pack(q, k, v, q_ptr, k_ptr, repeat=False)
    molecules, n, m = len(batch), batch.longest_q, batch.longest_k
    if molecules == 0:
        return q.new_zeros(*batch.shape, q.shape[1], v.shape[2]), None
    k_rows = _places(batch.k_ptr, batch.k.shape[0])
    padded = [_pad(x, k_rows, molecules, m) for x in (batch.k, batch.v)]
    if q_ptr is None:
        padded.insert(0, q.transpose(0, 1).expand(molecules, -1, -1, -1))
    else:
        q_rows = _places(batch.q_ptr, batch.q.shape[0])
        padded.insert(0, _pad(batch.q, q_rows, molecules, n))
    mask = (torch.arange(m, device=k.device) < batch.k_ptr.diff()[:, None])[:, None, None, :]
    dead = None
    if bias is not None:
        first = pair_ptr[:-1] if batch.live is None else pair_ptr[:-1][batch.live]
        logits = _padded_bias(bias, first, batch, n, m).to(q.dtype)
        logits = logits.masked_fill(~mask, -torch.inf)
        dead = (logits == -torch.inf).all(3, keepdim=True)
        mask = logits.masked_fill(dead, 0.0)
    attend = torch.nn.functional.scaled_dot_product_attention
    pieces = zip(*(x.split(adapters.GRID) for x in (*padded, mask)))
    out = torch.cat([attend(a, b, c, attn_mask=d, scale=scale) for a, b, c, d in pieces])
    if dead is not None:
        out = out.masked_fill(dead, 0.0)
    out = out.transpose(1, 2)  # [b, n, H, Dv]
    out = out.flatten(0, 1) if q_ptr is None else out[q_rows]
    return batch.restore(out, 0.0), None


def _places(ptr: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Molecule of every row, and place in it."""
    row = torch.arange(rows, device=ptr.device)
    molecule = torch.searchsorted(ptr[1:].long(), row, right=True)
    return molecule, row - ptr[molecule]


def _pad(x: Tensor, rows: tuple[Tensor, Tensor], molecules: int, longest: int) -> Tensor:
    """[N, H, D] rows into [B, H, longest, D] zeros."""
    padded = x.new_zeros(molecules, longest, *x.shape[1:])
    return padded.index_put(rows, x).transpose(1, 2)


def _padded_bias(bias, first, batch, n, m):
    """[P, H] pairs into [B, H, n, m] zeros. first: where each molecule's pairs begin."""
    counts = [x.diff().long()[:, None, None] for x in (batch.q_ptr, batch.k_ptr)]
    query = torch.arange(n, device=bias.device)[:, None]
    key = torch.arange(m, device=bias.device)
    pair = first[:, None, None] + query * counts[1] + key
    real = (query < counts[0]) & (key < counts[1]) & (pair < bias.shape[0])
    place = real.nonzero(as_tuple=True)
    padded = bias.new_zeros(len(batch), n, m, bias.shape[1])
    return padded.index_put(place, bias[pair[place]]).permute(0, 3, 1, 2)
