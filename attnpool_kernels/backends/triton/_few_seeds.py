"""Pooling with few seeds: k and v are streamed once, a molecule at a time; long ones in parts.

The queries of a molecule are one tile, so a program is a (molecule, head), a warp or two, and a
batch of molecules fills the chip by their number. One huge set would be one program: its keys are
cut into parts of SPLIT, counted from its first key, each a program of its own. Per-part results go
to a scratch tensor and are merged in order. A molecule of up to SPLIT keys is one part and needs
none of that; how a molecule is cut depends on its own size only, so its bits do not depend on its
batch mates.

Parts are the tiles of `find_tile` over the keys. In scratch, part i of a molecule that starts at
row x has the slot 2 ((x + i SPLIT) // SPLIT) + (i = 0): unique among molecules of several parts, as
two of them cannot start within SPLIT rows. So n_k // SPLIT + 1 pairs of slots always suffice, and
the kernels that work on several parts have grids of that size, not of the number of molecules.

d(seeds) is summed over CHUNK parts in order by a program, over programs by the last kernel.
"""

import torch
import triton
import triton.language as tl

from . import launch, tile_table
from ._backward import sum_parts
from ._forward import attend
from .primitives import (
    UNSPECIALIZED,
    add_bias,
    find_segment,
    find_tile,
    keep_mask,
    later,
    load_bias,
    load_row_values,
    load_rows,
    molecule_pairs,
    molecule_rows,
    products,
    store_pairs,
    store_products,
    store_row_values,
    store_rows,
    weights,
)


@triton.jit
def part_of(tile, k_ptr, B, n_k, SPLIT: tl.constexpr):
    """(molecule, its first row, first and end of the part's keys, keys of the molecule, whether
    it is one); a surplus tile has first >= end, first > 0."""
    molecule, row, first_row, end = find_tile(tile, k_ptr, B, n_k, SPLIT)
    first, keys = (first_row - row).to(tl.int32), (end - row).to(tl.int32)
    known = (molecule >= 0) & (molecule < B)
    return molecule, row, first, tl.minimum(first + SPLIT, keys), keys, known


@triton.jit
def slot_of(row, first, SPLIT: tl.constexpr):
    """Where in scratch the part that starts at row + first is."""
    return (row + first) // SPLIT * 2 + (first == 0)


@triton.jit
def part_in_slot(slot, k_ptr, B, n_k, SPLIT: tl.constexpr):
    """(molecule, its first row, first key, keys); keys = 0 where no part has this slot."""
    low = slot.to(tl.int64) // 2 * SPLIT
    starts = slot % 2 == 1
    n_k = n_k.to(tl.int64)
    row = tl.minimum(tl.where(starts, low + SPLIT, low + 1), n_k) - 1
    molecule = find_segment(row, k_ptr, B, n_k, 1, 0) - 1
    start, keys = molecule_rows(k_ptr, molecule, B, n_k)
    first = tl.where(starts, 0, (low - start + SPLIT - 1) // SPLIT * SPLIT)
    ours = tl.where(starts, start >= low, first > 0) & (first < keys) & (keys > SPLIT)
    return molecule, start, tl.where(ours, first, 0).to(tl.int32), tl.where(ours, keys, 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(
    q, k, v, bias, k_ptr, pair_ptr, seed, out, lse, outs, lses, sq, sk, sv, sb,
    B: tl.int64, H: tl.int32, n_q: tl.int64, n_k: tl.int64, n_pairs: tl.int64,
    scale: tl.float64, threshold: tl.uint32, keep_scale: tl.float64,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = lse.dtype.element_ty
    head = (tl.program_id(0) % H).to(tl.int64)
    molecule, k_row, first, last, keys, known = part_of(
        tl.program_id(0) // H, k_ptr, B, n_k, SPLIT)  # fmt: skip
    if ((first > 0) & (first >= keys)) | (known == 0):
        return
    pair, pairs = molecule_pairs(pair_ptr, molecule, B, n_pairs)
    o_m = tl.arange(0, BLOCK_M)
    seeds = n_q.to(tl.int32)  # masks of 64 bits take twice the registers
    m_m = o_m < seeds
    acc, b_lse = attend(
        q, k, v, bias, seed, sq, sk, sv, sb, threshold, tl.full((), scale, ACC), molecule, head, H,
        molecule * 0, o_m, m_m, k_row, first, last, keys, pair, pairs, D, DV, BD, BDV, BLOCK_M,
        BLOCK_N, SLICE, PRECISION)  # fmt: skip
    if seed is not None:
        acc *= tl.full((), keep_scale, ACC)
    if keys <= SPLIT:
        store_rows(out, molecule * n_q, head, H, o_m, m_m, acc, DV, BDV)
        store_row_values(lse, molecule * n_q, head, H, o_m, m_m, b_lse)
    else:
        row = slot_of(k_row, first, SPLIT) * n_q
        store_rows(outs, row, head, H, o_m, m_m, acc, DV, BDV)
        store_row_values(lses, row, head, H, o_m, m_m, b_lse)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _merge_kernel(
    k_ptr, out, lse, outs, lses, B: tl.int64, H: tl.int32, n_q: tl.int64, n_k: tl.int64,
    DV: tl.constexpr, BDV: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Merges the parts of a molecule in order: outputs weighted by exp(lse), or plain sums."""
    head = (tl.program_id(0) % H).to(tl.int64)
    molecule, k_row, _, keys = part_in_slot(
        tl.program_id(0) // H * 2 + 1, k_ptr, B, n_k, SPLIT)  # fmt: skip
    if keys == 0:
        return
    ACC: tl.constexpr = outs.dtype.element_ty
    o_m = tl.arange(0, BLOCK_M)
    seeds = n_q.to(tl.int32)  # masks of 64 bits take twice the registers
    m_m = o_m < seeds
    acc = tl.zeros((BLOCK_M, BDV), ACC)
    largest = tl.full((BLOCK_M,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    so = (H.to(tl.int64) * DV, DV, 1)
    for at in range(0, keys, SPLIT):
        row = slot_of(k_row, at, SPLIT) * n_q
        b_o = load_rows(outs, so, row, head, o_m, m_m, DV, BDV)
        if lses is not None:
            b_lse = load_row_values(lses, (H.to(tl.int64), 1), row, head, o_m, m_m, float("-inf"))
            new_largest = tl.maximum(largest, b_lse)
            shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            shrink, share = tl.exp(largest - shift), tl.exp(b_lse - shift)
            acc = acc * shrink[:, None] + b_o * share[:, None]
            total = total * shrink + share
            largest = new_largest
        else:
            acc += b_o
    if lses is not None:
        empty = total == 0
        acc = acc / tl.where(empty, 1.0, total)[:, None]
        b_lse = tl.where(empty, float("-inf"), largest + tl.log(tl.where(empty, 1.0, total)))
        store_row_values(lse, molecule * n_q, head, H, o_m, m_m, b_lse)
    store_rows(out, molecule * n_q, head, H, o_m, m_m, acc, DV, BDV)


@triton.jit
def merged(statistic, k_row, keys, n_q, head, H, o_m, m_m, SPLIT: tl.constexpr):
    """Sum of a row statistic over the parts of a molecule, in order."""
    total = tl.zeros((o_m.shape[0],), statistic.dtype.element_ty)
    for at in range(0, keys, SPLIT):
        row = slot_of(k_row, at, SPLIT) * n_q
        total += load_row_values(statistic, (H.to(tl.int64), 1), row, head, o_m, m_m, 0.0)
    return total


@triton.jit
def _block(
    q, k, v, bias, seed, p_do, sq, sk, sv, sb, sdo, b_lse, threshold, c, r, molecule, head,
    head_at, H, o_m, m_m, k_row, o_n, m_n, first_k, keys, pair, pairs, zero,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK_N: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(P, P∘R, dP) of the seeds and a block of keys, before P is divided by its row sum."""
    row = molecule * 0
    s, _ = products(
        q, sq, None, None, row, o_m, m_m, k, sk, None, None, k_row, o_n, m_n,
        head, head_at, H, zero, D, BD, SLICE, PRECISION)  # fmt: skip
    dp, _ = products(
        p_do, sdo, None, None, row, o_m, m_m, v, sv, None, None, k_row, o_n, m_n,
        head, head_at, H, zero, DV, BDV, SLICE, PRECISION)  # fmt: skip
    b_bias = load_bias(bias, sb, pair, pairs, head_at, o_m, m_m, o_n, keys, c)
    p = weights(add_bias(s, c, b_bias, m_n[None, :]), b_lse[:, None])
    kept = p
    if seed is not None:
        m_keep = keep_mask(seed, threshold, molecule, head, o_m, first_k, BLOCK_N)
        dp = tl.where(m_keep, dp * r, 0.0)
        kept = tl.where(m_keep, p * r, 0.0)
    return p, kept, dp


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_kernel(
    q, k, v, bias, k_ptr, pair_ptr, seed, sq, sk, sv, sb, lse, dout, dlse, sl, sdo_b, sdo, sdl_b,
    sdl, dq, dk, dv, dbias, totals, deltas,
    B: tl.int64, H: tl.int32, n_q: tl.int64, n_k: tl.int64, n_pairs: tl.int64,
    scale: tl.float64, threshold: tl.uint32, keep_scale: tl.float64, CHUNK: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICE: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """Gradients of CHUNK parts; with STATISTICS only Σ P and Σ P∘dP of the part in a slot."""
    ACC: tl.constexpr = lse.dtype.element_ty
    head = (tl.program_id(0) % H).to(tl.int64)
    at = (tl.program_id(0) // H).to(tl.int64)
    c = tl.full((), scale, ACC)
    r = tl.full((), keep_scale, ACC)
    one = tl.full((), 1.0, ACC)
    o_m = tl.arange(0, BLOCK_M)
    seeds = n_q.to(tl.int32)  # masks of 64 bits take twice the registers
    zero = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    acc = tl.zeros((BLOCK_M, BD), ACC)
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
            molecule, k_row, first, last, keys, known = part_of(
                low + (tile - low), k_ptr, B, n_k, SPLIT)  # fmt: skip
        live = tl.where(known, last, 0)  # rows of no molecule: not read, gradient 0
        pair, pairs = molecule_pairs(pair_ptr, molecule, B, n_pairs)
        m_m = o_m < tl.where(known, seeds, 0)
        row = molecule * n_q
        b_lse = load_row_values(lse, sl, row, head, o_m, m_m, float("-inf"))
        p_do = dout + molecule * sdo_b
        total = tl.zeros((BLOCK_M,), ACC)
        b_delta = tl.zeros((BLOCK_M,), ACC)
        one_block = keys <= BLOCK_N
        # the row sum that P really has, and δ from what is used below: of the keys, or of the parts
        end = tl.where((one_block | (keys > SPLIT)) & (not STATISTICS), first, live)
        for first_k in range(first, end, BLOCK_N):
            o_n = first_k + tl.arange(0, BLOCK_N)
            k_at, head_at = later(k_row, first_k, H), later(head, first_k, H)
            p, kept, dp = _block(
                q, k, v, bias, seed, p_do, sq, sk, sv, sb, sdo, b_lse, threshold, c, r, molecule,
                head, head_at, H, o_m, m_m, k_at, o_n, o_n < live, first_k, keys, pair, pairs,
                zero, D, DV, BD, BDV, BLOCK_N, SLICE, PRECISION)  # fmt: skip
            total += tl.sum(p, 1)
            b_delta += tl.sum(p * dp, 1)
        if STATISTICS:
            slot = at * n_q
            store_row_values(totals, slot, head, H, o_m, m_m, total)
            store_row_values(deltas, slot, head, H, o_m, m_m, b_delta)
        else:
            if keys > SPLIT:
                total = merged(totals, k_row, keys, n_q, head, H, o_m, m_m, SPLIT)
                b_delta = merged(deltas, k_row, keys, n_q, head, H, o_m, m_m, SPLIT)
            b_dlse = tl.zeros((BLOCK_M,), ACC)
            if dlse is not None:
                b_dlse = load_row_values(
                    dlse + molecule * sdl_b, sdl, molecule * 0, head, o_m, m_m, 0.0)  # fmt: skip
                b_dlse = tl.where(b_lse == float("-inf"), 0.0, b_dlse)
            for first_k in range(first, last, BLOCK_N):
                o_n = first_k + tl.arange(0, BLOCK_N)
                k_at, head_at = later(k_row, first_k, H), later(head, first_k, H)
                m_n = o_n < last
                p, kept, dp = _block(
                    q, k, v, bias, seed, p_do, sq, sk, sv, sb, sdo, b_lse, threshold, c, r,
                    molecule, head, head_at, H, o_m, m_m, k_at, o_n, o_n < live, first_k, keys,
                    pair, pairs, zero, D, DV, BD, BDV, BLOCK_N, SLICE, PRECISION)  # fmt: skip
                if one_block:
                    total = tl.sum(p, 1)
                    b_delta = tl.sum(p * dp, 1)
                b_norm = 1.0 / tl.where(total > 0, total, 1.0)
                ds = p * b_norm[:, None] * (dp - (b_delta * b_norm - b_dlse)[:, None])
                if dbias is not None:
                    store_pairs(dbias, pair, pairs, head_at, H, o_m, m_m, o_n, keys, ds)
                ds = ds.to(k.dtype.element_ty)
                b_k = load_rows(k, sk, k_at, head_at, o_n, o_n < live, D, BD)
                acc = tl.dot(ds, b_k, acc, input_precision=PRECISION)
                q_at = later(molecule * 0, first_k, H)
                kept *= b_norm[:, None]
                store_products(
                    dv, k_at, o_n, m_n, tl.trans(kept.to(v.dtype.element_ty)), p_do, sdo, None,
                    None, None, q_at, o_m, m_m, head_at, H, one, DV, BDV,
                    PRECISION)  # fmt: skip
                store_products(
                    dk, k_at, o_n, m_n, tl.trans(ds), q, sq, None, None, None, q_at, o_m,
                    m_m, head_at, H, c, D, BD, PRECISION)  # fmt: skip
    if not STATISTICS:
        store_rows(dq, at * n_q, head, H, o_m, o_m < seeds, acc * c, D, BD)


def few_tiles(n_k: int, molecules: int) -> int:
    """Parts of all molecules and of the rows of none, surplus ones included."""
    return n_k // tile_table.SPLIT + molecules + 2


def scratch(like: torch.Tensor, n_k: int) -> torch.Tensor:
    """A slot for every part of a molecule of several, each of the shape of one of like."""
    shape = (2 * (n_k // tile_table.SPLIT + 1), *like.shape[1:])
    return torch.empty(shape, dtype=launch.accumulation(like.dtype), device=like.device)


def arguments(*problem) -> dict:
    """Those of every pass, and a tile's worth of seeds: (q, k, v, bias, q_ptr, ...)."""
    found = launch.arguments(*problem)
    del found["q_ptr"]
    return found | dict(SPLIT=tile_table.SPLIT)


def merge(common: dict, tile: dict, x, parts, lse=None, lses=None) -> None:
    """x, or (x, lse), of molecules of several parts from those of the parts."""
    names = ("k_ptr", "B", "H", "n_q", "n_k", "DV", "BDV", "SPLIT")
    grid = (parts.shape[0] // 2 * common["H"],)
    _merge_kernel[grid](
        out=x, lse=lse, outs=parts, lses=lses, **{name: common[name] for name in names},
        BLOCK_M=tile["BLOCK_M"], num_warps=tile["num_warps"],
        enable_fp_fusion=True)  # fmt: skip


def forward(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout):
    """(out, lse) of seed pooling."""
    molecules, heads = k_ptr.numel() - 1, q.shape[1]
    out = torch.empty((molecules, *q.shape[:2], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty(out.shape[:-1], dtype=launch.accumulation(q.dtype), device=q.device)
    if out.numel() == 0:
        return out, lse
    common = arguments(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout)
    tile = launch.tile("few_seeds_forward", q, v, bias is not None or seed is not None)
    outs, lses = scratch(out, k.shape[0]), scratch(lse, k.shape[0])
    with launch.on_device(q):
        grid = (few_tiles(k.shape[0], molecules) * heads,)
        _forward_kernel[grid](**common, out=out, lse=lse, outs=outs, lses=lses, **tile)
        if k.shape[0] > tile_table.SPLIT:
            merge(common, tile, out, outs, lse, lses)
    return out, lse


def backward(
    q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, out, lse, dout, dlse, scale, dropout, need_dbias
):  # fmt: skip
    """(dq, dk, dv, dbias); dbias is [0, H] unless asked for. out is not needed."""
    common = arguments(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout)
    sdo_b, sdo = launch.row_strides(dout, q_ptr)
    sdl_b, sdl = launch.row_strides(dlse, q_ptr)
    dk, dv, dbias = launch.new(k), launch.new(v), launch.new_pairs(q, bias, need_dbias)
    heads, molecules = q.shape[1], common["B"]
    tile = launch.tile("few_seeds_backward", q, v, bias is not None or seed is not None)
    totals, deltas = (scratch(lse, k.shape[0]) for _ in range(2))
    chunk, parts = launch.chunks(few_tiles(k.shape[0], molecules), heads)
    dq = launch.new_query_gradient(q, q_ptr, parts)
    common |= dict(lse=lse, sl=lse.stride()[-2:], dout=dout, sdo_b=sdo_b, sdo=sdo, dlse=dlse)
    common |= dict(sdl_b=sdl_b, sdl=sdl, dq=dq, dk=dk, dv=dv, totals=totals, deltas=deltas)
    common |= dict(dbias=dbias if dbias.numel() else None, CHUNK=chunk)
    with launch.on_device(q):
        if k.shape[0] > tile_table.SPLIT:
            grid = (len(totals) * heads,)
            _backward_kernel[grid](**common, STATISTICS=True, **tile)
        _backward_kernel[(parts * heads,)](**common, STATISTICS=False, **tile)
        dq = sum_parts(dq, q)
    return dq, dk, dv, dbias
