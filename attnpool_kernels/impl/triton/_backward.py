"""Backward pass: (B1) to (B8), the weights recomputed from q, k, biases and lse; no atomics.

The *query kernel* walks the keys of up to BLOCK_M query rows: dq, dbias, and the row statistic
delta' of (B2). The *key kernel* walks the queries of up to BLOCK_N key rows: dk, dv, dkey_bias. A
molecule whose queries fit one tile is done by the query kernel alone, which then has every query of
each key block at hand; the key kernel skips it. With shared seeds a query program sums dq over
CHUNK molecules, in order, and a last kernel sums the chunks, in order.

Where a molecule's keys are one block, delta is rowsum(P∘dP) and P is divided by its own row sum:
dS is then 0 to the last bit where it should be, and out is not read. Rows of more blocks take delta
from out, and rows of large LSE, whose rounding is a factor of P, sum P once more for its norm.
"""

import torch
import triton
import triton.language as tl

from ...operands import Cotangents, Gradients, Operands, Options, Result
from . import launch
from .arguments import Dual, Molecule, Place, Rows, Statistics, Tile, Width, Widths
from .primitives import (
    UNSPECIALIZED,
    chunk_of,
    find_molecule,
    find_query_tile,
    find_tile,
    keep_mask,
    later,
    load_bias,
    load_bias_of_keys,
    load_key_bias,
    load_row_values,
    load_rows,
    logits,
    molecule_pairs,
    not_ours,
    of_molecule,
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
    x,
    y,
    dy,
    gradients,
    saved,
    B: tl.int64,
    H: tl.int32,
    n_q: tl.int64,
    n_k: tl.int64,
    n_pairs: tl.int64,
    scale: tl.float64,
    threshold: tl.uint32,
    keep_scale: tl.float64,
    CHUNK: tl.int64,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
    SHORTEST: tl.constexpr,
    LONGEST: tl.constexpr,
):
    ACC: tl.constexpr = y.lse.data.dtype.element_ty
    WIDTHS: tl.constexpr = Widths(Width(D, BD), Width(DV, BDV))
    TILE: tl.constexpr = Tile(BLOCK_M, BLOCK_N, SLICE, PRECISION)
    head = (tl.program_id(0) % H).to(tl.int64)
    part, q_row, first, rows = find_query_tile(tl.program_id(0) // H, x.q_ptr, B, n_q, BLOCK_M)
    if (first >= rows) | not_ours(rows, SHORTEST, LONGEST):
        return
    c = tl.full((), scale, ACC)
    r = tl.full((), keep_scale, ACC)
    one = tl.full((), 1.0, ACC)
    o_m = first + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    at_m = Place(q_row, o_m, m_m, head)
    zero = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    acc = tl.zeros((BLOCK_M, BD), ACC)
    low, high = chunk_of(part, x.q_ptr, B, CHUNK)
    for molecule in range(low, high):
        o_row = out_row(x.q_ptr, molecule, q_row, n_q)
        of = find_molecule(x, molecule, B, n_k, n_pairs)
        one_block = of.keys <= BLOCK_N
        at_out = Place(o_row, o_m, m_m, head)
        b_lse = load_row_values(y.lse, at_out, float("-inf"))
        dout = of_molecule(dy.dout, molecule)
        m_o = o_m < tl.where(one_block, 0, rows)
        # [BLOCK_M, BDV]
        b_o = load_rows(y.out, Place(o_row, o_m, m_o, head), WIDTHS.v)
        b_do = load_rows(dout, Place(q_row, o_m, m_o, head), WIDTHS.v)
        b_delta = tl.sum(b_o.to(ACC) * b_do.to(ACC), 1)
        b_dlse = tl.zeros((BLOCK_M,), ACC)
        if dy.dlse is not None:
            b_dlse = load_row_values(of_molecule(dy.dlse, molecule), at_m, 0.0)
            b_dlse = tl.where(b_lse == float("-inf"), 0.0, b_dlse)
        b_norm = tl.full((BLOCK_M,), 1.0, ACC)
        large = renormalise(b_lse, x.bias, x.key_bias, x.q.data.dtype.element_ty)
        if large & (of.keys > BLOCK_N):
            total = tl.zeros((BLOCK_M,), ACC)
            for first_k in range(0, of.keys, BLOCK_N):
                o_n = first_k + tl.arange(0, BLOCK_N)
                m_n = o_n < of.keys
                at_n = Place(of.k_row, o_n, m_n, head)
                s, _ = products(
                    Dual(x.q, None), at_m, Dual(x.k, None), at_n, zero, H, WIDTHS.qk, TILE
                )
                b_bias = load_bias(x.bias, of, at_m, o_n, head, c)
                s = logits(s, c, b_bias, load_key_bias(x.key_bias, at_n, c, 0), m_n[None, :])
                total += tl.sum(weights(s, b_lse[:, None]), 1)
            b_norm = 1.0 / tl.where(total > 0, total, 1.0)
        for first_k in range(0, of.keys, BLOCK_N):
            o_n = first_k + tl.arange(0, BLOCK_N)
            k_at, head_at = later(of.k_row, first_k, H), later(head, first_k, H)
            m_n = o_n < of.keys
            at_n = Place(k_at, o_n, m_n, head_at)
            # [BLOCK_M, BLOCK_N]
            s, _ = products(Dual(x.q, None), at_m, Dual(x.k, None), at_n, zero, H, WIDTHS.qk, TILE)
            dp, _ = products(Dual(dout, None), at_m, Dual(x.v, None), at_n, zero, H, WIDTHS.v, TILE)
            b_bias = load_bias(x.bias, of, at_m, o_n, head_at, c)
            b_key = load_key_bias(x.key_bias, at_n, c, 0)
            p = weights(logits(s, c, b_bias, b_key, m_n[None, :]), b_lse[:, None])
            if x.seed is not None:
                m_keep = keep_mask(x.seed, threshold, molecule, head_at, o_m, first_k, BLOCK_N)
                dp = tl.where(m_keep, dp * r, 0.0)
            if one_block:  # the whole row is at hand: both statistics from what is used below
                total = tl.sum(p, 1)
                b_norm = 1.0 / tl.where(total > 0, total, 1.0)
                b_delta = tl.sum(p * b_norm[:, None] * dp, 1)
            p *= b_norm[:, None]
            ds = p * (dp - (b_delta - b_dlse)[:, None])
            if gradients.dbias is not None:
                store_pairs(gradients.dbias, of, at_m, o_n, head_at, H, ds)
            if gradients.dkey_bias is not None:  # noqa: SIM102 - no `and`: known when compiled
                if rows <= BLOCK_M:
                    store_row_values(gradients.dkey_bias, at_n, H, tl.sum(ds, 0))
            ds = ds.to(x.k.data.dtype.element_ty)
            # [BLOCK_N, BD]
            b_k = load_rows(x.k, at_n, WIDTHS.qk)
            acc = tl.dot(ds, b_k, acc, input_precision=PRECISION)
            if rows <= BLOCK_M:
                if x.seed is not None:
                    p = tl.where(m_keep, p * r, 0.0)
                at_q = Place(later(q_row, first_k, H), o_m, m_m, head_at)
                kept = Dual(tl.trans(p.to(x.v.data.dtype.element_ty)), None)
                store_products(
                    gradients.dv, at_n, kept, Dual(dout, None), at_q, one, H, WIDTHS.v, PRECISION
                )
                ds_t = Dual(tl.trans(ds), None)
                store_products(
                    gradients.dk, at_n, ds_t, Dual(x.q, None), at_q, c, H, WIDTHS.qk, PRECISION
                )
        if rows > BLOCK_M:
            store_row_values(saved.delta, at_out, H, b_delta - b_dlse)
            store_row_values(saved.norm, at_out, H, b_norm)
    if x.q_ptr is None:
        q_row = part * n_q
    store_rows(gradients.dq, Place(q_row, o_m, m_m, head), H, acc * c, WIDTHS.qk)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _key_kernel(
    x,
    y,
    dy,
    gradients,
    saved,
    B: tl.int64,
    H: tl.int32,
    n_q: tl.int64,
    n_k: tl.int64,
    n_pairs: tl.int64,
    scale: tl.float64,
    threshold: tl.uint32,
    keep_scale: tl.float64,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPLETE: tl.constexpr,
    SHORTEST: tl.constexpr,
    LONGEST: tl.constexpr,
):
    ACC: tl.constexpr = y.lse.data.dtype.element_ty
    WIDTHS: tl.constexpr = Widths(Width(D, BD), Width(DV, BDV))
    TILE: tl.constexpr = Tile(BLOCK_M, BLOCK_N, SLICE, PRECISION)
    head = (tl.program_id(0) % H).to(tl.int64)
    molecule, k_row, first_row, end = find_tile(tl.program_id(0) // H, x.k_ptr, B, n_k, BLOCK_N)
    if (first_row >= end) | not_ours(end - k_row, SHORTEST, LONGEST):
        return
    q_row, rows = query_rows(x.q_ptr, molecule, B, n_q)
    if (rows > 0) & (rows <= COMPLETE):
        return
    first = (first_row - k_row).to(tl.int32)
    keys = (end - k_row).to(tl.int32)
    o_row = out_row(x.q_ptr, molecule, q_row, n_q)
    pair, pairs = molecule_pairs(x.pair_ptr, molecule, B, n_pairs)
    of = Molecule(molecule, k_row, keys, pair, pairs)
    c = tl.full((), scale, ACC)
    r = tl.full((), keep_scale, ACC)
    o_n = first + tl.arange(0, BLOCK_N)
    m_n = o_n < keys
    at_n = Place(k_row, o_n, m_n, head)
    dout = of_molecule(dy.dout, molecule)
    zero = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    b_dk = tl.zeros((BLOCK_N, BD), ACC)
    b_dv = tl.zeros((BLOCK_N, BDV), ACC)
    b_de = tl.zeros((BLOCK_N,), ACC)
    b_key = load_key_bias(x.key_bias, at_n, c, 1)
    for first_q in range(0, rows, BLOCK_M):
        o_m = first_q + tl.arange(0, BLOCK_M)
        q_at, head_at = later(q_row, first_q, H), later(head, first_q, H)
        m_m = o_m < rows
        at_m = Place(q_at, o_m, m_m, head_at)
        at_out = Place(o_row, o_m, m_m, head_at)
        # [BLOCK_N, BLOCK_M]
        s, _ = products(Dual(x.k, None), at_n, Dual(x.q, None), at_m, zero, H, WIDTHS.qk, TILE)
        dp, _ = products(Dual(x.v, None), at_n, Dual(dout, None), at_m, zero, H, WIDTHS.v, TILE)
        b_lse = load_row_values(y.lse, at_out, float("-inf"))
        b_delta = load_row_values(Rows(saved.delta, y.lse.strides), at_out, 0.0)
        b_norm = load_row_values(Rows(saved.norm, y.lse.strides), at_out, 1.0)
        b_bias = load_bias_of_keys(x.bias, of, at_m, o_n, head_at, c)
        s = logits(s, c, b_bias, b_key, m_m[None, :])
        p = weights(s, b_lse[None, :]) * b_norm[None, :]
        kept = p
        if x.seed is not None:
            m_keep = tl.trans(keep_mask(x.seed, threshold, molecule, head_at, o_m, first, BLOCK_N))
            dp = tl.where(m_keep, dp * r, 0.0)
            kept = tl.where(m_keep, p * r, 0.0)
        ds = p * (dp - b_delta[None, :])
        if gradients.dkey_bias is not None:
            b_de += tl.sum(ds, 1)
        # [BLOCK_M, BDV], [BLOCK_M, BD]
        b_do = load_rows(dout, at_m, WIDTHS.v)
        b_dv = tl.dot(kept.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_q = load_rows(x.q, at_m, WIDTHS.qk)
        b_dk = tl.dot(ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    store_rows(gradients.dk, at_n, H, b_dk * c, WIDTHS.qk)
    store_rows(gradients.dv, at_n, H, b_dv, WIDTHS.v)
    if gradients.dkey_bias is not None:
        store_row_values(gradients.dkey_bias, at_n, H, b_de)


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
    x: Operands, y: Result, dy: Cotangents, options: Options, need_dbias: bool
) -> Gradients:
    dk, dv = launch.new(x.k), launch.new(x.v)
    dbias, dkey_bias = launch.new_pairs(x, need_dbias), launch.new_key_bias(x)
    saved = Statistics(launch.new(y.lse), launch.new(y.lse))
    query = launch.schedules("backward_query", x, x.q.shape[0])
    key = launch.schedules("backward_key", x, x.k.shape[0])
    complete, heads = query[0]["BLOCK_M"], x.q.shape[1]
    chunk, parts = launch.query_chunks(x, complete)
    dq = launch.new_query_gradient(x, parts)
    y, dy = launch.result(y), launch.cotangents(dy, x.shared)
    wanted = dbias if dbias.numel() else None, launch.if_given(x.key_bias, dkey_bias)
    gradients = launch.carry(Gradients, dq, dk, dv, *wanted)
    common = launch.arguments(x, options) | dict(saved=saved)
    of_queries = common | dict(y=y, dy=dy, gradients=gradients, CHUNK=chunk)
    of_keys = common | dict(
        y=launch.carry(Result, None, y.lse),
        dy=Cotangents(dy.dout, None),
        gradients=launch.without(gradients, "dq", "dbias"),
        COMPLETE=complete,
    )
    with launch.on_device(x.q):
        for tile in query:
            tiles = launch.query_tiles(x, parts, tile["BLOCK_M"])
            if x.q.shape[0] and tiles:
                _query_kernel[(tiles * heads,)](**of_queries, **tile)
        for tile in key:
            tiles = launch.tiles_of(x.k.shape[0], x.molecules, tile["BLOCK_N"])
            if x.k.shape[0]:
                _key_kernel[(tiles * heads,)](**of_keys, **tile)
        if x.shared:
            dq = sum_parts(dq, x.q)
    return Gradients(dq, dk, dv, dbias, dkey_bias)
