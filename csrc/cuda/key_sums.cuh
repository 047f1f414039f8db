// Sums over queries, one for each of the 16 keys of a slot: (B8), (D13).
#pragma once

#include "pairs.cuh"

namespace attnpool {

// The four lanes that share a row of an accumulator add up its columns apart, each in places of its
// own in shared memory: two more sums in registers would spill. So no lane waits for another before
// the end, and the order of a sum is that of the steps over the queries.
template <typename T>
struct KeySums {
  static constexpr int PLACES = 4;  // of a key
  Acc<T>* own;                      // of this lane, for row g; 32 places on, for row g + 8

  // of_group: PLACES for each key of the group's tile
  ATTN_DEVICE KeySums(Acc<T>* of_group, int slot)
      : own(of_group + slot * PLACES + lane_index()) {}

  ATTN_DEVICE void clear() const { own[0] = own[32] = 0; }

  template <int N>
  ATTN_DEVICE void add(const Acc<T> (&terms)[N][4]) const {
    ATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      Acc<T> sum = 0;
      ATTN_UNROLL
      for (int n = 0; n < N; ++n) sum += terms[n][2 * half] + terms[n][2 * half + 1];
      own[32 * half] += sum;
    }
  }

  // first: the slot's first key in the molecule. All lanes; rows behind the last key are not keys.
  ATTN_DEVICE void store(const Pairs<T>& pairs, const View& x, int first) const {
    ATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Acc<T> sum = quad_sum(own[32 * half]);
      if (lane_index() % 4 == 0) pairs.store_key(x, first + lane_index() / 4 + 8 * half, sum);
    }
  }
};

}  // namespace attnpool
