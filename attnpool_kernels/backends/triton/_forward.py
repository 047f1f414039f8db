"""Forward pass: (F1), (F2), (F3) with the online softmax of FlashAttention (Dao et al. 2022).

One program computes up to BLOCK_M query rows of one molecule and head: it walks the molecule's keys
in steps of BLOCK_N and keeps the running maximum, the sum and the weighted values. Rows that no
molecule covers are the same program with no keys: output 0, lse -inf.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .primitives import (
    UNSPECIALIZED,
    add_bias,
    find_query_tile,
    keep_mask,
    load_bias,
    load_rows,
    molecule_pairs,
    molecule_rows,
    not_ours,
    out_row,
    products,
    store_row_values,
    store_rows,
)


@triton.jit
def attend(
    q, k, v, bias, seed, sq, sk, sv, sb, threshold, c, molecule, head, H, q_row, o_m, m_m, k_row,
    first, last, keys, pair, pairs,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(output, lse) of a tile of queries over the keys first to last of a molecule."""
    zero = tl.zeros((BLOCK_M, BLOCK_N), c.dtype)
    largest = tl.full((BLOCK_M,), float("-inf"), c.dtype)
    total = tl.zeros((BLOCK_M,), c.dtype)
    acc = tl.zeros((BLOCK_M, BDV), c.dtype)
    for first_k in range(first, last, BLOCK_N):
        o_n = first_k + tl.arange(0, BLOCK_N)
        m_n = o_n < last
        s, _ = products(
            q, sq, None, None, q_row, o_m, m_m, k, sk, None, None, k_row, o_n, m_n,
            head, head, H, zero, D, BD, SLICE, PRECISION)  # fmt: skip
        b_v = load_rows(v, sv, k_row, head, o_n, m_n, DV, BDV)
        b_bias = load_bias(bias, sb, pair, pairs, head, o_m, m_m, o_n, keys, c)
        s = add_bias(s, c, b_bias, m_n[None, :])
        new_largest = tl.maximum(largest, tl.max(s, 1))
        # a row of -inf so far subtracts 0: its weights are exp(-inf) = 0 and never NaN
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        p = tl.exp(s - shift[:, None])
        shrink = tl.exp(largest - shift)
        total = total * shrink + tl.sum(p, 1)
        if seed is not None:
            m_keep = keep_mask(seed, threshold, molecule, head, o_m, first_k, BLOCK_N)
            p = tl.where(m_keep, p, 0.0)
        p = p.to(b_v.dtype)
        acc = tl.dot(p, b_v, acc * shrink[:, None], input_precision=PRECISION)
        largest = new_largest
    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    return acc, tl.where(empty, float("-inf"), largest + tl.log(tl.where(empty, 1.0, total)))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, out, lse, sq, sk, sv, sb,
    B: tl.int64, H: tl.int32, n_q: tl.int64, n_k: tl.int64, n_pairs: tl.int64,
    scale: tl.float64, threshold: tl.uint32, keep_scale: tl.float64,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
    SHORTEST: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = lse.dtype.element_ty
    head = (tl.program_id(0) % H).to(tl.int64)
    molecule, q_row, first, rows = find_query_tile(tl.program_id(0) // H, q_ptr, B, n_q, BLOCK_M)
    if (first >= rows) | not_ours(rows, SHORTEST, LONGEST):
        return
    o_row = out_row(q_ptr, molecule, q_row, n_q)
    k_row, keys = molecule_rows(k_ptr, molecule, B, n_k)
    pair, pairs = molecule_pairs(pair_ptr, molecule, B, n_pairs)
    c = tl.full((), scale, ACC)
    o_m = first + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    acc, b_lse = attend(
        q, k, v, bias, seed, sq, sk, sv, sb, threshold, c, molecule, head, H, q_row, o_m, m_m,
        k_row, 0, keys, keys, pair, pairs, D, DV, BD, BDV, BLOCK_M, BLOCK_N, SLICE, PRECISION,
    )  # fmt: skip
    if seed is not None:
        acc *= tl.full((), keep_scale, ACC)
    store_rows(out, o_row, head, H, o_m, m_m, acc, DV, BDV)
    store_row_values(lse, o_row, head, H, o_m, m_m, b_lse)


def forward(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout):
    """(out, lse) of set attention, or of seed pooling where q_ptr is None."""
    molecules, heads = k_ptr.numel() - 1, q.shape[1]
    shape = launch.out_shape(q, v, q_ptr, molecules)
    out = torch.empty(shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(shape[:-1], dtype=launch.accumulation(q.dtype), device=q.device)
    if out.numel() == 0:
        return out, lse
    options = bias is not None or seed is not None
    arguments = launch.arguments(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout)
    with launch.on_device(q):
        for tile in launch.schedules("forward", q, v, q_ptr, q.shape[0], options):
            tiles = launch.query_tiles(q, q_ptr, molecules, tile["BLOCK_M"])
            _forward_kernel[(tiles * heads,)](**arguments, out=out, lse=lse, **tile)
    return out, lse
