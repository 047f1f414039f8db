"""torch's own scaled_dot_product_attention on a padded batch: what most programs do today.

Kept as a fallback and as a contender of the benchmark. Molecules are padded to the longest one of
the batch, so memory grows with B times the longest and the boundaries are read on the host. torch
chooses the kernel; ``with torch.nn.attention.sdpa_kernel(...)`` around the call narrows the choice.
Each molecule is its own row of the batch, so a NaN stays in its molecule. The first derivative is
torch's; a second one is ours where a native kernel can serve, else it raises (``autograd``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operands import Operands, Options, accumulator
from ..problem import Problem
from ..ragged import Sets
from .needs import Needs
from .packing import GRID, NO_DROPOUT, pack

KIND = "composite"
NEEDS = Needs(
    order=1, refused={"return_lse": "torch does not return the LSE", "dropout": NO_DROPOUT}
)


def why_not(problem: Problem) -> list[str]:
    reasons = NEEDS.reasons(problem)
    if problem.deterministic and problem.device != "cpu":
        reasons.append("deterministic mode: the fused backward adds in no fixed order")
    return reasons


def attention(x: Operands, options: Options, sets: Sets | None) -> tuple[Tensor, None]:
    batch = pack(x, sets, repeat=False)
    molecules, n, m = len(batch), batch.longest_q, batch.longest_k
    if molecules == 0:
        return x.q.new_zeros(*batch.shape, x.q.shape[1], x.v.shape[2]), None
    k_rows = _places(batch.k_ptr, batch.k.shape[0])
    k, v = (_pad(rows, k_rows, molecules, m) for rows in (batch.k, batch.v))
    if x.shared:
        q = x.q.transpose(0, 1).expand(molecules, -1, -1, -1)
    else:
        q_rows = _places(batch.q_ptr, batch.q.shape[0])
        q = _pad(batch.q, q_rows, molecules, n)
    mask = (torch.arange(m, device=k.device) < batch.k_ptr.diff()[:, None])[:, None, None, :]
    dead = logits = None
    given = [y for y in (x.bias, x.key_bias) if y is not None]
    # A float32 bias of half-precision rows is not rounded, and neither is the sum of two.
    wide = q.dtype if [y.dtype for y in given] == [q.dtype] else accumulator(q.dtype)
    if x.bias is not None and x.pair_ptr is not None:
        first = x.pair_ptr[:-1] if batch.live is None else x.pair_ptr[:-1][batch.live]
        logits = _padded_bias(x.bias.to(wide), first, batch, n, m)
    if batch.key_bias is not None:
        of_keys = _pad(batch.key_bias.to(wide)[..., None], k_rows, molecules, m).transpose(2, 3)
        logits = of_keys if logits is None else logits + of_keys
    if logits is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
        dead = (logits == -torch.inf).all(3, keepdim=True)
        mask = logits.masked_fill(dead, 0.0)
    attend = torch.nn.functional.scaled_dot_product_attention
    pieces = zip(*(padded.split(GRID) for padded in (q, k, v, mask)))
    out = torch.cat([attend(a, b, c, attn_mask=d, scale=options.scale) for a, b, c, d in pieces])
    if dead is not None:
        out = out.masked_fill(dead, 0.0)
    out = out.transpose(1, 2)  # [b, n, H, Dv]
    out = out.flatten(0, 1) if x.shared else out[q_rows]
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
