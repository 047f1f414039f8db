// Rows between global memory and tiles in shared memory, and the statistics of queries.
#pragma once

#include "place.cuh"

namespace attnpool {

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
