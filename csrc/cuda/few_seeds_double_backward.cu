// (D1)-(D13) for few seeds: the derivative of dq, dk, dv, dbias, dkey_bias with cotangents A =
// ddq, B = ddk, C = ddv, E = ddbias, f = ddkey_bias; an absent cotangent is zero and costs
// nothing. Shape of the work: few_seeds.cuh. Grid, launches, sweeps and d(q): as in
// few_seeds_backward.cu, with ddk and ddv beside the keys and values. The statistics norm, delta,
// t and y of a row come from one sweep, as means and covariances that are merged (Chan, Golub and
// LeVeque, 1983): sums of large products would cancel. gdout of molecules of several parts is
// summed by merge_parts_kernel.
#include "../equations.h"
#include "few_seeds.cuh"
#include "instances.cuh"
#include "few_seeds_merge.cuh"
#include "sum_over_molecules.cuh"

namespace attnpool {

template <typename T, int D>
using SeedsDoubleBackwardPlan = SeedsPlan<T, D, 16, 2, 4, 3, 4, 2, 5>;

// Of some keys and one seed, weighted by P: the sum of P, the means of dP (B2) and T (D2), and
// y = sum of P (T - t)(dP - delta) + P G (D3) (D4).
template <typename A>
struct SeedStatistics {
  A total, delta, t, y;

  ATTN_DEVICE void add(const SeedStatistics& x) {
    const A sum = total + x.total, share = sum == 0 ? A(0) : x.total / sum;
    y += x.y + (x.t - t) * (x.delta - delta) * (total * share);
    delta += (x.delta - delta) * share;
    t += (x.t - t) * share;
    total = sum;
  }
  // Over lanes that differ in bits below `bits`, the lower lane first.
  ATTN_DEVICE void add_lanes(int bits) {
    for (int i = 1; i < bits; i *= 2) {
      SeedStatistics x = {__shfl_xor_sync(WARP, total, i), __shfl_xor_sync(WARP, delta, i),
                          __shfl_xor_sync(WARP, t, i), __shfl_xor_sync(WARP, y, i)};
      if (lane_index() & i) {
        x.add(*this);
        *this = x;
      } else {
        add(x);
      }
    }
  }
};

// The shared memory of one warp.
template <typename T, int D>
struct SeedsDoubleBackwardTiles {
  using Plan = SeedsDoubleBackwardPlan<T, D>;
  using A = Acc<T>;
  T *k, *v, *b, *c;
  A *q, *dout, *a;
  A *kept, *ds, *u, *z;  // P R, dS, U R, Z; exp(S - lse), dP, T, G before that
  A *lse, *norm, *delta, *t, *y;  // delta is delta'

  ATTN_DEVICE explicit SeedsDoubleBackwardTiles(unsigned char* memory)
      : k(reinterpret_cast<T*>(memory)), v(k + Plan::STAGES * Plan::TILE),
        b(v + Plan::STAGES * Plan::TILE), c(b + Plan::STAGES * Plan::TILE),
        q(reinterpret_cast<A*>(c + Plan::STAGES * Plan::TILE)), dout(q + Plan::SEED_ROWS),
        a(dout + Plan::SEED_ROWS), kept(a + Plan::SEED_ROWS), ds(kept + Plan::TERMS),
        u(ds + Plan::TERMS), z(u + Plan::TERMS), lse(z + Plan::TERMS), norm(lse + SEEDS),
        delta(norm + SEEDS), t(delta + SEEDS), y(t + SEEDS) {}

  ATTN_DEVICE void load(const KernelParams& p, const Part& part, int tile, int stage,
                        int head) const {
    const int first = part.first + tile * Plan::KEYS, at = stage * Plan::TILE;
    const int head_dim = int(p.head_dim), value_dim = int(p.value_dim);
    const auto load = [&](T* to, const View& x, uint32_t flag, int units) {
      if (x.data)
        load_tile<Plan, T, D>(to + at, x, p.vector_loads & flag, part, first, head, units);
    };
    load(k, p.k, VECTOR_K, head_dim);
    load(v, p.v, VECTOR_V, value_dim);
    load(b, p.ddk, VECTOR_DDK, head_dim);
    load(c, p.ddv, VECTOR_DDV, value_dim);
  }

  // exp(S - lse), dP, T, G of the lane's key and every seed, to `at` in shared memory: in registers
  // there is no room for them. Lanes from KEYS on only help with the products.
  ATTN_DEVICE void multiply(const Pairs<T>& pairs, int stage, int at, int j, int last,
                            uint32_t kept_bits, uint32_t mask) const {
    const KernelParams& p = pairs.p;
    const int lane = lane_index(), row = stage * Plan::TILE + lane % Plan::KEYS * STRIDE<T, D>;
    A sum[SEEDS];
    const auto add = [&](const T* keys, const A* rows) {
      add_products<Plan, T, D>(sum, keys + row, rows, mask);
    };
    const auto store = [&](A* to) {
      complete_products<Plan>(sum, mask);
      ATTN_UNROLL
      for (int s = 0; s < SEEDS; ++s) {
        if ((mask >> s & 1) && lane < Plan::KEYS) to[s * Plan::PAIR_KEYS + at] = sum[s];
        sum[s] = 0;
      }
    };
    clear_seeds(sum);
    add(k, q);
    store(kept);
    add(v, dout);
    store(ds);
    if (p.ddq.data) add(k, a);
    if (p.ddk.data) add(b, q);
    store(u);
    if (p.ddv.data) add(c, dout);
    store(z);
    if (lane >= Plan::KEYS) return;
    const A of_key = j < last ? pairs.key_value(p.key_bias, j) : A(0);
    const A tangent_of_key = j < last ? pairs.key_value(p.ddkey_bias, j) : A(0);
    ATTN_ROLLED
    for (int s = 0; s < int(p.query_rows); ++s) {
      if (!(mask >> s & 1)) continue;
      const int pair = s * Plan::PAIR_KEYS + at;
      if (j >= last) {
        kept[pair] = ds[pair] = u[pair] = z[pair] = 0;
        continue;
      }
      const A r = kept_bits >> s & 1 ? pairs.keep_scale : A(0);
      kept[pair] = exponential<T>(pairs.logit(kept[pair], s, j, of_key) - lse[s]);     // (F2)
      ds[pair] *= r;                                                                   // (B1)
      u[pair] = pairs.tangent(u[pair], s, j, tangent_of_key);                          // (D1)
      z[pair] *= r;                                                                    // (D3)
    }
  }

  // The rows of gk = c (dS^T A + Z^T Q) (D8) and gv = (U R)^T dO (D9) of a tile. ds, z, u: from its
  // first key on.
  ATTN_DEVICE void store_keys(const KernelParams& p, const Part& part, int first, int head,
                              int at, uint32_t mask) const {
    constexpr int N = Plan::TOGETHER, U = Plan::UNITS;
    const int rows = rows_from(part.last, first, Plan::KEYS);
    const A scale = static_cast<A>(p.scale);
    ATTN_ROLLED
    for (int key = 0; key < rows; key += N) {
      A gk[N][U], gv[N][U];
      ATTN_UNROLL
      for (int i = 0; i < N; ++i)
        ATTN_UNROLL
        for (int n = 0; n < U; ++n) gk[i][n] = gv[i][n] = 0;
      ATTN_UNROLL
      for (int s = 0; s < SEEDS; ++s) {
        if (!(mask >> s & 1)) continue;
        const int pair = s * Plan::PAIR_KEYS + at + key;
        const auto add = [&](A(&sum)[N][U], const A* terms, const A* rows) {
          const Pack<A, N> weight = load_pack<N>(terms + pair);
          A x[U];
          read_units(x, rows + s * D);
          ATTN_UNROLL
          for (int i = 0; i < N; ++i)
            ATTN_UNROLL
            for (int n = 0; n < U; ++n) sum[i][n] += weight.at[i] * x[n];
        };
        if (p.ddq.data) add(gk, ds, a);
        add(gk, z, q);
        add(gv, u, dout);
      }
      ATTN_UNROLL
      for (int i = 0; i < N; ++i) {
        if (key + i >= rows) continue;
        ATTN_UNROLL
        for (int n = 0; n < U; ++n) gk[i][n] *= scale;
        const int64_t row = int64_t(part.row) + first + key + i;
        store_units<T>(p.gk, 0, row, head, int(p.head_dim), gk[i]);
        store_units<T>(p.gv, 0, row, head, int(p.value_dim), gv[i]);
      }
    }
  }
};

template <typename T, int D>
ATTN_KERNEL ATTN_BOUNDS(SeedsDoubleBackwardPlan<T, D>::THREADS)
    few_seeds_double_backward_kernel(ATTN_GRID_CONSTANT KernelParams p) {
  using Plan = SeedsDoubleBackwardPlan<T, D>;
  using A = Acc<T>;
  constexpr int KEYS = Plan::KEYS;
  ATTN_SHARED_MEMORY(memory);
  const Place<Plan> place(p);
  const int head = place.head, lane = lane_index(), key = lane % KEYS;
  const SeedsWork work(p, place.tile);
  if (work.surplus) return;

  const SeedsDoubleBackwardTiles<T, D> tiles(place.memory(memory));
  const int head_dim = int(p.head_dim), value_dim = int(p.value_dim), seeds = int(p.query_rows);
  if (work.clears) {
    clear_rows_of_nobody<T, Plan::UNITS>(p, p.gk, place.tile, head, head_dim);
    clear_rows_of_nobody<T, Plan::UNITS>(p, p.gv, place.tile, head, value_dim);
    clear_pairs_of_nobody(p, p.gbias, place.tile, head);
    clear_keys_of_nobody(p, p.gkey_bias, place.tile, head);
  }
  A gq[SEEDS][Plan::UNITS];
  clear_seeds(gq);
  bool new_seeds = true;
  ATTN_ROLLED
  for (int item = 0; item < work.items; ++item) {
    const Part part = work.part(p, item);
    if (part.last == 0 && (work.clears || p.only_statistics)) continue;  // no part
    const int count = (part.last - part.first + KEYS - 1) / KEYS;
    const bool whole = part.keys <= p.split, resident = whole && count <= Plan::STAGES;
    const Pairs<T> pairs(p, part.molecule, head, part.keys, part.row);
    const auto load = [&](int tile, int stage) { tiles.load(p, part, tile, stage, head); };
    begin_tiles<Plan>(count, load);
    if (new_seeds) {
      load_seeds<T, D>(tiles.q, p.q, 0, head, seeds, head_dim);
      if (p.ddq.data) load_seeds<T, D>(tiles.a, p.ddq, 0, head, seeds, head_dim);
    }
    new_seeds = false;
    load_seeds<T, D>(tiles.dout, p.dout, part.molecule, head, seeds, value_dim);
    const uint32_t mask = load_lse(tiles.lse, p, part.molecule, head);

    const auto find_statistics = [&] {
      SeedStatistics<A> sums[SEEDS];
      ATTN_UNROLL
      for (int s = 0; s < SEEDS; ++s) sums[s] = {0, 0, 0, 0};
      const auto add = [&](int tile, int stage) {
        const int at = (resident ? tile * KEYS : 0) + key, j = part.first + tile * KEYS + key;
        tiles.multiply(pairs, stage, at, j, part.last, keep_seeds(pairs, j, seeds), mask);
        ATTN_UNROLL
        for (int s = 0; s < SEEDS; ++s) {
          if (!(mask >> s & 1) || lane >= KEYS) continue;
          const int pair = s * Plan::PAIR_KEYS + at;
          const A weight = tiles.kept[pair];
          sums[s].add({weight, tiles.ds[pair], tiles.u[pair], weight * tiles.z[pair]});
        }
      };
      const bool sweeps = whole || p.only_statistics;
      if (sweeps) stream_tiles<Plan>(count, false, load, add);
      if (sweeps && !p.only_statistics && !resident) begin_tiles<Plan>(count, load);
      ATTN_UNROLL
      for (int s = 0; s < SEEDS; ++s) {
        if (s >= seeds) continue;
        SeedStatistics<A>& own = sums[s];
        if (mask >> s & 1) {
          if (!sweeps)
            for (int64_t i = lane * p.split; i < part.keys; i += 32 * p.split) {
              const A* from = numbers_of_part<A>(p, part, int(i), head, s) + value_dim;
              own.add({from[0], from[1], from[2], from[3]});
            }
          own.add_lanes(sweeps ? KEYS : 32);
        }
        if (lane > 0) continue;
        if (p.only_statistics) {
          A* to = numbers_of_part<A>(p, part, part.first, head, s) + value_dim;
          to[0] = own.total;
          to[1] = own.delta;
          to[2] = own.t;
          to[3] = own.y;
          continue;
        }
        const A norm = own.total == 0 ? A(0) : A(1) / own.total;
        const A dlse = p.dlse.data ? *address<const A>(p.dlse, part.molecule, s, head) : A(0);
        tiles.norm[s] = norm;
        tiles.delta[s] = own.delta - dlse;
        tiles.t[s] = own.t;
        tiles.y[s] = own.y * norm;                                                     // (D4)
        if (part.first == 0) *address<A>(p.gdlse, part.molecule, s, head) = own.t;     // (D12)
      }
      warp_barrier();
    };
    find_statistics();
    if (p.only_statistics) continue;

    A gdout[SEEDS][Plan::UNITS];
    clear_seeds(gdout);
    const auto find_gradients = [&](int tile, int stage) {
      const int first = part.first + tile * KEYS, j = first + key;
      const int at = (resident ? tile * KEYS : 0), row = stage * Plan::TILE;
      const uint32_t kept = keep_seeds(pairs, j, seeds);
      if (!resident) tiles.multiply(pairs, stage, at + key, j, part.last, kept, mask);
      A sum = 0;
      ATTN_ROLLED
      for (int s = 0; s < seeds && lane < KEYS; ++s) {
        A z = 0;
        if (mask >> s & 1) {
          const int pair = s * Plan::PAIR_KEYS + at + key;
          const A weight = tiles.kept[pair] * tiles.norm[s], dp = tiles.ds[pair];
          const A r = kept >> s & 1 ? pairs.keep_scale : A(0);
          const A centred = tiles.u[pair] - tiles.t[s], delta = tiles.delta[s];
          z = centred_second_gradient(weight, centred, dp, delta, tiles.z[pair], tiles.y[s]);
          tiles.kept[pair] = weight * r;
          tiles.ds[pair] = score_gradient(weight, dp, delta);                          // (B3)
          tiles.u[pair] = weight_cotangent(weight, tiles.u[pair], tiles.t[s]) * r;     // (D5)
          tiles.z[pair] = z;                                                           // (D6)
        }
        sum += z;
        if (j < part.last) pairs.store_pair(p.gbias, s, j, z);                         // (D10)
      }
      if (lane < KEYS && j < part.last) pairs.store_key(p.gkey_bias, j, sum);          // (D13)
      warp_barrier();
      const int rows = rows_from(part.last, first, KEYS);
      add_rows<Plan, T, D>(gq, tiles.z + at, tiles.k + row, rows, mask);               // (D7)
      if (p.ddk.data) add_rows<Plan, T, D>(gq, tiles.ds + at, tiles.b + row, rows, mask);
      add_rows<Plan, T, D>(gdout, tiles.u + at, tiles.v + row, rows, mask);            // (D11)
      if (p.ddv.data) add_rows<Plan, T, D>(gdout, tiles.kept + at, tiles.c + row, rows, mask);
      tiles.store_keys(p, part, first, head, at, mask);
    };
    stream_tiles<Plan>(count, resident, load, find_gradients);
    ATTN_UNROLL
    for (int s = 0; s < SEEDS; ++s) {
      if (s >= seeds) continue;
      if (whole) {
        store_units<T>(p.gdout, part.molecule, s, head, value_dim, gdout[s]);
        continue;
      }
      A* to = numbers_of_part<A>(p, part, part.first, head, s);
      ATTN_UNROLL
      for (int u = 0; u < Plan::UNITS; ++u)
        if (lane * Plan::UNITS + u < value_dim) to[lane * Plan::UNITS + u] = gdout[s][u];
    }
  }
  if (!p.only_statistics) store_partial<T>(p, place.tile, head, gq);
}

template <typename T, int D>
struct RunSeedsDoubleBackward {
  static int run(const KernelParams& p, void* stream) {
    using Plan = SeedsDoubleBackwardPlan<T, D>;
    int status = launch_parts<few_seeds_double_backward_kernel<T, D>, Plan>(p, stream);
    if (!status && p.key_rows > p.split) status = merge_parts<T>(p, stream);
    return status ? status : sum_over_molecules<T>(p, stream);
  }
};

int launch_few_seeds_double_backward(const KernelParams& p, void* stream) {
  return for_instance<RunSeedsDoubleBackward>(p, stream);
}

}  // namespace attnpool
