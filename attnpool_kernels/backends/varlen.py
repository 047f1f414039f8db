"""torch's own attention of packed rows, ``torch.nn.attention.varlen`` (torch 2.10 and newer).

Half precision on CUDA only: flash-attn's kernels as built into torch. Seeds are repeated for every
molecule, widths padded, and the longest molecule is computed, which synchronises (``adapters``).
The first derivative is torch's; a second one is ours where a native kernel can serve, else it
raises (``autograd``).
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
MODULE = "torch.nn.attention.varlen"


def why_not(problem: Problem) -> list[str]:
    reasons = adapters.reasons(problem)
    call, missing = adapters.find(MODULE, "varlen_attn")
    if missing:
        reasons.append(missing)
    elif "scale" not in inspect.signature(call).parameters:
        reasons.append("this torch's varlen_attn takes no scale")
    if problem.deterministic and problem.grad_order:
        reasons.append("deterministic mode: the order of its sums is not documented")
    return reasons


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, q_ptr: Tensor | None, k_ptr: Tensor,
    pair_ptr: Tensor | None, seed: Tensor | None, scale: float, dropout: float,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return adapters.attention(
        _attention, "varlen", q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout
    )


def _attention(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout):
    call, _ = adapters.find(MODULE, "varlen_attn")
    request, _ = adapters.find(MODULE, "AuxRequest")

    def run(batch: adapters.Packed) -> tuple[Tensor, Tensor]:
        out, lse = call(
            batch.q, batch.k, batch.v, batch.q_ptr, batch.k_ptr, batch.longest_q, batch.longest_k,
            scale=scale, return_aux=request(lse=True),
        )  # fmt: skip
        # Documented as [N, H], returned as [H, N] by torch 2.13.
        return out, lse.T if lse.shape[0] == batch.q.shape[1] else lse

    return adapters.attend(run, q, k, v, q_ptr, k_ptr)
