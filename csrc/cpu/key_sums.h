// (B8), (D13): gradients of the bias of the keys.
#pragma once

#include "block.h"

namespace attnpool {
namespace ATTN_ISA {

// Sums over the queries of a molecule, one for each key of a block of them.
template <typename T>
struct KeySums {
  T *block, *sum, *lost;  // [keys of a block], null where they are not wanted
  bool started = false;

  static int64_t elements(const AttnParams& a, int64_t keys) {
    return a.key_bias.data ? whole_vectors<T>(keys) : 0;
  }

  template <LanesAre L>
  void add(const Block& at, const T* x) {
    if (!block) return;
    if constexpr (L == LanesAre::queries) add_up_queries(at, x);
    else add_up_rows(at, x);
    for (int64_t j = 0; j < at.nj; j += WIDTH<T>) {
      Vector<T> all = load(block + j), rest{};
      if (started) {
        all = load(sum + j), rest = load(lost + j);
        add_exactly<T>(all, rest, load(block + j));
      }
      store(sum + j, all);
      store(lost + j, rest);
    }
    started = true;
  }

  void finish(const AttnParams& a, const Block& at, const View& to) {
    if (!to.data) return;
    for_keys(a, to, at, [&](int64_t j, auto* x) { narrow(started ? sum[j] + lost[j] : T(0), x); });
    started = false;
  }

 private:
  void add_up_rows(const Block& at, const T* x) {
    for (int64_t j = 0; j < at.nj; j += WIDTH<T>) {
      Vector<T> all{};
      for (int64_t i = 0; i < at.ni; ++i) all += load(x + i * KEYS + j);
      store(block + j, all);
    }
  }

  // block[j] = sum of x[j][i] over i: WIDTH keys at a time, added up lane by lane, then transposed.
  void add_up_queries(const Block& at, const T* x) {
    constexpr int W = WIDTH<T>;
    alignas(64) T lanes[W * W], turned[W * W];
    const int64_t whole = at.ni / W * W;
    Vector<T> lane{};
    for (int i = 0; i < W; ++i) lane[i] = T(i);
    const Vector<T> end = splat(T(at.ni - whole));
    for (int64_t j = 0; j < at.nj; j += W) {
      for (int64_t r = 0; r < W; ++r) {
        Vector<T> all{};
        const T* const row = x + (j + r) * QUERIES;
        for (int64_t i = 0; j + r < at.nj && i < whole; i += W) all += load(row + i);
        if (j + r < at.nj && whole < at.ni)  // lanes without a query hold anything
          all += lane < end ? load(row + whole) : Vector<T>{};
        store(lanes + r * W, all);
      }
      transpose<T>([&](int r) { return lanes + r * W; }, turned, W);
      Vector<T> all{};
      for (int r = 0; r < W; ++r) all += load(turned + r * W);
      store(block + j, all);
    }
  }
};

}  // namespace ATTN_ISA
}  // namespace attnpool
