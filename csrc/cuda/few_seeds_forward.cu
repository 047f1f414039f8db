// (F1)-(F3) for few seeds: out and lse. Shape of the work: few_seeds.cuh.
//
// Grid: x only, one warp a head and slot of `split` keys (a part that is not its molecule's first),
// then one a head and molecule (its first part). Shared memory a warp: STAGES tiles of keys and
// values, the seeds, the weights of a tile. Molecules of several parts leave unnormalised sums, the
// largest logit and the sum of weights in `parts`; merge_parts_kernel puts them together.
#include "few_seeds.cuh"
#include "instances.cuh"
#include "few_seeds_merge.cuh"

namespace attnpool {

template <typename T, int D>
using SeedsForwardPlan = SeedsPlan<T, D, 32, 2, 2, 1, 1, 1, 0>;

template <typename T, int D>
ATTN_KERNEL ATTN_BOUNDS(SeedsForwardPlan<T, D>::THREADS)
    few_seeds_forward_kernel(ATTN_GRID_CONSTANT KernelParams p) {
  using Plan = SeedsForwardPlan<T, D>;
  using A = Acc<T>;
  constexpr int KEYS = Plan::KEYS;
  ATTN_SHARED_MEMORY(memory);
  const Place<Plan> place(p);
  const int head = place.head, lane = lane_index();
  const int64_t slots = p.key_rows > p.split ? slot_count(p) : 0;
  if (place.tile >= slots + p.molecules) return;
  const Part part = place.tile < slots ? part_in_slot(p, place.tile, false)
                                       : part_of_molecule(p, place.tile - slots, 0);
  if (place.tile < slots && part.last == 0) return;

  T* b_k = reinterpret_cast<T*>(place.memory(memory));
  T* b_v = b_k + Plan::STAGES * Plan::TILE;
  A* b_q = reinterpret_cast<A*>(b_v + Plan::STAGES * Plan::TILE);
  A* b_weights = b_q + Plan::SEED_ROWS;
  const int head_dim = int(p.head_dim), value_dim = int(p.value_dim), seeds = int(p.query_rows);
  const uint32_t mask = (1u << seeds) - 1;
  const Pairs<T> pairs(p, part.molecule, head, part.keys, part.row);
  A out[SEEDS][Plan::UNITS], highest[SEEDS], total[SEEDS];
  clear_seeds(out);
  clear_seeds(total);  // of this lane's keys
  ATTN_UNROLL
  for (int s = 0; s < SEEDS; ++s) highest[s] = -A(INFINITY);
  const auto load = [&](int tile, int stage) {
    const int first = part.first + tile * KEYS;
    load_tile<Plan, T, D>(b_k + stage * Plan::TILE, p.k, p.vector_loads & VECTOR_K, part, first,
                          head, head_dim);
    load_tile<Plan, T, D>(b_v + stage * Plan::TILE, p.v, p.vector_loads & VECTOR_V, part, first,
                          head, value_dim);
  };
  const auto use = [&](int tile, int stage) {
    const int first = part.first + tile * KEYS, key = lane % KEYS, j = first + key;
    const int rows = rows_from(part.last, first, KEYS);
    A logits[SEEDS];
    clear_seeds(logits);
    add_products<Plan, T, D>(logits, b_k + stage * Plan::TILE + key * STRIDE<T, D>, b_q, mask);
    complete_products<Plan>(logits, mask);
    const uint32_t kept = keep_seeds(pairs, j, seeds);
    const A of_key = key < rows ? pairs.key_value(p.key_bias, j) : A(0);
    ATTN_UNROLL
    for (int s = 0; s < SEEDS; ++s) {
      if (!(mask >> s & 1)) continue;
      const A logit =
          key < rows ? pairs.logit(logits[s], s, j, of_key) : -A(INFINITY);            // (F1)
      A peak = max_below(logit, KEYS);
      peak = highest[s] > peak ? highest[s] : peak;
      const A shrink =
          highest[s] == -A(INFINITY) ? A(0) : exponential<T>(highest[s] - peak);
      highest[s] = peak;
      const A weight = logit == -A(INFINITY) ? A(0) : exponential<T>(logit - peak);
      total[s] = total[s] * shrink + weight;
      if (lane < KEYS)
        b_weights[s * Plan::PAIR_KEYS + key] = kept >> s & 1 ? weight * pairs.keep_scale : A(0);
      ATTN_UNROLL
      for (int u = 0; u < Plan::UNITS; ++u) out[s][u] *= shrink;
    }
    warp_barrier();
    add_rows<Plan, T, D>(out, b_weights, b_v + stage * Plan::TILE, rows, mask);        // (F3)
  };
  const int tiles = (part.last - part.first + KEYS - 1) / KEYS;
  begin_tiles<Plan>(tiles, load);
  load_seeds<T, D>(b_q, p.q, 0, head, seeds, head_dim);
  stream_tiles<Plan>(tiles, false, load, use);

  const bool whole = part.keys <= p.split;
  ATTN_UNROLL
  for (int s = 0; s < SEEDS; ++s) {
    if (!(mask >> s & 1)) continue;
    total[s] = sum_below(total[s], KEYS);
    if (whole) {
      store_result<T>(p, part.molecule, head, s, out[s], highest[s], total[s]);
      continue;
    }
    A* to = numbers_of_part<A>(p, part, part.first, head, s);
    ATTN_UNROLL
    for (int u = 0; u < Plan::UNITS; ++u)
      if (lane * Plan::UNITS + u < value_dim) to[lane * Plan::UNITS + u] = out[s][u];
    if (lane == 0) {
      to[value_dim] = highest[s];
      to[value_dim + 1] = total[s];
    }
  }
}

template <typename T, int D>
struct RunSeedsForward {
  static int run(const KernelParams& p, void* stream) {
    using Plan = SeedsForwardPlan<T, D>;
    const bool several = p.key_rows > p.split;
    const int64_t parts = p.molecules + (several ? slot_count(p) : 0);
    const int status = launch<few_seeds_forward_kernel<T, D>, Plan>(parts * p.heads, p, stream);
    return status || !several ? status : merge_parts<T>(p, stream);
  }
};

int launch_few_seeds_forward(const KernelParams& p, void* stream) {
  return for_instance<RunSeedsForward>(p, stream);
}

}  // namespace attnpool
