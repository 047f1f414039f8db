// Plain data of one kernel call, shared by the CPU and the CUDA kernels. No torch, no C++ library.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define ATTN_HD __host__ __device__ __forceinline__
#else
#define ATTN_HD inline
#endif

namespace attnpool {

enum class Pass { forward, backward, double_backward };
enum class Dtype : int32_t { float16, bfloat16, float32, float64 };

// A tensor [rows, heads, units] (q, out, dq ...), [rows, heads] (lse, biases: unit = 0) or, with
// shared seeds, [molecules, rows, heads, units]. Strides count elements and may be 0. The element
// of molecule b, row r, head h, unit d lies at b * molecule + r * row + h * head + d * unit; packed
// tensors have molecule = 0 and r counts from the start of the tensor, seeds have molecule = 0 and
// r counts the seeds. data is null for an absent tensor (which means zero, or "not wanted").
struct View {
  void* data;
  int64_t molecule, row, head, unit;
};

// Inputs and outputs of all three passes (names of attnpool_kernels/operands.py: dq gradient, ddq
// its cotangent, gq gradient of q in the double backward). What a pass does not use stays zero.
struct AttnParams {
  // All passes.
  View q, k, v;
  View bias, key_bias;      // rows are pairs, and keys
  View out, lse;            // forward writes them, the others read them
  const void* q_ptr;        // [molecules + 1], null with shared seeds
  const void* k_ptr;        // [molecules + 1]
  const int64_t* pair_ptr;  // [molecules + 1], null without bias
  const int64_t* seed;      // [1], null without dropout

  // backward and double_backward
  View dout, dlse;
  View dq, dk, dv, dbias, dkey_bias;       // backward writes them
  View ddq, ddk, ddv, ddbias, ddkey_bias;  // their cotangents
  View gq, gk, gv, gbias, gkey_bias, gdout, gdlse;  // double_backward writes them

  int64_t molecules, heads, head_dim, value_dim;
  int64_t query_rows;  // N_q, or S with shared seeds
  int64_t key_rows;    // N_k
  int64_t pairs;       // P, rows of bias

  double scale;
  double keep_scale;        // 1 / (1 - dropout)
  uint32_t drop_threshold;  // a pair is kept iff its random word is >= this

  Dtype dtype;       // of q, k, v, out and their derivatives
  Dtype bias_dtype, key_bias_dtype;  // dtype, or float32
  int32_t ptr_is_64;     // q_ptr and k_ptr hold int64, else int32
  int32_t shared_seeds;  // the rows of q are seeds of every molecule
};

// Rows first ... first + size - 1 of one molecule, inside [0, rows] whatever ptr holds.
struct Span {
  int64_t first, size;
};

ATTN_HD Span span_between(int64_t first, int64_t last, int64_t rows) {
  first = first < 0 ? 0 : first > rows ? rows : first;
  last = last < first ? first : last > rows ? rows : last;
  return {first, last - first};
}

ATTN_HD Span span_of(const void* ptr, int32_t ptr_is_64, int64_t molecule, int64_t rows) {
  if (ptr_is_64) {
    const int64_t* p = static_cast<const int64_t*>(ptr);
    return span_between(p[molecule], p[molecule + 1], rows);
  }
  const int32_t* p = static_cast<const int32_t*>(ptr);
  return span_between(p[molecule], p[molecule + 1], rows);
}

ATTN_HD Span query_span(const AttnParams& a, int64_t molecule) {
  if (a.shared_seeds) return {0, a.query_rows};
  return span_of(a.q_ptr, a.ptr_is_64, molecule, a.query_rows);
}

ATTN_HD Span key_span(const AttnParams& a, int64_t molecule) {
  return span_of(a.k_ptr, a.ptr_is_64, molecule, a.key_rows);
}

// Row of bias for query i and key j of a molecule is pair_span(a, b).first + i * n_k + j; it exists
// iff i * n_k + j < pair_span(a, b).size, which holds for every pair when ptr and pair_ptr agree.
ATTN_HD Span pair_span(const AttnParams& a, int64_t molecule) {
  return span_between(a.pair_ptr[molecule], a.pair_ptr[molecule + 1], a.pairs);
}

template <typename T>
ATTN_HD T* address(const View& x, int64_t molecule, int64_t row, int64_t head) {
  return static_cast<T*>(x.data) + (molecule * x.molecule + row * x.row + head * x.head);
}

}  // namespace attnpool
