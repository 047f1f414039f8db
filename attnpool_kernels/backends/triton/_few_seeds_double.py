"""Double backward of pooling with few seeds; parts, slots and sums as in _few_seeds.py.

Each part walks its keys twice: for the statistics Σ P, δ, t and y of its rows, then for gk, gv,
gbias and its shares of gq and gdout. The statistics of molecules of several parts come from a
launch before, and are merged in order by every part.
"""

import triton
import triton.language as tl

from . import launch, tile_table
from ._backward import sum_parts
from ._double_backward import block_of_keys, merge_statistics, statistics_of
from ._few_seeds import arguments, few_tiles, merge, part_in_slot, part_of, scratch, slot_of
from .primitives import (
    UNSPECIALIZED,
    later,
    load_row_values,
    load_rows,
    molecule_pairs,
    store_pairs,
    store_products,
    store_row_values,
    store_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _double_backward_kernel(
    q, k, v, bias, k_ptr, pair_ptr, seed, sq, sk, sv, sb, lse, dout, dlse, ddq, ddk, ddv, ddbias,
    sl, sdo_b, sdo, sdl_b, sdl, sddq, sddk, sddv, sddb, gq, gk, gv, gbias, gdout, gdouts, gdlse,
    totals, deltas, ts, ys,
    B: tl.int64, H: tl.int32, n_q: tl.int64, n_k: tl.int64, n_pairs: tl.int64,
    scale: tl.float64, threshold: tl.uint32, keep_scale: tl.float64, CHUNK: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """Second-order results of CHUNK parts; with STATISTICS only those of the part in a slot."""
    ACC: tl.constexpr = lse.dtype.element_ty
    head = (tl.program_id(0) % H).to(tl.int64)
    at = (tl.program_id(0) // H).to(tl.int64)
    c = tl.full((), scale, ACC)
    r = tl.full((), keep_scale, ACC)
    unit = tl.full((), 1.0, ACC)
    o_m = tl.arange(0, BLOCK_M)
    seeds = n_q.to(tl.int32)  # masks of 64 bits take twice the registers
    zero = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    one = tl.full((BLOCK_M,), 1.0, ACC)
    b_gq = tl.zeros((BLOCK_M, BD), ACC)
    low, high = at, at + 1
    if not STATISTICS:
        low = at * CHUNK
        high = tl.minimum(low + CHUNK, n_k // SPLIT + B + 2)
    for tile in range(low, high):
        if STATISTICS:
            molecule, k_row, first, keys = part_in_slot(at, k_ptr, B, n_k, SPLIT)
            last = tl.minimum(first + SPLIT, keys)
            known = keys > 0
        else:
            # low + ...: the interpreter's loop variables are plain integers
            molecule, k_row, first, last, keys, known = part_of(
                low + (tile - low), k_ptr, B, n_k, SPLIT)  # fmt: skip
        live = tl.where(known, last, 0)  # rows of no molecule: not read, result 0
        pair, pairs = molecule_pairs(pair_ptr, molecule, B, n_pairs)
        m_m = o_m < tl.where(known, seeds, 0)
        row = molecule * n_q
        q_row = molecule * 0
        b_lse = load_row_values(lse, sl, row, head, o_m, m_m, float("-inf"))
        p_do = dout + molecule * sdo_b
        b_delta = tl.zeros((BLOCK_M,), ACC)
        b_t = tl.zeros((BLOCK_M,), ACC)
        b_y = tl.zeros((BLOCK_M,), ACC)
        total = tl.zeros((BLOCK_M,), ACC)
        end = tl.where((keys > SPLIT) & (not STATISTICS), first, live)
        for first_k in range(first, end, BLOCK_N):
            p, kept, dp, t, g = block_of_keys(
                q, k, v, p_do, bias, ddq, ddk, ddv, ddbias, sq, sk, sv, sdo, sb, sddq, sddk, sddv,
                sddb, seed, threshold, b_lse, one, c, r, molecule, head, H, q_row, k_row, live,
                keys, pair, pairs, o_m, m_m, first_k, zero, D, DV, BD, BDV, BLOCK_N, SLICE,
                PRECISION)  # fmt: skip
            total, b_delta, b_t, b_y = merge_statistics(
                total, b_delta, b_t, b_y, *statistics_of(p, dp, t, g))  # fmt: skip
        if STATISTICS:
            slot = at * n_q
            store_row_values(totals, slot, head, H, o_m, m_m, total)
            store_row_values(deltas, slot, head, H, o_m, m_m, b_delta)
            store_row_values(ts, slot, head, H, o_m, m_m, b_t)
            store_row_values(ys, slot, head, H, o_m, m_m, b_y)
        else:
            s_s = (H.to(tl.int64), 1)
            for of in range(0, tl.where(keys > SPLIT, keys, 0), SPLIT):
                slot = slot_of(k_row, of, SPLIT) * n_q
                total, b_delta, b_t, b_y = merge_statistics(
                    total, b_delta, b_t, b_y,
                    load_row_values(totals, s_s, slot, head, o_m, m_m, 0.0),
                    load_row_values(deltas, s_s, slot, head, o_m, m_m, 0.0),
                    load_row_values(ts, s_s, slot, head, o_m, m_m, 0.0),
                    load_row_values(ys, s_s, slot, head, o_m, m_m, 0.0))  # fmt: skip
            # the rounding of lse is a factor of P: divide by the row sum that P really has
            b_norm = 1.0 / tl.where(total > 0, total, 1.0)
            b_y *= b_norm
            if dlse is not None:
                b_dlse = load_row_values(
                    dlse + molecule * sdl_b, sdl, q_row, head, o_m, m_m, 0.0)  # fmt: skip
                b_delta -= tl.where(b_lse == float("-inf"), 0.0, b_dlse)
            m_first = o_m < tl.where(known & (first == 0), seeds, 0)
            store_row_values(gdlse, row, head, H, o_m, m_first, b_t)
            b_gdo = tl.zeros((BLOCK_M, BDV), ACC)
            for first_k in range(first, last, BLOCK_N):
                p, kept, dp, t, g = block_of_keys(
                    q, k, v, p_do, bias, ddq, ddk, ddv, ddbias, sq, sk, sv, sdo, sb, sddq, sddk,
                    sddv, sddb, seed, threshold, b_lse, b_norm, c, r, molecule, head, H, q_row,
                    k_row, live, keys, pair, pairs, o_m, m_m, first_k, zero, D, DV, BD, BDV,
                    BLOCK_N, SLICE, PRECISION)  # fmt: skip
                ds = p * (dp - b_delta[:, None])
                z = ds * (t - b_t[:, None]) + p * (g - b_y[:, None])
                o_n = first_k + tl.arange(0, BLOCK_N)
                k_at, head_at = later(k_row, first_k, H), later(head, first_k, H)
                m_n = o_n < last
                m_live = o_n < live
                if gbias is not None:
                    store_pairs(gbias, pair, pairs, head_at, H, o_m, m_m, o_n, keys, z)
                u = (kept * (t - b_t[:, None])).to(v.dtype.element_ty)
                z = z.to(k.dtype.element_ty)
                ds = ds.to(k.dtype.element_ty)
                q_at = later(molecule * 0, first_k, H)
                store_products(
                    gk, k_at, o_n, m_n, tl.trans(z), q, sq, tl.trans(ds), ddq, sddq, q_at, o_m,
                    m_m, head_at, H, c, D, BD, PRECISION)  # fmt: skip
                store_products(
                    gv, k_at, o_n, m_n, tl.trans(u), p_do, sdo, None, None, None, q_at, o_m, m_m,
                    head_at, H, unit, DV, BDV, PRECISION)  # fmt: skip
                b_k = load_rows(k, sk, k_at, head_at, o_n, m_live, D, BD)
                b_gq = tl.dot(z, b_k, b_gq, input_precision=PRECISION)
                if ddk is not None:
                    b_ddk = load_rows(ddk, sddk, k_at, head_at, o_n, m_live, D, BD)
                    b_gq = tl.dot(ds, b_ddk, b_gq, input_precision=PRECISION)
                b_v = load_rows(v, sv, k_at, head_at, o_n, m_live, DV, BDV)
                b_gdo = tl.dot(u, b_v, b_gdo, input_precision=PRECISION)
                if ddv is not None:
                    b_ddv = load_rows(ddv, sddv, k_at, head_at, o_n, m_live, DV, BDV)
                    b_gdo = tl.dot(kept.to(b_v.dtype), b_ddv, b_gdo, input_precision=PRECISION)
            if keys <= SPLIT:
                store_rows(gdout, later(row, keys, H), head, H, o_m, m_first, b_gdo, DV, BDV)
            else:
                slot = slot_of(k_row, first, SPLIT) * n_q
                m_part = o_m < tl.where(known & (first < keys), seeds, 0)
                store_rows(gdouts, slot, head, H, o_m, m_part, b_gdo, DV, BDV)
    if not STATISTICS:
        store_rows(gq, at * n_q, head, H, o_m, o_m < seeds, b_gq * c, D, BD)


def double_backward(
    q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, out, lse, dout, dlse, ddq, ddk, ddv, ddbias,
    scale, dropout,
):  # fmt: skip
    """(gq, gk, gv, gbias, gdout, gdlse); gbias is [0, H] without a bias. out is not needed."""
    common = arguments(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout)
    sdo_b, sdo = launch.row_strides(dout, q_ptr)
    sdl_b, sdl = launch.row_strides(dlse, q_ptr)
    gk, gv, gbias = launch.new(k), launch.new(v), launch.new_pairs(q, bias, True)
    gdout, gdlse = launch.new(dout), launch.new(lse)
    heads, molecules = q.shape[1], common["B"]
    totals, deltas, ts, ys = (scratch(lse, k.shape[0]) for _ in range(4))
    gdouts = scratch(gdout, k.shape[0])
    tile = launch.tile("few_seeds_double_backward", q, v, bias is not None or seed is not None)
    chunk, parts = launch.chunks(few_tiles(k.shape[0], molecules), heads)
    gq = launch.new_query_gradient(q, q_ptr, parts)
    common |= dict(lse=lse, sl=lse.stride()[-2:], dout=dout, sdo_b=sdo_b, sdo=sdo, dlse=dlse)
    common |= dict(sdl_b=sdl_b, sdl=sdl, totals=totals, deltas=deltas, ts=ts, ys=ys)
    common |= dict(ddq=ddq, ddk=ddk, ddv=ddv, ddbias=ddbias, sddb=launch.strides(ddbias))
    common |= {f"s{n}": launch.strides(x) for n, x in (("ddq", ddq), ("ddk", ddk), ("ddv", ddv))}
    common |= dict(gq=gq, gk=gk, gv=gv, gdout=gdout, gdlse=gdlse, gdouts=gdouts, CHUNK=chunk)
    common |= dict(gbias=None if bias is None else gbias)
    with launch.on_device(q):
        several = k.shape[0] > tile_table.SPLIT and molecules > 0
        if several:
            grid = (len(totals) * heads,)
            _double_backward_kernel[grid](**common, STATISTICS=True, **tile)
        _double_backward_kernel[(parts * heads,)](**common, STATISTICS=False, **tile)
        if several:
            merge(common, tile, gdout, gdouts)
        gq = sum_parts(gq, q)
    return gq, gk, gv, gbias, gdout, gdlse
