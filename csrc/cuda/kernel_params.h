// What a CUDA kernel gets besides AttnParams. Host and device, no torch, no CUDA header.
#pragma once

#include "tiles.h"

namespace attnpool {

// Tensors whose rows may be read 16 bytes at a time.
enum VectorLoads : uint32_t {
  VECTOR_Q = 1,
  VECTOR_K = 2,
  VECTOR_V = 4,
  VECTOR_DOUT = 8,
  VECTOR_DDQ = 16,
  VECTOR_DDK = 32,
  VECTOR_DDV = 64
};

struct KernelParams : AttnParams {
  // Row statistics that a key tile needs and a query tile computes, [query rows, heads, 4] in the
  // accumulator's type: norm, delta', t, y. With shared seeds [molecules, seeds, heads, 4].
  void* statistics;
  // Shared seeds: `partial_rows` partial results of d(q), each [seeds, heads, head_dim] in the
  // accumulator's type, one a molecule if not said otherwise, later summed in a fixed order; and
  // the room for that sum.
  void* partial;
  void* partial_sums;
  int64_t partial_rows;
  uint32_t vector_loads;
  // Few seeds (few_seeds.cuh): numbers of the parts of molecules of more than `split` keys; how
  // many molecules a warp takes in the gradients; and which of their launches this is.
  int32_t split;
  void* parts;
  int32_t molecule_chunk;
  int32_t only_statistics;
  // Small sets (small_sets.cuh): those of at most `small_rows` queries and keys are theirs (0: none
  // is), and so are the rows of nobody; a set has 2^head_shift blocks; `longest` bounds the rows of
  // every set, 0: unknown; zero is 0, scale_float is scale.
  int32_t small_rows, head_shift, longest;
  uint32_t zero;
  float scale_float;
};

inline bool loads_by_16_bytes(const View& x, int64_t units, int64_t element) {
  const uint64_t bits = reinterpret_cast<uint64_t>(x.data) |
                        static_cast<uint64_t>(x.molecule * element) |
                        static_cast<uint64_t>(x.row * element) |
                        static_cast<uint64_t>(x.head * element) |
                        static_cast<uint64_t>(units * element);
  return x.unit == 1 && bits % 16 == 0;
}

inline uint32_t vector_loads(const AttnParams& a, int64_t element) {
  const auto flag = [&](const View& x, int64_t units, uint32_t bit) {
    return loads_by_16_bytes(x, units, element) ? bit : 0u;
  };
  return flag(a.q, a.head_dim, VECTOR_Q) | flag(a.k, a.head_dim, VECTOR_K) |
         flag(a.v, a.value_dim, VECTOR_V) | flag(a.dout, a.value_dim, VECTOR_DOUT) |
         flag(a.ddq, a.head_dim, VECTOR_DDQ) | flag(a.ddk, a.head_dim, VECTOR_DDK) |
         flag(a.ddv, a.value_dim, VECTOR_DDV);
}

}  // namespace attnpool
