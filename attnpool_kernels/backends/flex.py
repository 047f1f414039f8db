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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import adapters

if TYPE_CHECKING:
    from ..dispatch import Problem

KIND = "composite"
GRAD_ORDER = 1
MODULE = "torch.nn.attention.flex_attention"
BLOCK = 128  # of the mask
SMALLEST = 16  # width that the compiled kernel takes


def why_not(problem: Problem) -> list[str]:
    reasons = adapters.first_derivative_reasons(problem)
    if problem.device not in ("cpu", "cuda"):
        reasons.append(f"tensors on {problem.device}: needs cpu or cuda")
    if problem.device == "cpu" and problem.grad_order:
        reasons.append("tensors on cpu require grad: torch has no backward for them")
    if problem.device == "cuda" and problem.dtype == torch.float64:
        reasons.append("float64: its compiled kernel needs float32 or a half type")
    if problem.deterministic and problem.bias and problem.grad_order:
        reasons.append("deterministic mode: the gradient of the bias is added in no fixed order")
    for name in ("flex_attention", "BlockMask", "AuxRequest"):
        if missing := adapters.find(MODULE, name)[1]:
            reasons.append(missing)
            break
    return reasons


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, q_ptr: Tensor | None, k_ptr: Tensor,
    pair_ptr: Tensor | None, seed: Tensor | None, scale: float, dropout: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return adapters.attention(
        _attention, "flex", q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout
    )


def _attention(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout):
    batch = adapters.pack(q, k, v, q_ptr, k_ptr)
    if len(batch) == 0:
        out = q.new_zeros(*batch.shape, q.shape[1], v.shape[2])
        return out, torch.full_like(out[..., 0], -torch.inf, dtype=_accumulator(q))
    if "flex" not in batch.kept:
        q_of, k_of = (_molecules(x, y) for x, y in ((batch.q_ptr, batch.q), (batch.k_ptr, batch.k)))
        batch.kept["flex"] = q_of, _mask(batch, q_of, k_of)
    q_of, block_mask = batch.kept["flex"]
    score_mod = None
    if bias is not None:
        first = pair_ptr[:-1] if batch.live is None else pair_ptr[:-1][batch.live]
        score_mod = _score_mod(bias, first, batch, q_of)
    width = max(SMALLEST, adapters.padded_width(q, v))
    rows = [
        torch.nn.functional.pad(x, (0, width - x.shape[2])).transpose(0, 1)[None]
        for x in (batch.q, batch.k, batch.v)
    ]
    request = adapters.find(MODULE, "AuxRequest")[0](lse=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        out, extra = _compiled(q.device.type)(
            *rows, score_mod=score_mod, block_mask=block_mask, scale=scale,
            return_aux=request,
        )  # fmt: skip
    out, lse = out[0].transpose(0, 1)[..., : v.shape[2]], extra.lse[0].T
    # A row with only -inf in its bias: torch's convention differs by version and device.
    dead = lse == -torch.inf
    out = out.masked_fill(dead[..., None], 0.0)
    return batch.restore(out, 0.0), batch.restore(lse.to(_accumulator(q)), -torch.inf)


@cache
def _compiled(device: str) -> Any:
    call, _ = adapters.find(MODULE, "flex_attention")
    return call if device == "cpu" else torch.compile(call, dynamic=True)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _molecules(ptr: Tensor, rows: Tensor) -> Tensor:
    row = torch.arange(rows.shape[0], device=ptr.device)
    return torch.searchsorted(ptr[1:].long(), row, right=True)


def _mask(batch: adapters.Packed, q_of: Tensor, k_of: Tensor) -> Any:
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

    block_mask, _ = adapters.find(MODULE, "BlockMask")
    return block_mask.from_kv_blocks(
        count[None, None], index[None, None], BLOCK_SIZE=BLOCK, mask_mod=own, seq_lengths=(n, m)
    )


def _score_mod(bias: Tensor, first: Tensor, batch: adapters.Packed, q_of: Tensor) -> Any:
    """Adds bias[pair, head]; other molecules' pairs read something and are masked afterwards."""
    n_k = batch.k_ptr.diff().long()
    row = torch.arange(len(q_of), device=q_of.device) - batch.q_ptr[q_of]
    begin = first[q_of] + row * n_k[q_of] - batch.k_ptr[q_of]
    last = bias.shape[0] - 1

    def add(score, b, head, query, key):
        return score + bias[(begin[query] + key).clamp(0, last), head]

    return add
