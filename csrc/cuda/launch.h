// The host's side of the CUDA kernels, free of torch and of CUDA headers: what a pass may be asked,
// which kernels serve it, and the call. `stream` is a cudaStream_t; the results are 0 or a
// cudaError_t.
#pragma once

#include "kernel_params.h"

namespace attnpool {

constexpr int64_t MAX_DIM = 128;                // of head_dim and value_dim
constexpr int64_t MAX_ROWS = INT32_MAX - 1024;  // queries, keys, molecules; offsets: 64 bits
constexpr int64_t SUM_CHUNK = 64;               // rows of one part of d(seeds)
constexpr int64_t MAX_SEEDS = 8;                // of the schedule of few seeds
constexpr int32_t SPLIT = 512;                  // keys of a part of a molecule there
constexpr int64_t PART_NUMBERS = 4;             // of a seed, besides a row of values
constexpr int32_t SMALL_ROWS = 64;              // queries and keys of a small set, at most
constexpr int64_t SMALL_WIDTH = 64;             // there, with options

int launch_forward(const KernelParams& p, void* stream);
int launch_backward(const KernelParams& p, void* stream);
int launch_double_backward(const KernelParams& p, void* stream);
int launch_small_forward(const KernelParams& p, void* stream);
int launch_small_backward(const KernelParams& p, void* stream);
int launch_small_double_backward(const KernelParams& p, void* stream);
int launch_few_seeds_forward(const KernelParams& p, void* stream);
int launch_few_seeds_backward(const KernelParams& p, void* stream);
int launch_few_seeds_double_backward(const KernelParams& p, void* stream);

// Whether few_seeds*.cu serve a call.
inline bool has_few_seeds(const AttnParams& a) {
  return a.shared_seeds && 1 <= a.query_rows && a.query_rows <= MAX_SEEDS;
}

// Elements of the accumulator's type that the pointers of that name in KernelParams need.
struct ScratchSizes {
  int64_t statistics, partial, partial_sums, parts;
};

// Fills in what follows from sizes and strides, and tells what is still to be allocated.
inline ScratchSizes prepare(KernelParams& p, Pass pass, int32_t split = SPLIT) {
  const int64_t element = p.dtype == Dtype::float64 ? 8 : p.dtype == Dtype::float32 ? 4 : 2;
  p.vector_loads = vector_loads(p, element);
  p.split = split;
  p.partial_rows = p.molecules;
  ScratchSizes need = {0, 0, 0, 0};
  const int64_t slots = p.key_rows / split + 1, seeds = p.query_rows * p.heads;
  const bool few = has_few_seeds(p);
  if (few) {
    // A warp of the gradients takes several molecules of a large batch, for a shorter sum.
    const int64_t chunk = p.molecules * p.heads / 4096;
    p.molecule_chunk = chunk < 1 ? 1 : chunk > 16 ? 16 : int32_t(chunk);
    p.partial_rows = slots + (p.molecules + p.molecule_chunk - 1) / p.molecule_chunk;
    if (p.key_rows > split) need.parts = 2 * slots * seeds * (p.value_dim + PART_NUMBERS);
  }
  if (pass == Pass::forward) return need;
  if (!few) need.statistics = (p.shared_seeds ? p.molecules * seeds : seeds) * 4;
  if (p.shared_seeds) {
    need.partial = p.partial_rows * seeds * p.head_dim;
    need.partial_sums = (p.partial_rows + SUM_CHUNK - 1) / SUM_CHUNK * seeds * p.head_dim;
  }
  return need;
}

// Whether the instance without options serves them.
inline bool is_plain_small(const KernelParams& p) {
  if (p.gq.data && !(p.ddq.data && p.ddk.data && p.ddv.data)) return false;
  return p.q_ptr == p.k_ptr && p.query_rows == p.key_rows && !p.bias.data && !p.key_bias.data &&
         !p.seed && p.scale > 0 && p.head_dim == p.value_dim &&
         (p.head_dim == 32 || p.head_dim == 64 || p.head_dim == 128);
}

// Whether small_*.cu serve the small sets of a call: rows that are read and written 16 bytes at a
// time, at offsets of 32 bits.
inline bool has_small_sets(const KernelParams& p) {
  if (p.dtype == Dtype::float64 || has_few_seeds(p)) return false;
  if (!is_plain_small(p) && (p.head_dim > SMALL_WIDTH || p.value_dim > SMALL_WIDTH)) return false;
  const int64_t element = p.dtype == Dtype::float32 ? 4 : 2;
  const auto fits = [&](const View& x, int64_t units) {
    return !x.data || (loads_by_16_bytes(x, units, element) && x.row * 64 < INT32_MAX &&
                       x.head * element < INT32_MAX);
  };
  for (const View* x : {&p.q, &p.k, &p.dq, &p.dk, &p.ddq, &p.ddk, &p.gq, &p.gk})
    if (!fits(*x, p.head_dim)) return false;
  for (const View* x : {&p.v, &p.out, &p.dout, &p.dv, &p.ddv, &p.gv, &p.gdout})
    if (!fits(*x, p.value_dim)) return false;
  return true;
}

// Whether the kernels for sets of any size have something to do.
inline bool has_large_sets(const KernelParams& p) {
  return p.small_rows == 0 || p.longest == 0 || p.longest > p.small_rows;
}

inline int run_pass(Pass pass, KernelParams p, void* stream) {
  const bool few = has_few_seeds(p);
  p.small_rows = has_small_sets(p) ? SMALL_ROWS : 0;
  p.zero = 0;
  p.scale_float = float(p.scale);
  // Blocks enough for four on each multiprocessor of a large chip; a warp has at least one head.
  while (p.molecules << p.head_shift < 528 && int64_t{4} << p.head_shift < p.heads) ++p.head_shift;
  switch (pass) {
    case Pass::forward: return (few ? launch_few_seeds_forward : launch_forward)(p, stream);
    case Pass::backward: return (few ? launch_few_seeds_backward : launch_backward)(p, stream);
    case Pass::double_backward:
      return (few ? launch_few_seeds_double_backward : launch_double_backward)(p, stream);
  }
  return -1;
}

}  // namespace attnpool
