"""Backward pass: (B1) to (B7), the weights recomputed from q, k, bias and lse; no atomics.

The *query kernel* walks the keys of up to BLOCK_M query rows: dq, dbias, and the row statistic
delta' of (B2). The *key kernel* walks the queries of up to BLOCK_N key rows: dk, dv. A molecule
whose queries fit one tile is done by the query kernel alone, which then has every query of each key
block at hand; the key kernel skips it. With shared seeds a query program sums dq over CHUNK
molecules, in order, and a last kernel sums the chunks, in order.

Where a molecule's keys are one block, delta is rowsum(P∘dP) and P is divided by its own row sum:
dS is then 0 to the last bit where it should be, and out is not read. Rows of more blocks take delta
from out, and rows of large LSE, whose rounding is a factor of P, sum P once more for its norm.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .primitives import (
    UNSPECIALIZED,
    add_bias,
    chunk_of,
    find_query_tile,
    find_tile,
    keep_mask,
    later,
    load_bias,
    load_bias_of_keys,
    load_row_values,
    load_rows,
    molecule_pairs,
    molecule_rows,
    not_ours,
    out_row,
    products,
    query_rows,
    renormalise,
    store_pairs,
    store_products,
    store_row_values,
    store_rows,
    weights,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _query_kernel(
    q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, sq, sk, sv, sb,
    out, lse, dout, dlse, so, sl, sdo_b, sdo, sdl_b, sdl, dq, dk, dv, dbias, delta, norm,
    B: tl.int64, H: tl.int32, n_q: tl.int64, n_k: tl.int64, n_pairs: tl.int64,
    scale: tl.float64, threshold: tl.uint32, keep_scale: tl.float64, CHUNK: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
    SHORTEST: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = lse.dtype.element_ty
    head = (tl.program_id(0) % H).to(tl.int64)
    part, q_row, first, rows = find_query_tile(tl.program_id(0) // H, q_ptr, B, n_q, BLOCK_M)
    if (first >= rows) | not_ours(rows, SHORTEST, LONGEST):
        return
    c = tl.full((), scale, ACC)
    r = tl.full((), keep_scale, ACC)
    one = tl.full((), 1.0, ACC)
    o_m = first + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    zero = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    acc = tl.zeros((BLOCK_M, BD), ACC)
    low, high = chunk_of(part, q_ptr, B, CHUNK)
    for molecule in range(low, high):
        o_row = out_row(q_ptr, molecule, q_row, n_q)
        k_row, keys = molecule_rows(k_ptr, molecule, B, n_k)
        pair, pairs = molecule_pairs(pair_ptr, molecule, B, n_pairs)
        one_block = keys <= BLOCK_N
        b_lse = load_row_values(lse, sl, o_row, head, o_m, m_m, float("-inf"))
        p_do = dout + molecule * sdo_b
        m_o = o_m < tl.where(one_block, 0, rows)
        b_o = load_rows(out, so, o_row, head, o_m, m_o, DV, BDV)
        b_do = load_rows(p_do, sdo, q_row, head, o_m, m_o, DV, BDV)
        b_delta = tl.sum(b_o.to(ACC) * b_do.to(ACC), 1)
        b_dlse = tl.zeros((BLOCK_M,), ACC)
        if dlse is not None:
            b_dlse = load_row_values(dlse + molecule * sdl_b, sdl, q_row, head, o_m, m_m, 0.0)
            b_dlse = tl.where(b_lse == float("-inf"), 0.0, b_dlse)
        b_norm = tl.full((BLOCK_M,), 1.0, ACC)
        if renormalise(b_lse, q.dtype.element_ty) & (keys > BLOCK_N):
            total = tl.zeros((BLOCK_M,), ACC)
            for first_k in range(0, keys, BLOCK_N):
                o_n = first_k + tl.arange(0, BLOCK_N)
                m_n = o_n < keys
                s, _ = products(
                    q, sq, None, None, q_row, o_m, m_m, k, sk, None, None, k_row, o_n, m_n,
                    head, head, H, zero, D, BD, SLICE, PRECISION)  # fmt: skip
                b_bias = load_bias(bias, sb, pair, pairs, head, o_m, m_m, o_n, keys, c)
                s = add_bias(s, c, b_bias, m_n[None, :])
                total += tl.sum(weights(s, b_lse[:, None]), 1)
            b_norm = 1.0 / tl.where(total > 0, total, 1.0)
        for first_k in range(0, keys, BLOCK_N):
            o_n = first_k + tl.arange(0, BLOCK_N)
            k_at, head_at = later(k_row, first_k, H), later(head, first_k, H)
            m_n = o_n < keys
            s, _ = products(
                q, sq, None, None, q_row, o_m, m_m, k, sk, None, None, k_at, o_n, m_n,
                head, head_at, H, zero, D, BD, SLICE, PRECISION)  # fmt: skip
            dp, _ = products(
                p_do, sdo, None, None, q_row, o_m, m_m, v, sv, None, None, k_at, o_n, m_n,
                head, head_at, H, zero, DV, BDV, SLICE, PRECISION)  # fmt: skip
            b_bias = load_bias(bias, sb, pair, pairs, head_at, o_m, m_m, o_n, keys, c)
            p = weights(add_bias(s, c, b_bias, m_n[None, :]), b_lse[:, None])
            if seed is not None:
                m_keep = keep_mask(seed, threshold, molecule, head_at, o_m, first_k, BLOCK_N)
                dp = tl.where(m_keep, dp * r, 0.0)
            if one_block:  # the whole row is at hand: both statistics from what is used below
                total = tl.sum(p, 1)
                b_norm = 1.0 / tl.where(total > 0, total, 1.0)
                b_delta = tl.sum(p * b_norm[:, None] * dp, 1)
            p *= b_norm[:, None]
            ds = p * (dp - (b_delta - b_dlse)[:, None])
            if dbias is not None:
                store_pairs(dbias, pair, pairs, head_at, H, o_m, m_m, o_n, keys, ds)
            ds = ds.to(k.dtype.element_ty)
            b_k = load_rows(k, sk, k_at, head_at, o_n, m_n, D, BD)
            acc = tl.dot(ds, b_k, acc, input_precision=PRECISION)
            if rows <= BLOCK_M:
                if seed is not None:
                    p = tl.where(m_keep, p * r, 0.0)
                q_at = later(q_row, first_k, H)
                store_products(
                    dv, k_at, o_n, m_n, tl.trans(p.to(v.dtype.element_ty)), p_do, sdo, None, None,
                    None, q_at, o_m, m_m, head_at, H, one, DV, BDV, PRECISION)  # fmt: skip
                store_products(
                    dk, k_at, o_n, m_n, tl.trans(ds), q, sq, None, None, None, q_at, o_m, m_m,
                    head_at, H, c, D, BD, PRECISION)  # fmt: skip
        if rows > BLOCK_M:
            store_row_values(delta, o_row, head, H, o_m, m_m, b_delta - b_dlse)
            store_row_values(norm, o_row, head, H, o_m, m_m, b_norm)
    if q_ptr is None:
        q_row = part * n_q
    store_rows(dq, q_row, head, H, o_m, m_m, acc * c, D, BD)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _key_kernel(
    q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, sq, sk, sv, sb,
    lse, dout, sl, sdo_b, sdo, dk, dv, delta, norm,
    B: tl.int64, H: tl.int32, n_q: tl.int64, n_k: tl.int64, n_pairs: tl.int64,
    scale: tl.float64, threshold: tl.uint32, keep_scale: tl.float64,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
    COMPLETE: tl.constexpr, SHORTEST: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = lse.dtype.element_ty
    head = (tl.program_id(0) % H).to(tl.int64)
    molecule, k_row, first_row, end = find_tile(tl.program_id(0) // H, k_ptr, B, n_k, BLOCK_N)
    if (first_row >= end) | not_ours(end - k_row, SHORTEST, LONGEST):
        return
    q_row, rows = query_rows(q_ptr, molecule, B, n_q)
    if (rows > 0) & (rows <= COMPLETE):
        return
    first = (first_row - k_row).to(tl.int32)
    keys = (end - k_row).to(tl.int32)
    o_row = out_row(q_ptr, molecule, q_row, n_q)
    pair, pairs = molecule_pairs(pair_ptr, molecule, B, n_pairs)
    c = tl.full((), scale, ACC)
    r = tl.full((), keep_scale, ACC)
    o_n = first + tl.arange(0, BLOCK_N)
    m_n = o_n < keys
    p_do = dout + molecule * sdo_b
    zero = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    b_dk = tl.zeros((BLOCK_N, BD), ACC)
    b_dv = tl.zeros((BLOCK_N, BDV), ACC)
    for first_q in range(0, rows, BLOCK_M):
        o_m = first_q + tl.arange(0, BLOCK_M)
        q_at, head_at = later(q_row, first_q, H), later(head, first_q, H)
        m_m = o_m < rows
        s, _ = products(
            k, sk, None, None, k_row, o_n, m_n, q, sq, None, None, q_at, o_m, m_m,
            head, head_at, H, zero, D, BD, SLICE, PRECISION)  # fmt: skip
        dp, _ = products(
            v, sv, None, None, k_row, o_n, m_n, p_do, sdo, None, None, q_at, o_m, m_m,
            head, head_at, H, zero, DV, BDV, SLICE, PRECISION)  # fmt: skip
        b_lse = load_row_values(lse, sl, o_row, head_at, o_m, m_m, float("-inf"))
        b_delta = load_row_values(delta, sl, o_row, head_at, o_m, m_m, 0.0)
        b_norm = load_row_values(norm, sl, o_row, head_at, o_m, m_m, 1.0)
        b_bias = load_bias_of_keys(bias, sb, pair, pairs, head_at, o_m, m_m, o_n, keys, c)
        p = weights(add_bias(s, c, b_bias, m_m[None, :]), b_lse[None, :]) * b_norm[None, :]
        kept = p
        if seed is not None:
            m_keep = tl.trans(keep_mask(seed, threshold, molecule, head_at, o_m, first, BLOCK_N))
            dp = tl.where(m_keep, dp * r, 0.0)
            kept = tl.where(m_keep, p * r, 0.0)
        ds = p * (dp - b_delta[None, :])
        b_do = load_rows(p_do, sdo, q_at, head_at, o_m, m_m, DV, BDV)
        b_dv = tl.dot(kept.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_q = load_rows(q, sq, q_at, head_at, o_m, m_m, D, BD)
        b_dk = tl.dot(ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    store_rows(dk, k_row, head, H, o_n, m_n, b_dk * c, D, BD)
    store_rows(dv, k_row, head, H, o_n, m_n, b_dv, DV, BDV)


@triton.jit(do_not_specialize=["size", "parts"])
def _sum_parts_kernel(partial, total, size: tl.int64, parts: tl.int64, BLOCK: tl.constexpr):
    """total[i] = sum of partial[part, i] over the parts, in order; what rounding takes from it is
    gathered in lost (Knuth's two-sum), so that the error does not grow with the parts."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), partial.dtype.element_ty)
    lost = tl.zeros((BLOCK,), partial.dtype.element_ty)
    for part in range(0, parts):
        x = tl.load(partial + part * size + o, mask=o < size, other=0.0)
        new = acc + x
        taken = new - acc
        lost += (acc - (new - taken)) + (x - taken)
        acc = new
    acc += tl.where(lost == lost, lost, 0.0)  # NaN where the sum is not finite
    tl.store(total + o, acc.to(total.dtype.element_ty), mask=o < size)


def sum_parts(partial: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Gradient of shared seeds q from its partial sums, added in order."""
    total, block = launch.new(q), 256
    grid = (triton.cdiv(total.numel(), block),)
    _sum_parts_kernel[grid](
        partial, total, total.numel(), partial.shape[0], BLOCK=block, enable_fp_fusion=True
    )
    return total


def backward(
    q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, out, lse, dout, dlse, scale, dropout, need_dbias
):  # fmt: skip
    """(dq, dk, dv, dbias); dbias is [0, H] unless asked for."""
    common = launch.arguments(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout)
    sdo_b, sdo = launch.row_strides(dout, q_ptr)
    sdl_b, sdl = launch.row_strides(dlse, q_ptr)
    dk, dv, dbias = launch.new(k), launch.new(v), launch.new_pairs(q, bias, need_dbias)
    delta, norm = launch.new(lse), launch.new(lse)
    common |= dict(lse=lse, sl=lse.stride()[-2:], dout=dout, sdo_b=sdo_b, sdo=sdo)
    common |= dict(dk=dk, dv=dv, delta=delta, norm=norm)
    heads, molecules = q.shape[1], common["B"]
    options = bias is not None or seed is not None
    query = launch.schedules("backward_query", q, v, q_ptr, q.shape[0], options)
    key = launch.schedules("backward_key", q, v, q_ptr, k.shape[0], options)
    complete = query[0]["BLOCK_M"]
    chunk, parts = 1, molecules
    if q_ptr is None:
        tiles = launch.query_tiles(q, q_ptr, 1, complete)
        chunk, parts = launch.chunks(molecules, tiles * heads)
    dq = launch.new_query_gradient(q, q_ptr, parts)
    with launch.on_device(q):
        for tile in query:
            tiles = launch.query_tiles(q, q_ptr, parts, tile["BLOCK_M"])
            if q.shape[0] and tiles:
                _query_kernel[(tiles * heads,)](
                    **common, out=out, so=out.stride()[-3:], dlse=dlse, sdl_b=sdl_b, sdl=sdl, dq=dq,
                    dbias=dbias if dbias.numel() else None, CHUNK=chunk, **tile)  # fmt: skip
        for tile in key:
            tiles = launch.tiles_of(k.shape[0], molecules, tile["BLOCK_N"])
            if k.shape[0]:
                _key_kernel[(tiles * heads,)](**common, COMPLETE=complete, **tile)
        if q_ptr is None:
            dq = sum_parts(dq, q)
    return dq, dk, dv, dbias
