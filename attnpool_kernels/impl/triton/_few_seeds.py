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

from ...operands import Cotangents, Gradients, Operands, Options, Result
from . import launch, tile_table
from ._backward import sum_parts
from ._double_backward import merge_statistics
from ._forward import attend
from .arguments import (
    Dual,
    Factors,
    Molecule,
    Outputs,
    Parts,
    Place,
    Rows,
    Statistics,
    Tile,
    Width,
    Widths,
)
from .primitives import (
    UNSPECIALIZED,
    find_segment,
    find_tile,
    keep_mask,
    later,
    load_bias,
    load_key_bias,
    load_row_values,
    load_rows,
    molecule_pairs,
    molecule_rows,
    of_molecule,
    pair_weights,
    products,
    store_pairs,
    store_products,
    store_row_values,
    store_rows,
)

# Parts whose numbers are on their way while others are added: memory answers after as long as a
# dozen of them take. Rows of values wait in registers, this many bytes for each seed.
IN_FLIGHT = tl.constexpr(8)
WAITING = 2048


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
    x,
    y,
    parts,
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
    SPLIT: tl.constexpr,
    FLIP: tl.constexpr,
):
    ACC: tl.constexpr = y.lse.dtype.element_ty
    WIDTHS: tl.constexpr = Widths(Width(D, BD), Width(DV, BDV))
    TILE: tl.constexpr = Tile(BLOCK_M, BLOCK_N, SLICE, PRECISION)
    head = (tl.program_id(0) % H).to(tl.int64)
    molecule, k_row, first, last, keys, known = part_of(
        tl.program_id(0) // H, x.k_ptr, B, n_k, SPLIT
    )
    if ((first > 0) & (first >= keys)) | (known == 0):
        return
    pair, pairs = molecule_pairs(x.pair_ptr, molecule, B, n_pairs)
    of = Molecule(molecule, k_row, keys, pair, pairs)
    o_m = tl.arange(0, BLOCK_M)
    seeds = n_q.to(tl.int32)  # masks of 64 bits take twice the registers
    m_m = o_m < seeds
    at_m = Place(molecule * 0, o_m, m_m, head)
    c = tl.full((), scale, ACC)
    acc, b_lse, largest, total = attend(
        x, of, at_m, first, last, c, threshold, H, WIDTHS, TILE, FLIP, False
    )
    if x.seed is not None:
        acc *= tl.full((), keep_scale, ACC)
    if keys <= SPLIT:
        at_out = Place(molecule * n_q, o_m, m_m, head)
        store_rows(y.out, at_out, H, acc, WIDTHS.v)
        store_row_values(y.lse, at_out, H, b_lse)
    else:
        at_part = Place(slot_of(k_row, first, SPLIT) * n_q, o_m, m_m, head)
        store_rows(parts.out, at_part, H, acc, WIDTHS.v)
        if parts.total is None:
            store_row_values(parts.lse, at_part, H, b_lse)
        else:
            store_row_values(parts.lse, at_part, H, largest)
            store_row_values(parts.total, at_part, H, total)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _merge_kernel(
    k_ptr,
    y,
    parts,
    B: tl.int64,
    H: tl.int32,
    n_q: tl.int64,
    n_k: tl.int64,
    DV: tl.constexpr,
    BDV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Merges the parts of a molecule in order: outputs weighted by exp(lse), or plain sums."""
    WIDTH: tl.constexpr = Width(DV, BDV)
    head = (tl.program_id(0) % H).to(tl.int64)
    slot = tl.program_id(0) // H * 2 + 1
    molecule, k_row, _, keys = part_in_slot(slot, k_ptr, B, n_k, SPLIT)
    if keys == 0:
        return
    ACC: tl.constexpr = parts.out.dtype.element_ty
    o_m = tl.arange(0, BLOCK_M)
    seeds = n_q.to(tl.int32)  # masks of 64 bits take twice the registers
    m_m = o_m < seeds
    acc = tl.zeros((BLOCK_M, BDV), ACC)
    largest = tl.full((BLOCK_M,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    outs = Rows(parts.out, (H.to(tl.int64) * DV, DV, 1))
    for at in tl.range(0, keys, SPLIT, loop_unroll_factor=TOGETHER):
        at_part = Place(slot_of(k_row, at, SPLIT) * n_q, o_m, m_m, head)
        b_o = load_rows(outs, at_part, WIDTH)
        if parts.lse is not None:
            lses = Rows(parts.lse, (H.to(tl.int64), 1))
            b_lse = load_row_values(lses, at_part, float("-inf"))
            new_largest = tl.maximum(largest, b_lse)
            shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            shrink, share = tl.exp(largest - shift), tl.exp(b_lse - shift)
            if parts.total is not None:
                share *= load_part(parts.total, at_part, H.to(tl.int64))
            acc = acc * shrink[:, None] + b_o * share[:, None]
            total = total * shrink + share
            largest = new_largest
        else:
            acc += b_o
    if parts.lse is not None:
        empty = total == 0
        acc = acc / tl.where(empty, 1.0, total)[:, None]
        b_lse = tl.where(empty, float("-inf"), largest + tl.log(tl.where(empty, 1.0, total)))
        store_row_values(y.lse, Place(molecule * n_q, o_m, m_m, head), H, b_lse)
    store_rows(y.out, Place(molecule * n_q, o_m, m_m, head), H, acc, WIDTH)


@triton.jit
def load_part(x, at, heads):
    """[rows] of a statistic of one part, from a contiguous scratch tensor; 0 outside the mask."""
    return load_row_values(Rows(x, (heads, 1)), at, 0.0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _merge_rows_kernel(
    k_ptr,
    parts,
    whole,
    B: tl.int64,
    H: tl.int32,
    n_q: tl.int64,
    n_k: tl.int64,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Row statistics of molecules of several parts from those of the parts, in order; they go to
    the slot of a molecule's first part."""
    heads = H.to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    slot = (tl.program_id(0) // H).to(tl.int64) * 2 + 1
    _, k_row, _, keys = part_in_slot(slot, k_ptr, B, n_k, SPLIT)
    if keys == 0:
        return
    o_m = tl.arange(0, BLOCK_M)
    m_m = o_m < n_q.to(tl.int32)
    total = tl.zeros((BLOCK_M,), parts.total.dtype.element_ty)
    b_delta, b_t, b_y = total, total, total
    for at in tl.range(0, keys, SPLIT, loop_unroll_factor=IN_FLIGHT):
        at_part = Place(slot_of(k_row, at, SPLIT) * n_q, o_m, m_m, head)
        part, delta = load_part(parts.total, at_part, heads), load_part(parts.delta, at_part, heads)
        if parts.t is None:
            total += part
            b_delta += delta
        else:
            t, y = load_part(parts.t, at_part, heads), load_part(parts.y, at_part, heads)
            total, b_delta, b_t, b_y = merge_statistics(total, b_delta, b_t, b_y, part, delta, t, y)
    at_first = Place(slot * n_q, o_m, m_m, head)
    store_row_values(whole.total, at_first, H, total)
    store_row_values(whole.delta, at_first, H, b_delta)
    if parts.t is not None:
        store_row_values(whole.t, at_first, H, b_t)
        store_row_values(whole.y, at_first, H, b_y)


@triton.jit
def _block(x, dout, of, at_m, at_n, first_k, b_lse, by, zero, H, widths, tile):
    """(P, P∘R, dP) of the seeds and a block of keys, before P is divided by its row sum."""
    # [BLOCK_M, BLOCK_N]
    s, _ = products(Dual(x.q, None), at_m, Dual(x.k, None), at_n, zero, H, widths.qk, tile)
    dp, _ = products(Dual(dout, None), at_m, Dual(x.v, None), at_n, zero, H, widths.v, tile)
    b_bias = load_bias(x.bias, of, at_m, at_n.offsets, at_n.head, by.c)
    b_key = load_key_bias(x.key_bias, at_n, by.c, 0)
    p = pair_weights(s, by.c, b_bias, b_key, at_n.mask[None, :], b_lse[:, None])
    kept = p
    if x.seed is not None:
        o_m, head = at_m.offsets, at_m.head
        m_keep = keep_mask(x.seed, by.threshold, of.index, head, o_m, first_k, tile.n)
        dp = tl.where(m_keep, dp * by.r, 0.0)
        kept = tl.where(m_keep, p * by.r, 0.0)
    return p, kept, dp


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_kernel(
    x,
    y,
    dy,
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
    """Gradients of CHUNK parts; with STATISTICS only Σ P and Σ P∘dP of the part in a slot."""
    ACC: tl.constexpr = y.lse.data.dtype.element_ty
    WIDTHS: tl.constexpr = Widths(Width(D, BD), Width(DV, BDV))
    TILE: tl.constexpr = Tile(BLOCK_M, BLOCK_N, SLICE, PRECISION)
    head = (tl.program_id(0) % H).to(tl.int64)
    at = (tl.program_id(0) // H).to(tl.int64)
    by = Factors(tl.full((), scale, ACC), tl.full((), keep_scale, ACC), threshold)
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
            molecule, k_row, first, keys = part_in_slot(at, x.k_ptr, B, n_k, SPLIT)
            last = tl.minimum(first + SPLIT, keys)
            known = keys > 0
        else:
            # low + ...: the interpreter's loop variables are plain integers
            molecule, k_row, first, last, keys, known = part_of(
                low + (tile - low), x.k_ptr, B, n_k, SPLIT
            )
        live = tl.where(known, last, 0)  # rows of no molecule: not read, gradient 0
        pair, pairs = molecule_pairs(x.pair_ptr, molecule, B, n_pairs)
        of = Molecule(molecule, k_row, keys, pair, pairs)
        m_m = o_m < tl.where(known, seeds, 0)
        row = molecule * n_q
        q_row = molecule * 0
        at_m = Place(q_row, o_m, m_m, head)
        b_lse = load_row_values(y.lse, Place(row, o_m, m_m, head), float("-inf"))
        dout = of_molecule(dy.dout, molecule)
        total = tl.zeros((BLOCK_M,), ACC)
        b_delta = tl.zeros((BLOCK_M,), ACC)
        one_block = keys <= BLOCK_N
        # the row sum that P really has, and δ from what is used below: of the keys, or of the parts
        end = tl.where((one_block | (keys > SPLIT)) & (not STATISTICS), first, live)
        for first_k in range(first, end, BLOCK_N):
            o_n = first_k + tl.arange(0, BLOCK_N)
            k_at, head_at = later(k_row, first_k, H), later(head, first_k, H)
            at_n = Place(k_at, o_n, o_n < live, head_at)
            p, kept, dp = _block(x, dout, of, at_m, at_n, first_k, b_lse, by, zero, H, WIDTHS, TILE)
            total += tl.sum(p, 1)
            b_delta += tl.sum(p * dp, 1)
        if STATISTICS:
            at_slot = Place(at * n_q, o_m, m_m, head)
            store_row_values(parts.rows.total, at_slot, H, total)
            store_row_values(parts.rows.delta, at_slot, H, b_delta)
        else:
            if keys > SPLIT:
                at_whole = Place(slot_of(k_row, 0, SPLIT) * n_q, o_m, m_m, head)
                total = load_part(parts.whole.total, at_whole, H.to(tl.int64))
                b_delta = load_part(parts.whole.delta, at_whole, H.to(tl.int64))
            b_dlse = tl.zeros((BLOCK_M,), ACC)
            if dy.dlse is not None:
                b_dlse = load_row_values(of_molecule(dy.dlse, molecule), at_m, 0.0)
                b_dlse = tl.where(b_lse == float("-inf"), 0.0, b_dlse)
            for first_k in range(first, last, BLOCK_N):
                o_n = first_k + tl.arange(0, BLOCK_N)
                k_at, head_at = later(k_row, first_k, H), later(head, first_k, H)
                at_n = Place(k_at, o_n, o_n < last, head_at)
                at_live = Place(k_at, o_n, o_n < live, head_at)
                p, kept, dp = _block(
                    x, dout, of, at_m, at_live, first_k, b_lse, by, zero, H, WIDTHS, TILE
                )
                if one_block:
                    total = tl.sum(p, 1)
                    b_delta = tl.sum(p * dp, 1)
                b_norm = 1.0 / tl.where(total > 0, total, 1.0)
                ds = p * b_norm[:, None] * (dp - (b_delta * b_norm - b_dlse)[:, None])
                if gradients.dbias is not None:
                    store_pairs(gradients.dbias, of, at_m, o_n, head_at, H, ds)
                if gradients.dkey_bias is not None:
                    store_row_values(gradients.dkey_bias, at_n, H, tl.sum(ds, 0))
                ds = ds.to(x.k.data.dtype.element_ty)
                # [BLOCK_N, BD]
                b_k = load_rows(x.k, at_live, WIDTHS.qk)
                acc = tl.dot(ds, b_k, acc, input_precision=PRECISION)
                at_q = Place(later(q_row, first_k, H), o_m, m_m, head_at)
                kept *= b_norm[:, None]
                ps = Dual(tl.trans(kept.to(x.v.data.dtype.element_ty)), None)
                store_products(
                    gradients.dv, at_n, ps, Dual(dout, None), at_q, one, H, WIDTHS.v, PRECISION
                )
                ds_t = Dual(tl.trans(ds), None)
                store_products(
                    gradients.dk, at_n, ds_t, Dual(x.q, None), at_q, by.c, H, WIDTHS.qk, PRECISION
                )
    if not STATISTICS:
        at_dq = Place(at * n_q, o_m, o_m < seeds, head)
        store_rows(gradients.dq, at_dq, H, acc * by.c, WIDTHS.qk)


def few_tiles(x: Operands) -> int:
    """Parts of all molecules and of the rows of none, surplus ones included."""
    return x.k.shape[0] // tile_table.SPLIT + x.molecules + 2


def scratch(like: torch.Tensor, x: Operands) -> torch.Tensor:
    """A slot for every part of a molecule of several, each of the shape of one of like."""
    shape = (2 * (x.k.shape[0] // tile_table.SPLIT + 1), *like.shape[1:])
    return torch.empty(shape, dtype=launch.accumulation(like.dtype), device=like.device)


def statistics(names: tuple[str, ...], like: torch.Tensor, x: Operands) -> Statistics:
    """These row statistics of every slot."""
    return Statistics(**(dict(delta=None) | {name: scratch(like, x) for name in names}))


def arguments(x: Operands, options: Options) -> dict:
    """Those of every pass, and the keys of a part."""
    return launch.arguments(x, options) | dict(SPLIT=tile_table.SPLIT)


def merge(common: dict, tile: dict, y: Result, parts: Outputs) -> None:
    """y of molecules of several parts from those of the parts; lse may be None in both."""
    grid = (parts.out.shape[0] // 2 * common["H"],)
    names = ("B", "H", "n_q", "n_k", "DV", "BDV", "SPLIT")
    waiting = WAITING // (common["BDV"] * parts.out.element_size())
    _merge_kernel[grid](
        k_ptr=common["x"].k_ptr,
        y=y,
        parts=parts,
        **{name: common[name] for name in names},
        BLOCK_M=tile["BLOCK_M"],
        TOGETHER=max(1, min(waiting, IN_FLIGHT.value)),
        num_warps=4,
        enable_fp_fusion=True,
    )


def merge_rows(common: dict, tile: dict, parts: Parts) -> None:
    """parts.whole from parts.rows."""
    grid = (parts.rows.total.shape[0] // 2 * common["H"],)
    _merge_rows_kernel[grid](
        k_ptr=common["x"].k_ptr,
        parts=parts.rows,
        whole=parts.whole,
        **{name: common[name] for name in ("B", "H", "n_q", "n_k", "SPLIT")},
        BLOCK_M=tile["BLOCK_M"],
        num_warps=1,
        enable_fp_fusion=True,
    )


def forward(x: Operands, options: Options) -> Result:
    y = launch.new_result(x)
    if y.out.numel() == 0:
        return y
    common = arguments(x, options)
    tile = launch.chosen("few_seeds_forward", x)
    biased = x.bias is not None or x.key_bias is not None
    total = scratch(y.lse, x) if biased else None
    parts = Outputs(scratch(y.out, x), scratch(y.lse, x), total)
    with launch.on_device(x.q):
        grid = (few_tiles(x) * x.q.shape[1],)
        _forward_kernel[grid](**common, y=y, parts=parts, FLIP=options.scale < 0, **tile)
        if x.k.shape[0] > tile_table.SPLIT:
            merge(common, tile, y, parts)
    return y


def backward(
    x: Operands, y: Result, dy: Cotangents, options: Options, need_dbias: bool
) -> Gradients:
    """out is not needed."""
    dk, dv = launch.new(x.k), launch.new(x.v)
    dbias, dkey_bias = launch.new_pairs(x, need_dbias), launch.new_key_bias(x)
    wanted = dbias if dbias.numel() else None, launch.if_given(x.key_bias, dkey_bias)
    heads, tile = x.q.shape[1], launch.chosen("few_seeds_backward", x)
    chunk, programs = launch.chunks(few_tiles(x), heads)
    dq = launch.new_query_gradient(x, programs)
    parts = Parts(None, *(statistics(("delta", "total"), y.lse, x) for _ in range(2)))
    common = arguments(x, options) | dict(
        y=launch.carry(Result, None, launch.result(y).lse),
        dy=launch.cotangents(dy, x.shared),
        gradients=launch.carry(Gradients, dq, dk, dv, *wanted),
        parts=parts,
        CHUNK=chunk,
    )
    with launch.on_device(x.q):
        if x.k.shape[0] > tile_table.SPLIT:
            grid = (len(parts.rows.total) * heads,)
            _backward_kernel[grid](**common, STATISTICS=True, **tile)
            merge_rows(common, tile, parts)
        _backward_kernel[(programs * heads,)](**common, STATISTICS=False, **tile)
        dq = sum_parts(dq, x.q)
    return Gradients(dq, dk, dv, dbias, dkey_bias)
