"""flash-attn's spelling of attention over packed sequences, served by this package.

A program that calls ``flash_attn.flash_attn_varlen_func`` without a mask runs with this function in
its place, on any device, in float32 and float64 as well, with a second derivative. What is not
implemented raises by name, it is never ignored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ragged
from .dropout import draw_seed, keep_mask
from .functional import set_attention
from .tracing import unreadable


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    key_bias: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    r"""softmax(softmax_scale · q kᵀ) v in every sequence of a packed batch; see ``set_attention``.

    Args:
        q: [total_q, H, D]; k: [total_k, H_k, D]; v: [total_k, H_k, D_v] with H a multiple of H_k:
            head h of q attends to head h // (H / H_k) of k and v. float16 to float64.
        cu_seqlens_q, cu_seqlens_k: [B + 1] boundaries from 0, int32 or int64.
        max_seqlen_q, max_seqlen_k: ignored, whatever they are: nothing here depends on them.
        dropout_p: in [0, 1), on the attention weights; 0 in evaluation.
        softmax_scale: default D**-0.5.
        causal, window_size, softcap, alibi_slopes, block_table: only their defaults.
        deterministic: accepted; the native backends always add in a fixed order.
        return_attn_probs: also return softmax_lse and S_dmask.
        key_bias: not in flash-attn: [total_k, H] or [total_k] added to the logits of a key, -inf
            forbids it.

    Returns:
        out [total_q, H, D_v] in the dtype of q. With return_attn_probs (out, softmax_lse, S_dmask):
        softmax_lse [H, total_q], float32 (float64 for float64), natural logarithm, differentiable;
        as in flash-attn +inf for a query without keys, whose out is 0. S_dmask, for tests only:
        with dropout the attention weights before dropout, normalised, as [B, H, longest q,
        longest k] in the dtype of q, negative where dropped and 0 beyond a sequence; without
        dropout an empty tensor [0].

    Raises NotImplementedError for a feature that is not implemented, else as ``set_attention``.
    Source of the conventions: Dao-AILab/flash-attention 2.8, flash_attn_interface.py.

    Examples:
        >>> x, edges = torch.randn(8, 2, 16), torch.tensor([0, 5, 8], dtype=torch.int32)
        >>> flash_attn_varlen_func(x, x, x, edges, edges, 5, 5).shape
        torch.Size([8, 2, 16])
    """
    _refuse(causal, window_size, softcap, alibi_slopes, block_table)
    _check_boundaries("cu_seqlens_q", cu_seqlens_q, q)
    _check_boundaries("cu_seqlens_k", cu_seqlens_k, k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k must have as many elements as cu_seqlens_q, {len(cu_seqlens_q)}, "
            f"got {len(cu_seqlens_k)}"
        )
    own = [x.shape[1] for x in (k, v) if isinstance(x, Tensor) and x.dim() == 3]
    k, v = _expanded("k", k, q), _expanded("v", v, q)
    if own[1:] and own[0] != own[1]:
        raise ValueError(f"k and v must have as many heads, got {own[0]} and {own[1]}")
    drawn = None
    if return_attn_probs and dropout_p:
        drawn = _next_seed(q.device)
    options: dict[str, Any] = {"scale": softmax_scale, "dropout": dropout_p, "key_bias": key_bias}
    if not return_attn_probs:
        return set_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
    out, lse = set_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, **options, return_lse=True)
    weights = q.new_zeros(0)
    if drawn is not None:
        scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
        more = k.new_zeros(k.shape[:1]) if key_bias is None else key_bias
        more = more.unsqueeze(1) if more.dim() == 1 else more
        weights = _weights((q, k, more), lse, (cu_seqlens_q, cu_seqlens_k), drawn, scale, dropout_p)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf).T.contiguous(), weights


def _refuse(causal, window_size, softcap, alibi_slopes, block_table) -> None:
    what = None
    if causal:
        what = f"causal={causal}"
    elif not isinstance(window_size, tuple | list | Tensor) or len(window_size) != 2:
        raise ValueError(f"window_size must be (left, right), got {window_size!r}")
    elif any(side is not None and side >= 0 for side in window_size):
        what = f"window_size={tuple(window_size)}"
    elif softcap:
        what = f"softcap={softcap}"
    elif alibi_slopes is not None:
        what = "alibi_slopes"
    elif block_table is not None:
        what = "block_table"
    if what is not None:
        raise NotImplementedError(
            f"{what} is not implemented: atoms have no order; for a bias or a mask of pairs use "
            "set_attention(..., bias=) or key_bias="
        )


def _check_boundaries(name: str, ptr: Tensor, rows_of: object) -> None:
    """As ``set_attention`` checks them, under the names of this function."""
    ragged.check_kind(ptr, name)
    readable = ptr.device.type == "cpu" and not unreadable(ptr)
    if readable and isinstance(rows_of, Tensor) and rows_of.dim() == 3:
        ragged.check(ptr, rows_of.shape[0], name)


def _expanded(name: str, x: Tensor, q: Tensor) -> Tensor:
    """Repeats the heads of k or v to those of q; a view where there is only one."""
    if not (isinstance(x, Tensor) and isinstance(q, Tensor) and x.dim() == q.dim() == 3):
        return x  # set_attention says what is wrong
    heads, own = q.shape[1], x.shape[1]
    if own == heads:
        return x
    if own == 0 or heads % own:
        raise ValueError(
            f"{name} must have a number of heads that divides that of q, {heads}, got {own}"
        )
    return x.unsqueeze(2).expand(-1, -1, heads // own, -1).flatten(1, 2)


def _next_seed(device: torch.device) -> Tensor:
    """The seed that the next operator draws; the generator is left as it is."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return draw_seed(device)


@torch.no_grad()
def _weights(rows_of, lse, boundaries, seed, scale, dropout) -> Tensor:
    """S_dmask: softmax weights, negative where dropped. Reads the boundaries on the host."""
    (q, k, key_bias), (q_ptr, k_ptr) = rows_of, boundaries
    q_edges, k_edges = q_ptr.tolist(), k_ptr.tolist()
    n_q, n_k = q_ptr.diff().tolist(), k_ptr.diff().tolist()
    heads = q.shape[1]
    found = q.new_zeros(len(n_q), heads, max(n_q, default=0), max(n_k, default=0))
    for i, (n, m) in enumerate(zip(n_q, n_k)):
        rows, columns = (slice(x[i], x[i + 1]) for x in (q_edges, k_edges))
        if n == 0 or m == 0:
            continue
        logits = scale * torch.einsum("ihd,jhd->hij", q[rows].to(lse), k[columns].to(lse))
        logits = logits + key_bias[columns].to(lse).T[:, None]
        row_lse = lse[rows].T[:, :, None]
        weights = (logits - row_lse).exp().masked_fill(row_lse == -torch.inf, 0.0)
        keep = keep_mask(seed, i, heads, n, m, dropout)
        found[i, :, :n, :m] = torch.where(keep, weights, -weights)
    return found
