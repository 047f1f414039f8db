// Rows that belong to no set, before the first and behind the last one, and pairs behind the last
// set's: what the kernels for small sets write there, by a few blocks of their own.
#pragma once

#include "pairs.cuh"

namespace attnpool {

constexpr int SMALL_WARPS = 4;  // of a block
constexpr int NOBODY_BLOCKS = 4, NOBODY_THREADS = NOBODY_BLOCKS * SMALL_WARPS * 32;

// Rows first ... last - 1, by all threads of the blocks for the rows of nobody; a warp has a row.
template <typename Fill>
ATTN_DEVICE void for_elements(int64_t first, int64_t last, int64_t heads, int units, int thread,
                              const Fill& fill) {
  ATTN_ROLLED
  for (int64_t row = first + thread / 32; row < last; row += NOBODY_THREADS / 32)
    ATTN_ROLLED
    for (int head = 0; head < heads; ++head)
      ATTN_ROLLED
      for (int unit = lane_index(); unit < units; unit += 32) fill(row, head, unit);
}

// Calls fill(first, last) for the rows of an axis before the first molecule and behind the last.
template <typename Fill>
ATTN_DEVICE void for_rows_of_nobody(const Axis& axis, const Fill& fill) {
  ATTN_ROLLED  // one copy of the code
  for (int side = 0; side < 2; ++side)
    fill(side ? edge(axis, axis.molecules) : 0, side ? axis.rows : edge(axis, 0));
}

template <typename T>
ATTN_DEVICE void fill_rows_of_nobody(const KernelParams& p, const View& x, bool of_queries,
                                     int64_t units, T value, int thread) {
  for_rows_of_nobody(of_queries ? query_axis(p) : key_axis(p), [&](int64_t first, int64_t last) {
    for_elements(first, last, p.heads, int(units), thread, [&](int64_t row, int head, int unit) {
      address<T>(x, 0, row, head)[unit] = value;
    });
  });
}

ATTN_DEVICE void clear_added_of_nobody(const KernelParams& p, const View& bias,
                                       const View& key_bias, int thread) {
  const auto clear = [&](const View& x, Dtype stored, int64_t first, int64_t last) {
    for_elements(first, last, p.heads, 1, thread, [&](int64_t row, int head, int) {
      clear_element(x, stored, row, head);
    });
  };
  if (bias.data)
    clear(bias, p.bias_dtype, span_between(p.pair_ptr[p.molecules], p.pairs, p.pairs).first,
          p.pairs);
  if (key_bias.data)
    for_rows_of_nobody(key_axis(p), [&](int64_t first, int64_t last) {
      clear(key_bias, p.key_bias_dtype, first, last);
    });
}

}  // namespace attnpool
