"""Double backward pass: (D1) to (D12), everything pairwise recomputed from q, k, v, dout and lse.

The *query kernel* walks the keys of up to BLOCK_M query rows twice: first for the row statistics
delta', t and y, then for gq, gdout and gbias. With y counted as s1 − δt + w, (D4) and (D6) become
Z = dS∘(T − t) + P∘(G − y), which cancels less. The *key kernel* walks the queries of up to BLOCK_N
key rows: gk, gv. Who does small molecules, and how gradients of shared seeds are summed, is as in
_backward.py. A cotangent that is None is zero and costs nothing.
"""

import triton
import triton.language as tl

from . import launch
from ._backward import sum_parts
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
    out_row,
    products,
    query_rows,
    store_pairs,
    store_products,
    store_row_values,
    store_rows,
    weights,
)


@triton.jit
def _finish_block(s, t, dp, g, c, r, b_bias, b_e, m_pair, m_keep, b_lse, b_norm):
    """(P, P∘R, dP, T, G) from the products of a block: of (q, k), its tangent, (dO, V), (dO, C)."""
    p = weights(add_bias(s, c, b_bias, m_pair), b_lse) * b_norm
    t *= c
    if b_e is not None:
        t += b_e
    kept = p
    if m_keep is not None:
        dp = tl.where(m_keep, dp * r, 0.0)
        g = tl.where(m_keep, g * r, 0.0)
        kept = tl.where(m_keep, p * r, 0.0)
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
def block_of_keys(
    q, k, v, dout, bias, ddq, ddk, ddv, ddbias, sq, sk, sv, sdo, sb, sddq, sddk, sddv, sddb, seed,
    threshold, b_lse, b_norm, c, r, molecule, head, H, q_row, k_row, live, keys, pair, pairs,
    o_m, m_m, first_k, zero,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK_N: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(P, P∘R, dP, T, G) of a tile of queries and keys first_k to live."""
    o_n = first_k + tl.arange(0, BLOCK_N)
    k_at, head_at = later(k_row, first_k, H), later(head, first_k, H)
    m_n = o_n < live
    s, t = products(
        q, sq, ddq, sddq, q_row, o_m, m_m, k, sk, ddk, sddk, k_at, o_n, m_n,
        head, head_at, H, zero, D, BD, SLICE, PRECISION)  # fmt: skip
    dp, g = products(
        dout, sdo, None, None, q_row, o_m, m_m, v, sv, ddv, sddv, k_at, o_n, m_n,
        head, head_at, H, zero, DV, BDV, SLICE, PRECISION)  # fmt: skip
    b_bias = load_bias(bias, sb, pair, pairs, head_at, o_m, m_m, o_n, keys, c)
    b_e = load_bias(ddbias, sddb, pair, pairs, head_at, o_m, m_m, o_n, keys, c)
    m_keep = None
    if seed is not None:
        m_keep = keep_mask(seed, threshold, molecule, head_at, o_m, first_k, BLOCK_N)
    return _finish_block(
        s, t, dp, g, c, r, b_bias, b_e, m_n[None, :], m_keep, b_lse[:, None], b_norm[:, None]
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _query_kernel(
    q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, sq, sk, sv, sb,
    lse, dout, dlse, ddq, ddk, ddv, ddbias, sl, sdo_b, sdo, sdl_b, sdl, sddq, sddk, sddv, sddb,
    gq, gk, gv, gbias, gdout, gdlse, delta, y, norm,
    B: tl.int64, H: tl.int32, n_q: tl.int64, n_k: tl.int64, n_pairs: tl.int64,
    scale: tl.float64, threshold: tl.uint32, keep_scale: tl.float64, CHUNK: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = lse.dtype.element_ty
    head = (tl.program_id(0) % H).to(tl.int64)
    part, q_row, first, rows = find_query_tile(tl.program_id(0) // H, q_ptr, B, n_q, BLOCK_M)
    if first >= rows:
        return
    c = tl.full((), scale, ACC)
    r = tl.full((), keep_scale, ACC)
    one = tl.full((), 1.0, ACC)
    o_m = first + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    zero = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    b_gq = tl.zeros((BLOCK_M, BD), ACC)
    low, high = chunk_of(part, q_ptr, B, CHUNK)
    for molecule in range(low, high):
        o_row = out_row(q_ptr, molecule, q_row, n_q)
        k_row, keys = molecule_rows(k_ptr, molecule, B, n_k)
        pair, pairs = molecule_pairs(pair_ptr, molecule, B, n_pairs)
        p_do = dout + molecule * sdo_b
        b_lse = load_row_values(lse, sl, o_row, head, o_m, m_m, float("-inf"))
        b_delta = tl.zeros((BLOCK_M,), ACC)
        b_t = tl.zeros((BLOCK_M,), ACC)
        b_y = tl.zeros((BLOCK_M,), ACC)
        total = tl.zeros((BLOCK_M,), ACC)
        b_norm = tl.full((BLOCK_M,), 1.0, ACC)
        for first_k in range(0, keys, BLOCK_N):
            p, kept, dp, t, g = block_of_keys(
                q, k, v, p_do, bias, ddq, ddk, ddv, ddbias, sq, sk, sv, sdo, sb, sddq, sddk, sddv,
                sddb, seed, threshold, b_lse, b_norm, c, r, molecule, head, H, q_row, k_row, keys,
                keys, pair, pairs, o_m, m_m, first_k, zero, D, DV, BD, BDV, BLOCK_N,
                SLICE, PRECISION)  # fmt: skip
            total, b_delta, b_t, b_y = merge_statistics(
                total, b_delta, b_t, b_y, *statistics_of(p, dp, t, g))  # fmt: skip
        # the rounding of lse is a factor of P: divide by the row sum that P really has
        b_norm = 1.0 / tl.where(total > 0, total, 1.0)
        b_y *= b_norm
        if dlse is not None:
            b_dlse = load_row_values(dlse + molecule * sdl_b, sdl, q_row, head, o_m, m_m, 0.0)
            b_delta -= tl.where(b_lse == float("-inf"), 0.0, b_dlse)
        store_row_values(gdlse, o_row, head, H, o_m, m_m, b_t)
        if rows > BLOCK_M:
            store_row_values(delta, o_row, head, H, o_m, m_m, b_delta)
            store_row_values(y, o_row, head, H, o_m, m_m, b_y)
            store_row_values(norm, o_row, head, H, o_m, m_m, b_norm)
        b_gdo = tl.zeros((BLOCK_M, BDV), ACC)
        for first_k in range(0, keys, BLOCK_N):
            p, kept, dp, t, g = block_of_keys(
                q, k, v, p_do, bias, ddq, ddk, ddv, ddbias, sq, sk, sv, sdo, sb, sddq, sddk, sddv,
                sddb, seed, threshold, b_lse, b_norm, c, r, molecule, head, H, q_row, k_row, keys,
                keys, pair, pairs, o_m, m_m, first_k, zero, D, DV, BD, BDV, BLOCK_N,
                SLICE, PRECISION)  # fmt: skip
            ds = p * (dp - b_delta[:, None])
            z = ds * (t - b_t[:, None]) + p * (g - b_y[:, None])
            o_n = first_k + tl.arange(0, BLOCK_N)
            k_at, head_at = later(k_row, first_k, H), later(head, first_k, H)
            m_n = o_n < keys
            if gbias is not None:
                store_pairs(gbias, pair, pairs, head_at, H, o_m, m_m, o_n, keys, z)
            u = (kept * (t - b_t[:, None])).to(v.dtype.element_ty)
            z = z.to(k.dtype.element_ty)
            ds = ds.to(k.dtype.element_ty)
            b_k = load_rows(k, sk, k_at, head_at, o_n, m_n, D, BD)
            b_gq = tl.dot(z, b_k, b_gq, input_precision=PRECISION)
            if ddk is not None:
                b_ddk = load_rows(ddk, sddk, k_at, head_at, o_n, m_n, D, BD)
                b_gq = tl.dot(ds, b_ddk, b_gq, input_precision=PRECISION)
            b_v = load_rows(v, sv, k_at, head_at, o_n, m_n, DV, BDV)
            b_gdo = tl.dot(u, b_v, b_gdo, input_precision=PRECISION)
            if ddv is not None:
                b_ddv = load_rows(ddv, sddv, k_at, head_at, o_n, m_n, DV, BDV)
                b_gdo = tl.dot(kept.to(b_v.dtype), b_ddv, b_gdo, input_precision=PRECISION)
            if rows <= BLOCK_M:
                q_at = later(q_row, first_k, H)
                store_products(
                    gk, k_at, o_n, m_n, tl.trans(z), q, sq, tl.trans(ds), ddq, sddq, q_at, o_m,
                    m_m, head_at, H, c, D, BD, PRECISION)  # fmt: skip
                store_products(
                    gv, k_at, o_n, m_n, tl.trans(u), p_do, sdo, None, None, None, q_at, o_m, m_m,
                    head_at, H, one, DV, BDV, PRECISION)  # fmt: skip
        store_rows(gdout, later(o_row, keys, H), head, H, o_m, m_m, b_gdo, DV, BDV)
    if q_ptr is None:
        q_row = part * n_q
    store_rows(gq, q_row, head, H, o_m, m_m, b_gq * c, D, BD)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _key_kernel(
    q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, sq, sk, sv, sb,
    lse, dout, ddq, ddk, ddv, ddbias, sl, sdo_b, sdo, sddq, sddk, sddv, sddb,
    gk, gv, gdlse, delta, y, norm,
    B: tl.int64, H: tl.int32, n_q: tl.int64, n_k: tl.int64, n_pairs: tl.int64,
    scale: tl.float64, threshold: tl.uint32, keep_scale: tl.float64,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
    COMPLETE: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = lse.dtype.element_ty
    head = (tl.program_id(0) % H).to(tl.int64)
    molecule, k_row, first_row, end = find_tile(tl.program_id(0) // H, k_ptr, B, n_k, BLOCK_N)
    if first_row >= end:
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
    b_gk = tl.zeros((BLOCK_N, BD), ACC)
    b_gv = tl.zeros((BLOCK_N, BDV), ACC)
    for first_q in range(0, rows, BLOCK_M):
        o_m = first_q + tl.arange(0, BLOCK_M)
        q_at, head_at = later(q_row, first_q, H), later(head, first_q, H)
        m_m = o_m < rows
        s, t = products(
            k, sk, ddk, sddk, k_row, o_n, m_n, q, sq, ddq, sddq, q_at, o_m, m_m,
            head, head_at, H, zero, D, BD, SLICE, PRECISION)  # fmt: skip
        dp, g = products(
            v, sv, ddv, sddv, k_row, o_n, m_n, p_do, sdo, None, None, q_at, o_m, m_m,
            head, head_at, H, zero, DV, BDV, SLICE, PRECISION)  # fmt: skip
        b_lse = load_row_values(lse, sl, o_row, head_at, o_m, m_m, float("-inf"))[None, :]
        b_delta = load_row_values(delta, sl, o_row, head_at, o_m, m_m, 0.0)[None, :]
        b_t = load_row_values(gdlse, sl, o_row, head_at, o_m, m_m, 0.0)[None, :]
        b_y = load_row_values(y, sl, o_row, head_at, o_m, m_m, 0.0)[None, :]
        b_norm = load_row_values(norm, sl, o_row, head_at, o_m, m_m, 1.0)[None, :]
        b_bias = load_bias_of_keys(bias, sb, pair, pairs, head_at, o_m, m_m, o_n, keys, c)
        b_e = load_bias_of_keys(ddbias, sddb, pair, pairs, head_at, o_m, m_m, o_n, keys, c)
        m_keep = None
        if seed is not None:
            m_keep = tl.trans(keep_mask(seed, threshold, molecule, head_at, o_m, first, BLOCK_N))
        p, kept, dp, t, g = _finish_block(
            s, t, dp, g, c, r, b_bias, b_e, m_m[None, :], m_keep, b_lse, b_norm
        )
        ds = p * (dp - b_delta)
        z = (ds * (t - b_t) + p * (g - b_y)).to(q.dtype.element_ty)
        b_q = load_rows(q, sq, q_at, head_at, o_m, m_m, D, BD)
        b_gk = tl.dot(z, b_q, b_gk, input_precision=PRECISION)
        if ddq is not None:
            b_ddq = load_rows(ddq, sddq, q_at, head_at, o_m, m_m, D, BD)
            b_gk = tl.dot(ds.to(b_ddq.dtype), b_ddq, b_gk, input_precision=PRECISION)
        b_do = load_rows(p_do, sdo, q_at, head_at, o_m, m_m, DV, BDV)
        u = (kept * (t - b_t)).to(b_do.dtype)
        b_gv = tl.dot(u, b_do, b_gv, input_precision=PRECISION)
    store_rows(gk, k_row, head, H, o_n, m_n, b_gk * c, D, BD)
    store_rows(gv, k_row, head, H, o_n, m_n, b_gv, DV, BDV)


def double_backward(
    q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, out, lse, dout, dlse, ddq, ddk, ddv, ddbias,
    scale, dropout,
):  # fmt: skip
    """(gq, gk, gv, gbias, gdout, gdlse); gbias is [0, H] without a bias. out is not needed."""
    common = launch.arguments(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout)
    sdo_b, sdo = launch.row_strides(dout, q_ptr)
    sdl_b, sdl = launch.row_strides(dlse, q_ptr)
    gk, gv, gbias = launch.new(k), launch.new(v), launch.new_pairs(q, bias, True)
    gdout, gdlse = launch.new(dout), launch.new(lse)
    delta, y, norm = launch.new(lse), launch.new(lse), launch.new(lse)
    common |= dict(lse=lse, sl=lse.stride()[-2:], dout=dout, sdo_b=sdo_b, sdo=sdo)
    common |= dict(ddq=ddq, ddk=ddk, ddv=ddv, ddbias=ddbias, sddb=launch.strides(ddbias))
    common |= {f"s{n}": launch.strides(x) for n, x in (("ddq", ddq), ("ddk", ddk), ("ddv", ddv))}
    common |= dict(gk=gk, gv=gv, gdlse=gdlse, delta=delta, y=y, norm=norm)
    heads, molecules = q.shape[1], common["B"]
    options = bias is not None or seed is not None
    tile = launch.tile("double_backward_query", q, v, options)
    key_tile = launch.tile("double_backward_key", q, v, options)
    chunk, parts = 1, molecules
    if q_ptr is None:
        tiles = launch.query_tiles(q, q_ptr, 1, tile["BLOCK_M"])
        chunk, parts = launch.chunks(molecules, tiles * heads)
    gq = launch.new_query_gradient(q, q_ptr, parts)
    with launch.on_device(q):
        tiles = launch.query_tiles(q, q_ptr, parts, tile["BLOCK_M"])
        if q.shape[0] and tiles:
            _query_kernel[(tiles * heads,)](
                **common, dlse=dlse, sdl_b=sdl_b, sdl=sdl, gq=gq, gdout=gdout,
                gbias=None if bias is None else gbias, CHUNK=chunk, **tile)  # fmt: skip
        if k.shape[0]:
            tiles = launch.tiles_of(k.shape[0], molecules, key_tile["BLOCK_N"])
            _key_kernel[(tiles * heads,)](**common, COMPLETE=tile["BLOCK_M"], **key_tile)
        if q_ptr is None:
            gq = sum_parts(gq, q)
    return gq, gk, gv, gbias, gdout, gdlse
