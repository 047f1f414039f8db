"""Primitives of the Triton kernels: which rows a program owns, loads, logits, the keep mask.

A tile is up to BLOCK rows of *one* molecule; the rows of the other side are walked from that
molecule's own start in steps of the other block. So a row's sums never depend on its batch mates.

Tile -> molecule needs neither the longest molecule nor a prefix sum over tiles. Number the segments
of the packed axis: 0 = rows before ptr[0], i + 1 = molecule i, B + 1 = rows from ptr[B] on, and let
x_j be the first row of segment j. Segment j owns the tiles from x_j // BLOCK + j to
x_{j+1} // BLOCK + j: at least ceil(rows / BLOCK) of them, of which surplus ones return at once, and
n // BLOCK + B + 2 in all. A program finds its segment in that rising sequence by itself, 32
boundaries at a time: three dependent loads for 30,000 molecules, most of them in the L1 cache. That
is about what reading a precomputed map would cost, without its launch and its memory.

Whatever `ptr` holds, every range is clamped to the tensor, so no content reaches memory outside.
Offsets of rows and pairs are 64-bit; positions inside one molecule are 32-bit.
"""

import triton
import triton.language as tl

from .arguments import Molecule, Place, Rows

PIVOTS = tl.constexpr(32)  # boundaries tried at once: one per lane of a warp

# sizes and factors that change from batch to batch: never a reason to compile again
UNSPECIALIZED = ["B", "H", "n_q", "n_k", "n_pairs", "scale", "threshold", "keep_scale", "CHUNK"]
UNSPECIALIZED += ["SHORTEST", "LONGEST", "COMPLETE", "ALONE"]
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def boundary(ptr, segment, B, n):
    """First row x_j of a segment: 0, ptr[0], ..., ptr[B], n; each within [0, n]."""
    m_ptr = (segment > 0) & (segment <= B + 1)
    x = tl.load(ptr + segment - 1, mask=m_ptr, other=0).to(tl.int64)
    return tl.where(segment > B + 1, n, clamp(x, 0, n))


@triton.jit
def find_segment(target, ptr, B, n, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Last segment j with x_j // BLOCK + STEP * j <= target."""
    low = target * 0
    count = B.to(tl.int64) + 2
    o_p = tl.arange(0, PIVOTS).to(tl.int64)
    while count > 1:
        step = (count + PIVOTS - 1) // PIVOTS
        segment = low + o_p * step
        first_tile = boundary(ptr, segment, B, n) // BLOCK + STEP * segment
        started = (first_tile <= target) & (o_p * step < count)
        last = tl.maximum(tl.sum(started.to(tl.int64), 0), 1) - 1
        low += last * step
        count = tl.minimum(step, count - last * step)
    return low


@triton.jit
def find_tile(tile, ptr, B, n, BLOCK: tl.constexpr):
    """(molecule, its first row, first row of the tile, end of the molecule); see the docstring.

    molecule is -1 or B for rows that no molecule covers; surplus tiles have first >= end.
    """
    tile = tile.to(tl.int64)
    n = n.to(tl.int64)
    low = find_segment(tile, ptr, B, n, BLOCK, 1)
    start = boundary(ptr, low, B, n)
    end = tl.maximum(boundary(ptr, low + 1, B, n), start)
    # boundaries that fall send the search astray: never to rows before the molecule
    first = start + tl.maximum(tile - start // BLOCK - low, 0) * BLOCK
    return low - 1, start, first, end


@triton.jit
def molecule_rows(ptr, molecule, B, n):
    """(first row, number of rows) of a molecule; none for rows that no molecule covers."""
    known = (molecule >= 0) & (molecule < B)
    n = n.to(tl.int64)
    start = clamp(tl.load(ptr + molecule, mask=known, other=0).to(tl.int64), 0, n)
    end = clamp(tl.load(ptr + molecule + 1, mask=known, other=0).to(tl.int64), start, n)
    return start, (end - start).to(tl.int32)


@triton.jit
def find_segment_tiles(segment, ptr, B, n):
    """find_tile of a program that has a segment to itself, and walks its tiles from the first."""
    n = n.to(tl.int64)
    segment = segment.to(tl.int64)
    start = boundary(ptr, segment, B, n)
    end = tl.maximum(boundary(ptr, segment + 1, B, n), start)
    return segment - 1, start, start, end


@triton.jit
def find_long_tile(slot, ptr, B, n, BLOCK: tl.constexpr):
    """find_tile where segments of fewer than BLOCK rows have no tiles, so that there are not so
    many as molecules.

    A tile that starts at the packed row x has the slot 2 (x // BLOCK) + (it is the first of its
    segment): those of one segment are BLOCK rows apart, and so are the first ones of several.
    """
    n = n.to(tl.int64)
    low = slot.to(tl.int64) // 2 * BLOCK
    starts = slot % 2 == 1
    # the last segment that starts within the block, or the one that its first row belongs to
    row = tl.minimum(tl.where(starts, low + BLOCK - 1, low), n)
    segment = find_segment(row, ptr, B, n, 1, 0)
    start = boundary(ptr, segment, B, n)
    end = tl.maximum(boundary(ptr, segment + 1, B, n), start)
    later_one = start + tl.maximum(low - start + BLOCK - 1, 0) // BLOCK * BLOCK
    first = tl.where(starts, start, later_one)
    ours = tl.where(starts, start >= low, (first > start) & (first < low + BLOCK))
    return segment - 1, start, tl.where(ours, first, end), end


@triton.jit
def not_ours(rows, SHORTEST, LONGEST):
    """Whether a molecule of this size is left to a launch with other tiles."""
    return (rows < SHORTEST) | (rows >= LONGEST)


@triton.jit
def query_rows(q_ptr, molecule, B, n_q):
    """(first row in q, number of rows) of a molecule's queries; all n_q seeds without q_ptr."""
    if q_ptr is None:
        start = molecule * 0
        rows = tl.where((molecule >= 0) & (molecule < B), n_q, 0).to(tl.int32)
    else:
        start, rows = molecule_rows(q_ptr, molecule, B, n_q)
    return start, rows


@triton.jit
def find_query_tile(tile, q_ptr, B, n_q, BLOCK: tl.constexpr, WALK: tl.constexpr):
    """(molecule, first row in q, first and number of its queries) of a tile of queries.

    The last two count inside the molecule; a surplus tile has first >= number. Without q_ptr the
    n_q seeds of every molecule are cut into tiles. WALK: the program has all tiles of a segment;
    2 stands for tiles of long segments only.
    """
    if q_ptr is None:
        per_molecule = (n_q + BLOCK - 1) // BLOCK
        molecule = tile // per_molecule
        start = molecule * 0
        first = (tile % per_molecule * BLOCK).to(tl.int32)
        rows = n_q.to(tl.int32)
    else:
        if WALK == 1:
            molecule, start, first_row, end = find_segment_tiles(tile, q_ptr, B, n_q)
        elif WALK == 2:
            molecule, start, first_row, end = find_long_tile(tile, q_ptr, B, n_q, BLOCK)
        else:
            molecule, start, first_row, end = find_tile(tile, q_ptr, B, n_q, BLOCK)
        first = (first_row - start).to(tl.int32)
        rows = (end - start).to(tl.int32)
    return molecule, start, first, rows


@triton.jit
def out_row(q_ptr, molecule, q_row, n_q):
    """First row of a molecule in out, lse, ...: that of q, or n_q rows for every molecule."""
    if q_ptr is None:
        row = molecule * n_q
    else:
        row = q_row
    return row


@triton.jit
def chunk_of(part, q_ptr, B, CHUNK):
    """Molecules whose queries a program serves: one, or CHUNK in turn with shared seeds."""
    if q_ptr is None:
        low = part.to(tl.int64) * CHUNK
        high = tl.minimum(low + CHUNK, B)
    else:
        low = part
        high = part + 1
    return low, high


@triton.jit
def molecule_pairs(pair_ptr, molecule, B, n_pairs):
    """(first row of a molecule in bias, number of its rows); (0, 0) without a bias."""
    if pair_ptr is None:
        start = molecule * 0
        end = start
    else:
        known = (molecule >= 0) & (molecule < B)
        start = clamp(tl.load(pair_ptr + molecule, mask=known, other=0), 0, n_pairs)
        end = clamp(tl.load(pair_ptr + molecule + 1, mask=known, other=0), start, n_pairs)
    return start, end - start


@triton.jit
def find_molecule(x, index, B, n_k, n_pairs):
    """Keys and pairs of a molecule; none for rows that no molecule covers."""
    k_row, keys = molecule_rows(x.k_ptr, index, B, n_k)
    pair, pairs = molecule_pairs(x.pair_ptr, index, B, n_pairs)
    return Molecule(index, k_row, keys, pair, pairs)


@triton.jit
def later(x, step, H):
    """x, which a loop over step takes for new in every turn. What follows from it, addresses above
    all, would else be computed before the loop and hold registers through all of it."""
    return x + tl.where(H > 0, 0, step)


@triton.jit
def unknown(bound, H):
    """bound, which the compiler does not know. It would else unroll the loop and load all slices
    first, into registers."""
    return tl.where(H > 0, bound, -H)


@triton.jit
def of_molecule(x, molecule):
    """Rows of a Batched tensor, counted from the first of the molecule with seeds."""
    return Rows(x.data + molecule * x.step, x.strides)


@triton.jit
def load_slice(x, at, first_d, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """[rows, TILE] of x[at, first_d:]; 0 outside the mask, if there is one, and beyond WIDTH."""
    o_d = first_d + tl.arange(0, TILE)
    # [rows, TILE]
    p_x = x.data + at.head * x.strides[1] + ((at.row + at.offsets) * x.strides[0])[:, None]
    p_x += (o_d * x.strides[2])[None, :]
    if at.mask is None:
        if WIDTH % TILE != 0:
            b_x = tl.load(p_x, mask=(o_d < WIDTH)[None, :], other=0.0)
        else:
            b_x = tl.load(p_x)
    else:
        m_x = at.mask[:, None]
        if WIDTH % TILE != 0:
            m_x = m_x & (o_d < WIDTH)[None, :]
        b_x = tl.load(p_x, mask=m_x, other=0.0)
    return b_x


@triton.jit
def load_rows(x, at, width):
    """[rows, width.padded] of x[at]; 0 outside the mask and beyond the width."""
    return load_slice(x, at, 0, width.used, width.padded)


@triton.jit
def store_slice(x, at, H, first_d, value, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """x[at, first_d:] = value [rows, TILE] for a contiguous x [*, H, WIDTH]."""
    o_d = first_d + tl.arange(0, TILE)
    # [rows, TILE]
    p_x = x + ((at.row + at.offsets[:, None].to(tl.int64)) * H + at.head) * WIDTH + o_d[None, :]
    m_x = at.mask[:, None] & (o_d < WIDTH)[None, :]
    tl.store(p_x, value.to(x.dtype.element_ty), mask=m_x)


@triton.jit
def store_rows(x, at, H, value, width):
    """x[at] = value [rows, width.padded] for a contiguous x [*, H, width.used]."""
    store_slice(x, at, H, 0, value, width.used, width.padded)


@triton.jit
def load_row_values(x, at, other):
    """[rows] of x[at]; other outside the mask."""
    p_x = x.data + at.head * x.strides[1] + (at.row + at.offsets) * x.strides[0]
    return tl.load(p_x, mask=at.mask, other=other)


@triton.jit
def store_row_values(x, at, H, value):
    """x[at] = value [rows] for a contiguous x [*, H]."""
    p_x = x + (at.row + at.offsets.to(tl.int64)) * H + at.head
    tl.store(p_x, value.to(x.dtype.element_ty), mask=at.mask)


@triton.jit
def load_key_bias(x, at_n, c, AXIS: tl.constexpr):
    """[1, keys], with AXIS 1 [keys, 1], of key_bias in the type of c; None without x."""
    if x is None:
        b_x = None
    else:
        b_x = tl.expand_dims(load_row_values(x, at_n, 0.0).to(c.dtype), AXIS)
    return b_x


@triton.jit
def load_bias(x, of, at_m, o_n, head, c):
    """[queries, keys] of the bias of a molecule in the type of c; None without x."""
    if x is None:
        b_x = None
    else:
        o_mn = at_m.offsets[:, None].to(tl.int64) * of.keys + o_n[None, :]
        m_mn = at_m.mask[:, None] & (o_n < of.keys)[None, :] & (o_mn < of.pairs)
        p_x = x.data + (of.pair + o_mn) * x.strides[0] + head * x.strides[1]
        b_x = tl.load(p_x, mask=m_mn, other=0.0).to(c.dtype)
    return b_x


@triton.jit
def load_bias_of_keys(x, of, at_m, o_n, head, c):
    """load_bias, transposed: [keys, queries]."""
    if x is None:
        b_x = None
    else:
        o_nm = at_m.offsets[None, :].to(tl.int64) * of.keys + o_n[:, None]
        m_nm = at_m.mask[None, :] & (o_n < of.keys)[:, None] & (o_nm < of.pairs)
        p_x = x.data + (of.pair + o_nm) * x.strides[0] + head * x.strides[1]
        b_x = tl.load(p_x, mask=m_nm, other=0.0).to(c.dtype)
    return b_x


@triton.jit
def store_pairs(x, of, at_m, o_n, head, H, value):
    """Writes value [queries, keys] to the pairs of a molecule in a contiguous x [*, H]."""
    o_mn = at_m.offsets[:, None].to(tl.int64) * of.keys + o_n[None, :]
    m_mn = at_m.mask[:, None] & (o_n < of.keys)[None, :] & (o_mn < of.pairs)
    tl.store(x + (of.pair + o_mn) * H + head, value.to(x.dtype.element_ty), mask=m_mn)


@triton.jit
def products(x, at_x, y, at_y, zero, H, width, tile):
    """(x y^T, x' y^T + x y'^T) of the rows at_x and at_y, x' and y' being the tangents.

    zero is an accumulator [rows of x, rows of y]. The width is walked in slices, which are loaded
    where they are used, so that wide or precise operands need not all stay in registers. A single
    slice of x is loaded once, outside of the caller's loop over y, by the compiler: at_y holds
    later(row) and later(head).
    """
    xy = zero
    dot = zero
    if tile.slice >= width.padded:
        # [rows of x, BD], [rows of y, BD]
        b_x = load_rows(x.value, at_x, width)
        b_y = load_rows(y.value, at_y, width)
        xy = tl.dot(b_x, tl.trans(b_y), xy, input_precision=tile.precision)
        if x.tangent is not None:
            b_xd = load_rows(x.tangent, at_x, width)
            dot = tl.dot(b_xd, tl.trans(b_y), dot, input_precision=tile.precision)
        if y.tangent is not None:
            b_yd = load_rows(y.tangent, at_y, width)
            dot = tl.dot(b_x, tl.trans(b_yd), dot, input_precision=tile.precision)
    else:
        now = Place(at_x.row, at_x.offsets, at_x.mask, at_y.head)
        for d in range(0, unknown(width.used, H), tile.slice):
            # [rows of x, SLICE], [rows of y, SLICE]
            b_x = load_slice(x.value, now, d, width.used, tile.slice)
            b_y = load_slice(y.value, at_y, d, width.used, tile.slice)
            xy = tl.dot(b_x, tl.trans(b_y), xy, input_precision=tile.precision)
            if x.tangent is not None:
                b_xd = load_slice(x.tangent, now, d, width.used, tile.slice)
                dot = tl.dot(b_xd, tl.trans(b_y), dot, input_precision=tile.precision)
            if y.tangent is not None:
                b_yd = load_slice(y.tangent, at_y, d, width.used, tile.slice)
                dot = tl.dot(b_x, tl.trans(b_yd), dot, input_precision=tile.precision)
    return xy, dot


@triton.jit
def product_slice(
    a, y, at_y, first_d, c, WIDTH: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr
):
    """[rows of a, TILE] of c (a y + a' y') from first_d on, a' and y' being the tangents."""
    # [rows of y, TILE]
    b_y = load_slice(y.value, at_y, first_d, WIDTH, TILE)
    ay = tl.dot(a.value.to(b_y.dtype), b_y, input_precision=PRECISION, out_dtype=c.dtype)
    if y.tangent is not None:
        b_yd = load_slice(y.tangent, at_y, first_d, WIDTH, TILE)
        ay = tl.dot(a.tangent.to(b_yd.dtype), b_yd, ay, input_precision=PRECISION)
    return ay * c


@triton.jit
def store_products(x, at_x, a, y, at_y, c, H, width, PRECISION: tl.constexpr):
    """x[at_x] = c (a y + a' y') for a contiguous x [*, H, width.used], some columns at a time:
    wide operands take registers, and most of all those of float64 without a tensor core."""
    PART: tl.constexpr = 16 if c.dtype == tl.float64 else 64
    if width.padded <= PART:
        value = product_slice(a, y, at_y, 0, c, width.used, width.padded, PRECISION)
        store_slice(x, at_x, H, 0, value, width.used, width.padded)
    else:
        for d in range(0, unknown(width.used, H), PART):
            value = product_slice(a, y, at_y, d, c, width.used, PART, PRECISION)
            store_slice(x, at_x, H, d, value, width.used, PART)


@triton.jit
def add_biases(s, c, b_bias, b_key):
    """c s + bias + key_bias, of which either may be None."""
    s *= c
    if b_bias is not None:
        s += b_bias
    if b_key is not None:
        s += b_key
    return s


@triton.jit
def logits(s, c, b_bias, b_key, m_pair):
    """(F1) c s + bias + key_bias; -inf where m_pair is off."""
    return tl.where(m_pair, add_biases(s, c, b_bias, b_key), float("-inf"))


@triton.jit
def weights(s, b_lse):
    """(F2) P from logits and LSE; a row of LSE -inf has no weights."""
    return tl.exp(s - tl.where(b_lse == float("-inf"), float("inf"), b_lse))


@triton.jit
def pair_weights(s, c, b_bias, b_key, m_pair, b_lse):
    """(F2) P of the products s; 0 where m_pair is off. Without biases in powers of 2."""
    if b_bias is None and b_key is None:
        shift = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2_E)
        p = tl.exp2(s * (c * LOG2_E) - shift)
        if m_pair is not None:
            p = tl.where(m_pair, p, 0.0)
    else:
        p = weights(logits(s, c, b_bias, b_key, m_pair), b_lse)
    return p


@triton.jit
def renormalise(b_lse, bias, key_bias, dtype: tl.constexpr):
    """Whether the rounding of a row's LSE, a relative error of P, would show in this dtype."""
    HALF: tl.constexpr = (dtype == tl.float16) or (dtype == tl.bfloat16)
    if HALF and bias is None and key_bias is None:
        large = False
    else:  # a bias may be the least finite number, of which LSE keeps nothing else
        LIMIT: tl.constexpr = 1024.0 if HALF else 8.0
        large = tl.max(tl.where(b_lse == float("-inf"), 0.0, tl.abs(b_lse)), 0) > LIMIT
    return large


@triton.jit
def keep_mask(seed, threshold, molecule, head, o_q, first_k, BLOCK_K: tl.constexpr):
    """[queries, BLOCK_K] of bool: attnpool_kernels.dropout's Philox mask, first_k a multiple of 4.

    One Philox call serves four neighbouring keys: counter = (key // 4, query, head, molecule).
    """
    o_4 = first_k // 4 + tl.arange(0, BLOCK_K // 4)
    zero = o_q[:, None] * 0 + o_4[None, :] * 0
    # tl.full, as the interpreter's loop variables are plain integers
    w0, w1, w2, w3 = tl.philox(
        tl.load(seed),
        zero + o_4[None, :],
        zero + o_q[:, None],
        zero + tl.full((), head, tl.int32),
        zero + tl.full((), molecule, tl.int32),
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., i, j] = word 2 i + j
    return tl.reshape(words, (words.shape[0], BLOCK_K)) >= threshold.to(tl.uint32)
