"""torch's FlexAttention with a mask that lets an atom see its own molecule.

All molecules are one long sequence; the mask of blocks of 128 x 128 pairs is built from the
boundaries without looking at single pairs. Compiled on CUDA. On the CPU torch runs it uncompiled,
without a derivative and with all pairs of the batch in memory: a reference, used where named only.
The bias enters through ``score_mod``. The first derivative is torch's; a second one is ours where a
native kernel can serve, else it raises (``autograd``). A block holds several molecules, and torch
multiplies masked weights of 0 with their values: a NaN can reach the neighbours in a block.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..operands import Operands, Options, accumulator
from ..problem import Problem
from ..ragged import Sets
from .needs import Needs, find
from .packing import NO_DROPOUT, Packed, pack, padded_width

KIND = "composite"
NEEDS = Needs(devices=("cpu", "cuda"), order=1, refused={"dropout": NO_DROPOUT})
MODULE = "torch.nn.attention.flex_attention"
BLOCK = 128  # of the mask
SMALLEST = 16  # width that the compiled kernel takes


def why_not(problem: Problem) -> list[str]:
    reasons = NEEDS.reasons(problem)
    if problem.device == "cpu" and problem.grad_order:
        reasons.append("tensors on cpu require grad: torch has no backward for them")
    if problem.device == "cuda" and problem.dtype == torch.float64:
        reasons.append("float64: its compiled kernel needs float32 or a half type")
    if problem.deterministic and (problem.bias or problem.key_bias) and problem.grad_order:
        reasons.append("deterministic mode: the gradient of the bias is added in no fixed order")
    for name in ("flex_attention", "BlockMask", "AuxRequest"):
        if missing := find(MODULE, name)[1]:
            reasons.append(missing)
            break
    return reasons


def attention(x: Operands, options: Options, sets: Sets | None) -> tuple[Tensor, Tensor]:
    batch = pack(x, sets)
    if len(batch) == 0:
        out = x.q.new_zeros(*batch.shape, x.q.shape[1], x.v.shape[2])
        return out, torch.full_like(out[..., 0], -torch.inf, dtype=accumulator(out.dtype))
    if "flex" not in batch.kept:
        q_of = _molecules(batch.q_ptr, batch.q)
        batch.kept["flex"] = q_of, _mask(batch, q_of, _molecules(batch.k_ptr, batch.k))
    q_of, block_mask = batch.kept["flex"]
    score_mod = None
    if x.bias is not None and x.pair_ptr is not None:
        first = x.pair_ptr[:-1] if batch.live is None else x.pair_ptr[:-1][batch.live]
        score_mod = _score_mod(x.bias, first, batch, q_of)
    if batch.key_bias is not None:
        score_mod = _key_mod(batch.key_bias, score_mod)
    width = max(SMALLEST, padded_width(x))
    rows = [
        torch.nn.functional.pad(part, (0, width - part.shape[2])).transpose(0, 1)[None]
        for part in (batch.q, batch.k, batch.v)
    ]
    named = {"score_mod": score_mod, "block_mask": block_mask, "scale": options.scale}
    request = find(MODULE, "AuxRequest")[0](lse=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        out, extra = _compiled(x.q.device.type)(*rows, **named, return_aux=request)
    out, lse = out[0].transpose(0, 1)[..., : x.v.shape[2]], extra.lse[0].T
    # A row with only -inf in its bias: torch's convention differs by version and device.
    dead = lse == -torch.inf
    out = out.masked_fill(dead[..., None], 0.0)
    return batch.restore(out, 0.0), batch.restore(lse.to(accumulator(out.dtype)), -torch.inf)


@cache
def _compiled(device: str) -> Any:
    call, _ = find(MODULE, "flex_attention")
    return call if device == "cpu" else torch.compile(call, dynamic=True)


def _molecules(ptr: Tensor, rows: Tensor) -> Tensor:
    row = torch.arange(rows.shape[0], device=ptr.device)
    return torch.searchsorted(ptr[1:].long(), row, right=True)


def _mask(batch: Packed, q_of: Tensor, k_of: Tensor) -> Any:
    """The mask of blocks: queries of a block see keys from their first to their last molecule."""
    n, m = len(q_of), len(k_of)
    blocks = torch.arange(0, n, BLOCK, device=q_of.device)
    first = batch.k_ptr[q_of[blocks]] // BLOCK
    last = (batch.k_ptr[q_of[(blocks + BLOCK - 1).clamp(max=n - 1)] + 1] - 1) // BLOCK
    count = (last - first + 1).int()
    index = torch.arange(-(-m // BLOCK), device=q_of.device)
    index = torch.minimum(first[:, None] + index, index[-1]).int()  # the rest is not read

    def own(b, h, query, key):
        return q_of[query] == k_of[key]

    block_mask, _ = find(MODULE, "BlockMask")
    return block_mask.from_kv_blocks(
        count[None, None], index[None, None], BLOCK_SIZE=BLOCK, mask_mod=own, seq_lengths=(n, m)
    )


def _score_mod(bias: Tensor, first: Tensor, batch: Packed, q_of: Tensor) -> Any:
    """Adds bias[pair, head]; other molecules' pairs read something and are masked afterwards."""
    n_k = batch.k_ptr.diff().long()
    row = torch.arange(len(q_of), device=q_of.device) - batch.q_ptr[q_of]
    begin = first[q_of] + row * n_k[q_of] - batch.k_ptr[q_of]
    last = bias.shape[0] - 1

    def add(score, b, head, query, key):
        return score + bias[(begin[query] + key).clamp(0, last), head]

    return add


def _key_mod(key_bias: Tensor, before: Any) -> Any:
    """Adds key_bias[key, head] to what another score_mod gives."""

    def add(score, b, head, query, key):
        score = score if before is None else before(score, b, head, query, key)
        return score + key_bias[key, head]

    return add
