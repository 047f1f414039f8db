"""Double backward pass: (D1) to (D13), everything pairwise recomputed from q, k, v, dout and lse.

The *query kernel* walks the keys of up to BLOCK_M query rows twice: first for the row statistics
delta', t and y, then for gq, gdout and gbias. With y counted as s1 − δt + w, (D4) and (D6) become
Z = dS∘(T − t) + P∘(G − y), which cancels less. The *key kernel* walks the queries of up to BLOCK_N
key rows: gk, gv, gkey_bias. Who does small molecules, and how gradients of shared seeds are summed,
is as in _backward.py. A cotangent that is None is zero and costs nothing.
"""

import triton
import triton.language as tl

from ...operands import Cotangents, Operands, Options, Result, SecondGradients, Tangents
from . import launch, schedules
from ._backward import sum_parts
from .arguments import Dual, Factors, Molecule, Place, Rows, Statistics, Tile, Width, Widths
from .primitives import (
    UNSPECIALIZED,
    add_biases,
    chunk_of,
    find_long_tile,
    find_molecule,
    find_query_tile,
    find_segment_tiles,
    find_tile,
    keep_mask,
    later,
    load_bias,
    load_bias_of_keys,
    load_key_bias,
    load_row_values,
    load_rows,
    molecule_pairs,
    not_ours,
    of_molecule,
    out_row,
    pair_weights,
    products,
    query_rows,
    store_pairs,
    store_products,
    store_row_values,
    store_rows,
)


@triton.jit
def _finish_block(s, t, dp, g, by, b_bias, b_key, b_e, b_f, m_pair, m_keep, b_lse, b_norm):
    """(P, P∘R, dP, T, G) from the products of a block: of (q, k), its tangent, (dO, V), (dO, C)."""
    p = pair_weights(s, by.c, b_bias, b_key, m_pair, b_lse) * b_norm
    t = add_biases(t, by.c, b_e, b_f)
    kept = p
    if m_keep is not None:
        dp = tl.where(m_keep, dp * by.r, 0.0)
        g = tl.where(m_keep, g * by.r, 0.0)
        kept = tl.where(m_keep, p * by.r, 0.0)
    return p, kept, dp, t, g


@triton.jit
def statistics_of(p, dp, b_t, g):
    """Of a block of keys: Σ P, the means δ and t, and Σ P(T − t)(dP − δ) + Σ P∘G."""
    part = tl.sum(p, 1)
    share = 1.0 / tl.maximum(part, 1e-30)  # of a subnormal sum it would be infinite
    delta = tl.sum(p * dp, 1) * share
    t = tl.sum(p * b_t, 1) * share
    y = tl.sum(p * ((b_t - t[:, None]) * (dp - delta[:, None]) + g), 1)
    return part, delta, t, y


@triton.jit
def merge_statistics(total, delta, t, y, part, delta_b, t_b, y_b):
    """Those of the keys so far and of some more, together.

    Means and covariances are merged (Chan, Golub, LeVeque 1983) rather than sums subtracted, as
    large logits have large T: y = s1 − δt + w would lose what s1 and δt have in common.
    """
    y += y_b
    new_total = total + part
    share = part / tl.where(new_total > 0, new_total, 1.0)
    y += (t_b - t) * (delta_b - delta) * total * share
    return new_total, delta + (delta_b - delta) * share, t + (t_b - t) * share, y


@triton.jit
def block_of_keys(x, dout, t, of, at_m, first_k, live, b_lse, b_norm, by, zero, H, widths, tile):
    """(P, P∘R, dP, T, G) of a block of queries and the keys first_k to live."""
    o_n = first_k + tl.arange(0, tile.n)
    k_at, head_at = later(of.k_row, first_k, H), later(at_m.head, first_k, H)
    m_n = o_n < live
    at_n = Place(k_at, o_n, m_n, head_at)
    # [BLOCK_M, BLOCK_N]
    s, s_dot = products(Dual(x.q, t.ddq), at_m, Dual(x.k, t.ddk), at_n, zero, H, widths.qk, tile)
    dp, g = products(Dual(dout, None), at_m, Dual(x.v, t.ddv), at_n, zero, H, widths.v, tile)
    b_bias = load_bias(x.bias, of, at_m, o_n, head_at, by.c)
    b_e = load_bias(t.ddbias, of, at_m, o_n, head_at, by.c)
    b_key = load_key_bias(x.key_bias, at_n, by.c, 0)
    b_f = load_key_bias(t.ddkey_bias, at_n, by.c, 0)
    m_pair = m_n[None, :]
    m_keep = None
    if x.seed is not None:
        m_keep = keep_mask(x.seed, by.threshold, of.index, head_at, at_m.offsets, first_k, tile.n)
    b_lse, b_norm = b_lse[:, None], b_norm[:, None]
    return _finish_block(
        s, s_dot, dp, g, by, b_bias, b_key, b_e, b_f, m_pair, m_keep, b_lse, b_norm
    )


@triton.jit
def _query_tile(
    x,
    y,
    dy,
    t,
    gradients,
    saved,
    molecules,
    q_row,
    first,
    rows,
    head,
    by,
    B,
    H,
    n,
    alone,
    widths,
    tile,
    COMPLETES: tl.constexpr,
):
    """The queries from first on, in the molecules low to high. n: rows of q, k and bias."""
    ACC: tl.constexpr = y.lse.data.dtype.element_ty
    low, high = molecules
    n_q, n_k, n_pairs = n
    one = tl.full((), 1.0, ACC)
    o_m = first + tl.arange(0, tile.m)
    m_m = o_m < rows
    at_m = Place(q_row, o_m, m_m, head)
    zero = tl.zeros((tile.m, tile.n), ACC)
    b_gq = tl.zeros((tile.m, widths.qk.padded), ACC)
    for molecule in range(low, high):
        o_row = out_row(x.q_ptr, molecule, q_row, n_q)
        of = find_molecule(x, molecule, B, n_k, n_pairs)
        dout = of_molecule(dy.dout, molecule)
        at_out = Place(o_row, o_m, m_m, head)
        b_lse = load_row_values(y.lse, at_out, float("-inf"))
        b_delta = tl.zeros((tile.m,), ACC)
        b_t = tl.zeros((tile.m,), ACC)
        b_y = tl.zeros((tile.m,), ACC)
        total = tl.zeros((tile.m,), ACC)
        b_norm = tl.full((tile.m,), 1.0, ACC)
        b_dlse = tl.zeros((tile.m,), ACC)
        if dy.dlse is not None:
            b_dlse = load_row_values(of_molecule(dy.dlse, molecule), at_m, 0.0)
            b_dlse = tl.where(b_lse == float("-inf"), 0.0, b_dlse)
        if of.keys > tile.n:
            for first_k in range(0, of.keys, tile.n):
                p, kept, dp, b_dot, g = block_of_keys(
                    x, dout, t, of, at_m, first_k, of.keys, b_lse, b_norm, by, zero, H, widths, tile
                )
                total, b_delta, b_t, b_y = merge_statistics(
                    total, b_delta, b_t, b_y, *statistics_of(p, dp, b_dot, g)
                )
            # the rounding of lse is a factor of P: divide by the row sum that P really has
            b_norm = 1.0 / tl.where(total > 0, total, 1.0)
            b_y *= b_norm
        b_gdo = tl.zeros((tile.m, widths.v.padded), ACC)
        for first_k in range(0, of.keys, tile.n):
            p, kept, dp, b_dot, g = block_of_keys(
                x, dout, t, of, at_m, first_k, of.keys, b_lse, b_norm, by, zero, H, widths, tile
            )
            if of.keys <= tile.n:  # the whole row is at hand: statistics from what is used below
                total, b_delta, b_t, b_y = statistics_of(p, dp, b_dot, g)
                b_norm = 1.0 / tl.where(total > 0, total, 1.0)
                b_y *= b_norm
                p *= b_norm[:, None]
                kept *= b_norm[:, None]
            b_delta -= b_dlse
            b_dlse = tl.zeros((tile.m,), ACC)
            ds = p * (dp - b_delta[:, None])
            z = ds * (b_dot - b_t[:, None]) + p * (g - b_y[:, None])
            o_n = first_k + tl.arange(0, tile.n)
            k_at, head_at = later(of.k_row, first_k, H), later(head, first_k, H)
            at_n = Place(k_at, o_n, o_n < of.keys, head_at)
            if gradients.gbias is not None:
                store_pairs(gradients.gbias, of, at_m, o_n, head_at, H, z)
            if gradients.gkey_bias is not None:  # noqa: SIM102 - no `and`: known when compiled
                if rows <= tile.m:
                    store_row_values(gradients.gkey_bias, at_n, H, tl.sum(z, 0))
            u = (kept * (b_dot - b_t[:, None])).to(x.v.data.dtype.element_ty)
            z = z.to(x.k.data.dtype.element_ty)
            ds = ds.to(x.k.data.dtype.element_ty)
            # [BLOCK_N, BD]
            b_k = load_rows(x.k, at_n, widths.qk)
            b_gq = tl.dot(z, b_k, b_gq, input_precision=tile.precision)
            if t.ddk is not None:
                b_ddk = load_rows(t.ddk, at_n, widths.qk)
                b_gq = tl.dot(ds, b_ddk, b_gq, input_precision=tile.precision)
            # [BLOCK_N, BDV]
            b_v = load_rows(x.v, at_n, widths.v)
            b_gdo = tl.dot(u, b_v, b_gdo, input_precision=tile.precision)
            if t.ddv is not None:
                b_ddv = load_rows(t.ddv, at_n, widths.v)
                b_gdo = tl.dot(kept.to(b_v.dtype), b_ddv, b_gdo, input_precision=tile.precision)
            if COMPLETES:
                if rows <= tile.m:
                    at_q = Place(later(q_row, first_k, H), o_m, m_m, head_at)
                    zs = Dual(tl.trans(z), tl.trans(ds))
                    store_products(
                        gradients.gk,
                        at_n,
                        zs,
                        Dual(x.q, t.ddq),
                        at_q,
                        by.c,
                        H,
                        widths.qk,
                        tile.precision,
                    )
                    us = Dual(tl.trans(u), None)
                    store_products(
                        gradients.gv,
                        at_n,
                        us,
                        Dual(dout, None),
                        at_q,
                        one,
                        H,
                        widths.v,
                        tile.precision,
                    )
                elif alone != 0:  # sizes were known wrongly, and nobody else comes: it shows
                    fill_keys(gradients, at_n, H, float("nan"), widths)
        at_end = Place(later(o_row, of.keys, H), o_m, m_m, head)
        store_row_values(gradients.gdlse, at_end, H, b_t)
        if rows > tile.m:
            store_row_values(saved.delta, at_end, H, b_delta)
            store_row_values(saved.y, at_end, H, b_y)
            store_row_values(saved.norm, at_end, H, b_norm)
        store_rows(gradients.gdout, at_end, H, b_gdo, widths.v)
        if COMPLETES:  # noqa: SIM102 - no `and`: known when compiled
            if (alone != 0) & ((molecule < 0) | (molecule >= B)):  # rows of no molecule
                fill_keys(gradients, at_m, H, 0.0, widths)
    return b_gq


@triton.jit
def fill_keys(gradients, at, H, value, widths):
    """A number in the gradients of some keys."""
    ROWS: tl.constexpr = at.offsets.shape[0]
    store_rows(gradients.gk, at, H, tl.full((ROWS, widths.qk.padded), value, tl.float32), widths.qk)
    store_rows(gradients.gv, at, H, tl.full((ROWS, widths.v.padded), value, tl.float32), widths.v)
    if gradients.gkey_bias is not None:
        store_row_values(gradients.gkey_bias, at, H, tl.full((ROWS,), value, tl.float32))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _query_kernel(
    x,
    y,
    dy,
    t,
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
    ALONE: tl.int32,
    SHORTEST: tl.int32,
    LONGEST: tl.int32,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
    WALK: tl.constexpr,
    COMPLETES: tl.constexpr,
):
    ACC: tl.constexpr = y.lse.data.dtype.element_ty
    WIDTHS: tl.constexpr = Widths(Width(D, BD), Width(DV, BDV))
    TILE: tl.constexpr = Tile(BLOCK_M, BLOCK_N, SLICE, PRECISION)
    head = (tl.program_id(0) % H).to(tl.int64)
    part, q_row, first, rows = find_query_tile(
        tl.program_id(0) // H, x.q_ptr, B, n_q, BLOCK_M, WALK
    )
    if (first >= rows) | not_ours(rows, SHORTEST, LONGEST):
        return
    by = Factors(tl.full((), scale, ACC), tl.full((), keep_scale, ACC), threshold)
    molecules = chunk_of(part, x.q_ptr, B, CHUNK)
    n = (n_q, n_k, n_pairs)
    gq_row = q_row
    if x.q_ptr is None:
        gq_row = part * n_q
    last = first + 1
    if WALK == 1:
        last = rows
    for at in range(first, last, BLOCK_M):
        b_gq = _query_tile(
            x,
            y,
            dy,
            t,
            gradients,
            saved,
            molecules,
            q_row,
            at,
            rows,
            head,
            by,
            B,
            H,
            n,
            ALONE,
            WIDTHS,
            TILE,
            COMPLETES,
        )
        o_m = at + tl.arange(0, BLOCK_M)
        at_gq = Place(gq_row, o_m, o_m < rows, head)
        store_rows(gradients.gq, at_gq, H, b_gq * by.c, WIDTHS.qk)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _key_kernel(
    x,
    y,
    dy,
    t,
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
    COMPLETE: tl.int32,
    SHORTEST: tl.int32,
    LONGEST: tl.int32,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
    WALK: tl.constexpr,
):
    ACC: tl.constexpr = y.lse.data.dtype.element_ty
    WIDTHS: tl.constexpr = Widths(Width(D, BD), Width(DV, BDV))
    TILE: tl.constexpr = Tile(BLOCK_M, BLOCK_N, SLICE, PRECISION)
    head = (tl.program_id(0) % H).to(tl.int64)
    if WALK == 1:
        molecule, k_row, first_row, end = find_segment_tiles(tl.program_id(0) // H, x.k_ptr, B, n_k)
    elif WALK == 2:
        molecule, k_row, first_row, end = find_long_tile(
            tl.program_id(0) // H, x.k_ptr, B, n_k, BLOCK_N
        )
    else:
        molecule, k_row, first_row, end = find_tile(tl.program_id(0) // H, x.k_ptr, B, n_k, BLOCK_N)
    if (first_row >= end) | not_ours(end - k_row, SHORTEST, LONGEST):
        return
    q_row, rows = query_rows(x.q_ptr, molecule, B, n_q)
    if (rows > 0) & (rows <= COMPLETE):
        return
    o_row = out_row(x.q_ptr, molecule, q_row, n_q)
    pair, pairs = molecule_pairs(x.pair_ptr, molecule, B, n_pairs)
    keys = (end - k_row).to(tl.int32)
    of = Molecule(molecule, k_row, keys, pair, pairs)
    by = Factors(tl.full((), scale, ACC), tl.full((), keep_scale, ACC), threshold)
    first = (first_row - k_row).to(tl.int32)
    last = first + 1
    if WALK == 1:
        last = keys
    for at in range(first, last, BLOCK_N):
        _key_tile(
            x, y, dy, t, gradients, saved, of, at, q_row, o_row, rows, head, by, H, WIDTHS, TILE
        )


@triton.jit
def _key_tile(
    x, y, dy, t, gradients, saved, of, first, q_row, o_row, rows, head, by, H, widths, tile
):
    """The keys from first on."""
    ACC: tl.constexpr = y.lse.data.dtype.element_ty
    o_n = first + tl.arange(0, tile.n)
    at_n = Place(of.k_row, o_n, o_n < of.keys, head)
    dout = of_molecule(dy.dout, of.index)
    zero = tl.zeros((tile.n, tile.m), ACC)
    b_gk = tl.zeros((tile.n, widths.qk.padded), ACC)
    b_gv = tl.zeros((tile.n, widths.v.padded), ACC)
    b_ge = tl.zeros((tile.n,), ACC)
    b_key = load_key_bias(x.key_bias, at_n, by.c, 1)
    b_f = load_key_bias(t.ddkey_bias, at_n, by.c, 1)
    for first_q in range(0, rows, tile.m):
        o_m = first_q + tl.arange(0, tile.m)
        q_at, head_at = later(q_row, first_q, H), later(head, first_q, H)
        m_m = o_m < rows
        at_m = Place(q_at, o_m, m_m, head_at)
        at_out = Place(o_row, o_m, m_m, head_at)
        # [BLOCK_N, BLOCK_M]
        s, s_dot = products(
            Dual(x.k, t.ddk), at_n, Dual(x.q, t.ddq), at_m, zero, H, widths.qk, tile
        )
        dp, g = products(Dual(x.v, t.ddv), at_n, Dual(dout, None), at_m, zero, H, widths.v, tile)
        # [1, BLOCK_M]
        b_lse = load_row_values(y.lse, at_out, float("-inf"))[None, :]
        b_delta = load_row_values(Rows(saved.delta, y.lse.strides), at_out, 0.0)[None, :]
        b_t = load_row_values(Rows(gradients.gdlse, y.lse.strides), at_out, 0.0)[None, :]
        b_y = load_row_values(Rows(saved.y, y.lse.strides), at_out, 0.0)[None, :]
        b_norm = load_row_values(Rows(saved.norm, y.lse.strides), at_out, 1.0)[None, :]
        b_bias = load_bias_of_keys(x.bias, of, at_m, o_n, head_at, by.c)
        b_e = load_bias_of_keys(t.ddbias, of, at_m, o_n, head_at, by.c)
        m_keep = None
        if x.seed is not None:
            keep = keep_mask(x.seed, by.threshold, of.index, head_at, o_m, first, tile.n)
            m_keep = tl.trans(keep)
        p, kept, dp, b_dot, g = _finish_block(
            s, s_dot, dp, g, by, b_bias, b_key, b_e, b_f, m_m[None, :], m_keep, b_lse, b_norm
        )
        ds = p * (dp - b_delta)
        z = ds * (b_dot - b_t) + p * (g - b_y)
        if gradients.gkey_bias is not None:
            b_ge += tl.sum(z, 1)
        z = z.to(x.q.data.dtype.element_ty)
        # [BLOCK_M, BD]
        b_q = load_rows(x.q, at_m, widths.qk)
        b_gk = tl.dot(z, b_q, b_gk, input_precision=tile.precision)
        if t.ddq is not None:
            b_ddq = load_rows(t.ddq, at_m, widths.qk)
            b_gk = tl.dot(ds.to(b_ddq.dtype), b_ddq, b_gk, input_precision=tile.precision)
        # [BLOCK_M, BDV]
        b_do = load_rows(dout, at_m, widths.v)
        u = (kept * (b_dot - b_t)).to(b_do.dtype)
        b_gv = tl.dot(u, b_do, b_gv, input_precision=tile.precision)
    store_rows(gradients.gk, at_n, H, b_gk * by.c, widths.qk)
    store_rows(gradients.gv, at_n, H, b_gv, widths.v)
    if gradients.gkey_bias is not None:
        store_row_values(gradients.gkey_bias, at_n, H, b_ge)


def double_backward(
    x: Operands, y: Result, dy: Cotangents, t: Tangents, options: Options
) -> SecondGradients:
    """out is not needed."""
    gk, gv = launch.new(x.k), launch.new(x.v)
    gbias, gkey_bias = launch.new_pairs(x, True), launch.new_key_bias(x)
    gdout, gdlse = launch.new(dy.dout), launch.new(y.lse)
    query = schedules.of_queries("double_backward_query", x)
    complete, heads = schedules.complete(query), x.q.shape[1]
    key = schedules.of_keys("double_backward_key", x, complete)
    chunk, parts = launch.query_chunks(x, query[0]["BLOCK_M"])
    gq = launch.new_query_gradient(x, parts)
    lse, dy = launch.carry(Result, None, launch.result(y).lse), launch.cotangents(dy, x.shared)
    wanted = launch.if_given(x.bias, gbias), launch.if_given(x.key_bias, gkey_bias)
    gradients = launch.carry(SecondGradients, gq, gk, gv, *wanted, gdout, gdlse)
    common = launch.arguments(x, options) | dict(
        y=lse,
        t=launch.tangents(t),
        saved=Statistics(*(launch.new(y.lse) for _ in range(3))),
    )
    alone = int(schedules.alone(x, complete))
    of_queries = common | dict(dy=dy, gradients=gradients, CHUNK=chunk, ALONE=alone)
    of_keys = common | dict(
        dy=Cotangents(dy.dout, None),
        gradients=launch.without(gradients, "gq", "gbias", "gdout"),
        COMPLETE=complete,
    )
    with launch.on_device(x.q):
        for tile in query:
            tiles = schedules.query_programs(x, parts, tile)
            if x.q.shape[0] and tiles:
                _query_kernel[(tiles * heads,)](**of_queries, **tile)
        for tile in key:
            tile = schedules.without_completion(tile)
            _key_kernel[(schedules.key_programs(x, tile) * heads,)](**of_keys, **tile)
        if x.shared:
            gq = sum_parts(gq, x.q)
    return SecondGradients(gq, gk, gv, gbias, gkey_bias, gdout, gdlse)
