// Blocks: up to QUERIES rows of q against up to key_block() rows of k of one (molecule, head). Rows
// are read where they lie (rows.h) or are packed, dense, padded with zeros and of the accumulation
// type T, whatever the tensors hold; the sums are the same. Matrices of pairs are stored
// [key][query], so that the lanes of a vector are queries and row statistics are plain vector
// operations.
#pragma once

#include "../philox.h"
#include "kernels.h"
#include "product.h"
#include "rows.h"
#include "simd.h"
#include "sums.h"

namespace attnpool {
namespace ATTN_ISA {

template <typename T>
ATTN_INLINE int64_t key_block(int64_t widest) {
  const int64_t fit = 32768 / (int64_t(sizeof(T)) * widest) / 4 * 4;
  return smaller(larger(fit, 32), 128);
}

// Equal steps of at most `most` that are multiples of `multiple`; depends on the count only.
ATTN_INLINE int64_t step_of(int64_t count, int64_t most, int64_t multiple) {
  const int64_t steps = larger(1, blocks_of(count, most));
  return larger(multiple, blocks_of(blocks_of(count, steps), multiple) * multiple);
}

// Hands out aligned pieces of a buffer; with a null buffer it only counts.
class Arena {
 public:
  explicit Arena(void* buffer) : base_(static_cast<char*>(buffer)) {}
  template <typename T>
  T* take(int64_t count) {
    char* const piece = base_ + used_;
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64 + 64;  // + 64: no two pieces alias in L1
    return base_ ? reinterpret_cast<T*>(piece) : nullptr;
  }
  template <typename... P>
  void each(int64_t count, P*&... pieces) {
    ((pieces = take<P>(count)), ...);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// One (molecule, head) and the block of pairs at hand.
struct Block {
  int64_t molecule, head;
  Span queries, keys;       // of the molecule
  int64_t i0, j0, ni, nj;   // block, in rows of the molecule
};

// to[nj][QUERIES] = x of the pairs, 0 in lanes without a query. Pairs that bias lacks read as 0.
template <typename T>
void pack_pairs(const AttnParams& a, const View& x, const Block& at, T* to) {
  constexpr int W = WIDTH<T>;
  const Span pairs = pair_span(a, at.molecule);
  const int64_t lanes = whole_vectors<T>(at.ni);
  if (lanes != at.ni)
    for (int64_t j = 0; j < at.nj; ++j)
      store(to + j * QUERIES + lanes - W, Vector<T>{});
  with_stored(a.bias_dtype, [&](auto kind) {
    using S = decltype(kind);
    for (int64_t i = 0; i < at.ni; ++i) {
      const int64_t pair = (at.i0 + i) * at.keys.size + at.j0;
      const int64_t there = smaller(at.nj, pairs.size - pair);
      const S* from = address<S>(x, 0, pairs.first + pair, at.head);
      for (int64_t j = 0; j < there; ++j) to[j * QUERIES + i] = T(widened(from[j * x.row]));
      for (int64_t j = larger(there, 0); j < at.nj; ++j) to[j * QUERIES + i] = 0;
    }
  });
}

template <typename T>
void store_pairs(const AttnParams& a, const T* from, const Block& at, const View& x) {
  const Span pairs = pair_span(a, at.molecule);
  with_stored(a.bias_dtype, [&](auto kind) {
    using S = decltype(kind);
    for (int64_t i = 0; i < at.ni; ++i) {
      const int64_t pair = (at.i0 + i) * at.keys.size + at.j0;
      const int64_t there = smaller(at.nj, pairs.size - pair);
      S* to = address<S>(x, 0, pairs.first + pair, at.head);
      for (int64_t j = 0; j < there; ++j) narrow(from[j * QUERIES + i], to + j * x.row);
    }
  });
}

// f(element) for each key of a block of x [rows, heads], in the type that it is stored in.
template <typename F>
ATTN_INLINE void for_keys(const AttnParams& a, const View& x, const Block& at, F f) {
  with_stored(a.key_bias_dtype, [&](auto kind) {
    using S = decltype(kind);
    S* element = address<S>(x, 0, at.keys.first + at.j0, at.head);
    for (int64_t j = 0; j < at.nj; ++j, element += x.row) f(j, element);
  });
}

// What is added to the logits of a block.
enum class Added { nothing, keys, pairs };

// A finite bias stays finite in units of log 2: masks are often made of the least finite number.
template <typename V, typename T>
ATTN_INLINE V bounded(V x, T) {
  const T infinity = T(__builtin_inf());
  const T most = (sizeof(T) == 8 ? T(__DBL_MAX__) : T(__FLT_MAX__)) / T(2 * LOG2_E);
  if constexpr (sizeof(V) == sizeof(T)) {
    const T high = x > most && x != infinity ? most : x;
    return high < -most && high != -infinity ? -most : high;
  } else {
    const V high = ((x > splat(most)) & (x != splat(infinity))) ? splat(most) : x;
    return ((high < splat(-most)) & (high != splat(-infinity))) ? splat(-most) : high;
  }
}

// to: [nj] of the key bias; or as pack_pairs, together with it, where there is a bias of pairs.
template <typename T>
Added pack_bias(const AttnParams& a, const Block& at, T* to) {
  if (!a.bias.data && !a.key_bias.data) return Added::nothing;
  if (!a.bias.data) {
    for_keys(a, a.key_bias, at, [&](int64_t j, auto* x) { to[j] = bounded(T(widened(*x)), T()); });
    return Added::keys;
  }
  pack_pairs(a, a.bias, at, to);
  for (int64_t j = 0; j < at.nj; ++j)
    for (int64_t x = j * QUERIES; x < j * QUERIES + at.ni; x += WIDTH<T>)
      store(to + x, bounded(load(to + x), T()));
  if (a.key_bias.data)
    for_keys(a, a.key_bias, at, [&](int64_t j, auto* key) {
      const Vector<T> more = splat(bounded(T(widened(*key)), T()));
      for (int64_t x = j * QUERIES; x < j * QUERIES + at.ni; x += WIDTH<T>)
        store(to + x, load(to + x) + more);
    });
  return Added::pairs;
}

template <typename T, Added ADDED>
ATTN_INLINE Vector<T> with_bias(Vector<T> logit, const T* bias, int64_t j, int64_t x) {
  if (ADDED == Added::nothing) return logit;
  const Vector<T> more = ADDED == Added::keys ? splat(bias[j]) : load(bias + j * QUERIES + x);
  return logit + more * T(LOG2_E);
}

// to[nj][QUERIES] = keep factor R of the pairs: 0 or 1 / (1 - dropout).
template <typename T>
void keep_pairs(const AttnParams& a, const Block& at, T* to) {
  const PhiloxKey key = philox_key(*a.seed);
  const T kept = T(a.keep_scale);
  const int64_t lanes = whole_vectors<T>(at.ni);
  uint32_t word[4][QUERIES];
  for (int64_t group = at.j0 / 4; group * 4 < at.j0 + at.nj; ++group) {
    for (int64_t i = 0; i < lanes; ++i) {
      const PhiloxWords words = keep_words(key, at.molecule, at.head, at.i0 + i, group * 4);
      for (int w = 0; w < 4; ++w) word[w][i] = words.word[w];
    }
    for (int w = 0; w < 4; ++w) {
      const int64_t j = group * 4 + w - at.j0;
      if (j < 0 || j >= at.nj) continue;
      for (int64_t i = 0; i < lanes; ++i)
        to[j * QUERIES + i] = word[w][i] >= a.drop_threshold ? kept : T(0);
    }
  }
}

// Rows of one block without a finite logit: P is 0 there, and nothing else of them, not even a NaN,
// may reach a sum.
struct DeadRows {
  bool any;
  bool lane[QUERIES];

  template <typename T>
  void clear_rows(T* rows, int64_t ld, int64_t count) const {
    if (!any) return;
    for (int64_t i = 0; i < count; ++i)
      if (lane[i]) zero(rows + i * ld, ld);
  }
  // f(first, count) for each run of living rows.
  template <typename F>
  void living(int64_t count, F f) const {
    if (!any) return f(int64_t(0), count);
    for (int64_t i = 0, from; i < count; ++i) {
      if (lane[i]) continue;
      for (from = i; i < count && !lane[i];) ++i;
      f(from, i - from);
    }
  }
  template <typename T>
  void clear_pairs(T* pairs, int64_t ni, int64_t nj, T value = 0) const {
    if (!any) return;
    for (int64_t i = 0; i < ni; ++i)
      if (lane[i])
        for (int64_t j = 0; j < nj; ++j) pairs[j * QUERIES + i] = value;
  }
};

// to (+)= factor * x^T y: sums over the keys of a block. x is [nj][QUERIES], y the
// rows of keys, `to` the rows of the molecule's queries; dead rows receive nothing.
template <typename T>
void sum_over_keys(const Block& at, const DeadRows& dead, const T* x, const Place<T>& y,
                   int64_t width, const Place<T>& to, T factor, bool add, Ahead* ahead = nullptr,
                   bool large = false) {
  if (!add)
    for (int64_t i = 0; dead.any && i < at.ni; ++i)
      if (dead.lane[i]) zero(to.row(at.i0 + i), columns_of<T>(width));
  dead.living(at.ni, [&](int64_t i, int64_t count) {
    product_columns<T>({x + i, QUERIES, y.data, y.ld, to.row(at.i0 + i), to.ld, int(count),
                        int(columns_of<T>(width)), int(at.nj), factor, nullptr, add, ahead, large});
  });
}

// to (+)= factor * x y: sums over the queries of a block. x is [nj][QUERIES], y the
// rows of queries.
template <typename T>
void sum_over_queries(const Block& at, const T* x, const Place<T>& y, int64_t width,
                      const Place<T>& to, T factor, bool add, Ahead* ahead = nullptr,
                      bool large = false) {
  product_rows<T>({x, QUERIES, y.data, y.ld, to.data, to.ld, int(at.nj),
                   int(columns_of<T>(width)), int(at.ni), factor, nullptr, add, ahead, large});
}

// to (+)= factor * x y^T of the block, x the rows of keys and y the transposed queries.
template <typename T>
void pair_products(const Block& at, const Place<T>& x, const T* y_t, int64_t width, T* to,
                   T factor, bool add, Ahead* ahead = nullptr) {
  product_rows<T>({x.data, x.ld, y_t, QUERIES, to, QUERIES, int(at.nj),
                   int(whole_vectors<T>(at.ni)), int(width), factor, nullptr, add, ahead});
}

// minus_lse[lanes] = -lse in units of log 2, or -inf in dead rows, so that exp2(s + minus_lse) is 0
// there.
template <typename T>
void read_lse(const View& lse, int64_t molecule, int64_t first, int64_t head, int64_t count,
              T* minus_lse, DeadRows& dead) {
  const T infinity = T(__builtin_inf());
  dead.any = false;
  for (int64_t i = 0; i < count; ++i) {
    const T x = *address<T>(lse, molecule, first + i, head);
    dead.lane[i] = x == -infinity;
    dead.any |= dead.lane[i];
    minus_lse[i] = dead.lane[i] ? x : x * T(-LOG2_E);
  }
  for (int64_t i = count; i < whole_vectors<T>(count); ++i) minus_lse[i] = 0;
}

// Adds the biases to logits p and finds the largest of each query.
template <typename T, Added ADDED>
void add_bias(T* p, const T* bias, int64_t nj, int64_t lanes, T* maxima) {
  for (int64_t x = 0; x < lanes; x += WIDTH<T>) {
    Vector<T> top = splat(-T(__builtin_inf()));
    for (int64_t j = 0; j < nj; ++j) {
      const Vector<T> logit = with_bias<T, ADDED>(load(p + j * QUERIES + x), bias, j, x);
      store(p + j * QUERIES + x, logit);
      top = larger_lanes(logit, top);
    }
    store(maxima + x, top);
  }
}

// (F1) of a block that has all keys of its queries, and the largest logit of each query: weights
// are relative to that and are divided by their sum, because the rounding of a large LSE would spoil
// the cancellations of the derivatives. pairs is scratch for the biases.
template <typename T>
void block_logits(const AttnParams& a, const Block& at, const Place<T>& k, const T* q_t, T* pairs,
                  T* p, T* maxima, Ahead& ahead) {
  const int64_t lanes = whole_vectors<T>(at.ni);
  for (int64_t x = 0; x < lanes; x += WIDTH<T>) store(maxima + x, splat(-T(__builtin_inf())));
  product_rows<T>({k.data, k.ld, q_t, QUERIES, p, QUERIES, int(at.nj), int(lanes), int(a.head_dim),
                   T(a.scale * LOG2_E), nullptr, false, &ahead, false, maxima});
  const Added added = pack_bias(a, at, pairs);
  if (added == Added::keys) add_bias<T, Added::keys>(p, pairs, at.nj, lanes, maxima);
  if (added == Added::pairs) add_bias<T, Added::pairs>(p, pairs, at.nj, lanes, maxima);
}

// What weights 2^(logit - x) are relative to, given the largest logit.
template <typename T>
ATTN_INLINE Vector<T> finite_top(const T* maxima) {
  const Vector<T> top = load(maxima);
  return top == splat(-T(__builtin_inf())) ? Vector<T>{} : top;
}

// What weights are relative to in a block that has some keys of its queries: to the LSE; or, to be
// divided by their sum, to a whole number near it, which is subtracted without any rounding.
enum class Base { lse, whole };

// p: logits (without bias) to weights.
template <typename T, Base BASE, Added ADDED>
void weights_of(T* p, const T* bias, const T* minus_lse, int64_t nj, int64_t lanes) {
  for (int64_t x = 0; x < lanes; x += WIDTH<T>) {
    Vector<T> shift = load(minus_lse + x);
    if (BASE == Base::whole) shift = nearest_whole<T>(shift);
    for (int64_t j = 0; j < nj; ++j) {
      const Vector<T> logit = with_bias<T, ADDED>(load(p + j * QUERIES + x), bias, j, x);
      const Vector<T> power = logit + shift;
      store(p + j * QUERIES + x, BASE == Base::whole
                                     ? exp2<T, true>(power, logit - (power - shift))
                                     : exp2<T>(power));
    }
  }
}

template <typename T, Base BASE>
void weights_with(Added added, T* p, const T* bias, const T* minus_lse, int64_t nj,
                  int64_t lanes) {
  switch (added) {
    case Added::nothing:
      return weights_of<T, BASE, Added::nothing>(p, bias, minus_lse, nj, lanes);
    case Added::keys: return weights_of<T, BASE, Added::keys>(p, bias, minus_lse, nj, lanes);
    default: return weights_of<T, BASE, Added::pairs>(p, bias, minus_lse, nj, lanes);
  }
}

// (F1), (F2) of a block; pairs is scratch for the biases.
template <typename T>
void block_weights(const AttnParams& a, const Block& at, Base base, const Place<T>& k,
                   const T* q_t, const T* minus_lse, T* pairs, T* p) {
  pair_products(at, k, q_t, a.head_dim, p, T(a.scale * LOG2_E), false);
  const Added added = pack_bias(a, at, pairs);
  const auto run = base == Base::lse ? weights_with<T, Base::lse> : weights_with<T, Base::whole>;
  run(added, p, pairs, minus_lse, at.nj, whole_vectors<T>(at.ni));
}

template <typename T>
void read_statistic(const View& x, int64_t molecule, int64_t first, int64_t head, int64_t count,
                    T* to) {
  for (int64_t i = 0; i < count; ++i)
    to[i] = x.data ? *address<T>(x, molecule, first + i, head) : T(0);
  for (int64_t i = count; i < whole_vectors<T>(count); ++i) to[i] = 0;
}

template <typename T>
void write_statistic(const T* from, const View& x, int64_t molecule, int64_t first, int64_t head,
                     int64_t count) {
  for (int64_t i = 0; i < count; ++i) *address<T>(x, molecule, first + i, head) = from[i];
}

}  // namespace ATTN_ISA
}  // namespace attnpool
