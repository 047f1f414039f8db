"""xformers' ``memory_efficient_attention`` with a ``BlockDiagonalMask`` over the molecules.

Half precision on CUDA only; xformers chooses among its operators (since 0.0.35 those of mslk).
Seeds are repeated for every molecule, widths padded, and the mask takes the counts as Python lists,
which synchronises (see ``packing``). The first derivative is the library's; it refuses or, by call
style, silently drops a second one, so ours takes its place or it raises (``autograd``).
"""

from __future__ import annotations

import inspect
from dataclasses import replace

from torch import Tensor

from ..operands import Operands, Options
from ..problem import Problem
from ..ragged import Sets
from .needs import find, missing
from .packing import PACKED, Packed, attend

KIND = "composite"
_NO_LSE = {"return_lse": "memory_efficient_attention does not return the LSE"}
NEEDS = replace(PACKED, refused={**PACKED.refused, **_NO_LSE})
NEEDED = (
    ("xformers.ops", "memory_efficient_attention"),
    ("xformers.ops.fmha.attn_bias", "BlockDiagonalMask"),
)


def why_not(problem: Problem) -> list[str]:
    reasons = NEEDS.reasons(problem)
    if problem.deterministic and problem.grad_order:
        reasons.append("deterministic mode: not every operator it may choose adds in a fixed order")
    if reasons:  # something else decides: do not import a large library for the table
        absent = missing("xformers")
        return [*reasons, absent] if absent else reasons
    return [reason for name in NEEDED if (reason := find(*name)[1])][:1]


def attention(x: Operands, options: Options, sets: Sets | None) -> tuple[Tensor, None]:
    (call, _), (mask, _) = (find(*name) for name in NEEDED)
    takes_device = "device" in inspect.signature(mask.from_seqlens).parameters
    place = {"device": x.q.device} if takes_device else {}

    def run(batch: Packed) -> tuple[Tensor, None]:
        own = batch.kept.get("xformers")
        if own is None:
            counts = (ptr.diff().tolist() for ptr in (batch.q_ptr, batch.k_ptr))
            own = batch.kept["xformers"] = mask.from_seqlens(*counts, **place)
        rows = batch.q[None], batch.k[None], batch.v[None]
        return call(*rows, attn_bias=own, p=0.0, scale=options.scale)[0], None

    return attend(run, x, sets)[0], None
