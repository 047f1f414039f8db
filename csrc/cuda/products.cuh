// Products of one warp: tiles in shared memory, accumulators in registers.
#pragma once

#include "place.cuh"

namespace attnpool {

template <int N, typename A>
ATTN_DEVICE void clear(A (&c)[N][4]) {
  ATTN_UNROLL
  for (int n = 0; n < N; ++n)
    ATTN_UNROLL
    for (int e = 0; e < 4; ++e) c[n][e] = 0;
}

// c (16 x 8 N) += a bᵀ over the D units: a is the first of 16 rows of a tile, b of 8 N rows.
// SWAPPED says that a is the keys' side; a product has the same bits either way.
template <typename T, int D, bool SWAPPED, int N>
ATTN_DEVICE void multiply_rows(Acc<T> (&c)[N][4], const T* a, const T* b) {
  constexpr int S = STRIDE<T, D>;
  const int lane = lane_index();
  if constexpr (IS_HALF<T>) {
    static_assert(N % 2 == 0);
    const T* a_row = a + lane % 16 * S + lane / 16 * 8;
    const T* b_row = b + (lane % 8 + lane / 16 * 8) * S + lane / 8 % 2 * 8;
    ATTN_UNROLL_TWO
    for (int d = 0; d < D; d += 16) {
      uint32_t x[4], y[4];
      load_matrices(x, a_row + d);
      ATTN_UNROLL
      for (int n = 0; n < N; n += 2) {
        load_matrices(y, b_row + n * 8 * S + d);
        mma_16(c[n], x, y[0], y[1], T{});
        mma_16(c[n + 1], x, y[2], y[3], T{});
      }
    }
  } else if constexpr (sizeof(T) == 4) {
    const T* a_row = a + lane / 4 * S + lane % 4 * 2;
    const T* b_row = b + lane / 4 * S + lane % 4 * 2;
    const auto pair = [](const T* x) { return Split(x[0], x[1]); };
    ATTN_ROLLED  // eight products a step are enough in flight, and the parts take registers
    for (int d = 0; d < D; d += 16) {
      const Split x[4] = {pair(a_row + d), pair(a_row + 8 * S + d), pair(a_row + d + 8),
                          pair(a_row + 8 * S + d + 8)};
      ATTN_UNROLL
      for (int n = 0; n < N; ++n) {
        const Split y[2] = {pair(b_row + n * 8 * S + d), pair(b_row + n * 8 * S + d + 8)};
        mma_16<SWAPPED>(c[n], x, y);
      }
    }
  } else {
    const T* a_row = a + lane / 4 * S + lane % 4;
    const T* b_row = b + lane / 4 * S + lane % 4;
    ATTN_ROLLED
    for (int d = 0; d < D; d += 8) {
      const T x[4] = {a_row[d], a_row[8 * S + d], a_row[d + 4], a_row[8 * S + d + 4]};
      ATTN_UNROLL
      for (int n = 0; n < N; ++n) mma_8(c[n], x, b_row[n * 8 * S + d], b_row[n * 8 * S + d + 4]);
    }
  }
}

// c (16 x 8 M) += p b: p (16 x 8 N) is an accumulator, b the first of 8 N rows of a tile, from its
// unit of interest on. An accumulator is a left operand as it stands: two of its 8 columns make 16
// for the half types and float; for double its columns 2t and 2t + 1 serve as t and t + 4, which
// only reorders the sum.
template <typename T, int D, int N, int M>
ATTN_DEVICE void multiply_weights(Acc<T> (&c)[M][4], const Acc<T> (&p)[N][4], const T* b) {
  constexpr int S = STRIDE<T, D>;
  const int lane = lane_index();
  if constexpr (IS_HALF<T>) {
    static_assert(N % 2 == 0 && M % 2 == 0);
    const T* b_row = b + (lane % 8 + lane / 8 % 2 * 8) * S + lane / 16 * 8;
    ATTN_UNROLL
    for (int n = 0; n < N; n += 2) {
      const uint32_t x[4] = {
          pack(p[n][0], p[n][1], T{}), pack(p[n][2], p[n][3], T{}),
          pack(p[n + 1][0], p[n + 1][1], T{}), pack(p[n + 1][2], p[n + 1][3], T{})};
      ATTN_UNROLL
      for (int m = 0; m < M; m += 2) {
        uint32_t y[4];
        load_matrices_transposed(y, b_row + n * 8 * S + m * 8);
        mma_16(c[m], x, y[0], y[1], T{});
        mma_16(c[m + 1], x, y[2], y[3], T{});
      }
    }
  } else if constexpr (sizeof(T) == 4) {
    static_assert(N % 2 == 0);
    const T* b_row = b + lane % 4 * 2 * S + lane / 4;
    ATTN_UNROLL
    for (int n = 0; n < N; n += 2) {
      const Split x[4] = {Split(p[n][0], p[n][1]), Split(p[n][2], p[n][3]),
                          Split(p[n + 1][0], p[n + 1][1]), Split(p[n + 1][2], p[n + 1][3])};
      ATTN_UNROLL
      for (int m = 0; m < M; ++m) {
        const T* y = b_row + n * 8 * S + m * 8;
        const Split columns[2] = {Split(y[0], y[S]), Split(y[8 * S], y[9 * S])};
        mma_16<false>(c[m], x, columns);
      }
    }
  } else {
    const T* b_row = b + lane % 4 * 2 * S + lane / 4;
    ATTN_UNROLL
    for (int n = 0; n < N; ++n) {
      const T x[4] = {p[n][0], p[n][2], p[n][1], p[n][3]};
      ATTN_UNROLL
      for (int m = 0; m < M; ++m)
        mma_8(c[m], x, b_row[n * 8 * S + m * 8], b_row[(n * 8 + 1) * S + m * 8]);
    }
  }
}

}  // namespace attnpool
