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
from . import launch, schedules
from .arguments import Dual, Factors, Molecule, Place, Rows, Statistics, Tile, Width, Widths
from .primitives import (
    UNSPECIALIZED,
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
    renormalise,
    store_pairs,
    store_products,
    store_row_values,
    store_rows,
)


@triton.jit
def _query_tile(
    x,
    y,
    dy,
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
    PLAIN: tl.constexpr = (x.bias is None) and (x.key_bias is None)
    TYPE: tl.constexpr = x.q.data.dtype.element_ty
    # of half types the rounding of LSE shows nowhere, unless a bias has made it large
    RENORM: tl.constexpr = not (PLAIN and ((tl.float16 == TYPE) or (tl.bfloat16 == TYPE)))
    low, high = molecules
    n_q, n_k, n_pairs = n
    o_m = first + tl.arange(0, tile.m)
    m_m = o_m < rows
    at_m = Place(q_row, o_m, m_m, head)
    zero = tl.zeros((tile.m, tile.n), ACC)
    one = tl.full((), 1.0, ACC)
    acc = tl.zeros((tile.m, widths.qk.padded), ACC)
    for molecule in range(low, high):
        o_row = out_row(x.q_ptr, molecule, q_row, n_q)
        of = find_molecule(x, molecule, B, n_k, n_pairs)
        one_block = of.keys <= tile.n
        at_out = Place(o_row, o_m, m_m, head)
        b_lse = load_row_values(y.lse, at_out, float("-inf"))
        dout = of_molecule(dy.dout, molecule)
        b_delta = tl.zeros((tile.m,), ACC)
        if of.keys > tile.n:
            # [BLOCK_M, BDV]
            b_o = load_rows(y.out, at_out, widths.v)
            b_do = load_rows(dout, at_m, widths.v)
            b_delta = tl.sum(b_o.to(ACC) * b_do.to(ACC), 1)
        b_dlse = tl.zeros((tile.m,), ACC)
        if dy.dlse is not None:
            b_dlse = load_row_values(of_molecule(dy.dlse, molecule), at_m, 0.0)
            b_dlse = tl.where(b_lse == float("-inf"), 0.0, b_dlse)
        b_norm = tl.full((tile.m,), 1.0, ACC)
        if RENORM:
            large = renormalise(b_lse, x.bias, x.key_bias, TYPE)
            if large & (of.keys > tile.n):
                total = tl.zeros((tile.m,), ACC)
                for first_k in range(0, of.keys, tile.n):
                    o_n = first_k + tl.arange(0, tile.n)
                    m_n = o_n < of.keys
                    at_n = Place(of.k_row, o_n, m_n, head)
                    s, _ = products(
                        Dual(x.q, None), at_m, Dual(x.k, None), at_n, zero, H, widths.qk, tile
                    )
                    b_bias = load_bias(x.bias, of, at_m, o_n, head, by.c)
                    b_key = load_key_bias(x.key_bias, at_n, by.c, 0)
                    p = pair_weights(s, by.c, b_bias, b_key, m_n[None, :], b_lse[:, None])
                    total += tl.sum(p, 1)
                b_norm = 1.0 / tl.where(total > 0, total, 1.0)
        for first_k in range(0, of.keys, tile.n):
            o_n = first_k + tl.arange(0, tile.n)
            k_at, head_at = later(of.k_row, first_k, H), later(head, first_k, H)
            m_n = o_n < of.keys
            at_n = Place(k_at, o_n, m_n, head_at)
            # [BLOCK_M, BLOCK_N]
            s, _ = products(Dual(x.q, None), at_m, Dual(x.k, None), at_n, zero, H, widths.qk, tile)
            dp, _ = products(Dual(dout, None), at_m, Dual(x.v, None), at_n, zero, H, widths.v, tile)
            b_bias = load_bias(x.bias, of, at_m, o_n, head_at, by.c)
            b_key = load_key_bias(x.key_bias, at_n, by.c, 0)
            p = pair_weights(s, by.c, b_bias, b_key, m_n[None, :], b_lse[:, None])
            if x.seed is not None:
                m_keep = keep_mask(x.seed, by.threshold, molecule, head_at, o_m, first_k, tile.n)
                dp = tl.where(m_keep, dp * by.r, 0.0)
            if one_block:  # the whole row is at hand: both statistics from what is used below
                total = tl.sum(p, 1)
                b_norm = 1.0 / tl.where(total > 0, total, 1.0)
                b_delta = tl.sum(p * b_norm[:, None] * dp, 1)
            p *= b_norm[:, None]
            ds = p * (dp - (b_delta - b_dlse)[:, None])
            if gradients.dbias is not None:
                store_pairs(gradients.dbias, of, at_m, o_n, head_at, H, ds)
            if gradients.dkey_bias is not None:  # noqa: SIM102 - no `and`: known when compiled
                if rows <= tile.m:
                    store_row_values(gradients.dkey_bias, at_n, H, tl.sum(ds, 0))
            ds = ds.to(x.k.data.dtype.element_ty)
            # [BLOCK_N, BD]
            b_k = load_rows(x.k, at_n, widths.qk)
            acc = tl.dot(ds, b_k, acc, input_precision=tile.precision)
            if COMPLETES:
                if rows <= tile.m:
                    if x.seed is not None:
                        p = tl.where(m_keep, p * by.r, 0.0)
                    at_q = Place(later(q_row, first_k, H), o_m, m_m, head_at)
                    kept = Dual(tl.trans(p.to(x.v.data.dtype.element_ty)), None)
                    do, q = Dual(dout, None), Dual(x.q, None)
                    store_products(
                        gradients.dv, at_n, kept, do, at_q, one, H, widths.v, tile.precision
                    )
                    ds_t = Dual(tl.trans(ds), None)
                    store_products(
                        gradients.dk, at_n, ds_t, q, at_q, by.c, H, widths.qk, tile.precision
                    )
                elif alone != 0:  # sizes were known wrongly, and nobody else comes: it shows
                    fill_keys(gradients, at_n, H, float("nan"), widths)
        if rows > tile.m:
            store_row_values(saved.delta, at_out, H, b_delta - b_dlse)
            store_row_values(saved.norm, at_out, H, b_norm)
        if COMPLETES:  # noqa: SIM102 - no `and`: known when compiled
            if (alone != 0) & ((molecule < 0) | (molecule >= B)):  # rows of no molecule
                fill_keys(gradients, at_m, H, 0.0, widths)
    return acc


@triton.jit
def fill_keys(gradients, at, H, value, widths):
    """A number in the gradients of some keys."""
    ROWS: tl.constexpr = at.offsets.shape[0]
    store_rows(gradients.dk, at, H, tl.full((ROWS, widths.qk.padded), value, tl.float32), widths.qk)
    store_rows(gradients.dv, at, H, tl.full((ROWS, widths.v.padded), value, tl.float32), widths.v)
    if gradients.dkey_bias is not None:
        store_row_values(gradients.dkey_bias, at, H, tl.full((ROWS,), value, tl.float32))


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
    dq_row = q_row
    if x.q_ptr is None:
        dq_row = part * n_q
    last = first + 1
    if WALK == 1:
        last = rows
    for at in range(first, last, BLOCK_M):
        acc = _query_tile(
            x,
            y,
            dy,
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
        at_dq = Place(dq_row, o_m, o_m < rows, head)
        store_rows(gradients.dq, at_dq, H, acc * by.c, WIDTHS.qk)


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
        _key_tile(x, y, dy, gradients, saved, of, at, q_row, o_row, rows, head, by, H, WIDTHS, TILE)


@triton.jit
def _key_tile(x, y, dy, gradients, saved, of, first, q_row, o_row, rows, head, by, H, widths, tile):
    """The keys from first on."""
    ACC: tl.constexpr = y.lse.data.dtype.element_ty
    o_n = first + tl.arange(0, tile.n)
    m_n = o_n < of.keys
    at_n = Place(of.k_row, o_n, m_n, head)
    dout = of_molecule(dy.dout, of.index)
    zero = tl.zeros((tile.n, tile.m), ACC)
    b_dk = tl.zeros((tile.n, widths.qk.padded), ACC)
    b_dv = tl.zeros((tile.n, widths.v.padded), ACC)
    b_de = tl.zeros((tile.n,), ACC)
    b_key = load_key_bias(x.key_bias, at_n, by.c, 1)
    for first_q in range(0, rows, tile.m):
        o_m = first_q + tl.arange(0, tile.m)
        q_at, head_at = later(q_row, first_q, H), later(head, first_q, H)
        m_m = o_m < rows
        at_m = Place(q_at, o_m, m_m, head_at)
        at_out = Place(o_row, o_m, m_m, head_at)
        # [BLOCK_N, BLOCK_M]
        s, _ = products(Dual(x.k, None), at_n, Dual(x.q, None), at_m, zero, H, widths.qk, tile)
        dp, _ = products(Dual(x.v, None), at_n, Dual(dout, None), at_m, zero, H, widths.v, tile)
        b_lse = load_row_values(y.lse, at_out, float("-inf"))
        b_delta = load_row_values(Rows(saved.delta, y.lse.strides), at_out, 0.0)
        b_norm = load_row_values(Rows(saved.norm, y.lse.strides), at_out, 1.0)
        b_bias = load_bias_of_keys(x.bias, of, at_m, o_n, head_at, by.c)
        # rows that are not there have LSE -inf, so no weight
        p = pair_weights(s, by.c, b_bias, b_key, m_m[None, :], b_lse[None, :]) * b_norm[None, :]
        kept = p
        if x.seed is not None:
            keep = keep_mask(x.seed, by.threshold, of.index, head_at, o_m, first, tile.n)
            m_keep = tl.trans(keep)
            dp = tl.where(m_keep, dp * by.r, 0.0)
            kept = tl.where(m_keep, p * by.r, 0.0)
        ds = p * (dp - b_delta[None, :])
        if gradients.dkey_bias is not None:
            b_de += tl.sum(ds, 1)
        # [BLOCK_M, BDV], [BLOCK_M, BD]
        b_do = load_rows(dout, at_m, widths.v)
        b_dv = tl.dot(kept.to(b_do.dtype), b_do, b_dv, input_precision=tile.precision)
        b_q = load_rows(x.q, at_m, widths.qk)
        b_dk = tl.dot(ds.to(b_q.dtype), b_q, b_dk, input_precision=tile.precision)
    store_rows(gradients.dk, at_n, H, b_dk * by.c, widths.qk)
    store_rows(gradients.dv, at_n, H, b_dv, widths.v)
    if gradients.dkey_bias is not None:
        store_row_values(gradients.dkey_bias, at_n, H, b_de)


GROUP = 64  # partial sums that one program adds


@triton.jit(do_not_specialize=["size", "parts", "groups"])
def _sum_parts_kernel(
    partial,
    total,
    size: tl.int64,
    parts: tl.int64,
    groups: tl.int32,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """total[g, i] = sum of partial[part, i] over the parts of group g, in order; what rounding
    takes from it is gathered in lost (Knuth's two-sum), so that the error does not grow with them.
    """
    group = (tl.program_id(0) % groups).to(tl.int64)
    o = (tl.program_id(0) // groups).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), partial.dtype.element_ty)
    lost = tl.zeros((BLOCK,), partial.dtype.element_ty)
    for part in range(group * GROUP, tl.minimum(group * GROUP + GROUP, parts)):
        x = tl.load(partial + part * size + o, mask=o < size, other=0.0)
        new = acc + x
        taken = new - acc
        lost += (acc - (new - taken)) + (x - taken)
        acc = new
    acc += tl.where(lost == lost, lost, 0.0)  # NaN where the sum is not finite
    tl.store(total + group * size + o, acc.to(total.dtype.element_ty), mask=o < size)


def sum_parts(partial: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Gradient of shared seeds q from its partial sums, added in order: GROUP of them, then the
    sums of the groups, so that no program adds more than a few dozen of the 4,096 that there are at
    most."""
    total, size, block = launch.new(q), q.numel(), 256
    while True:
        groups = max(1, -(-partial.shape[0] // GROUP))
        last = groups == 1
        sums = total if last else partial.new_empty((groups, *q.shape))
        _sum_parts_kernel[(-(-size // block) * groups,)](
            partial,
            sums,
            size,
            partial.shape[0],
            groups,
            BLOCK=block,
            GROUP=GROUP,
            num_warps=4,
            enable_fp_fusion=True,
        )
        if last:
            return total
        partial = sums


def backward(
    x: Operands, y: Result, dy: Cotangents, options: Options, need_dbias: bool
) -> Gradients:
    dk, dv = launch.new(x.k), launch.new(x.v)
    dbias, dkey_bias = launch.new_pairs(x, need_dbias), launch.new_key_bias(x)
    saved = Statistics(launch.new(y.lse), launch.new(y.lse))
    query = schedules.of_queries("backward_query", x)
    complete, heads = schedules.complete(query), x.q.shape[1]
    key = schedules.of_keys("backward_key", x, complete)
    chunk, parts = launch.query_chunks(x, query[0]["BLOCK_M"])
    dq = launch.new_query_gradient(x, parts)
    y, dy = launch.result(y), launch.cotangents(dy, x.shared)
    wanted = dbias if dbias.numel() else None, launch.if_given(x.key_bias, dkey_bias)
    gradients = launch.carry(Gradients, dq, dk, dv, *wanted)
    common = launch.arguments(x, options) | dict(saved=saved)
    alone = int(schedules.alone(x, complete))
    of_queries = common | dict(y=y, dy=dy, gradients=gradients, CHUNK=chunk, ALONE=alone)
    of_keys = common | dict(
        y=launch.carry(Result, None, y.lse),
        dy=Cotangents(dy.dout, None),
        gradients=launch.without(gradients, "dq", "dbias"),
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
            dq = sum_parts(dq, x.q)
    return Gradients(dq, dk, dv, dbias, dkey_bias)
