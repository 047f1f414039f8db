// Blocks: up to QUERIES rows of q against up to key_block() rows of k of one (molecule, head). Rows
// are read where they lie (rows.h) or are packed, dense, padded with zeros and of the accumulation
// type T, whatever the tensors hold; the sums are the same. How the pairs lie: pairs.h.
#pragma once

#include "kernels.h"
#include "pairs.h"
#include "product.h"
#include "rows.h"
#include "simd.h"
#include "sums.h"

namespace attnpool {
namespace ATTN_ISA {

template <typename T>
ATTN_INLINE int64_t key_block(int64_t widest) {
  const int64_t fit = 32768 / (int64_t(sizeof(T)) * widest) / 4 * 4;
  return smaller(larger(fit, 32), KEYS);
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

// Rows of one side of the products of pairs; turned: the same transposed, of the side whose rows
// are the lanes.
template <typename T>
struct Side {
  Place<T> rows;
  T* turned;
};

// Fills `turned` from rows that were read, if the lanes are these.
template <typename T, LanesAre L, LanesAre SIDE>
ATTN_INLINE void turn(const Side<T>& x, int64_t count, int64_t width, Ahead* ahead = nullptr) {
  if constexpr (L != SIDE) return;
  transpose_rows<T, L == LanesAre::queries ? QUERIES : KEYS>(x.rows.data, x.rows.ld, count,
                                                             columns_of<T>(width), x.turned, ahead);
}

// What is summed over the keys or the queries of a block: pairs x times rows y, and a second such
// product where there is one.
template <typename T>
struct Terms {
  const T* x;
  const Place<T>& y;
  const T* more_x = nullptr;
  const T* more_y = nullptr;
};

// to (+)= factor * x^T y: sums over the keys, y the rows of keys, `to` the rows of the molecule's
// queries; dead rows receive nothing. large: past the caches, unless `to` is a buffer.
template <typename T, LanesAre L>
void sum_over_keys(const Block& at, const DeadRows& dead, const Terms<T>& terms, int64_t width,
                   const Place<T>& to, T factor, bool add, Ahead* ahead = nullptr,
                   bool large = false) {
  if (!add)
    for (int64_t i = 0; dead.any && i < at.ni; ++i)
      if (dead.lane[i]) zero(to.row(at.i0 + i), columns_of<T>(width));
  const auto product = L == LanesAre::queries ? product_columns<T> : product_rows<T>;
  dead.living(at.ni, [&](int64_t i, int64_t count) {
    const int64_t first = pair_at<L>(i, 0);
    product({terms.x + first, L == LanesAre::queries ? QUERIES : KEYS, terms.y.data, terms.y.ld,
             to.row(at.i0 + i), to.ld, int(count), int(columns_of<T>(width)), int(at.nj), factor,
             nullptr, add, ahead, large && to.direct, nullptr,
             terms.more_x ? terms.more_x + first : nullptr, terms.more_y});
  });
}

// to (+)= factor * x y: sums over the queries of a block, y the rows of queries.
template <typename T, LanesAre L>
void sum_over_queries(const Block& at, const Terms<T>& terms, int64_t width, const Place<T>& to,
                      T factor, bool add, Ahead* ahead = nullptr, bool large = false) {
  const auto product = L == LanesAre::queries ? product_rows<T> : product_columns<T>;
  product({terms.x, L == LanesAre::queries ? QUERIES : KEYS, terms.y.data, terms.y.ld, to.data,
           to.ld, int(at.nj), int(columns_of<T>(width)), int(at.ni), factor, nullptr, add, ahead,
           large && to.direct, nullptr, terms.more_x, terms.more_y});
}

// The rows of keys and queries whose products are pairs.
template <typename T>
struct Sides {
  const Side<T>& keys;
  const Side<T>& queries;
};

// to (+)= factor * keys queries^T of the block, and of a second pair of sides where there is one.
// maxima: see product.h, of queries as lanes only.
template <typename T, LanesAre L>
void pair_products(const Block& at, const Sides<T>& x, int64_t width, T* to, T factor, bool add,
                   Ahead* ahead = nullptr, T* maxima = nullptr, const Sides<T>* more = nullptr) {
  if constexpr (L == LanesAre::queries) {
    product_rows<T>({x.keys.rows.data, x.keys.rows.ld, x.queries.turned, QUERIES, to, QUERIES,
                     int(at.nj), int(whole_vectors<T>(at.ni)), int(width), factor, nullptr, add,
                     ahead, false, maxima, more ? more->keys.rows.data : nullptr,
                     more ? more->queries.turned : nullptr});
  } else {
    product_rows<T>({x.queries.rows.data, x.queries.rows.ld, x.keys.turned, KEYS, to, KEYS,
                     int(at.ni), int(whole_vectors<T>(at.nj)), int(width), factor, nullptr, add,
                     ahead, false, nullptr, more ? more->queries.rows.data : nullptr,
                     more ? more->keys.turned : nullptr});
  }
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

// Adds the biases to logits p and finds the largest of each row. Lanes past the last key become
// -inf, and so have no weight.
template <typename T, LanesAre L, Added ADDED>
void add_bias(const Block& at, T* p, const T* bias, T* maxima) {
  const int64_t rows = rows_of_block<T, L>(at), vectors = vectors_of<T, L>(at);
  const Vector<T> none = splat(-T(__builtin_inf()));
  for (int64_t r = 0; r < rows; r += ROWS<T, L>) {
    Vector<T> top = none;
    for (int64_t n = 0; n < vectors; ++n) {
      T* const place = p + vector_at<T, L>(r, n);
      Vector<T> logit = with_bias<T, L, ADDED>(load(place), bias, r, n);
      logit = of_keys<T, L>(at, n, logit, none);
      if (ADDED != Added::nothing || L == LanesAre::keys) store(place, logit);
      top = larger_lanes(logit, top);
    }
    to_rows<L>(maxima + r, largest_of_row<T, L>(top));
  }
}

template <typename T, LanesAre L>
void add_biases(Added added, const Block& at, T* p, const T* bias, T* maxima) {
  switch (added) {
    case Added::nothing: return add_bias<T, L, Added::nothing>(at, p, bias, maxima);
    case Added::keys: return add_bias<T, L, Added::keys>(at, p, bias, maxima);
    default: return add_bias<T, L, Added::pairs>(at, p, bias, maxima);
  }
}

template <typename T>
void forget_maxima(const Block& at, T* maxima) {
  for (int64_t r = 0; r < whole_vectors<T>(at.ni); r += WIDTH<T>)
    store(maxima + r, splat(-T(__builtin_inf())));
}

// Adds the biases to logits of which the largest are known where lanes are queries.
template <typename T, LanesAre L>
void with_biases(const AttnParams& a, const Block& at, T* pairs, T* p, T* maxima) {
  const Added added = pack_bias<T, L>(a, at, pairs);
  if (L == LanesAre::keys || added != Added::nothing) add_biases<T, L>(added, at, p, pairs, maxima);
}

// (F1) of a block that has all keys of its queries, and the largest logit of each query: weights
// are relative to that and are divided by their sum, because the rounding of a large LSE would
// spoil the cancellations of the derivatives. pairs is scratch for the biases.
template <typename T, LanesAre L>
void block_logits(const AttnParams& a, const Block& at, const Side<T>& k, const Side<T>& q,
                  T* pairs, T* p, T* maxima, Ahead& ahead) {
  forget_maxima(at, maxima);
  pair_products<T, L>(at, {k, q}, a.head_dim, p, T(a.scale * LOG2_E), false, &ahead, maxima);
  with_biases<T, L>(a, at, pairs, p, maxima);
}

// What weights 2^(logit - x) are relative to, given the largest logit.
template <typename T>
ATTN_INLINE Vector<T> finite(Vector<T> top) {
  return top == splat(-T(__builtin_inf())) ? Vector<T>{} : top;
}
template <typename T, LanesAre L>
ATTN_INLINE Vector<T> finite_top(const T* maxima) {
  return finite<T>(of_rows<L>(maxima));
}

// What weights are relative to in a block that has some keys of its queries: to the LSE; or, to be
// divided by their sum, to a whole number near it, which is subtracted without any rounding.
enum class Base { lse, whole };

// p: logits (without bias) to weights.
template <typename T, LanesAre L, Base BASE, Added ADDED>
void weights_of(const Block& at, T* p, const T* bias, const T* minus_lse) {
  const int64_t rows = rows_of_block<T, L>(at), vectors = vectors_of<T, L>(at);
  for (int64_t r = 0; r < rows; r += ROWS<T, L>) {
    Vector<T> shift = of_rows<L>(minus_lse + r);
    if (BASE == Base::whole) shift = nearest_whole<T>(shift);
    for (int64_t n = 0; n < vectors; ++n) {
      T* const place = p + vector_at<T, L>(r, n);
      const Vector<T> logit = with_bias<T, L, ADDED>(load(place), bias, r, n);
      const Vector<T> power = logit + shift;
      const Vector<T> weight = BASE == Base::whole ? exp2<T, true>(power, logit - (power - shift))
                                                   : exp2<T>(power);
      store(place, of_keys<T, L>(at, n, weight, Vector<T>{}));
    }
  }
}

template <typename T, LanesAre L, Base BASE>
void weights_with(Added added, const Block& at, T* p, const T* bias, const T* minus_lse) {
  switch (added) {
    case Added::nothing: return weights_of<T, L, BASE, Added::nothing>(at, p, bias, minus_lse);
    case Added::keys: return weights_of<T, L, BASE, Added::keys>(at, p, bias, minus_lse);
    default: return weights_of<T, L, BASE, Added::pairs>(at, p, bias, minus_lse);
  }
}

// (F1), (F2) of a block; pairs is scratch for the biases.
template <typename T, LanesAre L>
void block_weights(const AttnParams& a, const Block& at, Base base, const Side<T>& k,
                   const Side<T>& q, const T* minus_lse, T* pairs, T* p) {
  pair_products<T, L>(at, {k, q}, a.head_dim, p, T(a.scale * LOG2_E), false);
  const Added added = pack_bias<T, L>(a, at, pairs);
  const auto run =
      base == Base::lse ? weights_with<T, L, Base::lse> : weights_with<T, L, Base::whole>;
  run(added, at, p, pairs, minus_lse);
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
