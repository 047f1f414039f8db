"""torch's own scaled_dot_product_attention on a padded batch: what most programs do today.

Kept as a fallback and as a contender of the benchmark. Molecules are padded to the longest one of
the batch, so memory grows with B times the longest and the boundaries are read on the host. The
first derivative is torch's; a second one raises, because the fused kernels have none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..autograd import first_order

if TYPE_CHECKING:
    from ..dispatch import Problem

KIND = "composite"
GRAD_ORDER = 1


def why_not(problem: Problem) -> list[str]:
    reasons = []
    if problem.grad_order > GRAD_ORDER:
        reasons.append(
            f"first derivative only, inputs require grad (grad_order={problem.grad_order})"
        )
    if problem.dropout:
        reasons.append("dropout: torch's mask is not the stateless one of this package")
    if problem.return_lse:
        reasons.append("return_lse: torch does not return the LSE")
    if problem.deterministic and problem.device != "cpu":
        reasons.append("deterministic mode: the fused backward adds in no fixed order")
    return reasons


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, q_ptr: Tensor | None, k_ptr: Tensor,
    pair_ptr: Tensor | None, seed: Tensor | None, scale: float, dropout: float,
) -> tuple[Tensor, None]:  # fmt: skip
    tensors = [x for x in (q, k, v, bias) if x is not None]
    arguments = (q, k, v, bias, q_ptr, k_ptr, pair_ptr, scale)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return first_order(_padded, "sdpa", *arguments), None
    return _padded(*arguments), None


def _padded(q, k, v, bias, q_ptr, k_ptr, pair_ptr, scale):
    molecules = k_ptr.numel() - 1
    k_molecule, k_place, m = _places(k_ptr, k.shape[0])
    if q_ptr is None:
        padded_q, n = q.transpose(0, 1).expand(molecules, -1, -1, -1), q.shape[0]
    else:
        q_molecule, q_place, n = _places(q_ptr, q.shape[0])
        padded_q = _pad(q, q_molecule, q_place, molecules, n)
    if molecules == 0 or n == 0 or m == 0:
        rows = q.shape[:1] if q_ptr is not None else (molecules, q.shape[0])
        zero = q[:0].sum() + k[:0].sum() + v[:0].sum()
        return zero.expand(*rows, q.shape[1], v.shape[2]).contiguous()
    keys = [_pad(x, k_molecule, k_place, molecules, m) for x in (k, v)]
    place = torch.arange(m, device=k.device)
    real = place < k_ptr.diff()[:, None]  # [B, m]
    mask = real[:, None, None, :]
    dead = ~real.any(1)[:, None, None, None]
    if bias is not None:
        mask = _padded_bias(bias, q_ptr, k_ptr, pair_ptr, n, m, q.shape[0]).to(q.dtype)
        mask = mask.masked_fill(~real[:, None, None, :], -torch.inf)
        dead = (mask == -torch.inf).all(3, keepdim=True)
        mask = mask.masked_fill(dead, 0.0)
    else:
        mask = mask | dead
    out = torch.nn.functional.scaled_dot_product_attention(
        padded_q, *keys, attn_mask=mask, scale=scale
    )
    out = out.masked_fill(dead, 0.0).transpose(1, 2)  # [B, n, H, Dv]
    if q_ptr is None:
        return out.contiguous()
    rows = q.shape[0]
    covered = out[q_molecule, q_place]
    return torch.cat([covered, covered.new_zeros(rows - len(covered), *covered.shape[1:])])


def _places(ptr: Tensor, rows: int) -> tuple[Tensor, Tensor, int]:
    """Molecule and place in it of every covered row, and the longest molecule."""
    counts = ptr.diff().long()
    molecule = torch.repeat_interleave(torch.arange(len(counts), device=ptr.device), counts)
    place = torch.arange(len(molecule), device=ptr.device) - ptr[:-1].long()[molecule]
    return molecule, place, int(counts.max()) if len(counts) else 0


def _pad(x: Tensor, molecule: Tensor, place: Tensor, molecules: int, longest: int) -> Tensor:
    """[N, H, D] rows into [B, H, longest, D] zeros."""
    padded = x.new_zeros(molecules, longest, *x.shape[1:])
    padded = padded.index_put((molecule, place), x[: len(molecule)])
    return padded.transpose(1, 2)


def _padded_bias(bias, q_ptr, k_ptr, pair_ptr, n, m, seeds):
    """[P, H] pairs into [B, H, n, m] zeros."""
    counts = pair_ptr.diff()
    molecule = torch.repeat_interleave(torch.arange(len(counts), device=bias.device), counts)
    pair = torch.arange(len(molecule), device=bias.device) - pair_ptr[:-1][molecule]
    keys = k_ptr.diff().long()[molecule]
    padded = bias.new_zeros(len(counts), n, m, bias.shape[1])
    padded = padded.index_put((molecule, pair // keys, pair % keys), bias[: len(molecule)])
    return padded.permute(0, 3, 1, 2)
