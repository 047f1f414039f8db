"""Attention weights on demand, for looking at them: no kernel stores any."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .functional import Given, checked
from .operands import Operands, accumulator
from .ragged import Ragged


def attention_weights(
    q: Tensor,
    k: Tensor,
    ptr: Tensor | Ragged | None,
    k_ptr: Tensor | Ragged | None = None,
    *,
    lse: Tensor | None = None,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    top: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The weights of attention: all of them, [P, H], or the ``top`` largest of each query.

    For query i and key j of one molecule, with the L of ``return_lse``::

        p_ij = exp(scale · q_i·k_j + bias_ij + key_bias_j - L_i)

    With ``lse`` nothing is normalised a second time: the weights are as exact as L, which rounds to
    eps·|L|. That shows where logits are in the thousands, and with a mask of the least finite
    number, of which L keeps nothing else. Without it they are normalised here, and add up to 1.

    Args:
        q, k, ptr, k_ptr, bias, key_bias, scale: as given to ``set_attention``. ptr None: q are the
            seeds [S, H, D] of ``seed_pool``, which all molecules of k_ptr share.
        lse: as ``set_attention(..., return_lse=True)`` gave it, [N_q, H], or [B, S, H] of
            ``seed_pool``; or None.
        top: how many keys of each query; None: all.

    Returns:
        weights [P, H], by molecule, then query, then key (``Ragged.pairs``), float32 (float64 for
        float64); rows of queries without keys have none. With ``top`` (weights, keys), both
        [N_q, H, top], or [B, S, H, top] of seeds: the largest weights, falling, and the rows of k
        that they belong to, int64; 0 and -1 where a query has fewer keys that are not forbidden.

    Differentiable to any order, through ``lse`` too, where that has a graph. Autocast rounds q and
    k, as for the attention, and nothing else. Works molecule by molecule on the host's time, with
    memory for the result and one molecule's pairs; for pictures and tables, not for layers.

    Raises: as ``set_attention``, and TypeError, ValueError: lse, top, by name.

    Examples:
        >>> x = torch.randn(8, 2, 4)
        >>> weights, keys = attention_weights(x, x, Ragged.from_counts([5, 3]), top=2)
        >>> weights.shape, bool((keys[5:] >= 5).all())  # keys of the row's own molecule
        (torch.Size([8, 2, 2]), True)
    """
    shared = ptr is None
    if shared and k_ptr is None:
        raise TypeError("k_ptr must be given where ptr is None (seeds of all molecules), got None")
    boundaries = (k_ptr, None) if shared else (ptr, k_ptr)
    name = "seeds" if shared else "q"
    given = Given(q, k, k, *boundaries, bias, key_bias, scale, 0.0, None, False)
    x, options, _ = checked(name, given)
    if top is not None and (isinstance(top, bool) or not isinstance(top, int)):
        raise TypeError(f"top must be an int, got {type(top).__name__}")
    if top is not None and top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    molecules, queries, heads = x.k_ptr.shape[0] - 1, *q.shape[:2]
    shape = (molecules, queries, heads) if shared else (queries, heads)
    if lse is not None:
        _check_lse(lse, shape, x.q)
        lse = lse.reshape(-1, heads)
    with torch.autocast(x.q.device.type, enabled=False):
        blocks = _blocks(x, lse, options.scale)
        if top is None:
            found = [p.permute(1, 2, 0).flatten(0, 1) for p, *_ in blocks]
            return torch.cat([x.q.new_zeros(0, heads, dtype=accumulator(x.q.dtype)), *found])
        weights, keys = _largest(blocks, molecules * queries if shared else queries, top, x)
    return weights.view(*shape, top), keys.view(*shape, top)


def _largest(
    blocks: Iterator[tuple[Tensor, Tensor, int, int]], rows: int, top: int, x: Operands
) -> tuple[Tensor, Tensor]:
    """Weights and keys [rows, H, top], by the logits: small weights may be 0 and still differ."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for p, logits, first, key in blocks:
        best = logits.topk(min(top, p.shape[2]), 2)
        place = torch.where(best.values > -torch.inf, best.indices + key, -1)
        missing = (0, top - place.shape[2])
        some = torch.nn.functional.pad(p.gather(2, best.indices), missing)
        place = torch.nn.functional.pad(place, missing, value=-1)
        row = torch.arange(first, first + p.shape[1], device=p.device)
        found.append((row, some.transpose(0, 1), place.transpose(0, 1)))
    weights = x.q.new_zeros(rows, x.q.shape[1], top, dtype=accumulator(x.q.dtype))
    keys = torch.full(weights.shape, -1, device=x.q.device)
    if found:
        index, some, place = (torch.cat(parts) for parts in zip(*found))
        weights, keys = weights.index_copy(0, index, some), keys.index_copy(0, index, place)
    return weights, keys


def _check_lse(lse: object, shape: tuple[int, ...], like: Tensor) -> None:
    if not isinstance(lse, Tensor):
        raise TypeError(f"lse must be a torch.Tensor, got {type(lse).__name__}")
    wanted = accumulator(like.dtype)
    if lse.dtype != wanted:
        raise TypeError(f"lse must be {wanted}, got {lse.dtype}")
    if tuple(lse.shape) != shape:
        raise ValueError(f"lse must have shape {shape}, got {tuple(lse.shape)}")
    if lse.device != like.device:
        raise ValueError(f"lse must be on the device of q, {like.device}, got {lse.device}")


def _blocks(
    x: Operands, lse: Tensor | None, scale: float
) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Of each molecule with pairs: weights and logits [H, n_q, n_k], its first query, and key."""
    wide = accumulator(x.q.dtype)
    q, k = (rows.to(wide).transpose(0, 1) for rows in (x.q, x.k))  # [H, N, D]
    seeds = x.q.shape[0]
    pairs = None if x.pair_ptr is None else x.pair_ptr.tolist()
    keys = x.k_ptr.tolist()
    queries = [seeds * i for i in range(len(keys))] if x.q_ptr is None else x.q_ptr.tolist()
    for i in range(len(keys) - 1):
        (a, b), (c, d) = queries[i : i + 2], keys[i : i + 2]
        if a == b or c == d:
            continue
        logits = scale * (q if x.q_ptr is None else q[:, a:b]) @ k[:, c:d].mT
        if x.bias is not None and pairs is not None:
            own = x.bias[pairs[i] : pairs[i + 1]].to(wide)
            logits = logits + own.view(b - a, d - c, -1).permute(2, 0, 1)
        if x.key_bias is not None:
            logits = logits + x.key_bias[c:d].to(wide).t()[:, None]
        # A query without a finite logit has L = -inf, and weights 0.
        if lse is None:
            dead = (logits == -torch.inf).all(2, keepdim=True)
            p = logits.masked_fill(dead, 0.0).softmax(2).masked_fill(dead, 0.0)
        else:
            own = lse[a:b].t()[:, :, None]
            p = (logits - own.masked_fill(own == -torch.inf, torch.inf)).exp()
        yield p, logits, a, c
