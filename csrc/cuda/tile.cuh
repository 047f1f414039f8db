// What one warp does with tiles in shared memory: find its molecule, load rows, multiply, add the
// terms of a pair, store rows. A tile is [rows][STRIDE] of T, D elements and 16 bytes of padding a
// row, so that eight rows start in eight different groups of banks. Unused units are zero.
#pragma once

#include "../philox.h"
#include "kernel_params.h"
#include "warp.cuh"

namespace attnpool {

template <typename T, int D>
constexpr int STRIDE = D + 16 / static_cast<int>(sizeof(T));

ATTN_HD constexpr int smaller(int a, int b) { return a < b ? a : b; }
ATTN_HD constexpr int larger(int a, int b) { return a > b ? a : b; }
ATTN_HD constexpr int round_up(int x, int unit) { return (x + unit - 1) / unit * unit; }

// Rows first ... of `rows`, at most `most` of them.
ATTN_DEVICE int rows_from(int rows, int first, int most) {
  const int left = rows - first;
  return left <= 0 ? 0 : left < most ? left : most;
}

// ---- who and where ------------------------------------------------------------------------

// A group of warps in the grid: GROUPS groups a block, heads of one tile after each other. A warp
// owns the 16 rows from `slot` on.
template <typename Plan>
struct Place {
  int group, thread, slot, head;
  int64_t tile;

  ATTN_DEVICE explicit Place(const KernelParams& p)
      : group(Plan::GROUPS == 1 ? 0 : threadIdx.x / Plan::GROUP_THREADS),
        thread(threadIdx.x % Plan::GROUP_THREADS), slot(thread / 32 * 16) {
    const uint32_t work = blockIdx.x * Plan::GROUPS + group;
    const uint32_t heads = static_cast<uint32_t>(p.heads);
    tile = work / heads;
    head = static_cast<int>(work % heads);
  }
  ATTN_DEVICE unsigned char* memory(unsigned char* of_block) const {
    return of_block + group * Plan::GROUP_BYTES;
  }
};

// The molecule of a tile: the last i with first_tile(i) <= tile. One warp, 33 ranges a step.
ATTN_DEVICE int64_t molecule_of_tile(const Axis& axis, int64_t tile, int tile_rows) {
  int64_t low = -1, high = axis.molecules + 1;  // first_tile(low) <= tile < first_tile(high)
  while (high - low > 1) {
    const int64_t step = (high - low + 32) / 33, probe = low + (lane_index() + 1) * step;
    const bool before = probe < high && first_tile(axis, probe, tile_rows) <= tile;
    const int passed = lowest_zero(__ballot_sync(WARP, before));  // -1: all 32
    low += (passed < 0 ? 32 : passed) * step;
    high = high < low + step ? high : low + step;
  }
  return low;
}

// A Tile in 32 bits, enough for MAX_ROWS: in 64, what lives through a whole kernel takes so many
// registers that others spill. Offsets into tensors are computed in 64.
struct Range {
  int first, size;
};
struct Rows {
  int molecule, first;
  Range own, other;
  bool real;

  ATTN_DEVICE explicit Rows(const Tile& tile)
      : molecule(int(tile.molecule)),
        first(int(tile.first < INT32_MAX ? tile.first : INT32_MAX)),  // a surplus tile
        own{int(tile.own.first), int(tile.own.size)},
        other{int(tile.other.first), int(tile.other.size)}, real(tile.real) {}
};

ATTN_DEVICE Rows find_query_tile(const AttnParams& a, int64_t tile, int tile_rows) {
  if (a.shared_seeds) {
    const int64_t each = tiles_of_seeds(a.query_rows, tile_rows);
    return Rows(query_tile(a, tile / each, tile % each, tile_rows));
  }
  const Axis axis = query_axis(a);
  const int64_t molecule = molecule_of_tile(axis, tile, tile_rows);
  const int64_t index = tile - first_tile(axis, molecule, tile_rows);
  return Rows(query_tile(a, molecule, index, tile_rows));
}

ATTN_DEVICE Rows find_key_tile(const AttnParams& a, int64_t tile, int tile_rows) {
  const Axis axis = key_axis(a);
  const int64_t molecule = molecule_of_tile(axis, tile, tile_rows);
  const int64_t index = tile - first_tile(axis, molecule, tile_rows);
  return Rows(key_tile(a, molecule, index, tile_rows));
}

// ---- global to shared and back ---------------------------------------------------------------

// Rows first ... first + live - 1 of a tensor into a tile, then zeros up to row `rows`. Complete
// after copy_commit, copy_wait and a barrier.
template <typename T, int D, int THREADS>
ATTN_DEVICE void load_rows(T* tile, int rows, const View& x, bool by_16_bytes, int molecule,
                           int first, int live, int head, int units, int thread) {
  constexpr int WIDTH = 16 / sizeof(T), CHUNKS = D / WIDTH;
  const T* base = address<const T>(x, molecule, first, head);
  ATTN_ROLLED  // nothing waits for a copy here, and the addresses of several take registers
  for (int i = thread; i < rows * CHUNKS; i += THREADS) {
    const int row = i / CHUNKS, unit = i % CHUNKS * WIDTH;
    T* to = tile + row * STRIDE<T, D> + unit;
    const T* from = base + row * x.row + unit * x.unit;
    const bool wanted = row < live && unit < units;
    if (by_16_bytes) {
      copy_async(to, wanted ? from : x.data, wanted);
    } else {
      ATTN_UNROLL
      for (int j = 0; j < WIDTH; ++j)
        to[j] = row < live && unit + j < units ? from[j * x.unit] : T{};
    }
  }
}

// How the rows of the other axis reach a group: in steps of STAGE, through a tile of ROWS.
// Those that all fit the tile are copied once and stay; the first step is computed while the second
// is on its way. Others stream: a step is computed from one half of the tile while the next one is
// copied to the other half, from the last step of a sweep to the first of the next as well. Where
// STAGE is ROWS there is no other half, and what streams is waited for.
template <typename Plan>
struct Walk {
  static constexpr int STAGE = Plan::STAGE;
  static constexpr bool HALVES = 2 * STAGE == Plan::ROWS;
  static_assert(HALVES || STAGE == Plan::ROWS);
  int size, group;
  bool stay;
  int at;  // where in the tile the present step lies

  ATTN_DEVICE Walk(int rows, int group_)
      : size(rows), group(group_), stay(rows <= Plan::ROWS), at(STAGE) {}

  // Issues the first copies, which end together with what was issued before. copy(first, to) issues
  // those of a step, from row `first` of the axis to row `to` of the tile.
  template <typename Copy>
  ATTN_DEVICE void start(const Copy& copy) const {
    const int rows = stay ? size : HALVES ? STAGE : 0;
    ATTN_ROLLED  // one copy of the code
    for (int first = 0; first < rows; first += STAGE) {
      copy(first, first);
      copy_commit();
    }
  }

  // After this the step of row `first` can be read, and the one before no longer. For all threads
  // of the group, in the order of the steps, in every sweep. True if the next step is on its way.
  template <typename Copy>
  ATTN_DEVICE bool arrive(int first, bool first_sweep, bool last_sweep, const Copy& copy) {
    const int next = first + STAGE < size ? first + STAGE : 0;  // 0: of the next sweep
    at = stay ? first : HALVES ? at ^ STAGE : 0;
    if (stay) {
      if (!first_sweep) return false;
      if (next > 0) copy_wait<1>();
      else copy_wait<0>();
      group_barrier(1 + group, Plan::GROUP_THREADS);  // the copies of all threads
      return false;
    }
    const bool more = HALVES && (next > 0 || !last_sweep);
    group_barrier(1 + group, Plan::GROUP_THREADS);  // what is overwritten now is computed
    if (more || !HALVES) copy(HALVES ? next : first, HALVES ? at ^ STAGE : 0);
    copy_commit();
    copy_wait<HALVES>();
    group_barrier(1 + group, Plan::GROUP_THREADS);  // the copies of all threads
    return more;
  }
};

// Units begin ... begin + 8 N - 1 of the 16 rows of a slot, times a factor for rows g and g + 8.
// A factor of 0 means an empty row, which is 0 even where the sum is not finite.
template <typename Out, typename A, int N>
ATTN_DEVICE void store_rows(const View& x, int molecule, int first, int live, int head, int begin,
                            int units, const A (&c)[N][4], A upper, A lower) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  ATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = g + 8 * half;
    if (row >= live) continue;
    const A factor = half ? lower : upper;
    Out* to = address<Out>(x, molecule, first + row, head);
    ATTN_UNROLL
    for (int n = 0; n < N; ++n)
      ATTN_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int unit = begin + 8 * n + 2 * t + e;
        const A value = factor == 0 ? A(0) : c[n][2 * half + e] * factor;
        if (unit < units) from_acc(value, to[unit * x.unit]);
      }
  }
}

// d(q) of a slot: to the tensor, or with shared seeds to the partial result of this molecule.
template <typename T, int N>
ATTN_DEVICE void store_query_gradient(const KernelParams& p, const View& dq, int molecule,
                                      int first, int live, int head, int begin,
                                      const Acc<T> (&c)[N][4], Acc<T> upper, Acc<T> lower) {
  const int units = static_cast<int>(p.head_dim);
  if (!p.shared_seeds) {
    store_rows<T>(dq, molecule, first, live, head, begin, units, c, upper, lower);
    return;
  }
  const int64_t row = p.heads * p.head_dim;
  const View partial = {p.partial, p.query_rows * row, row, p.head_dim, 1};
  store_rows<Acc<T>>(partial, molecule, first, live, head, begin, units, c, upper, lower);
}

// ---- products of one warp ----------------------------------------------------------------------

template <int N, typename A>
ATTN_DEVICE void clear(A (&c)[N][4]) {
  ATTN_UNROLL
  for (int n = 0; n < N; ++n)
    ATTN_UNROLL
    for (int e = 0; e < 4; ++e) c[n][e] = 0;
}

// c (16 x 8 N) += a bᵀ over the D units: a is the first of 16 rows of a tile, b of 8 N rows.
// SWAPPED says that a is the keys' side; a product has the same bits either way.
template <typename T, int D, bool SWAPPED, int N>
ATTN_DEVICE void multiply_rows(Acc<T> (&c)[N][4], const T* a, const T* b) {
  constexpr int S = STRIDE<T, D>;
  const int lane = lane_index();
  if constexpr (IS_HALF<T>) {
    static_assert(N % 2 == 0);
    const T* a_row = a + lane % 16 * S + lane / 16 * 8;
    const T* b_row = b + (lane % 8 + lane / 16 * 8) * S + lane / 8 % 2 * 8;
    ATTN_UNROLL_TWO
    for (int d = 0; d < D; d += 16) {
      uint32_t x[4], y[4];
      load_matrices(x, a_row + d);
      ATTN_UNROLL
      for (int n = 0; n < N; n += 2) {
        load_matrices(y, b_row + n * 8 * S + d);
        mma_16(c[n], x, y[0], y[1], T{});
        mma_16(c[n + 1], x, y[2], y[3], T{});
      }
    }
  } else if constexpr (sizeof(T) == 4) {
    const T* a_row = a + lane / 4 * S + lane % 4 * 2;
    const T* b_row = b + lane / 4 * S + lane % 4 * 2;
    const auto pair = [](const T* x) { return Split(x[0], x[1]); };
    ATTN_ROLLED  // eight products a step are enough in flight, and the parts take registers
    for (int d = 0; d < D; d += 16) {
      const Split x[4] = {pair(a_row + d), pair(a_row + 8 * S + d), pair(a_row + d + 8),
                          pair(a_row + 8 * S + d + 8)};
      ATTN_UNROLL
      for (int n = 0; n < N; ++n) {
        const Split y[2] = {pair(b_row + n * 8 * S + d), pair(b_row + n * 8 * S + d + 8)};
        mma_16<SWAPPED>(c[n], x, y);
      }
    }
  } else {
    const T* a_row = a + lane / 4 * S + lane % 4;
    const T* b_row = b + lane / 4 * S + lane % 4;
    ATTN_ROLLED
    for (int d = 0; d < D; d += 8) {
      const T x[4] = {a_row[d], a_row[8 * S + d], a_row[d + 4], a_row[8 * S + d + 4]};
      ATTN_UNROLL
      for (int n = 0; n < N; ++n) mma_8(c[n], x, b_row[n * 8 * S + d], b_row[n * 8 * S + d + 4]);
    }
  }
}

// c (16 x 8 M) += p b: p (16 x 8 N) is an accumulator, b the first of 8 N rows of a tile, from its
// unit of interest on. An accumulator is a left operand as it stands: two of its 8 columns make 16
// for the half types and float; for double its columns 2t and 2t + 1 serve as t and t + 4, which
// only reorders the sum.
template <typename T, int D, int N, int M>
ATTN_DEVICE void multiply_weights(Acc<T> (&c)[M][4], const Acc<T> (&p)[N][4], const T* b) {
  constexpr int S = STRIDE<T, D>;
  const int lane = lane_index();
  if constexpr (IS_HALF<T>) {
    static_assert(N % 2 == 0 && M % 2 == 0);
    const T* b_row = b + (lane % 8 + lane / 8 % 2 * 8) * S + lane / 16 * 8;
    ATTN_UNROLL
    for (int n = 0; n < N; n += 2) {
      const uint32_t x[4] = {
          pack(p[n][0], p[n][1], T{}), pack(p[n][2], p[n][3], T{}),
          pack(p[n + 1][0], p[n + 1][1], T{}), pack(p[n + 1][2], p[n + 1][3], T{})};
      ATTN_UNROLL
      for (int m = 0; m < M; m += 2) {
        uint32_t y[4];
        load_matrices_transposed(y, b_row + n * 8 * S + m * 8);
        mma_16(c[m], x, y[0], y[1], T{});
        mma_16(c[m + 1], x, y[2], y[3], T{});
      }
    }
  } else if constexpr (sizeof(T) == 4) {
    static_assert(N % 2 == 0);
    const T* b_row = b + lane % 4 * 2 * S + lane / 4;
    ATTN_UNROLL
    for (int n = 0; n < N; n += 2) {
      const Split x[4] = {Split(p[n][0], p[n][1]), Split(p[n][2], p[n][3]),
                          Split(p[n + 1][0], p[n + 1][1]), Split(p[n + 1][2], p[n + 1][3])};
      ATTN_UNROLL
      for (int m = 0; m < M; ++m) {
        const T* y = b_row + n * 8 * S + m * 8;
        const Split columns[2] = {Split(y[0], y[S]), Split(y[8 * S], y[9 * S])};
        mma_16<false>(c[m], x, columns);
      }
    }
  } else {
    const T* b_row = b + lane % 4 * 2 * S + lane / 4;
    ATTN_UNROLL
    for (int n = 0; n < N; ++n) {
      const T x[4] = {p[n][0], p[n][2], p[n][1], p[n][3]};
      ATTN_UNROLL
      for (int m = 0; m < M; ++m)
        mma_8(c[m], x, b_row[n * 8 * S + m * 8], b_row[(n * 8 + 1) * S + m * 8]);
    }
  }
}

// ---- terms of one pair ----------------------------------------------------------------------

// The pairs of one molecule in one head; i and j count its queries and keys, which fit 32 bits
// (MAX_ROWS).
template <typename T>
struct Pairs {
  const KernelParams& p;
  int molecule, head, keys;
  Span rows;  // of bias
  PhiloxKey key;
  Acc<T> scale, keep_scale;

  ATTN_DEVICE Pairs(const KernelParams& params, int molecule_, int head_, int keys_)
      : p(params), molecule(molecule_), head(head_), keys(keys_), rows{0, 0}, key{0, 0},
        scale(static_cast<Acc<T>>(params.scale)),
        keep_scale(static_cast<Acc<T>>(params.keep_scale)) {
    const bool real = molecule >= 0 && molecule < p.molecules;
    if (p.pair_ptr && real) rows = pair_span(p, molecule);
    if (p.seed) key = philox_key(*p.seed);
  }

  // Element (i, j) of bias or a tensor like it; 0 where there is none.
  ATTN_DEVICE Acc<T> pair_value(const View& x, int i, int j) const {
    const int64_t row = int64_t(i) * keys + j;
    if (!x.data || row >= rows.size) return 0;
    if (p.bias_dtype == p.dtype) return to_acc(*address<const T>(x, 0, rows.first + row, head));
    return *address<const float>(x, 0, rows.first + row, head);
  }

  ATTN_DEVICE void store_pair(const View& x, int i, int j, Acc<T> value) const {
    const int64_t row = int64_t(i) * keys + j;
    if (!x.data || row >= rows.size) return;
    if (p.bias_dtype == p.dtype) from_acc(value, *address<T>(x, 0, rows.first + row, head));
    else *address<float>(x, 0, rows.first + row, head) = static_cast<float>(value);
  }

  // (F1) from the product q . k
  ATTN_DEVICE Acc<T> logit(Acc<T> product, int i, int j) const {
    return product * scale + pair_value(p.bias, i, j);
  }

  // Which pairs of a 16 x 8 N accumulator are kept, one bit an element (bit 4 n + e). i and j: the
  // query and the key of its first element; SWAPPED: its rows are keys, else queries.
  template <int N, bool SWAPPED>
  ATTN_DEVICE uint32_t keep_bits(int i, int j) const {
    if (!p.seed) return ~0u;
    const int g = lane_index() / 4, t = lane_index() % 4;
    uint32_t bits = 0;
    ATTN_ROLLED
    for (int n = 0; n < 2 * N; ++n) {  // columns 8 (n / 2) + 2 t and + 1 of row g + 8 (n % 2)
      const int row = g + n % 2 * 8, column = n / 2 * 8 + 2 * t;
      uint32_t kept = 0;
      if (SWAPPED) {
        ATTN_UNROLL
        for (int e = 0; e < 2; ++e)
          kept |= (keep_two(i + column + e, j + row) >> ((j + row) & 1) & 1) << e;
      } else {
        kept = keep_two(i + row, j + column);
      }
      bits |= kept << 2 * n;
    }
    return bits;
  }

  // (B1) R for a bit of keep_bits
  ATTN_DEVICE Acc<T> keep(uint32_t bits, int n, int e) const {
    return bits >> (4 * n + e) & 1 ? keep_scale : 0;
  }

 private:
  // Two bits, for the even and the odd one of key j and its neighbour, which share their words.
  ATTN_DEVICE uint32_t keep_two(int i, int j) const {
    const PhiloxWords words = keep_words(key, molecule, head, i, j);
    const uint32_t even = j & 2 ? words.word[2] : words.word[0];
    const uint32_t odd = j & 2 ? words.word[3] : words.word[1];
    return static_cast<uint32_t>(even >= p.drop_threshold) |
           static_cast<uint32_t>(odd >= p.drop_threshold) << 1;
  }
};

// Zeros for the rows of dbias behind the last molecule's, by the first tile of the virtual molecule
// behind the last one.
ATTN_DEVICE void clear_pairs_of_nobody(const KernelParams& p, const View& dbias, const Rows& tile,
                                       int head, int thread, int threads) {
  if (!dbias.data || tile.molecule != p.molecules || tile.first != 0) return;
  const int64_t first = span_between(p.pair_ptr[p.molecules], p.pairs, p.pairs).first;
  for (int64_t row = first + thread; row < p.pairs; row += threads) {
    if (p.bias_dtype == Dtype::float64) *address<double>(dbias, 0, row, head) = 0;
    else if (p.bias_dtype == Dtype::float32) *address<float>(dbias, 0, row, head) = 0;
    else *address<uint16_t>(dbias, 0, row, head) = 0;
  }
}

// Where the statistics of a query row lie (KernelParams), four numbers a row and head.
template <typename T>
ATTN_DEVICE Acc<T>* statistics_of(const KernelParams& p, int molecule, int row, int head) {
  const int64_t rows = p.shared_seeds ? molecule * p.query_rows + row : row;
  return static_cast<Acc<T>*>(p.statistics) + (rows * p.heads + head) * 4;
}

// These four numbers of rows first ... first + live - 1, then zeros up to `rows`, as load_rows.
template <typename T, int THREADS>
ATTN_DEVICE void load_statistics(Acc<T>* to, int rows, const KernelParams& p, int molecule,
                                 int first, int live, int head, int thread) {
  constexpr int WIDTH = 16 / sizeof(Acc<T>), CHUNKS = 4 / WIDTH;
  for (int i = thread; i < rows * CHUNKS; i += THREADS) {
    const int row = i / CHUNKS;
    const Acc<T>* from = statistics_of<T>(p, molecule, first + (row < live ? row : 0), head);
    copy_async(to + i * WIDTH, from + i % CHUNKS * WIDTH, row < live);
  }
}

}  // namespace attnpool
