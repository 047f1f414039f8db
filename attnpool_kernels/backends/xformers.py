"""xformers' ``memory_efficient_attention`` with a ``BlockDiagonalMask`` over the molecules.

Half precision on CUDA only; xformers chooses among its operators (since 0.0.35 those of mslk).
Seeds are repeated for every molecule, widths padded, and the mask takes the counts as Python lists,
which synchronises (see ``adapters``). The first derivative is the library's; it refuses or, by call
style, silently drops a second one, so ours takes its place or it raises (``autograd``).
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from torch import Tensor

from .. import adapters

if TYPE_CHECKING:
    from ..dispatch import Problem

KIND = "composite"
GRAD_ORDER = 1
NEEDED = (
    ("xformers.ops", "memory_efficient_attention"),
    ("xformers.ops.fmha.attn_bias", "BlockDiagonalMask"),
)


def why_not(problem: Problem) -> list[str]:
    reasons = adapters.reasons(problem)
    if problem.return_lse:
        reasons.append("return_lse: memory_efficient_attention does not return the LSE")
    if problem.deterministic and problem.grad_order:
        reasons.append("deterministic mode: not every operator it may choose adds in a fixed order")
    if reasons:  # something else decides: do not import a large library for the table
        absent = adapters.missing("xformers")
        return [*reasons, absent] if absent else reasons
    return [reason for name in NEEDED if (reason := adapters.find(*name)[1])][:1]


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, q_ptr: Tensor | None, k_ptr: Tensor,
    pair_ptr: Tensor | None, seed: Tensor | None, scale: float, dropout: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return adapters.attention(
        _attention, "xformers", q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout
    )


def _attention(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout):
    (call, _), (mask, _) = (adapters.find(*name) for name in NEEDED)
    takes_device = "device" in inspect.signature(mask.from_seqlens).parameters
    place = {"device": q.device} if takes_device else {}

    def run(batch: adapters.Packed) -> tuple[Tensor, None]:
        own = batch.kept.get("xformers")
        if own is None:
            counts = (x.diff().tolist() for x in (batch.q_ptr, batch.k_ptr))
            own = batch.kept["xformers"] = mask.from_seqlens(*counts, **place)
        out = call(batch.q[None], batch.k[None], batch.v[None], attn_bias=own, p=0.0, scale=scale)
        return out[0], None

    out, _ = adapters.attend(run, q, k, v, q_ptr, k_ptr)
    return out, None
