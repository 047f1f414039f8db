"""torch's own attention of packed rows, ``torch.nn.attention.varlen`` (torch 2.10 and newer).

Half precision on CUDA only: flash-attn's kernels as built into torch. Seeds are repeated for every
molecule, widths padded, and the longest molecule is computed, which synchronises (``packing``).
The first derivative is torch's; a second one is ours where a native kernel can serve, else it
raises (``autograd``).
"""

from __future__ import annotations

import inspect

from torch import Tensor

from ..operands import Operands, Options
from ..problem import Problem
from ..ragged import Sets
from .needs import find
from .packing import PACKED, Packed, attend

KIND = "composite"
NEEDS = PACKED
MODULE = "torch.nn.attention.varlen"


def why_not(problem: Problem) -> list[str]:
    reasons = NEEDS.reasons(problem)
    call, missing = find(MODULE, "varlen_attn")
    if missing:
        reasons.append(missing)
    elif "scale" not in inspect.signature(call).parameters:
        reasons.append("this torch's varlen_attn takes no scale")
    if problem.deterministic and problem.grad_order:
        reasons.append("deterministic mode: the order of its sums is not documented")
    return reasons


def attention(x: Operands, options: Options, sets: Sets | None) -> tuple[Tensor, Tensor | None]:
    call, _ = find(MODULE, "varlen_attn")
    request, _ = find(MODULE, "AuxRequest")

    def run(batch: Packed) -> tuple[Tensor, Tensor]:
        rows = batch.q, batch.k, batch.v, batch.q_ptr, batch.k_ptr
        longest = batch.longest_q, batch.longest_k
        out, lse = call(*rows, *longest, scale=options.scale, return_aux=request(lse=True))
        # Documented as [N, H], returned as [H, N] by torch 2.13.
        return out, lse.T if lse.shape[0] == batch.q.shape[1] else lse

    return attend(run, x, sets)
