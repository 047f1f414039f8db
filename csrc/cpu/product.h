// The one matrix product of all passes: C = A B with C in registers, A read by scalars and B by
// vectors. What differs is which way A runs in memory.
#pragma once

#include "simd.h"

namespace attnpool {
namespace ATTN_ISA {

// c[i][x] = factor * sum_k a(i, k) * b[k][x], for i < rows and x < vectors * WIDTH<T>.
//   rows_scale: sums are also multiplied by rows_scale[i];
//   accumulate: the old c[i][x] (times rows_scale[i], which then spares the sum) is added.
template <typename T>
struct Product {
  const T* a;
  int64_t a_stride;  // between rows of a (product_rows) or between its k (product_columns)
  const T* b;
  int64_t b_stride;
  T* c;
  int64_t c_stride;
  int rows, vectors, depth;
  T factor;
  const T* rows_scale;
  bool accumulate;
};

template <typename T>
void product_rows(const Product<T>& x);  // a(i, k) = a[i * a_stride + k]
template <typename T>
void product_columns(const Product<T>& x);  // a(i, k) = a[k * a_stride + i]

}  // namespace ATTN_ISA
}  // namespace attnpool
