// Rows of values of molecules of several parts: few_seeds_forward.cu and the double backward leave
// one a part, here they become `out` and `lse` or `gdout`.
#pragma once

#include "few_seeds.cuh"

namespace attnpool {

// out and lse of a seed, from sums relative to its largest logit.
template <typename T, int N>
ATTN_DEVICE void store_result(const KernelParams& p, int molecule, int head, int seed,
                              Acc<T> (&sum)[N], Acc<T> highest, Acc<T> total) {
  using A = Acc<T>;
  const bool empty = total == 0;
  const A inverse = empty ? A(0) : A(1) / total;
  ATTN_UNROLL
  for (int n = 0; n < N; ++n) sum[n] = empty ? A(0) : sum[n] * inverse;
  store_units<T>(p.out, molecule, seed, head, int(p.value_dim), sum);
  if (lane_index() == 0)                                                               // (F2)
    *address<A>(p.lse, molecule, seed, head) =
        empty ? -A(INFINITY) : highest + natural_log(total);
}

template <typename T>
struct MergePlan {
  static constexpr int WARPS = 8, GROUP_THREADS = WARPS * 32, GROUPS = 1, UNITS = 4;
  static constexpr int ROW = MAX_DIM + 4;  // and the sum of weights
  static constexpr int GROUP_BYTES = WARPS * ROW * int(sizeof(Acc<T>));
  static constexpr int THREADS = GROUP_THREADS, BYTES = GROUP_BYTES;
};

// Grid: x only, a block for every slot, head and seed. A warp adds consecutive parts in order, then
// the first one the sums of the warps: an order that depends on the number of parts alone.
template <typename T>
ATTN_KERNEL ATTN_BOUNDS(MergePlan<T>::THREADS)
    merge_parts_kernel(ATTN_GRID_CONSTANT KernelParams p) {
  using Plan = MergePlan<T>;
  using A = Acc<T>;
  ATTN_SHARED_MEMORY(memory);
  const Place<Plan> place(p);
  const int head = place.head, lane = lane_index(), warp = place.thread / 32;
  const int seed = int(place.tile % p.query_rows), value_dim = int(p.value_dim);
  const Part part = part_in_slot(p, place.tile / p.query_rows, true);
  if (part.last == 0) return;
  const int parts = (part.keys + p.split - 1) / p.split;
  const auto numbers = [&](int i) {
    return numbers_of_part<A>(p, part, i * p.split, head, seed);
  };
  const bool weighted = !p.gdout.data;
  A highest = -A(INFINITY), total = 0, sum[Plan::UNITS] = {0, 0, 0, 0};
  A lost_total = 0, lost[Plan::UNITS] = {0, 0, 0, 0};
  if (weighted) {
    for (int i = lane; i < parts; i += 32) {
      const A peak = numbers(i)[value_dim];
      highest = peak > highest ? peak : highest;
    }
    highest = max_below(highest, 32);
  }
  const int first = int(int64_t(parts) * warp / Plan::WARPS);
  const int last = int(int64_t(parts) * (warp + 1) / Plan::WARPS);
  ATTN_UNROLL_TWO
  for (int i = first; i < last; ++i) {
    const A* from = numbers(i);
    A share = 1;
    if (weighted) {
      share = from[value_dim] == -A(INFINITY) ? A(0) : exponential<T>(from[value_dim] - highest);
      add_exactly(total, lost_total, from[value_dim + 1] * share);
    }
    ATTN_UNROLL
    for (int u = 0; u < Plan::UNITS; ++u)
      if (lane * Plan::UNITS + u < value_dim)
        add_exactly(sum[u], lost[u], from[lane * Plan::UNITS + u] * share);
  }
  total += lost_total;
  ATTN_UNROLL
  for (int u = 0; u < Plan::UNITS; ++u) sum[u] = whole_sum(sum[u], lost[u]);
  A* rows = reinterpret_cast<A*>(memory);
  A* row = rows + warp * Plan::ROW;
  ATTN_UNROLL
  for (int u = 0; u < Plan::UNITS; ++u) row[lane * Plan::UNITS + u] = sum[u];
  if (lane == 0) row[MAX_DIM] = total;
  group_barrier(1, Plan::THREADS);
  if (warp > 0) return;
  for (int i = 1; i < Plan::WARPS; ++i) {
    ATTN_UNROLL
    for (int u = 0; u < Plan::UNITS; ++u)
      sum[u] += rows[i * Plan::ROW + lane * Plan::UNITS + u];
    total += rows[i * Plan::ROW + MAX_DIM];
  }
  if (weighted) store_result<T>(p, part.molecule, head, seed, sum, highest, total);
  else store_units<T>(p.gdout, part.molecule, seed, head, value_dim, sum);
}

template <typename T>
int merge_parts(const KernelParams& p, void* stream) {
  const int64_t blocks = slot_count(p) * p.query_rows * p.heads;
  return launch<merge_parts_kernel<T>, MergePlan<T>>(blocks, p, stream);
}

}  // namespace attnpool
