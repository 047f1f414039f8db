// The one matrix product of all passes: C = A B with C in registers, A read by scalars and B by
// vectors. What differs is which way A runs in memory.
#pragma once

#include "ahead.h"
#include "simd.h"

namespace attnpool {
namespace ATTN_ISA {

// c[i][x] = factor * sum_k a(i, k) * b[k][x], for i < rows and x < columns.
//   columns: at least a vector. Where they are no multiple of it, the last vector overlaps the one
//     before, so that nothing beyond the rows of b and c is touched;
//   rows_scale: sums are also multiplied by rows_scale[i] (product_columns);
//   accumulate: the old c[i][x] (times rows_scale[i], which then spares the sum) is added;
//   ahead: what is fetched meanwhile, or null;
//   stream: c is written past the caches, if its layout allows (not with accumulate);
//   more_a, more_b: where not null, a second a and b of the same strides whose product is added;
//   maxima: where not null, maxima[x] is raised to the largest c[i][x] (not with accumulate).
template <typename T>
struct Product {
  const T* a;
  int64_t a_stride;  // between rows of a (product_rows) or between its k (product_columns)
  const T* b;
  int64_t b_stride;
  T* c;
  int64_t c_stride;
  int rows, columns, depth;
  T factor;
  T* rows_scale;
  bool accumulate;
  Ahead* ahead = nullptr;
  bool stream = false;
  T* maxima = nullptr;
  const T *more_a = nullptr, *more_b = nullptr;
};

template <typename T>
void product_rows(const Product<T>& x);  // a(i, k) = a[i * a_stride + k]
template <typename T>
void product_columns(const Product<T>& x);  // a(i, k) = a[k * a_stride + i]

#if defined(__AVX512F__)
// The same where each element of a and b is a pair of bfloat16 and k counts pairs, for processors
// that have_pairs(); nothing is accumulated or streamed.
void pair_product_rows(const Product<float>& x);
void pair_product_columns(const Product<float>& x);
inline bool have_pairs() { return __builtin_cpu_supports("avx512bf16"); }
#endif

}  // namespace ATTN_ISA
}  // namespace attnpool
