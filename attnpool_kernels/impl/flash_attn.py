"""flash-attn's kernels for packed rows, version 2, 3 or 4 as installed and as the device needs.

Half precision on CUDA only. The adapter repeats shared seeds for every molecule, pads the widths
and computes the longest molecule, which synchronises (see ``packing``). The first derivative is
the library's; its second is silently missing, so ours takes its place or it raises (``autograd``).
Facts from flash_attn/flash_attn_interface.py, hopper/flash_attn_interface.py and
flash_attn/cute/interface.py of Dao-AILab/flash-attention (2.8.4).
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..operands import Operands, Options
from ..problem import Problem
from ..ragged import Sets
from .needs import find, missing
from .packing import PACKED, Packed, attend

KIND = "composite"
NEEDS = PACKED

# Version -> module that holds flash_attn_varlen_func.
MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}
# Major compute capability -> versions in the order of preference. Others: 2.
PREFERRED = {9: (3, 2, 4), 10: (4, 2), 11: (4, 2)}


def versions(capability: tuple[int, int] | None) -> tuple[int, ...]:
    return PREFERRED.get(capability[0], (2,)) if capability else (2,)


@cache
def load(capability: tuple[int, int] | None, widest: int) -> tuple[int, Any, str]:
    """Version, function and "", or the reasons why there is none for the device and the width."""
    reasons = []
    for version in versions(capability):
        call, reason = find(MODULES[version], "flash_attn_varlen_func")
        if call is not None and version == 4 and widest > 128:
            reason = f"flash_attn 4: dimension {widest}, needs at most 128"
        if not reason:
            return version, call, ""
        reasons.append(reason)
    return 0, None, ", ".join(reasons)


def why_not(problem: Problem) -> list[str]:
    reasons = NEEDS.reasons(problem)
    widest = max(problem.head_dim, problem.value_dim)
    if reasons:  # something else decides: do not import a large library for the table
        absent = [missing(MODULES[i].partition(".")[0]) for i in versions(None)]
        return reasons + [x for x in absent if x]
    version, call, absence = load(problem.capability, widest)
    if absence:
        return [absence]
    if problem.deterministic and problem.grad_order:
        if "deterministic" not in _parameters(call):
            reasons.append(f"deterministic mode: flash_attn {version} here has no such option")
        elif version == 3 and widest > 192:
            reasons.append("deterministic mode: no such backward of dimension 256 in flash_attn 3")
    if problem.return_lse and version == 2 and not _packed_lse():
        reasons.append("return_lse: flash_attn before 2.6 returns a padded LSE")
    return reasons


def attention(x: Operands, options: Options, sets: Sets | None) -> tuple[Tensor, Tensor | None]:
    capability = torch.cuda.get_device_capability(x.q.device) if x.q.is_cuda else None
    version, call, _ = load(capability, max(x.q.shape[2], x.v.shape[2]))
    known = _parameters(call)
    named: dict[str, Any] = {"softmax_scale": options.scale}
    if torch.are_deterministic_algorithms_enabled() and "deterministic" in known:
        named["deterministic"] = True
    # Some versions return the LSE always, some under one of these names.
    named |= {name: True for name in ("return_attn_probs", "return_lse") if name in known}

    def run(batch: Packed) -> tuple[Tensor, Tensor | None]:
        found = call(
            batch.q,
            batch.k,
            batch.v,
            cu_seqlens_q=batch.q_ptr,
            cu_seqlens_k=batch.k_ptr,
            max_seqlen_q=batch.longest_q,
            max_seqlen_k=batch.longest_k,
            **named,
        )
        if not isinstance(found, tuple):
            return found, None
        return found[0], found[1].T if version != 2 or _packed_lse() else None

    return attend(run, x, sets)


@cache
def _parameters(call: Any) -> frozenset[str]:
    return frozenset(inspect.signature(call).parameters)


@cache
def _packed_lse() -> bool:
    """Whether version 2 returns the LSE as [H, N], as it does from 2.6 on."""
    version, _ = find("flash_attn", "__version__")
    try:
        return tuple(map(int, str(version).split(".")[:2])) >= (2, 6)
    except ValueError:
        return True  # a development build
