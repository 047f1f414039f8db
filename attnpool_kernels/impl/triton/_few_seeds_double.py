"""Double backward of pooling with few seeds; parts, slots and sums as in _few_seeds.py.

Each part walks its keys twice: for the statistics Σ P, δ, t and y of its rows, then for gk, gv,
gbias, gkey_bias and its shares of gq and gdout. The statistics of molecules of several parts come
from two launches before, which find those of the parts and merge them in order.
"""

import triton
import triton.language as tl

from ...operands import Cotangents, Operands, Options, Result, SecondGradients, Tangents
from . import launch, tile_table
from ._backward import sum_parts
from ._double_backward import block_of_keys, merge_statistics, statistics_of
from ._few_seeds import (
    arguments,
    few_tiles,
    load_part,
    merge,
    merge_rows,
    part_in_slot,
    part_of,
    scratch,
    slot_of,
    statistics,
)
from .arguments import (
    Dual,
    Factors,
    Molecule,
    Outputs,
    Parts,
    Place,
    Tile,
    Width,
    Widths,
)
from .primitives import (
    UNSPECIALIZED,
    later,
    load_row_values,
    load_rows,
    molecule_pairs,
    of_molecule,
    store_pairs,
    store_products,
    store_row_values,
    store_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _double_backward_kernel(
    x,
    y,
    dy,
    t,
    gradients,
    parts,
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
    SPLIT: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """Second-order results of CHUNK parts; with STATISTICS only those of the part in a slot."""
    ACC: tl.constexpr = y.lse.data.dtype.element_ty
    WIDTHS: tl.constexpr = Widths(Width(D, BD), Width(DV, BDV))
    TILE: tl.constexpr = Tile(BLOCK_M, BLOCK_N, SLICE, PRECISION)
    head = (tl.program_id(0) % H).to(tl.int64)
    at = (tl.program_id(0) // H).to(tl.int64)
    by = Factors(tl.full((), scale, ACC), tl.full((), keep_scale, ACC), threshold)
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
            molecule, k_row, first, keys = part_in_slot(at, x.k_ptr, B, n_k, SPLIT)
            last = tl.minimum(first + SPLIT, keys)
            known = keys > 0
        else:
            # low + ...: the interpreter's loop variables are plain integers
            molecule, k_row, first, last, keys, known = part_of(
                low + (tile - low), x.k_ptr, B, n_k, SPLIT
            )
        live = tl.where(known, last, 0)  # rows of no molecule: not read, result 0
        pair, pairs = molecule_pairs(x.pair_ptr, molecule, B, n_pairs)
        of = Molecule(molecule, k_row, keys, pair, pairs)
        m_m = o_m < tl.where(known, seeds, 0)
        row = molecule * n_q
        q_row = molecule * 0
        at_m = Place(q_row, o_m, m_m, head)
        b_lse = load_row_values(y.lse, Place(row, o_m, m_m, head), float("-inf"))
        dout = of_molecule(dy.dout, molecule)
        b_delta = tl.zeros((BLOCK_M,), ACC)
        b_t = tl.zeros((BLOCK_M,), ACC)
        b_y = tl.zeros((BLOCK_M,), ACC)
        total = tl.zeros((BLOCK_M,), ACC)
        end = tl.where((keys > SPLIT) & (not STATISTICS), first, live)
        for first_k in range(first, end, BLOCK_N):
            p, kept, dp, b_dot, g = block_of_keys(
                x, dout, t, of, at_m, first_k, live, b_lse, one, by, zero, H, WIDTHS, TILE
            )
            total, b_delta, b_t, b_y = merge_statistics(
                total, b_delta, b_t, b_y, *statistics_of(p, dp, b_dot, g)
            )
        if STATISTICS:
            at_slot = Place(at * n_q, o_m, m_m, head)
            store_row_values(parts.rows.total, at_slot, H, total)
            store_row_values(parts.rows.delta, at_slot, H, b_delta)
            store_row_values(parts.rows.t, at_slot, H, b_t)
            store_row_values(parts.rows.y, at_slot, H, b_y)
        else:
            if keys > SPLIT:
                heads = H.to(tl.int64)
                at_whole = Place(slot_of(k_row, 0, SPLIT) * n_q, o_m, m_m, head)
                total = load_part(parts.whole.total, at_whole, heads)
                b_delta = load_part(parts.whole.delta, at_whole, heads)
                b_t = load_part(parts.whole.t, at_whole, heads)
                b_y = load_part(parts.whole.y, at_whole, heads)
            # the rounding of lse is a factor of P: divide by the row sum that P really has
            b_norm = 1.0 / tl.where(total > 0, total, 1.0)
            b_y *= b_norm
            if dy.dlse is not None:
                b_dlse = load_row_values(of_molecule(dy.dlse, molecule), at_m, 0.0)
                b_delta -= tl.where(b_lse == float("-inf"), 0.0, b_dlse)
            m_first = o_m < tl.where(known & (first == 0), seeds, 0)
            store_row_values(gradients.gdlse, Place(row, o_m, m_first, head), H, b_t)
            b_gdo = tl.zeros((BLOCK_M, BDV), ACC)
            for first_k in range(first, last, BLOCK_N):
                p, kept, dp, b_dot, g = block_of_keys(
                    x, dout, t, of, at_m, first_k, live, b_lse, b_norm, by, zero, H, WIDTHS, TILE
                )
                ds = p * (dp - b_delta[:, None])
                z = ds * (b_dot - b_t[:, None]) + p * (g - b_y[:, None])
                o_n = first_k + tl.arange(0, BLOCK_N)
                k_at, head_at = later(k_row, first_k, H), later(head, first_k, H)
                at_n = Place(k_at, o_n, o_n < last, head_at)
                at_live = Place(k_at, o_n, o_n < live, head_at)
                if gradients.gbias is not None:
                    store_pairs(gradients.gbias, of, at_m, o_n, head_at, H, z)
                if gradients.gkey_bias is not None:
                    store_row_values(gradients.gkey_bias, at_n, H, tl.sum(z, 0))
                u = (kept * (b_dot - b_t[:, None])).to(x.v.data.dtype.element_ty)
                z = z.to(x.k.data.dtype.element_ty)
                ds = ds.to(x.k.data.dtype.element_ty)
                at_q = Place(later(q_row, first_k, H), o_m, m_m, head_at)
                zs = Dual(tl.trans(z), tl.trans(ds))
                store_products(
                    gradients.gk, at_n, zs, Dual(x.q, t.ddq), at_q, by.c, H, WIDTHS.qk, PRECISION
                )
                us = Dual(tl.trans(u), None)
                store_products(
                    gradients.gv, at_n, us, Dual(dout, None), at_q, unit, H, WIDTHS.v, PRECISION
                )
                # [BLOCK_N, BD]
                b_k = load_rows(x.k, at_live, WIDTHS.qk)
                b_gq = tl.dot(z, b_k, b_gq, input_precision=PRECISION)
                if t.ddk is not None:
                    b_ddk = load_rows(t.ddk, at_live, WIDTHS.qk)
                    b_gq = tl.dot(ds, b_ddk, b_gq, input_precision=PRECISION)
                # [BLOCK_N, BDV]
                b_v = load_rows(x.v, at_live, WIDTHS.v)
                b_gdo = tl.dot(u, b_v, b_gdo, input_precision=PRECISION)
                if t.ddv is not None:
                    b_ddv = load_rows(t.ddv, at_live, WIDTHS.v)
                    b_gdo = tl.dot(kept.to(b_v.dtype), b_ddv, b_gdo, input_precision=PRECISION)
            if keys <= SPLIT:
                at_out = Place(later(row, keys, H), o_m, m_first, head)
                store_rows(gradients.gdout, at_out, H, b_gdo, WIDTHS.v)
            else:
                slot = slot_of(k_row, first, SPLIT) * n_q
                m_part = o_m < tl.where(known & (first < keys), seeds, 0)
                at_part = Place(slot, o_m, m_part, head)
                store_rows(parts.gdout, at_part, H, b_gdo, WIDTHS.v)
    if not STATISTICS:
        at_gq = Place(at * n_q, o_m, o_m < seeds, head)
        store_rows(gradients.gq, at_gq, H, b_gq * by.c, WIDTHS.qk)


def double_backward(
    x: Operands, y: Result, dy: Cotangents, t: Tangents, options: Options
) -> SecondGradients:
    """out is not needed."""
    gk, gv = launch.new(x.k), launch.new(x.v)
    gbias, gkey_bias = launch.new_pairs(x, True), launch.new_key_bias(x)
    wanted = launch.if_given(x.bias, gbias), launch.if_given(x.key_bias, gkey_bias)
    gdout, gdlse = launch.new(dy.dout), launch.new(y.lse)
    names = ("delta", "total", "t", "y")
    parts = Parts(scratch(gdout, x), *(statistics(names, y.lse, x) for _ in range(2)))
    heads, tile = x.q.shape[1], launch.chosen("few_seeds_double_backward", x)
    chunk, programs = launch.chunks(few_tiles(x), heads)
    gq = launch.new_query_gradient(x, programs)
    common = arguments(x, options)
    given = common | dict(
        y=launch.carry(Result, None, launch.result(y).lse),
        dy=launch.cotangents(dy, x.shared),
        t=launch.tangents(t),
        gradients=launch.carry(SecondGradients, gq, gk, gv, *wanted, gdout, gdlse),
        parts=parts,
        CHUNK=chunk,
    )
    with launch.on_device(x.q):
        several = x.k.shape[0] > tile_table.SPLIT and x.molecules > 0
        if several:
            grid = (len(parts.rows.total) * heads,)
            _double_backward_kernel[grid](**given, STATISTICS=True, **tile)
            merge_rows(common, tile, parts)
        _double_backward_kernel[(programs * heads,)](**given, STATISTICS=False, **tile)
        if several:
            merge(common, tile, launch.carry(Result, gdout, None), Outputs(parts.gdout, None))
        gq = sum_parts(gq, x.q)
    return SecondGradients(gq, gk, gv, gbias, gkey_bias, gdout, gdlse)
