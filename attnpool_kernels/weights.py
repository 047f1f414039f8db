"""Attention weights on demand, for looking at them: no kernel stores any."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .functional import Given, checked, seed_pool, set_attention
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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The weights of attention: all of them, [P, H], or the ``top`` largest of each query.

    For query i and key j of one molecule, with the L of ``return_lse``::

        p_ij = exp(scale · q_i·k_j + bias_ij + key_bias_j - L_i)

    Nothing is normalised a second time, so the numbers are those that ``set_attention`` used.

    Args:
        q, k, ptr, k_ptr, bias, key_bias, scale: as given to ``set_attention``. ptr None: q are the
            seeds [S, H, D] of ``seed_pool``, which all molecules of k_ptr share.
        lse: as ``set_attention(..., return_lse=True)`` gave it, [N_q, H], or [B, S, H] of
            ``seed_pool``; None: found first, by ``backend``.
        top: how many keys of each query; None: all.

    Returns:
        weights [P, H], by molecule, then query, then key (``Ragged.pairs``), float32 (float64 for
        float64); rows of queries without keys have none. With ``top`` (weights, keys), both
        [N_q, H, top], or [B, S, H, top] of seeds: the largest weights, falling, and the rows of k
        that they belong to, int64; 0 and -1 where a query has fewer keys (weight 0 counts: a
        forbidden key is never among them).

    Differentiable to any order, through ``lse`` too, where that has a graph. Works molecule by
    molecule on the host's time, with memory for the result and one molecule's pairs; for pictures
    and tables, not for layers.

    Raises: as ``set_attention``, and TypeError, ValueError: lse, top, by name.
    """
    shared = ptr is None
    if shared and k_ptr is None:
        raise TypeError("k_ptr must be given where ptr is None (seeds of all molecules), got None")
    boundaries = (k_ptr, None) if shared else (ptr, k_ptr)
    name = "seeds" if shared else "q"
    given = Given(q, k, k, *boundaries, bias, key_bias, scale, 0.0, backend, True)
    x, options, _ = checked(name, given)
    if top is not None and (isinstance(top, bool) or not isinstance(top, int)):
        raise TypeError(f"top must be an int, got {type(top).__name__}")
    if top is not None and top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    molecules, queries, heads = len(x.k_ptr) - 1, *q.shape[:2]
    shape = (molecules, queries, heads) if shared else (queries, heads)
    if lse is None:
        lse = _lse(given, shared)
    _check_lse(lse, shape, x.q)
    lse = lse.reshape(-1, heads)
    # A query without a finite logit has L = -inf, and weights 0.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    blocks = _blocks(x, lse, options.scale)
    if top is None:
        found = [p.permute(1, 2, 0).flatten(0, 1) for p, _, _ in blocks]
        return torch.cat([lse.new_zeros(0, heads), *found])
    weights = lse.new_zeros(lse.shape[0], heads, top)
    keys = torch.full(weights.shape, -1, device=lse.device)
    largest, rows, places = [], [], []
    for p, first, key in blocks:
        some = p.topk(min(top, p.shape[2]), 2)
        there = some.values > 0
        place = torch.where(there, some.indices + key, -1)
        missing = (0, top - there.shape[2])
        largest.append(torch.nn.functional.pad(some.values, missing).transpose(0, 1))
        places.append(torch.nn.functional.pad(place, missing, value=-1).transpose(0, 1))
        rows.append(torch.arange(first, first + p.shape[1], device=p.device))
    if rows:
        index = torch.cat(rows)
        weights = weights.index_copy(0, index, torch.cat(largest))
        keys = keys.index_copy(0, index, torch.cat(places))
    return weights.view(*shape, top), keys.view(*shape, top)


def _lse(given: Given, shared: bool) -> Tensor:
    options = {"bias": given.bias, "key_bias": given.key_bias, "scale": given.scale}
    values = given.k[:, :, :1]  # any; one column is least work
    if shared:
        return seed_pool(
            given.q, given.k, values, given.ptr, **options, backend=given.backend, return_lse=True
        )[1]
    return set_attention(
        given.q,
        given.k,
        values,
        given.ptr,
        given.k_ptr,
        **options,
        backend=given.backend,
        return_lse=True,
    )[1]


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


def _blocks(x: Operands, lse: Tensor, scale: float) -> Iterator[tuple[Tensor, int, int]]:
    """Of each molecule with pairs: weights [H, n_q, n_k], its first row of lse, and of k."""
    wide = lse.dtype
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
        yield (logits - lse[a:b].t()[:, :, None]).exp(), a, c
