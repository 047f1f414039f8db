// (F1)-(F3): out and lse of one tile of queries a group of warps.
//
// Grid: x only, GROUPS tiles x heads a block. A group is ROWS / 16 warps that own ROWS query rows
// of one molecule and one head, 16 rows a warp, and walk over the molecule's keys in steps of KEYS
// from the molecule's own start, so a row's sums never depend on its batch. Shared memory a group:
// the queries, and keys and values twice (the next step is copied while this one is computed). The
// groups of a block are different tiles and never wait for each other.
// Any size is correct; the shape is meant for molecules, where memory is the limit.
// Source: online softmax (Milakov and Gimelshein, 2018) on tiles of FlashAttention-2 (Dao, 2023).
#include "copies.cuh"
#include "instances.cuh"
#include "launch.h"
#include "pairs.cuh"
#include "products.cuh"

namespace attnpool {

template <typename T, int D>
struct ForwardPlan {
  static constexpr int ROWS = 32, WARPS = ROWS / 16, GROUP_THREADS = WARPS * 32;
  static constexpr int KEYS = D * sizeof(T) <= 256 ? 32 : 16;
  static constexpr int GROUP_BYTES = (ROWS + 4 * KEYS) * STRIDE<T, D> * int(sizeof(T));
  static constexpr int GROUPS = GROUP_BYTES <= (24 << 10) ? 2 : 1;
  static constexpr int THREADS = GROUPS * GROUP_THREADS, BYTES = GROUPS * GROUP_BYTES;
};

template <typename T, int D>
ATTN_KERNEL ATTN_BOUNDS(ForwardPlan<T, D>::THREADS)
    forward_kernel(ATTN_GRID_CONSTANT KernelParams p) {
  using Plan = ForwardPlan<T, D>;
  using A = Acc<T>;
  constexpr int S = STRIDE<T, D>, KEYS = Plan::KEYS, N = KEYS / 8, M = D / 8;
  ATTN_SHARED_MEMORY(memory);
  const Place<Plan> place(p);
  const int group = place.group, thread = place.thread, slot = place.slot;
  const int head = place.head;
  if (place.tile >= query_tile_count(p, Plan::ROWS)) return;
  const Rows tile = find_query_tile(p, place.tile, Plan::ROWS);
  const int live = rows_from(tile.own.size, tile.first, Plan::ROWS);
  if (live == 0 || is_small(p, tile)) return;  // a surplus tile; the same for the whole group

  T* b_q = reinterpret_cast<T*>(place.memory(memory));
  T* b_k = b_q + Plan::ROWS * S;
  T* b_v = b_k + 2 * KEYS * S;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const int keys = tile.other.size, tile_query = tile.first;
  const int first_query = tile.own.first + tile.first;
  const auto load_keys = [&](int first, int stage) {
    const int rows = rows_from(keys, first, KEYS);
    load_rows<T, D, Plan::GROUP_THREADS>(b_k + stage * KEYS * S, KEYS, p.k,
                                         p.vector_loads & VECTOR_K, 0, tile.other.first + first,
                                         rows, head, head_dim, thread);
    load_rows<T, D, Plan::GROUP_THREADS>(b_v + stage * KEYS * S, KEYS, p.v,
                                         p.vector_loads & VECTOR_V, 0, tile.other.first + first,
                                         rows, head, value_dim, thread);
  };
  if (keys > 0) {
    load_rows<T, D, Plan::GROUP_THREADS>(b_q, round_up(live, 16), p.q, p.vector_loads & VECTOR_Q,
                                         0, first_query, live, head, head_dim, thread);
    load_keys(0, 0);
    copy_commit();
  }

  const Pairs<T> pairs(p, tile.molecule, head, keys, tile.other.first);
  const int g = lane_index() / 4, t = lane_index() % 4;
  A out[M][4], highest[2] = {A(-INFINITY), A(-INFINITY)}, sum[2] = {0, 0};
  clear(out);
  int stage = 0;
  for (int first = 0; first < keys; first += KEYS, stage ^= 1) {
    if (first + KEYS < keys) load_keys(first + KEYS, stage ^ 1);
    copy_commit();
    copy_wait<1>();
    group_barrier(1 + group, Plan::GROUP_THREADS);
    if (slot < live) {
      A s[N][4];
      clear(s);
      multiply_rows<T, D, false>(s, b_q + slot * S, b_k + stage * KEYS * S);
      const int rows = rows_from(keys, first, KEYS);
      A peak[2] = {highest[0], highest[1]};
      ATTN_UNROLL
      for (int n = 0; n < N; ++n)
        ATTN_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int row = slot + g + e / 2 * 8, column = n * 8 + 2 * t + e % 2;
          const bool exists = row < live && column < rows;
          s[n][e] = exists ? pairs.logit(s[n][e], tile_query + row, first + column)
                           : A(-INFINITY);                                           // (F1)
          peak[e / 2] = s[n][e] > peak[e / 2] ? s[n][e] : peak[e / 2];
        }
      A shrink[2];
      ATTN_UNROLL
      for (int half = 0; half < 2; ++half) {
        peak[half] = quad_max(peak[half]);
        shrink[half] = highest[half] == A(-INFINITY)
                           ? A(0) : exponential<T>(highest[half] - peak[half]);
        highest[half] = peak[half];
        sum[half] *= shrink[half];
      }
      ATTN_UNROLL
      for (int n = 0; n < N; ++n)
        ATTN_UNROLL
        for (int e = 0; e < 4; ++e) {
          const A weight = s[n][e] == A(-INFINITY)
                               ? A(0) : exponential<T>(s[n][e] - highest[e / 2]);
          sum[e / 2] += weight;
          s[n][e] = weight;
        }
      if (p.seed) {
        const uint32_t kept = pairs.template keep_bits<N, false>(tile_query + slot, first);
        ATTN_UNROLL
        for (int n = 0; n < N; ++n)
          ATTN_UNROLL
          for (int e = 0; e < 4; ++e) s[n][e] *= pairs.keep(kept, n, e);
      }
      ATTN_UNROLL
      for (int m = 0; m < M; ++m)
        ATTN_UNROLL
        for (int e = 0; e < 4; ++e) out[m][e] *= shrink[e / 2];
      multiply_weights<T, D>(out, s, b_v + stage * KEYS * S);                  // (F3)
    }
    group_barrier(1 + group, Plan::GROUP_THREADS);
  }
  if (slot >= live) return;
  A inverse[2];
  ATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    sum[half] = quad_sum(sum[half]);
    inverse[half] = sum[half] == 0 ? A(0) : A(1) / sum[half];
    const int row = slot + g + 8 * half;
    if (t == 0 && row < live)                                                        // (F2)
      *address<A>(p.lse, tile.molecule, first_query + row, head) =
          sum[half] == 0 ? A(-INFINITY) : highest[half] + natural_log(sum[half]);
  }
  store_rows<T>(p.out, tile.molecule, first_query + slot, live - slot, head, 0, value_dim, out,
                inverse[0], inverse[1]);
}

template <typename T, int D>
struct RunForward {
  static int run(const KernelParams& p, void* stream) {
    using Plan = ForwardPlan<T, D>;
    return launch<forward_kernel<T, D>, Plan>(query_tile_count(p, Plan::ROWS) * p.heads, p,
                                                stream);
  }
};

int launch_forward(const KernelParams& p, void* stream) {
  const int status = p.small_rows ? launch_small_forward(p, stream) : 0;
  return status || !has_large_sets(p) ? status : for_instance<RunForward>(p, stream);
}

}  // namespace attnpool
