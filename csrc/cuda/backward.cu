// (B1)-(B8): dq, dk, dv, dbias, dkey_bias.
//
// Grid: x only, GROUPS tiles x heads a block; a group of ROWS / 16 warps owns ROWS rows of one
// molecule and one head, 16 rows a warp, and waits for no other group. Two launches:
//   backward_queries_kernel  tiles of queries: delta and dq. Where the molecule has at most ROWS
//                            queries and keys the same group does its dk, dv and dkey_bias as
//                            well, from the rows already in shared memory: q, k, v, dout are read
//                            once.
//   backward_keys_kernel     tiles of keys of the other molecules: dk, dv and dkey_bias.
// Shared memory a group: four tiles (q, dout, k, v), the last two or the first two of them walked
// through by halves (Walk), norm, delta' and lse of the queries, and KeySums. norm is
// 1 / rowsum(exp(S - lse)), which is 1 but for the rounding of lse; with large logits that would be
// the largest error of all. delta is rowsum(P o dP) in the accumulator's type, so `out` is not
// read. No atomics; with shared seeds dq is written per molecule and summed afterwards
// (sum_over_molecules.cuh).
// Any size is correct; beyond ROWS each tile reads the rows of the other axis again.
#include "../equations.h"
#include "copies.cuh"
#include "instances.cuh"
#include "key_sums.cuh"
#include "launch.h"
#include "products.cuh"
#include "sum_over_molecules.cuh"

namespace attnpool {

template <typename T, int D>
struct BackwardPlan {
  static constexpr int ROW_BYTES = D * int(sizeof(T));
  static constexpr int ROWS = larger(16, smaller(64, (16 << 10) / ROW_BYTES));
  static constexpr int STAGE = ROWS / 2;  // rows of the other axis that arrive together
  static constexpr int N = smaller(STAGE / 8, sizeof(T) == 2 && D <= 64 ? 4 : 2);
  static constexpr int STEP = 8 * N;  // 16 x STEP pairs at a time
  static constexpr int UNITS = sizeof(T) == 2 || D < 128 ? D : 32;  // of a gradient at a time
  static constexpr int GROUP_THREADS = ROWS * 2;
  static constexpr int TILE = ROWS * STRIDE<T, D>;
  static constexpr int GROUP_BYTES =
      4 * TILE * int(sizeof(T)) + (4 + KeySums<T>::PLACES) * ROWS * int(sizeof(Acc<T>));
  static constexpr int GROUPS = GROUP_BYTES <= (24 << 10) ? 2 : 1;
  static constexpr int THREADS = GROUPS * GROUP_THREADS, BYTES = GROUPS * GROUP_BYTES;
};

// What a tile of keys needs of a query; in the global statistics too. norm is 0 for a row without
// a finite logit, or no row: its P and dS are 0.
template <typename A>
struct alignas(16) QueryRow {
  A norm, delta, lse, nothing;  // delta is delta'
};

// The shared memory of one group.
template <typename T, int D>
struct BackwardTiles {
  using Plan = BackwardPlan<T, D>;
  T *q, *dout, *k, *v;
  QueryRow<Acc<T>>* rows;
  Acc<T>* key_sums;

  ATTN_DEVICE explicit BackwardTiles(unsigned char* memory)
      : q(reinterpret_cast<T*>(memory)), dout(q + Plan::TILE), k(dout + Plan::TILE),
        v(k + Plan::TILE), rows(reinterpret_cast<QueryRow<Acc<T>>*>(v + Plan::TILE)),
        key_sums(reinterpret_cast<Acc<T>*>(rows + Plan::ROWS)) {}

  // Rows first ... of a molecule's queries, `most` of them, to row `to` of the tiles.
  ATTN_DEVICE void load_queries(const KernelParams& p, const Rows& tile, const Range& span,
                                int first, int most, int to, int head, int thread) const {
    const int live = rows_from(span.size, first, most), row = span.first + first;
    const int filled = smaller(most, round_up(live, larger(16, Plan::STEP)));
    load_rows<T, D, Plan::GROUP_THREADS>(q + to * STRIDE<T, D>, filled, p.q,
                                         p.vector_loads & VECTOR_Q, 0, row, live, head,
                                         int(p.head_dim), thread);
    load_rows<T, D, Plan::GROUP_THREADS>(dout + to * STRIDE<T, D>, filled, p.dout,
                                         p.vector_loads & VECTOR_DOUT, tile.molecule, row, live,
                                         head, int(p.value_dim), thread);
  }

  ATTN_DEVICE void load_keys(const KernelParams& p, const Range& span, int first, int most, int to,
                             int head, int thread) const {
    const int live = rows_from(span.size, first, most), row = span.first + first;
    const int filled = smaller(most, round_up(live, larger(16, Plan::STEP)));
    load_rows<T, D, Plan::GROUP_THREADS>(k + to * STRIDE<T, D>, filled, p.k,
                                         p.vector_loads & VECTOR_K, 0, row, live, head,
                                         int(p.head_dim), thread);
    load_rows<T, D, Plan::GROUP_THREADS>(v + to * STRIDE<T, D>, filled, p.v,
                                         p.vector_loads & VECTOR_V, 0, row, live, head,
                                         int(p.value_dim), thread);
  }
};

// dk and dv of the 16 keys from `slot` on, and their KeySums in the first of several such sweeps,
// over `queries` of the group's tile from row `from` on. first_query: where these begin in the
// molecule; first_key: where the tile of keys does.
template <typename T, int D, int M>
ATTN_DEVICE void add_key_gradients(Acc<T> (&dk)[M][4], Acc<T> (&dv)[M][4],
                                   const BackwardTiles<T, D>& tiles, const Pairs<T>& pairs,
                                   int slot, int from, int queries, int first_query,
                                   int first_key, int begin) {
  using Plan = BackwardPlan<T, D>;
  using A = Acc<T>;
  constexpr int S = STRIDE<T, D>, N = Plan::N;
  const int g = lane_index() / 4, t = lane_index() % 4;
  first_query -= from;
  for (int at = from; at < from + queries; at += Plan::STEP) {
    A weights[N][4], ds[N][4];
    clear(weights);
    clear(ds);
    multiply_rows<T, D, true>(weights, tiles.k + slot * S, tiles.q + at * S);
    multiply_rows<T, D, true>(ds, tiles.v + slot * S, tiles.dout + at * S);
    const uint32_t kept =
        pairs.template keep_bits<N, true>(first_query + at, first_key + slot);
    ATTN_UNROLL
    for (int n = 0; n < N; ++n)
      ATTN_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int query = at + n * 8 + 2 * t + e % 2;
        const int i = first_query + query, j = first_key + slot + g + e / 2 * 8;
        const QueryRow<A>& row = tiles.rows[query];
        if (row.norm == 0) {
          weights[n][e] = ds[n][e] = 0;
          continue;
        }
        const A logit = pairs.logit(weights[n][e], i, j);
        const A p = exponential<T>(logit - row.lse) * row.norm;                  // (F2)
        const A r = pairs.keep(kept, n, e);
        ds[n][e] = score_gradient(p, r * ds[n][e], row.delta);                   // (B1) (B3)
        weights[n][e] = p * r;
      }
    if (pairs.p.dkey_bias.data && begin == 0)
      KeySums<T>(tiles.key_sums, slot).add(ds);                                  // (B8)
    multiply_weights<T, D>(dv, weights, tiles.dout + at * S + begin);            // (B4)
    multiply_weights<T, D>(dk, ds, tiles.q + at * S + begin);                    // (B6)
  }
}

template <typename T, int D>
ATTN_KERNEL ATTN_BOUNDS(BackwardPlan<T, D>::THREADS)
    backward_queries_kernel(ATTN_GRID_CONSTANT KernelParams p) {
  using Plan = BackwardPlan<T, D>;
  using A = Acc<T>;
  constexpr int S = STRIDE<T, D>, ROWS = Plan::ROWS, STAGE = Plan::STAGE, N = Plan::N;
  constexpr int M = Plan::UNITS / 8;
  ATTN_SHARED_MEMORY(memory);
  const Place<Plan> place(p);
  const int group = place.group, thread = place.thread, slot = place.slot;
  const int head = place.head;
  if (place.tile >= query_tile_count(p, ROWS)) return;
  const Rows tile = find_query_tile(p, place.tile, ROWS);
  const int live = rows_from(tile.own.size, tile.first, ROWS);
  const int keys = tile.other.size, tile_query = tile.first;
  const bool whole = tile.real && tile.own.size <= ROWS && keys <= ROWS;
  if (is_small(p, tile)) return;
  if (whole ? tile.first > 0 : live == 0) return;  // a surplus tile; the same for the whole group

  const BackwardTiles<T, D> tiles(place.memory(memory));
  Walk<Plan> walk(keys, group);
  const auto copy_keys = [&](int first, int to) {
    tiles.load_keys(p, tile.other, first, STAGE, to, head, thread);
  };
  if (keys > 0) {
    tiles.load_queries(p, tile, tile.own, tile.first, ROWS, 0, head, thread);
    walk.start(copy_keys);
  }

  const Pairs<T> pairs(p, tile.molecule, head, keys, tile.other.first);
  const int g = lane_index() / 4, t = lane_index() % 4;
  const int first_query = tile.own.first + tile.first;
  // Of rows slot + g and slot + g + 8.
  A delta[2] = {0, 0}, norm[2] = {0, 0}, lse[2] = {-A(INFINITY), -A(INFINITY)};
  ATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = slot + g + 8 * half;
    if (row < live && keys > 0)
      lse[half] = *address<const A>(p.lse, tile.molecule, first_query + row, head);
  }
  A weights[N][4], dp[N][4];
  // Over the keys, sweep 0 finds norm and delta, sweep 1 adds to dq. A single step is kept.
  const bool once = keys <= Plan::STEP;
  for (int begin = 0; begin < D; begin += Plan::UNITS) {
    A dq[M][4];
    clear(dq);
    for (int sweep = begin == 0 ? 0 : 1; sweep < 2; ++sweep) {
      for (int first = 0; first < keys; first += STAGE) {
        walk.arrive(first, begin == 0 && sweep == 0, begin + Plan::UNITS >= D && sweep == 1,
                    copy_keys);
        if (slot >= live) continue;
        const int rows = rows_from(keys, first, STAGE);
        for (int at = 0; at < rows; at += Plan::STEP) {
          const T *k = tiles.k + (walk.at + at) * S, *v = tiles.v + (walk.at + at) * S;
          const int key = first + at + 2 * t;
          if (sweep == 0 || !once) {
            clear(weights);
            clear(dp);
            multiply_rows<T, D, false>(weights, tiles.q + slot * S, k);
            multiply_rows<T, D, false>(dp, tiles.dout + slot * S, v);
            const uint32_t kept =
                pairs.template keep_bits<N, false>(tile_query + slot, first + at);
            ATTN_UNROLL
            for (int n = 0; n < N; ++n)
              ATTN_UNROLL
              for (int e = 0; e < 4; ++e) {
                const int i = tile_query + slot + g + e / 2 * 8, j = key + 8 * n + e % 2;
                const bool exists = j < keys && lse[e / 2] != -A(INFINITY);
                A& x = weights[n][e];
                x = exists ? exponential<T>(pairs.logit(x, i, j) - lse[e / 2]) : A(0);  // (F2)
                dp[n][e] = exists ? pairs.keep(kept, n, e) * dp[n][e] : A(0);           // (B1)
              }
          }
          if (sweep == 0) {
            ATTN_UNROLL
            for (int n = 0; n < N; ++n)
              ATTN_UNROLL
              for (int e = 0; e < 4; ++e) {
                norm[e / 2] += weights[n][e];
                delta[e / 2] += weights[n][e] * dp[n][e];                        // (B2)
              }
            continue;
          }
          A ds[N][4];
          ATTN_UNROLL
          for (int n = 0; n < N; ++n)
            ATTN_UNROLL
            for (int e = 0; e < 4; ++e) {
              const int row = slot + g + e / 2 * 8;
              const int j = key + 8 * n + e % 2;
              const bool dead = lse[e / 2] == -A(INFINITY) || j >= keys;
              const A weight = weights[n][e] * norm[e / 2];
              ds[n][e] = dead ? A(0) : score_gradient(weight, dp[n][e], delta[e / 2]);
              if (begin == 0 && row < live && j < keys)
                pairs.store_pair(p.dbias, tile_query + row, j, ds[n][e]);        // (B3) (B7)
            }
          multiply_weights<T, D>(dq, ds, k + begin);                             // (B5)
        }
      }
      if (sweep == 1) break;
      ATTN_UNROLL
      for (int half = 0; half < 2; ++half) {
        norm[half] = quad_sum(norm[half]);
        norm[half] = norm[half] == 0 ? A(0) : A(1) / norm[half];
        delta[half] = quad_sum(delta[half]) * norm[half];
        const int row = slot + g + 8 * half;
        if (p.dlse.data && lse[half] != -A(INFINITY))
          delta[half] -= *address<const A>(p.dlse, tile.molecule, first_query + row, head);
        if (t != 0) continue;
        const QueryRow<A> found = {norm[half], delta[half], lse[half], 0};
        if (whole) {
          tiles.rows[row] = found;  // also where there is no row
        } else if (row < live) {
          A* to = statistics_of<T>(p, tile.molecule, first_query + row, head);
          *reinterpret_cast<QueryRow<A>*>(to) = found;
        }
      }
    }
    const A scale = pairs.scale;
    if (slot < live)
      store_query_gradient<T>(p, p.dq, tile.molecule, first_query + slot, live - slot, head, begin,
                              dq, lse[0] == -A(INFINITY) ? A(0) : scale,
                              lse[1] == -A(INFINITY) ? A(0) : scale);
  }
  if (!whole || keys == 0) return;

  group_barrier(1 + group, Plan::GROUP_THREADS);  // delta' of the other warps
  if (slot >= keys) return;
  const KeySums<T> sums(tiles.key_sums, slot);
  if (p.dkey_bias.data) sums.clear();
  for (int begin = 0; begin < D; begin += Plan::UNITS) {
    A dk[M][4], dv[M][4];
    clear(dk);
    clear(dv);
    add_key_gradients(dk, dv, tiles, pairs, slot, 0, live, 0, 0, begin);
    const int first_key = tile.other.first + slot;
    const int count = keys - slot;
    store_rows<T>(p.dk, 0, first_key, count, head, begin, int(p.head_dim), dk, pairs.scale,
                  pairs.scale);
    store_rows<T>(p.dv, 0, first_key, count, head, begin, int(p.value_dim), dv, A(1), A(1));
  }
  if (p.dkey_bias.data) sums.store(pairs, p.dkey_bias, slot);
}

template <typename T, int D>
ATTN_KERNEL ATTN_BOUNDS(BackwardPlan<T, D>::THREADS)
    backward_keys_kernel(ATTN_GRID_CONSTANT KernelParams p) {
  using Plan = BackwardPlan<T, D>;
  using A = Acc<T>;
  constexpr int ROWS = Plan::ROWS, STAGE = Plan::STAGE, M = Plan::UNITS / 8;
  ATTN_SHARED_MEMORY(memory);
  const Place<Plan> place(p);
  const int group = place.group, thread = place.thread, slot = place.slot;
  const int head = place.head;
  if (place.tile >= tile_count(key_axis(p), ROWS)) return;
  const Rows tile = find_key_tile(p, place.tile, ROWS);
  const int live = rows_from(tile.own.size, tile.first, ROWS);
  const int queries = tile.other.size, tile_key = tile.first;
  if (is_small(p, tile)) return;
  clear_pairs_of_nobody(p, p.dbias, tile, head, thread, Plan::GROUP_THREADS);
  const bool whole = tile.real && tile.own.size <= ROWS && queries <= ROWS;
  if (whole || live == 0) return;  // done by the tile of queries, or a surplus tile

  const BackwardTiles<T, D> tiles(place.memory(memory));
  Walk<Plan> walk(queries, group);
  const auto copy_queries = [&](int first, int to) {
    tiles.load_queries(p, tile, tile.other, first, STAGE, to, head, thread);
    load_statistics<T, Plan::GROUP_THREADS>(&tiles.rows[to].norm, STAGE, p, tile.molecule,
                                            tile.other.first + first,
                                            rows_from(queries, first, STAGE), head, thread);
  };
  if (queries > 0) {
    tiles.load_keys(p, tile.own, tile.first, ROWS, 0, head, thread);
    walk.start(copy_queries);
  }
  const Pairs<T> pairs(p, tile.molecule, head, tile.own.size, tile.own.first);
  const KeySums<T> sums(tiles.key_sums, slot);
  if (p.dkey_bias.data) sums.clear();
  for (int begin = 0; begin < D; begin += Plan::UNITS) {
    A dk[M][4], dv[M][4];
    clear(dk);
    clear(dv);
    for (int first = 0; first < queries; first += STAGE) {
      walk.arrive(first, begin == 0, begin + Plan::UNITS >= D, copy_queries);
      if (slot < live)
        add_key_gradients(dk, dv, tiles, pairs, slot, walk.at, rows_from(queries, first, STAGE),
                          first, tile_key, begin);
    }
    if (slot >= live) continue;
    const int first_key = tile.own.first + tile.first + slot;
    store_rows<T>(p.dk, 0, first_key, live - slot, head, begin, int(p.head_dim), dk, pairs.scale,
                  pairs.scale);
    store_rows<T>(p.dv, 0, first_key, live - slot, head, begin, int(p.value_dim), dv, A(1), A(1));
  }
  if (p.dkey_bias.data && slot < live) sums.store(pairs, p.dkey_bias, tile_key + slot);
}

template <typename T, int D>
struct RunBackward {
  static int run(const KernelParams& p, void* stream) {
    using Plan = BackwardPlan<T, D>;
    const int64_t query_tiles = query_tile_count(p, Plan::ROWS) * p.heads;
    const int64_t key_tiles = tile_count(key_axis(p), Plan::ROWS) * p.heads;
    int status = p.small_rows ? launch_small_backward(p, stream) : 0;
    if (!status && has_large_sets(p)) {
      status = launch<backward_queries_kernel<T, D>, Plan>(query_tiles, p, stream);
      if (!status) status = launch<backward_keys_kernel<T, D>, Plan>(key_tiles, p, stream);
    }
    if (!status && p.shared_seeds) status = sum_over_molecules<T>(p, stream);
    return status;
  }
};

int launch_backward(const KernelParams& p, void* stream) {
  return for_instance<RunBackward>(p, stream);
}

}  // namespace attnpool
