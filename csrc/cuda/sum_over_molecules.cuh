// d(seeds): the sum of the partial results of molecules, in a fixed order that depends on their
// number alone. SUM_CHUNK rows at a time, then the chunks.
#pragma once

#include "launch.h"
#include "warp.cuh"

namespace attnpool {

struct SumPlan {
  static constexpr int GROUPS = 1, THREADS = 256, BYTES = 0;
};

// Grid: x only, (chunks x elements / THREADS) blocks; one thread a chunk and element.
template <typename A, typename Out>
ATTN_DEVICE void sum_rows(const A* from, Out* to, int64_t rows, int64_t chunk, int64_t elements) {
  const int64_t blocks = (elements + SumPlan::THREADS - 1) / SumPlan::THREADS;
  const int64_t first = blockIdx.x / blocks * chunk;
  const int64_t element = blockIdx.x % blocks * SumPlan::THREADS + threadIdx.x;
  const int64_t last = first + chunk < rows ? first + chunk : rows;
  if (element >= elements) return;
  A sum = 0, lost = 0;
  for (int64_t row = first; row < last; ++row)
    add_exactly(sum, lost, from[row * elements + element]);
  from_acc(whole_sum(sum, lost), to[blockIdx.x / blocks * elements + element]);
}

template <typename T>
ATTN_KERNEL ATTN_BOUNDS(SumPlan::THREADS) sum_chunks_kernel(ATTN_GRID_CONSTANT KernelParams p) {
  sum_rows(static_cast<const Acc<T>*>(p.partial), static_cast<Acc<T>*>(p.partial_sums),
           p.partial_rows, SUM_CHUNK, p.query_rows * p.heads * p.head_dim);
}

template <typename T>
ATTN_KERNEL ATTN_BOUNDS(SumPlan::THREADS) sum_seeds_kernel(ATTN_GRID_CONSTANT KernelParams p) {
  const int64_t chunks = (p.partial_rows + SUM_CHUNK - 1) / SUM_CHUNK;
  T* to = static_cast<T*>(p.gq.data ? p.gq.data : p.dq.data);
  sum_rows(static_cast<const Acc<T>*>(p.partial_sums), to, chunks, chunks + 1,
           p.query_rows * p.heads * p.head_dim);
}

template <typename T>
int sum_over_molecules(const KernelParams& p, void* stream) {
  const int64_t elements = p.query_rows * p.heads * p.head_dim;
  const int64_t blocks = (elements + SumPlan::THREADS - 1) / SumPlan::THREADS;
  const int64_t chunks = (p.partial_rows + SUM_CHUNK - 1) / SUM_CHUNK;
  const int status = launch<sum_chunks_kernel<T>, SumPlan>(chunks * blocks, p, stream);
  return status ? status : launch<sum_seeds_kernel<T>, SumPlan>(blocks, p, stream);
}

}  // namespace attnpool
