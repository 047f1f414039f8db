// (D1)-(D13): the derivative of dq, dk, dv, dbias, dkey_bias with cotangents A = ddq, B = ddk,
// C = ddv, E = ddbias, f = ddkey_bias; an absent cotangent is zero and costs nothing.
//
// Grid, groups, one or two launches, shared seeds: as in backward.cu, with the tiles
//   double_backward_queries_kernel  norm, delta, t, y; gq, gdout, gbias, gdlse, and gk, gv,
//                                   gkey_bias too of molecules with at most ROWS queries and keys
//   double_backward_keys_kernel     gk, gv, gkey_bias of the other molecules
// Shared memory a group: seven tiles (q, dout, ddq; k, v, ddk, ddv), those of the other axis walked
// through by halves (Walk), five numbers a query, and KeySums.
// Nothing quadratic is stored.
#include "../equations.h"
#include "copies.cuh"
#include "instances.cuh"
#include "key_sums.cuh"
#include "launch.h"
#include "products.cuh"
#include "sum_over_molecules.cuh"

namespace attnpool {

template <typename T, int D>
struct DoubleBackwardPlan {
  static constexpr int ROW_BYTES = D * int(sizeof(T));
  static constexpr int ROWS = larger(16, smaller(64, (8 << 10) / ROW_BYTES));
  static constexpr int N = sizeof(T) == 8 ? 1 : 2, STEP = 8 * N;  // pairs at a time: 16 x STEP
  // Rows of the other axis that arrive together. float32 of width 128 has one stage: its products
  // take no fewer than 16 rows, and a second tile of them would make 91 KiB of 58, two warps an SM
  // of sm_90 instead of three, which costs more than waiting for copies beside so much arithmetic.
  static constexpr int STAGE = larger(STEP, ROWS / 2);
  static constexpr int UNITS = smaller(D, 128 / int(sizeof(T)));  // of a gradient at a time
  static constexpr int GROUP_THREADS = ROWS * 2;
  static constexpr int TILE = ROWS * STRIDE<T, D>;
  static constexpr int GROUP_BYTES =
      7 * TILE * int(sizeof(T)) + (5 + KeySums<T>::PLACES) * ROWS * int(sizeof(Acc<T>));
  static constexpr int GROUPS = GROUP_BYTES <= (24 << 10) ? 2 : 1;
  static constexpr int THREADS = GROUPS * GROUP_THREADS, BYTES = GROUPS * GROUP_BYTES;
};

// What all pairs of a query share, besides lse; in the global statistics too. norm is 0 for a row
// without a finite logit, or no row: every term is 0.
template <typename A>
struct alignas(16) Row {
  A norm, delta, t, y;  // delta is delta'
};

// Of one pair: in P, dP, T, G and R; out P R, dS, U R, Z.
template <typename A>
ATTN_DEVICE void second_order(A& weight, A& dp, A& tangent, A& g, A r, const Row<A>& row) {
  const A z = centred_second_gradient(weight, tangent - row.t, dp, row.delta, g, row.y);  // (D6)
  dp = score_gradient(weight, dp, row.delta);                                          // (B3)
  tangent = weight_cotangent(weight, tangent, row.t) * r;                              // (D5)
  weight *= r;
  g = z;
}

// The shared memory of one group.
template <typename T, int D>
struct DoubleBackwardTiles {
  using Plan = DoubleBackwardPlan<T, D>;
  using A = Acc<T>;
  T *q, *dout, *a, *k, *v, *b, *c;
  Row<A>* rows;
  A *lse, *key_sums;

  ATTN_DEVICE explicit DoubleBackwardTiles(unsigned char* memory)
      : q(reinterpret_cast<T*>(memory)), dout(q + Plan::TILE), a(dout + Plan::TILE),
        k(a + Plan::TILE), v(k + Plan::TILE), b(v + Plan::TILE), c(b + Plan::TILE),
        rows(reinterpret_cast<Row<A>*>(c + Plan::TILE)),
        lse(reinterpret_cast<A*>(rows + Plan::ROWS)), key_sums(lse + Plan::ROWS) {}

  ATTN_DEVICE static void load(T* tile, const KernelParams& p, const View& x, uint32_t flag,
                               int molecule, int row, int most, int live, int head, int64_t units,
                               int thread) {
    if (x.data)
      load_rows<T, D, Plan::GROUP_THREADS>(tile, smaller(most, round_up(live, 16)), x,
                                           p.vector_loads & flag, molecule, row, live, head,
                                           int(units), thread);
  }

  // Rows first ... of a molecule's queries, `most` of them, to row `to` of the tiles.
  ATTN_DEVICE void load_queries(const KernelParams& p, const Rows& tile, const Range& span,
                                int first, int most, int to, int head, int thread) const {
    const int live = rows_from(span.size, first, most), row = span.first + first;
    to *= STRIDE<T, D>;
    load(q + to, p, p.q, VECTOR_Q, 0, row, most, live, head, p.head_dim, thread);
    load(dout + to, p, p.dout, VECTOR_DOUT, tile.molecule, row, most, live, head, p.value_dim,
         thread);
    load(a + to, p, p.ddq, VECTOR_DDQ, 0, row, most, live, head, p.head_dim, thread);
  }

  ATTN_DEVICE void load_keys(const KernelParams& p, const Range& span, int first, int most, int to,
                             int head, int thread) const {
    const int live = rows_from(span.size, first, most), row = span.first + first;
    to *= STRIDE<T, D>;
    load(k + to, p, p.k, VECTOR_K, 0, row, most, live, head, p.head_dim, thread);
    load(v + to, p, p.v, VECTOR_V, 0, row, most, live, head, p.value_dim, thread);
    load(b + to, p, p.ddk, VECTOR_DDK, 0, row, most, live, head, p.head_dim, thread);
    load(c + to, p, p.ddv, VECTOR_DDV, 0, row, most, live, head, p.value_dim, thread);
  }
};

// Products of 16 x STEP pairs: q . k, dout . v, ddq . k + q . ddk, dout . ddv. SWAPPED: rows are
// the keys from `row` on and columns the queries from `column` on, else the other way round.
template <typename T, int D, bool SWAPPED>
struct Products {
  using Plan = DoubleBackwardPlan<T, D>;
  Acc<T> weight[Plan::N][4], dp[Plan::N][4], tangent[Plan::N][4], g[Plan::N][4];

  ATTN_DEVICE void multiply(const KernelParams& p, const DoubleBackwardTiles<T, D>& x, int row,
                            int column) {
    const auto add = [&](Acc<T>(&sum)[Plan::N][4], const T* queries, const T* keys) {
      const int r = row * STRIDE<T, D>, c = column * STRIDE<T, D>;
      if (SWAPPED) multiply_rows<T, D, true>(sum, keys + r, queries + c);
      else multiply_rows<T, D, false>(sum, queries + r, keys + c);
    };
    clear(weight);
    clear(dp);
    clear(tangent);
    clear(g);
    add(weight, x.q, x.k);
    add(dp, x.dout, x.v);
    if (p.ddq.data) add(tangent, x.a, x.k);
    if (p.ddk.data) add(tangent, x.q, x.b);
    if (p.ddv.data) add(g, x.dout, x.c);
  }

  // From products to exp(S - lse), dP, T, G of element (n, e), the pair (i, j); 0 unless `lives`.
  ATTN_DEVICE void complete(const Pairs<T>& pairs, int n, int e, bool lives, int i, int j,
                            Acc<T> lse, Acc<T> r) {
    if (!lives) {
      weight[n][e] = dp[n][e] = tangent[n][e] = g[n][e] = 0;
      return;
    }
    weight[n][e] = exponential<T>(pairs.logit(weight[n][e], i, j) - lse);              // (F2)
    dp[n][e] *= r;                                                                     // (B1)
    tangent[n][e] = pairs.tangent(tangent[n][e], i, j);                                // (D1)
    g[n][e] *= r;                                                                      // (D3)
  }
};

// gk and gv of the 16 keys from `slot` on, and their KeySums in the first of several such sweeps,
// over `queries` of the group's tile from row `from` on, where first_query lies; first_key: where
// the tile of keys begins in the molecule.
template <typename T, int D, int M>
ATTN_DEVICE void add_key_gradients(Acc<T> (&gk)[M][4], Acc<T> (&gv)[M][4], const KernelParams& p,
                                   const DoubleBackwardTiles<T, D>& tiles, const Pairs<T>& pairs,
                                   int slot, int from, int queries, int first_query,
                                   int first_key, int begin) {
  using Plan = DoubleBackwardPlan<T, D>;
  constexpr int S = STRIDE<T, D>;
  const int g = lane_index() / 4, t = lane_index() % 4;
  first_query -= from;
  for (int at = from; at < from + queries; at += Plan::STEP) {
    Products<T, D, true> x;
    x.multiply(p, tiles, slot, at);
    const uint32_t kept =
        pairs.template keep_bits<Plan::N, true>(first_query + at, first_key + slot);
    ATTN_UNROLL
    for (int n = 0; n < Plan::N; ++n)
      ATTN_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int query = at + n * 8 + 2 * t + e % 2;
        const Row<Acc<T>> row = tiles.rows[query];
        const Acc<T> r = pairs.keep(kept, n, e);
        x.complete(pairs, n, e, row.norm != 0, first_query + query,
                   first_key + slot + g + e / 2 * 8, tiles.lse[query], r);
        x.weight[n][e] *= row.norm;
        second_order(x.weight[n][e], x.dp[n][e], x.tangent[n][e], x.g[n][e], r, row);
      }
    if (p.gkey_bias.data && begin == 0) KeySums<T>(tiles.key_sums, slot).add(x.g);     // (D13)
    if (p.ddq.data) multiply_weights<T, D>(gk, x.dp, tiles.a + at * S + begin);        // (D8)
    multiply_weights<T, D>(gk, x.g, tiles.q + at * S + begin);
    multiply_weights<T, D>(gv, x.tangent, tiles.dout + at * S + begin);                // (D9)
  }
}

template <typename T, int D>
ATTN_KERNEL ATTN_BOUNDS(DoubleBackwardPlan<T, D>::THREADS)
    double_backward_queries_kernel(ATTN_GRID_CONSTANT KernelParams p) {
  using Plan = DoubleBackwardPlan<T, D>;
  using A = Acc<T>;
  constexpr int S = STRIDE<T, D>, ROWS = Plan::ROWS, STAGE = Plan::STAGE, M = Plan::UNITS / 8;
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

  const DoubleBackwardTiles<T, D> tiles(place.memory(memory));
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
  // Of rows slot + g and slot + g + 8. lse = -inf: no finite logit, or no row.
  Row<A> row[2] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
  A lse[2] = {-A(INFINITY), -A(INFINITY)};
  ATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int query = slot + g + 8 * half;
    if (query < live && keys > 0)
      lse[half] = *address<const A>(p.lse, tile.molecule, first_query + query, head);
  }
  // Over the keys, sweep 0 sums norm, delta, t and w (in y), sweep 1 adds to y centred terms, which
  // do not cancel (equations.h), and sweep 2 adds to the gradients.
  for (int begin = 0; begin < D; begin += Plan::UNITS) {
    A gq[M][4], gdout[M][4];
    clear(gq);
    clear(gdout);
    for (int sweep = begin == 0 ? 0 : 2; sweep < 3; ++sweep) {
      for (int first = 0; first < keys; first += STAGE) {
        walk.arrive(first, begin == 0 && sweep == 0, begin + Plan::UNITS >= D && sweep == 2,
                    copy_keys);
        if (slot >= live) continue;
        const int rows = rows_from(keys, first, STAGE);
        for (int step = 0; step < rows; step += Plan::STEP) {
          const int at = walk.at + step;
          Products<T, D, false> x;
          x.multiply(p, tiles, slot, at);
          const uint32_t kept =
              pairs.template keep_bits<Plan::N, false>(tile_query + slot, first + step);
          ATTN_UNROLL
          for (int n = 0; n < Plan::N; ++n)
            ATTN_UNROLL
            for (int e = 0; e < 4; ++e) {
              const int query = slot + g + e / 2 * 8;
              const int i = tile_query + query, j = first + step + n * 8 + 2 * t + e % 2;
              Row<A>& own = row[e / 2];
              const A r = pairs.keep(kept, n, e);
              const bool lives = j < keys && lse[e / 2] != -A(INFINITY);
              x.complete(pairs, n, e, lives, i, j, lse[e / 2], r);
              const A weight = x.weight[n][e], dp = x.dp[n][e];
              if (sweep == 0) {
                own.norm += weight;
                own.delta += weight * dp;                                              // (B2)
                own.t += weight * x.tangent[n][e];                                     // (D2)
                own.y += weight * x.g[n][e];                                           // (D3)
                continue;
              }
              if (sweep == 1) {
                own.y += weight * (x.tangent[n][e] - own.t) * (dp - own.delta);        // (D2)
                continue;
              }
              x.weight[n][e] *= own.norm;
              second_order(x.weight[n][e], x.dp[n][e], x.tangent[n][e], x.g[n][e], r, own);
              if (begin == 0 && query < live && j < keys)
                pairs.store_pair(p.gbias, i, j, x.g[n][e]);                            // (D10)
            }
          if (sweep < 2) continue;
          if (p.ddk.data) multiply_weights<T, D>(gq, x.dp, tiles.b + at * S + begin);  // (D7)
          multiply_weights<T, D>(gq, x.g, tiles.k + at * S + begin);
          multiply_weights<T, D>(gdout, x.tangent, tiles.v + at * S + begin);          // (D11)
          if (p.ddv.data) multiply_weights<T, D>(gdout, x.weight, tiles.c + at * S + begin);
        }
      }
      if (sweep == 2) break;
      ATTN_UNROLL
      for (int half = 0; half < 2; ++half) {
        Row<A>& own = row[half];
        if (sweep == 0) {
          own.norm = quad_sum(own.norm);
          own.norm = own.norm == 0 ? A(0) : A(1) / own.norm;
          own.delta = quad_sum(own.delta) * own.norm;
          own.t = quad_sum(own.t) * own.norm;
          continue;
        }
        own.y = quad_sum(own.y) * own.norm;                                            // (D4)
        const int query = slot + g + 8 * half;
        if (p.dlse.data && lse[half] != -A(INFINITY))
          own.delta -= *address<const A>(p.dlse, tile.molecule, first_query + query, head);
        if (t != 0) continue;
        if (query < live)
          *address<A>(p.gdlse, tile.molecule, first_query + query, head) = own.t;      // (D12)
        if (whole) {
          tiles.rows[query] = own;  // also where there is no row
          tiles.lse[query] = lse[half];
        } else if (query < live) {
          A* to = statistics_of<T>(p, tile.molecule, first_query + query, head);
          *reinterpret_cast<Row<A>*>(to) = own;
        }
      }
    }
    if (slot >= live) continue;
    const bool dead[2] = {lse[0] == -A(INFINITY), lse[1] == -A(INFINITY)};
    store_query_gradient<T>(p, p.gq, tile.molecule, first_query + slot, live - slot, head, begin,
                            gq, dead[0] ? A(0) : pairs.scale, dead[1] ? A(0) : pairs.scale);
    store_rows<T>(p.gdout, tile.molecule, first_query + slot, live - slot, head, begin,
                  int(p.value_dim), gdout, dead[0] ? A(0) : A(1), dead[1] ? A(0) : A(1));
  }
  if (!whole || keys == 0) return;

  group_barrier(1 + group, Plan::GROUP_THREADS);  // the statistics of the other warps
  if (slot >= keys) return;
  const KeySums<T> sums(tiles.key_sums, slot);
  if (p.gkey_bias.data) sums.clear();
  for (int begin = 0; begin < D; begin += Plan::UNITS) {
    A gk[M][4], gv[M][4];
    clear(gk);
    clear(gv);
    add_key_gradients(gk, gv, p, tiles, pairs, slot, 0, live, 0, 0, begin);
    const int first_key = tile.other.first + slot;
    const int count = keys - slot;
    store_rows<T>(p.gk, 0, first_key, count, head, begin, int(p.head_dim), gk, pairs.scale,
                  pairs.scale);
    store_rows<T>(p.gv, 0, first_key, count, head, begin, int(p.value_dim), gv, A(1), A(1));
  }
  if (p.gkey_bias.data) sums.store(pairs, p.gkey_bias, slot);
}

template <typename T, int D>
ATTN_KERNEL ATTN_BOUNDS(DoubleBackwardPlan<T, D>::THREADS)
    double_backward_keys_kernel(ATTN_GRID_CONSTANT KernelParams p) {
  using Plan = DoubleBackwardPlan<T, D>;
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
  clear_pairs_of_nobody(p, p.gbias, tile, head, thread, Plan::GROUP_THREADS);
  const bool whole = tile.real && tile.own.size <= ROWS && queries <= ROWS;
  if (whole || live == 0) return;  // done by the tile of queries, or a surplus tile

  const DoubleBackwardTiles<T, D> tiles(place.memory(memory));
  Walk<Plan> walk(queries, group);
  // The lse of a row is not 16 bytes: a thread reads it when it issues the copies of the next step,
  // and writes it to shared memory behind the present step.
  A lse = 0;
  const auto read_lse = [&](int first) {
    const int row = first + thread;
    if (row < queries)
      lse = *address<const A>(p.lse, tile.molecule, tile.other.first + row, head);
  };
  const auto copy_queries = [&](int first, int to) {
    tiles.load_queries(p, tile, tile.other, first, STAGE, to, head, thread);
    load_statistics<T, Plan::GROUP_THREADS>(&tiles.rows[to].norm, STAGE, p, tile.molecule,
                                            tile.other.first + first,
                                            rows_from(queries, first, STAGE), head, thread);
    read_lse(first);
    if (!walk.HALVES && thread < STAGE) tiles.lse[thread] = lse;
  };
  if (queries > 0) {
    tiles.load_keys(p, tile.own, tile.first, ROWS, 0, head, thread);
    walk.start(copy_queries);
    read_lse(0);
    if (thread < ROWS) tiles.lse[thread] = lse;
  }
  const Pairs<T> pairs(p, tile.molecule, head, tile.own.size, tile.own.first);
  const KeySums<T> sums(tiles.key_sums, slot);
  if (p.gkey_bias.data) sums.clear();
  for (int begin = 0; begin < D; begin += Plan::UNITS) {
    A gk[M][4], gv[M][4];
    clear(gk);
    clear(gv);
    for (int first = 0; first < queries; first += STAGE) {
      const bool more = walk.arrive(first, begin == 0, begin + Plan::UNITS >= D, copy_queries);
      if (slot < live)
        add_key_gradients(gk, gv, p, tiles, pairs, slot, walk.at,
                          rows_from(queries, first, STAGE), first, tile_key, begin);
      if (more && thread < STAGE) tiles.lse[(walk.at ^ STAGE) + thread] = lse;
    }
    if (slot >= live) continue;
    const int first_key = tile.own.first + tile.first + slot;
    store_rows<T>(p.gk, 0, first_key, live - slot, head, begin, int(p.head_dim), gk, pairs.scale,
                  pairs.scale);
    store_rows<T>(p.gv, 0, first_key, live - slot, head, begin, int(p.value_dim), gv, A(1), A(1));
  }
  if (p.gkey_bias.data && slot < live) sums.store(pairs, p.gkey_bias, tile_key + slot);
}

template <typename T, int D>
struct RunDoubleBackward {
  static int run(const KernelParams& p, void* stream) {
    using Plan = DoubleBackwardPlan<T, D>;
    const int64_t query_tiles = query_tile_count(p, Plan::ROWS) * p.heads;
    const int64_t key_tiles = tile_count(key_axis(p), Plan::ROWS) * p.heads;
    int status = p.small_rows ? launch_small_double_backward(p, stream) : 0;
    if (!status && has_large_sets(p)) {
      status = launch<double_backward_queries_kernel<T, D>, Plan>(query_tiles, p, stream);
      if (!status) status = launch<double_backward_keys_kernel<T, D>, Plan>(key_tiles, p, stream);
    }
    if (!status && p.shared_seeds) status = sum_over_molecules<T>(p, stream);
    return status;
  }
};

int launch_double_backward(const KernelParams& p, void* stream) {
  return for_instance<RunDoubleBackward>(p, stream);
}

}  // namespace attnpool
