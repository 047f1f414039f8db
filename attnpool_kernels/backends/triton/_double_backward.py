"""Double backward pass: (D1) to (D12), everything pairwise recomputed from q, k, v, dout and lse.

The *query kernel* walks the keys of up to BLOCK_M query rows twice: first for the row statistics
delta', t, s1 and w of (B2), (D2) and (D3), which give y (D4); then for gq, gdout and gbias. The
*key kernel* walks the queries of up to BLOCK_N key rows: gk, gv. Who does small molecules, and how
gradients of shared seeds are summed, is as in _backward.py. A cotangent that is None is zero and
costs nothing.
"""

import triton
import triton.language as tl

from . import launch
from ._backward import sum_parts
from .tiles import (
    UNSPECIALIZED,
    chunk_of,
    find_query_tile,
    find_tile,
    keep_mask,
    load_pairs,
    load_row_values,
    load_rows,
    molecule_pairs,
    molecule_rows,
    out_row,
    pair_offsets,
    query_rows,
    scores,
    store_pairs,
    store_row_values,
    store_rows,
    tangents,
    weights,
)


@triton.jit
def _block(a, a_dot, a_v, a_c, b, b_dot, b_v, b_c, c, r, b_bias, b_e, m_pair, m_keep, b_lse,
           PRECISION: tl.constexpr):  # fmt: skip
    """(P, P∘R, dP, T, G) of a block whose rows are a and columns b: queries and keys, or keys and
    queries. *_dot are the cotangents of their gradients; (a_v, b_v) make dP, (a_c, b_c) make G."""
    p = weights(scores(a, b, c, b_bias, m_pair, PRECISION), b_lse)
    dp = tl.dot(a_v, tl.trans(b_v), input_precision=PRECISION)
    t = tangents(a, a_dot, b, b_dot, c, b_e, PRECISION)
    kept = p
    if (a_c is None) or (b_c is None):
        g = tl.zeros_like(p)
    else:
        g = tl.dot(a_c, tl.trans(b_c), input_precision=PRECISION)
    if m_keep is not None:
        dp = tl.where(m_keep, dp * r, 0.0)
        g = tl.where(m_keep, g * r, 0.0)
        kept = tl.where(m_keep, p * r, 0.0)
    return p, kept, dp, t, g


@triton.jit
def _block_of_keys(
    k, v, bias, ddk, ddv, ddbias, sk, sv, sb, sddk, sddv, sddb, seed, threshold,
    b_q, b_do, b_ddq, b_lse, c, r, molecule, head, k_row, keys, pair, pairs, o_m, m_m, first_k,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys' tiles k, v, ddk, ddv from first_k on, and _block of the queries against them."""
    o_n = first_k + tl.arange(0, BLOCK_N)
    m_n = o_n < keys
    b_k = load_rows(k, sk, k_row, head, o_n, m_n, D, BD)
    b_v = load_rows(v, sv, k_row, head, o_n, m_n, DV, BDV)
    b_ddk = None
    b_ddv = None
    b_bias = None
    b_e = None
    m_keep = None
    if ddk is not None:
        b_ddk = load_rows(ddk, sddk, k_row, head, o_n, m_n, D, BD)
    if ddv is not None:
        b_ddv = load_rows(ddv, sddv, k_row, head, o_n, m_n, DV, BDV)
    if bias is not None:
        offsets = pair_offsets(o_m[:, None], o_n[None, :], keys)
        m_mn = m_m[:, None] & m_n[None, :]
        b_bias = load_pairs(bias, sb, pair, pairs, head, offsets, m_mn, c.dtype)
        if ddbias is not None:
            b_e = load_pairs(ddbias, sddb, pair, pairs, head, offsets, m_mn, c.dtype)
    if seed is not None:
        m_keep = keep_mask(seed, threshold, molecule, head, o_m, first_k, BLOCK_N)
    p, kept, dp, t, g = _block(
        b_q, b_ddq, b_do, b_do, b_k, b_ddk, b_v, b_ddv, c, r, b_bias, b_e, m_n[None, :], m_keep,
        b_lse[:, None], PRECISION)  # fmt: skip
    return b_k, b_v, b_ddk, b_ddv, p, kept, dp, t, g


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _query_kernel(
    q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, sq, sk, sv, sb,
    lse, dout, dlse, ddq, ddk, ddv, ddbias, sl, sdo_b, sdo, sdl_b, sdl, sddq, sddk, sddv, sddb,
    gq, gk, gv, gbias, gdout, gdlse, delta, y,
    B: tl.int64, H: tl.int32, n_q: tl.int64, n_k: tl.int64, n_pairs: tl.int64,
    scale: tl.float64, threshold: tl.uint32, keep_scale: tl.float64, CHUNK: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = lse.dtype.element_ty
    head = (tl.program_id(0) % H).to(tl.int64)
    part, q_row, first, rows = find_query_tile(tl.program_id(0) // H, q_ptr, B, n_q, BLOCK_M)
    if first >= rows:
        return
    c = tl.full((), scale, ACC)
    r = tl.full((), keep_scale, ACC)
    o_m = first + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    b_q = load_rows(q, sq, q_row, head, o_m, m_m, D, BD)
    b_ddq = None
    if ddq is not None:
        b_ddq = load_rows(ddq, sddq, q_row, head, o_m, m_m, D, BD)
    b_gq = tl.zeros((BLOCK_M, BD), ACC)
    low, high = chunk_of(part, q_ptr, B, CHUNK)
    for molecule in range(low, high):
        o_row = out_row(q_ptr, molecule, q_row, n_q)
        k_row, keys = molecule_rows(k_ptr, molecule, B, n_k)
        pair, pairs = molecule_pairs(pair_ptr, molecule, B, n_pairs)
        b_do = load_rows(dout + molecule * sdo_b, sdo, q_row, head, o_m, m_m, DV, BDV)
        b_lse = load_row_values(lse, sl, o_row, head, o_m, m_m, float("-inf"))
        b_delta = tl.zeros((BLOCK_M,), ACC)
        b_t = tl.zeros((BLOCK_M,), ACC)
        b_y = tl.zeros((BLOCK_M,), ACC)  # s1 + w so far
        for first_k in range(0, keys, BLOCK_N):
            b_k, b_v, b_ddk, b_ddv, p, kept, dp, t, g = _block_of_keys(
                k, v, bias, ddk, ddv, ddbias, sk, sv, sb, sddk, sddv, sddb, seed, threshold,
                b_q, b_do, b_ddq, b_lse, c, r, molecule, head, k_row, keys, pair, pairs, o_m, m_m,
                first_k, D, DV, BD, BDV, BLOCK_N, PRECISION)  # fmt: skip
            b_delta += tl.sum(p * dp, 1)
            b_t += tl.sum(p * t, 1)
            b_y += tl.sum(p * (t * dp + g), 1)
        b_shifted = b_delta  # delta'
        if dlse is not None:
            b_dlse = load_row_values(dlse + molecule * sdl_b, sdl, q_row, head, o_m, m_m, 0.0)
            b_shifted -= tl.where(b_lse == float("-inf"), 0.0, b_dlse)
        b_y -= (b_delta + b_shifted) * b_t
        store_row_values(gdlse, o_row, head, H, o_m, m_m, b_t)
        if rows > BLOCK_M:
            store_row_values(delta, o_row, head, H, o_m, m_m, b_shifted)
            store_row_values(y, o_row, head, H, o_m, m_m, b_y)
        b_gdo = tl.zeros((BLOCK_M, BDV), ACC)
        for first_k in range(0, keys, BLOCK_N):
            b_k, b_v, b_ddk, b_ddv, p, kept, dp, t, g = _block_of_keys(
                k, v, bias, ddk, ddv, ddbias, sk, sv, sb, sddk, sddv, sddb, seed, threshold,
                b_q, b_do, b_ddq, b_lse, c, r, molecule, head, k_row, keys, pair, pairs, o_m, m_m,
                first_k, D, DV, BD, BDV, BLOCK_N, PRECISION)  # fmt: skip
            ds = p * (dp - b_shifted[:, None])
            z = p * (t * (dp - b_shifted[:, None]) - b_t[:, None] * dp + g - b_y[:, None])
            o_n = first_k + tl.arange(0, BLOCK_N)
            m_n = o_n < keys
            if gbias is not None:
                offsets = pair_offsets(o_m[:, None], o_n[None, :], keys)
                m_mn = m_m[:, None] & m_n[None, :]
                store_pairs(gbias, pair, pairs, head, H, offsets, m_mn, z)
            u = (kept * (t - b_t[:, None])).to(b_v.dtype)
            z = z.to(b_k.dtype)
            ds = ds.to(b_k.dtype)
            b_gq = tl.dot(z, b_k, b_gq, input_precision=PRECISION)
            b_gdo = tl.dot(u, b_v, b_gdo, input_precision=PRECISION)
            if ddk is not None:
                b_gq = tl.dot(ds, b_ddk, b_gq, input_precision=PRECISION)
            if ddv is not None:
                kept = kept.to(b_v.dtype)
                b_gdo = tl.dot(kept, b_ddv, b_gdo, input_precision=PRECISION)
            if rows <= BLOCK_M:
                b_gk = tl.dot(tl.trans(z), b_q, input_precision=PRECISION)
                if ddq is not None:
                    b_gk = tl.dot(tl.trans(ds), b_ddq, b_gk, input_precision=PRECISION)
                store_rows(gk, k_row, head, H, o_n, m_n, b_gk * c, D, BD)
                b_gv = tl.dot(tl.trans(u), b_do, input_precision=PRECISION)
                store_rows(gv, k_row, head, H, o_n, m_n, b_gv, DV, BDV)
        store_rows(gdout, o_row, head, H, o_m, m_m, b_gdo, DV, BDV)
    if q_ptr is None:
        q_row = part * n_q
    store_rows(gq, q_row, head, H, o_m, m_m, b_gq * c, D, BD)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _key_kernel(
    q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, sq, sk, sv, sb,
    lse, dout, ddq, ddk, ddv, ddbias, sl, sdo_b, sdo, sddq, sddk, sddv, sddb,
    gk, gv, gdlse, delta, y,
    B: tl.int64, H: tl.int32, n_q: tl.int64, n_k: tl.int64, n_pairs: tl.int64,
    scale: tl.float64, threshold: tl.uint32, keep_scale: tl.float64,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COMPLETE: tl.constexpr, PRECISION: tl.constexpr,
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
    b_k = load_rows(k, sk, k_row, head, o_n, m_n, D, BD)
    b_v = load_rows(v, sv, k_row, head, o_n, m_n, DV, BDV)
    b_ddk = None
    b_ddv = None
    if ddk is not None:
        b_ddk = load_rows(ddk, sddk, k_row, head, o_n, m_n, D, BD)
    if ddv is not None:
        b_ddv = load_rows(ddv, sddv, k_row, head, o_n, m_n, DV, BDV)
    b_gk = tl.zeros((BLOCK_N, BD), ACC)
    b_gv = tl.zeros((BLOCK_N, BDV), ACC)
    for first_q in range(0, rows, BLOCK_M):
        o_m = first_q + tl.arange(0, BLOCK_M)
        m_m = o_m < rows
        b_q = load_rows(q, sq, q_row, head, o_m, m_m, D, BD)
        b_do = load_rows(dout + molecule * sdo_b, sdo, q_row, head, o_m, m_m, DV, BDV)
        b_lse = load_row_values(lse, sl, o_row, head, o_m, m_m, float("-inf"))[None, :]
        b_delta = load_row_values(delta, sl, o_row, head, o_m, m_m, 0.0)[None, :]
        b_t = load_row_values(gdlse, sl, o_row, head, o_m, m_m, 0.0)[None, :]
        b_y = load_row_values(y, sl, o_row, head, o_m, m_m, 0.0)[None, :]
        b_ddq = None
        b_bias = None
        b_e = None
        m_keep = None
        if ddq is not None:
            b_ddq = load_rows(ddq, sddq, q_row, head, o_m, m_m, D, BD)
        if bias is not None:
            offsets = pair_offsets(o_m[None, :], o_n[:, None], keys)
            m_nm = m_n[:, None] & m_m[None, :]
            b_bias = load_pairs(bias, sb, pair, pairs, head, offsets, m_nm, ACC)
            if ddbias is not None:
                b_e = load_pairs(ddbias, sddb, pair, pairs, head, offsets, m_nm, ACC)
        if seed is not None:
            m_keep = tl.trans(keep_mask(seed, threshold, molecule, head, o_m, first, BLOCK_N))
        p, kept, dp, t, g = _block(
            b_k, b_ddk, b_v, b_ddv, b_q, b_ddq, b_do, b_do, c, r, b_bias, b_e, m_m[None, :], m_keep,
            b_lse, PRECISION)  # fmt: skip
        z = (p * (t * (dp - b_delta) - b_t * dp + g - b_y)).to(b_q.dtype)
        u = (kept * (t - b_t)).to(b_do.dtype)
        b_gk = tl.dot(z, b_q, b_gk, input_precision=PRECISION)
        b_gv = tl.dot(u, b_do, b_gv, input_precision=PRECISION)
        if ddq is not None:
            ds = (p * (dp - b_delta)).to(b_q.dtype)
            b_gk = tl.dot(ds, b_ddq, b_gk, input_precision=PRECISION)
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
    delta, y = launch.new(lse), launch.new(lse)
    common |= dict(lse=lse, sl=lse.stride()[-2:], dout=dout, sdo_b=sdo_b, sdo=sdo)
    common |= dict(ddq=ddq, ddk=ddk, ddv=ddv, ddbias=ddbias, sddb=launch.strides(ddbias))
    common |= {f"s{n}": launch.strides(x) for n, x in (("ddq", ddq), ("ddk", ddk), ("ddv", ddv))}
    common |= dict(gk=gk, gv=gv, gdlse=gdlse, delta=delta, y=y)
    heads, molecules = q.shape[1], common["B"]
    tile = launch.tile("double_backward_query", q, v)
    key_tile = launch.tile("double_backward_key", q, v)
    chunk, parts = launch.chunks(q, q_ptr, molecules, tile["BLOCK_M"])
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
