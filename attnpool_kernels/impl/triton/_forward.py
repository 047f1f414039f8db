"""Forward pass: (F1), (F2), (F3) with the online softmax of FlashAttention (Dao et al. 2022).

One program computes up to BLOCK_M query rows of one molecule and head: it walks the molecule's keys
in steps of BLOCK_N and keeps the running maximum, the sum and the weighted values. Rows that no
molecule covers are the same program with no keys: output 0, lse -inf.
"""

import triton
import triton.language as tl

from ...operands import Operands, Options, Result
from . import launch, schedules
from .arguments import Dual, Place, Tile, Width, Widths
from .primitives import (
    LN_2,
    LOG2_E,
    UNSPECIALIZED,
    find_molecule,
    find_query_tile,
    keep_mask,
    load_bias,
    load_key_bias,
    load_rows,
    logits,
    not_ours,
    out_row,
    products,
    store_row_values,
    store_rows,
)


@triton.jit
def attend(
    x,
    of,
    at_m,
    first,
    last,
    c,
    threshold,
    H,
    widths,
    tile,
    FLIP: tl.constexpr,
    PEELED: tl.constexpr,
):
    """Of a block of queries over the keys first to last of a molecule: output, lse, and its terms,
    the largest logit and Σ exp(logit - largest).

    Without biases the logits are counted in powers of 2: one factor, c log2(e), does for the scale
    and the exponential, and the largest product is the largest logit, as the factor is positive
    (q has the sign of the scale, see ``FLIP``). The least finite bias would overflow there.
    PEELED: the blocks before the last are whole, so they need no mask.
    """
    BIASED: tl.constexpr = (x.bias is not None) or (x.key_bias is not None)
    if not BIASED:
        c = tl.maximum(tl.abs(c) * LOG2_E, 1e-37)  # not 0, which no -inf may meet
    largest = tl.full((tile.m,), float("-inf"), c.dtype)
    total = tl.zeros((tile.m,), c.dtype)
    acc = tl.zeros((tile.m, widths.v.padded), c.dtype)
    whole = first
    if PEELED and not BIASED:
        whole = first + (last - first) // tile.n * tile.n
        for first_k in range(first, whole, tile.n):
            largest, total, acc = attend_block(
                x,
                of,
                at_m,
                first_k,
                last,
                c,
                threshold,
                H,
                largest,
                total,
                acc,
                widths,
                tile,
                FLIP,
                True,
            )
    for first_k in range(whole, last, tile.n):
        largest, total, acc = attend_block(
            x,
            of,
            at_m,
            first_k,
            last,
            c,
            threshold,
            H,
            largest,
            total,
            acc,
            widths,
            tile,
            FLIP,
            False,
        )
    empty = total == 0
    acc = acc * (1.0 / tl.where(empty, 1.0, total))[:, None]
    if BIASED:
        b_lse = largest + tl.log(tl.where(empty, 1.0, total))
    else:
        b_lse = (largest + tl.log2(tl.where(empty, 1.0, total))) * LN_2
    return acc, tl.where(empty, float("-inf"), b_lse), largest, total


@triton.jit
def attend_block(
    x,
    of,
    at_m,
    first_k,
    last,
    c,
    threshold,
    H,
    largest,
    total,
    acc,
    widths,
    tile,
    FLIP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One step of the online softmax: (largest, total, acc) with the keys from first_k on."""
    BIASED: tl.constexpr = (x.bias is not None) or (x.key_bias is not None)
    o_n = first_k + tl.arange(0, tile.n)
    m_n = o_n < last
    at_n = Place(of.k_row, o_n, m_n, at_m.head)
    if WHOLE:
        at_n = Place(of.k_row, o_n, None, at_m.head)
    zero = tl.zeros((tile.m, tile.n), c.dtype)
    # [BLOCK_M, BLOCK_N]
    s, _ = products(Dual(x.q, None), at_m, Dual(x.k, None), at_n, zero, H, widths.qk, tile)
    # [BLOCK_N, BDV]
    b_v = load_rows(x.v, at_n, widths.v)
    if BIASED:
        b_bias = load_bias(x.bias, of, at_m, o_n, at_m.head, c)
        s = logits(s, c, b_bias, load_key_bias(x.key_bias, at_n, c, 0), m_n[None, :])
        new_largest = tl.maximum(largest, tl.max(s, 1))
        # a row of -inf so far subtracts 0: its weights are exp(-inf) = 0 and never NaN
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        p = tl.exp(s - shift[:, None])
        shrink = tl.exp(largest - shift)
    else:
        if FLIP:
            s = -s
        if not WHOLE:
            s = tl.where(m_n[None, :], s, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(s, 1) * c)
        p = tl.exp2(s * c - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(p, 1)
    if x.seed is not None:
        m_keep = keep_mask(x.seed, threshold, of.index, at_m.head, at_m.offsets, first_k, tile.n)
        p = tl.where(m_keep, p, 0.0)
    acc = tl.dot(p.to(b_v.dtype), b_v, acc * shrink[:, None], input_precision=tile.precision)
    return new_largest, total, acc


@triton.jit
def _forward_tile(
    x,
    y,
    of,
    q_row,
    o_row,
    first,
    rows,
    head,
    c,
    r,
    threshold,
    H,
    widths,
    tile,
    FLIP: tl.constexpr,
    PEELED: tl.constexpr,
):
    """The queries from first on."""
    o_m = first + tl.arange(0, tile.m)
    m_m = o_m < rows
    at_m = Place(q_row, o_m, m_m, head)
    acc, b_lse, _, _ = attend(x, of, at_m, 0, of.keys, c, threshold, H, widths, tile, FLIP, PEELED)
    if x.seed is not None:
        acc *= r
    at_out = Place(o_row, o_m, m_m, head)
    store_rows(y.out, at_out, H, acc, widths.v)
    store_row_values(y.lse, at_out, H, b_lse)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    x,
    y,
    B: tl.int64,
    H: tl.int32,
    n_q: tl.int64,
    n_k: tl.int64,
    n_pairs: tl.int64,
    scale: tl.float64,
    threshold: tl.uint32,
    keep_scale: tl.float64,
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
    FLIP: tl.constexpr,
):
    ACC: tl.constexpr = y.lse.dtype.element_ty
    WIDTHS: tl.constexpr = Widths(Width(D, BD), Width(DV, BDV))
    TILE: tl.constexpr = Tile(BLOCK_M, BLOCK_N, SLICE, PRECISION)
    PEELED: tl.constexpr = WALK != 1  # what has a program for each tile has many keys
    head = (tl.program_id(0) % H).to(tl.int64)
    molecule, q_row, first, rows = find_query_tile(
        tl.program_id(0) // H, x.q_ptr, B, n_q, BLOCK_M, WALK
    )
    if (first >= rows) | not_ours(rows, SHORTEST, LONGEST):
        return
    o_row = out_row(x.q_ptr, molecule, q_row, n_q)
    of = find_molecule(x, molecule, B, n_k, n_pairs)
    c = tl.full((), scale, ACC)
    r = tl.full((), keep_scale, ACC)
    if WALK == 1:
        for at in range(0, rows, BLOCK_M):
            _forward_tile(
                x,
                y,
                of,
                q_row,
                o_row,
                at,
                rows,
                head,
                c,
                r,
                threshold,
                H,
                WIDTHS,
                TILE,
                FLIP,
                PEELED,
            )
    else:
        _forward_tile(
            x,
            y,
            of,
            q_row,
            o_row,
            first,
            rows,
            head,
            c,
            r,
            threshold,
            H,
            WIDTHS,
            TILE,
            FLIP,
            PEELED,
        )


def forward(x: Operands, options: Options) -> Result:
    """Of set attention, or of seed pooling where x.q_ptr is None."""
    y = launch.new_result(x)
    if y.out.numel() == 0:
        return y
    common = launch.arguments(x, options) | dict(FLIP=options.scale < 0)
    heads = x.q.shape[1]
    with launch.on_device(x.q):
        for tile in schedules.of_queries("forward", x):
            tiles = schedules.query_programs(x, x.molecules, tile)
            _forward_kernel[(tiles * heads,)](**common, y=y, **schedules.without_completion(tile))
    return y
