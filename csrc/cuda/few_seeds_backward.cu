// (B1)-(B8) for few seeds: dq, dk, dv, dbias, dkey_bias. Shape of the work: few_seeds.cuh.
//
// Grid: x only, one warp a head and slot of `split` keys (a part that is not its molecule's first,
// and zeros for rows of no molecule), then one a head and `molecule_chunk` molecules. Each leaves a
// partial dq for sum_over_molecules.cuh. Shared memory a warp: STAGES tiles of keys and values, q
// and dout of the seeds, two numbers of a pair. Keys that fit the stages are read once; the others
// in two sweeps, the first for norm and delta (backward.cu says why). Those of molecules of several
// parts come from a launch before, and every part adds them up in order.
#include "../equations.h"
#include "few_seeds.cuh"
#include "instances.cuh"
#include "sum_over_molecules.cuh"

namespace attnpool {

template <typename T, int D>
using SeedsBackwardPlan = SeedsPlan<T, D, 32, D * sizeof(T) <= 128 ? 2 : 4, 2, 2, 2,
                                    D * sizeof(T) <= 128 ? 2 : 4, 3>;

// A tile by unit: dq += dS K (B5), and the rows of dk = c dS^T Q (B6) and dv = (P R)^T dO (B4).
template <typename Plan, typename T, int D>
ATTN_DEVICE void add_gradients(Acc<T> (&dq)[SEEDS][D / 32], const KernelParams& p,
                               const Part& part, int first, int head, Acc<T> scale, const T* k,
                               const Acc<T>* q, const Acc<T>* dout, const Acc<T>* ds,
                               const Acc<T>* kept, uint32_t mask) {
  using A = Acc<T>;
  constexpr int N = Plan::TOGETHER, U = D / 32;
  const int rows = rows_from(part.last, first, Plan::KEYS);
  ATTN_ROLLED
  for (int key = 0; key < rows; key += N) {
    A x[N][U], dk[N][U], dv[N][U];
    ATTN_UNROLL
    for (int i = 0; i < N; ++i) {
      read_units(x[i], k + (key + i) * STRIDE<T, D>);
      ATTN_UNROLL
      for (int u = 0; u < U; ++u) dk[i][u] = dv[i][u] = 0;
    }
    ATTN_UNROLL
    for (int s = 0; s < SEEDS; ++s) {
      if (!(mask >> s & 1)) continue;
      const Pack<A, N> a = load_pack<N>(ds + s * Plan::PAIR_KEYS + key);
      const Pack<A, N> b = load_pack<N>(kept + s * Plan::PAIR_KEYS + key);
      A of_q[U], of_dout[U];
      read_units(of_q, q + s * D);
      read_units(of_dout, dout + s * D);
      ATTN_UNROLL
      for (int u = 0; u < U; ++u) {
        A part = 0;
        ATTN_UNROLL
        for (int i = 0; i < N; ++i) {
          part += a.at[i] * x[i][u];
          dk[i][u] += a.at[i] * of_q[u];
          dv[i][u] += b.at[i] * of_dout[u];
        }
        dq[s][u] += part;
      }
    }
    ATTN_UNROLL
    for (int i = 0; i < N; ++i) {
      if (key + i >= rows) continue;
      ATTN_UNROLL
      for (int u = 0; u < U; ++u) dk[i][u] *= scale;
      const int64_t row = int64_t(part.row) + first + key + i;
      store_units<T>(p.dk, 0, row, head, int(p.head_dim), dk[i]);
      store_units<T>(p.dv, 0, row, head, int(p.value_dim), dv[i]);
    }
  }
}

template <typename T, int D>
ATTN_KERNEL ATTN_BOUNDS(SeedsBackwardPlan<T, D>::THREADS)
    few_seeds_backward_kernel(ATTN_GRID_CONSTANT KernelParams p) {
  using Plan = SeedsBackwardPlan<T, D>;
  using A = Acc<T>;
  constexpr int KEYS = Plan::KEYS;
  ATTN_SHARED_MEMORY(memory);
  const Place<Plan> place(p);
  const int head = place.head, lane = lane_index(), key = lane % KEYS;
  const SeedsWork work(p, place.tile);
  if (work.surplus) return;

  T* b_k = reinterpret_cast<T*>(place.memory(memory));
  T* b_v = b_k + Plan::STAGES * Plan::TILE;
  A* b_q = reinterpret_cast<A*>(b_v + Plan::STAGES * Plan::TILE);
  A* b_dout = b_q + Plan::SEED_ROWS;
  A* b_ds = b_dout + Plan::SEED_ROWS;  // exp(S - lse) in the first sweep
  A* b_kept = b_ds + Plan::TERMS;      // P R; dP in the first sweep
  A* b_lse = b_kept + Plan::TERMS;
  A *b_norm = b_lse + SEEDS, *b_delta = b_norm + SEEDS;  // delta is delta'
  const int head_dim = int(p.head_dim), value_dim = int(p.value_dim), seeds = int(p.query_rows);
  if (work.clears) {
    clear_rows_of_nobody<T, Plan::UNITS>(p, p.dk, place.tile, head, head_dim);
    clear_rows_of_nobody<T, Plan::UNITS>(p, p.dv, place.tile, head, value_dim);
    clear_pairs_of_nobody(p, p.dbias, place.tile, head);
    clear_keys_of_nobody(p, p.dkey_bias, place.tile, head);
  }
  A dq[SEEDS][Plan::UNITS];
  clear_seeds(dq);
  bool new_seeds = true;
  ATTN_ROLLED
  for (int item = 0; item < work.items; ++item) {
    const Part part = work.part(p, item);
    if (part.last == 0) continue;
    const int tiles = (part.last - part.first + KEYS - 1) / KEYS;
    const bool whole = part.keys <= p.split, resident = whole && tiles <= Plan::STAGES;
    const Pairs<T> pairs(p, part.molecule, head, part.keys, part.row);
    const auto load = [&](int tile, int stage) {
      const int first = part.first + tile * KEYS;
      load_tile<Plan, T, D>(b_k + stage * Plan::TILE, p.k, p.vector_loads & VECTOR_K, part, first,
                            head, head_dim);
      load_tile<Plan, T, D>(b_v + stage * Plan::TILE, p.v, p.vector_loads & VECTOR_V, part, first,
                            head, value_dim);
    };
    begin_tiles<Plan>(tiles, load);
    if (new_seeds) load_seeds<T, D>(b_q, p.q, 0, head, seeds, head_dim);
    new_seeds = false;
    load_seeds<T, D>(b_dout, p.dout, part.molecule, head, seeds, value_dim);
    const uint32_t mask = load_lse(b_lse, p, part.molecule, head);
    // exp(S - lse) and dP of this lane's key; 0 where there is none.
    const auto multiply = [&](A(&weight)[SEEDS], A(&dp)[SEEDS], int stage, int j, uint32_t kept) {
      const int row = stage * Plan::TILE + key * STRIDE<T, D>;
      clear_seeds(weight);
      clear_seeds(dp);
      add_products<Plan, T, D>(weight, b_k + row, b_q, mask);
      add_products<Plan, T, D>(dp, b_v + row, b_dout, mask);
      complete_products<Plan>(weight, mask);
      complete_products<Plan>(dp, mask);
      const bool real = j < part.last;
      const A of_key = real ? pairs.key_value(p.key_bias, j) : A(0);
      ATTN_UNROLL
      for (int s = 0; s < SEEDS; ++s) {
        if (!(mask >> s & 1)) continue;
        weight[s] =
            real ? exponential<T>(pairs.logit(weight[s], s, j, of_key) - b_lse[s]) : A(0);  // (F2)
        dp[s] = real && (kept >> s & 1) ? dp[s] * pairs.keep_scale : A(0);                // (B1)
      }
    };
    const auto find_statistics = [&] {
      A total[SEEDS], delta[SEEDS];
      clear_seeds(total);
      clear_seeds(delta);
      const auto add = [&](int tile, int stage) {
        const int at = tile * KEYS + key, j = part.first + at;
        A weight[SEEDS], dp[SEEDS];
        multiply(weight, dp, stage, j, keep_seeds(pairs, j, seeds));
        ATTN_UNROLL
        for (int s = 0; s < SEEDS; ++s) {
          if (!(mask >> s & 1)) continue;
          total[s] += weight[s];
          delta[s] += weight[s] * dp[s];                                               // (B2)
          if (!resident || lane >= KEYS) continue;
          b_ds[s * Plan::PAIR_KEYS + at] = weight[s];
          b_kept[s * Plan::PAIR_KEYS + at] = dp[s];
        }
      };
      const bool sweeps = whole || p.only_statistics;
      if (sweeps) stream_tiles<Plan>(tiles, false, load, add);
      if (sweeps && !p.only_statistics && !resident) begin_tiles<Plan>(tiles, load);
      ATTN_UNROLL
      for (int s = 0; s < SEEDS; ++s) {
        if (!(mask >> s & 1)) continue;
        if (!sweeps) {
          A lost_total = 0, lost_delta = 0;
          for (int64_t i = lane * p.split; i < part.keys; i += 32 * p.split) {
            const A* from = numbers_of_part<A>(p, part, int(i), head, s) + value_dim;
            add_exactly(total[s], lost_total, from[0]);
            add_exactly(delta[s], lost_delta, from[1]);
          }
          total[s] += lost_total;
          delta[s] += lost_delta;
        }
        total[s] = sum_below(total[s], sweeps ? KEYS : 32);
        delta[s] = sum_below(delta[s], sweeps ? KEYS : 32);
        if (lane > 0) continue;
        if (p.only_statistics) {
          A* to = numbers_of_part<A>(p, part, part.first, head, s) + value_dim;
          to[0] = total[s];
          to[1] = delta[s];
          continue;
        }
        const A norm = total[s] == 0 ? A(0) : A(1) / total[s];
        const A dlse = p.dlse.data ? *address<const A>(p.dlse, part.molecule, s, head) : A(0);
        b_norm[s] = norm;
        b_delta[s] = delta[s] * norm - dlse;
      }
      warp_barrier();
    };
    const auto find_gradients = [&](int tile, int stage) {
      const int first = part.first + tile * KEYS, j = first + key;
      const int at = (resident ? tile * KEYS : 0) + key;
      const uint32_t kept = keep_seeds(pairs, j, seeds);
      A weight[SEEDS], dp[SEEDS], sum = 0;
      if (!resident) multiply(weight, dp, stage, j, kept);
      ATTN_UNROLL
      for (int s = 0; s < SEEDS; ++s) {
        if (lane >= KEYS || s >= seeds) continue;
        A ds = 0;
        if (mask >> s & 1) {
          const int pair = s * Plan::PAIR_KEYS + at;
          const A x = (resident ? b_ds[pair] : weight[s]) * b_norm[s];
          ds = score_gradient(x, resident ? b_kept[pair] : dp[s], b_delta[s]);           // (B3)
          b_ds[pair] = ds;
          b_kept[pair] = kept >> s & 1 ? x * pairs.keep_scale : A(0);
        }
        sum += ds;
        if (j < part.last) pairs.store_pair(p.dbias, s, j, ds);                        // (B7)
      }
      if (lane < KEYS && j < part.last) pairs.store_key(p.dkey_bias, j, sum);          // (B8)
      warp_barrier();
      add_gradients<Plan, T, D>(dq, p, part, first, head, pairs.scale, b_k + stage * Plan::TILE,
                                b_q, b_dout, b_ds + at - key, b_kept + at - key, mask);
    };

    find_statistics();
    if (!p.only_statistics) stream_tiles<Plan>(tiles, resident, load, find_gradients);
  }
  if (!p.only_statistics) store_partial<T>(p, place.tile, head, dq);
}

template <typename T, int D>
struct RunSeedsBackward {
  static int run(const KernelParams& p, void* stream) {
    using Plan = SeedsBackwardPlan<T, D>;
    const int status = launch_parts<few_seeds_backward_kernel<T, D>, Plan>(p, stream);
    return status ? status : sum_over_molecules<T>(p, stream);
  }
};

int launch_few_seeds_backward(const KernelParams& p, void* stream) {
  return for_instance<RunSeedsBackward>(p, stream);
}

}  // namespace attnpool
